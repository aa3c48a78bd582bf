"""What the calm_* programs do with next-vector models: train their two stages, judge, compare.

reconstruction   the share of a chunk's tokens that the autoencoder gives back, from its mean,
                 from a draw of its posterior, and with as much noise added again
brier            draws held against the text that follows: see `brier`
shuffled         the same draws held against the text that follows other contexts
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from continuous_lm import losses
from continuous_lm.errors import InputError
from continuous_lm.experiments.calm import brier_lm
from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.training import fit, run_folder, text, window_batches
from continuous_lm.io.atomic_files import as_path
from continuous_lm.models import calm, density
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import AutoencoderConfig, Codec
from continuous_lm.models.calm.checkpoint import NextVectorLM
from continuous_lm.models.density.model import DensityLM
from continuous_lm.models.language_model import LanguageModel

TOKENS = 64  # of a window from which the autoencoder's chunks are cut
TARGETS = 16  # draws of the posterior for each chunk of a training step
EVALUATED, SCORED = 32, 128  # held-out windows that a training run takes its loss and scores of


def train_codec(
    codec: Codec,
    data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike,
    batch_size: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Codec:
    """Trains an autoencoder on the chunks of tokens [n], or goes on with the run in `folder`.

    Args:
      codec: with its first parameters.
      data: what to train on.
      held_out: whose reconstruction is logged with each checkpoint.
      folder: of the run; see `training`.
      batch_size: windows of 64 tokens, or a little more, in a step.
      seed: of the data's order, and of the keys.
      settings: what else must be the same for a run to go on.
      **options: of `training.fit`.
    """
    size, model = codec.config.chunk_size, codec.model
    length = -(-TOKENS // size) * size

    def loss(params, batch, key):
        nats: Any = model.apply({"params": params}, batch.reshape(-1, size), key, method="loss")
        return jnp.mean(nats), {}

    watched = _windows(held_out, length).reshape(-1, size)
    judge: Callable = jax.jit(lambda params: _share(model, params, watched, jax.random.key(0), 1.0))
    params = fit.fit(
        loss,
        codec.params,
        window_batches.shuffled(data, length=length - 1, batch_size=batch_size, seed=seed),
        folder=folder,
        settings={"autoencoder": dataclasses.asdict(codec.config), **(settings or {})}
        | {"batch_size": batch_size},
        evaluate=lambda params: {"reconstructed": float(judge(params))},
        tokens_per_step=length * batch_size,
        seed=seed,
        **options,
    )
    return Codec(codec.config, params, codec.tokenizer, codec.notes)


def train(
    lm: NextVectorLM,
    data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike,
    length: int,
    batch_size: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> NextVectorLM:
    """Trains a next-vector model on tokens [n], its autoencoder frozen, or goes on with a run.

    Args:
      lm: the model with its first parameters.
      data: what to train on.
      held_out: what the loss is logged of, with each checkpoint.
      folder: of the run; see `training`.
      length: chunks that are read in a sequence.
      batch_size: sequences in a step.
      seed: of the data's order, and of the keys.
      settings: what else must be the same for a run to go on.
      **options: of `training.fit`.
    """
    model, size = lm.model, lm.chunk_size
    tokens = size * (length + 1)

    def loss(params, batch, key):
        chunks = batch.reshape(*batch.shape[:-1], -1, size)
        score: Any = model.apply({"params": params}, chunks, key, method="loss")
        return jnp.mean(score), {}

    watched, many = (_windows(held_out, tokens, limit) for limit in (EVALUATED, SCORED))
    judge: Callable = jax.jit(lambda params: loss(params, watched, jax.random.key(0))[0])

    @jax.jit
    def drawn(params):
        """Two chunks for each of many held-out ones, and these: [2, B, T, O] and [B, T, O]."""
        chunks = many.reshape(len(many), -1, size)
        variables: Any = {"params": params}
        hidden: Any = model.apply(variables, chunks, method="predictions")
        key = jax.random.key(0)
        return model.apply(variables, key, hidden, 2, method="draws"), chunks[:, 1:]

    def evaluate(params):
        (first, second), reference = drawn(params)
        orders = [n for n in brier_lm.ORDERS if n <= size]
        scores = {
            f"brier_{n}": float(
                jnp.mean(losses.brier_n(first[..., :n], second[..., :n], reference[..., :n], n=n))
            )
            for n in orders
        }
        return {"held_out": float(judge(params)), **scores}

    params = fit.fit(
        loss,
        lm.params,
        window_batches.shuffled(data, length=tokens - 1, batch_size=batch_size, seed=seed),
        folder=folder,
        frozen=lambda path: path.startswith("autoencoder/"),
        settings={"length": length, "batch_size": batch_size, **(settings or {})},
        evaluate=evaluate,
        tokens_per_step=length * size * batch_size,
        seed=seed,
        **options,
    )
    return dataclasses.replace(lm, params=params)


def _windows(tokens: np.ndarray, length: int, limit: int = EVALUATED) -> np.ndarray:
    """Held-out windows of so many tokens, [k, length]."""
    return window_batches.consecutive(tokens, length=length - 1, limit=limit)


def _share(model, params, chunks, key, factor) -> jax.Array:
    """The share of tokens that come back from latents with `factor` times the posterior's noise."""
    variables = {"params": params}
    mean, log_scale = model.apply(variables, chunks, method="encode")
    z = mean + factor * jnp.exp(log_scale) * jax.random.normal(key, mean.shape, mean.dtype)
    return jnp.mean(model.apply(variables, z, method="tokens") == chunks)


def reconstruction(codec: Codec, tokens: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """Shares of the tokens [n] that come back: from the mean, from a draw, and with noise again.

    "noisy" is a draw to which noise of the posterior's own scale is added once more.
    """
    size = codec.config.chunk_size
    window_batches.check_length(tokens, size - 1, "the held-out data")
    chunks = np.asarray(tokens[: len(tokens) // size * size]).reshape(-1, size)
    share = jax.jit(_share, static_argnums=0)
    found: dict[str, list[float]] = {"mean": [], "sampled": [], "noisy": []}
    parts = np.array_split(chunks, -(-len(chunks) // 4096))
    for i, part in enumerate(parts):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for name, factor in {"mean": 0.0, "sampled": 1.0, "noisy": 2**0.5}.items():
            found[name].append(float(share(codec.model, codec.params, part, key, factor)))
    sizes = [len(part) for part in parts]
    return {name: float(np.average(values, weights=sizes)) for name, values in found.items()}


def positions(
    held_out: np.ndarray, *, context: int, stride: int, limit: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where models are held against each other: contexts and what follows them.

    Args:
      held_out: tokens [m].
      context: tokens before each position.
      stride: from one position to the next.
      limit: at most so many, spread over the text.
      seed: of their order, which is one of chance.

    Returns:
      contexts int [n, context], references int [n, 4], and groups int [n]: the positions whose
      contexts begin within the same stretch of the text.
    """
    size = context + brier_lm.TOKENS
    window_batches.check_length(held_out, size - 1, "the held-out data")
    begins = np.arange(0, len(held_out) - size + 1, stride)
    if limit < len(begins):
        begins = begins[np.arange(limit) * len(begins) // limit]
    begins = np.random.default_rng(seed).permutation(begins)
    windows = np.asarray(held_out)[begins[:, None] + np.arange(size)]
    return windows[:, :context], windows[:, context:], begins // size


def continuations(
    lm: NextVectorLM | DensityLM, contexts: np.ndarray, key: jax.Array, *, rows: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Two independent continuations of 4 tokens of each context, int [n, 4] each.

    A model whose chunks are shorter goes on from its own draws; of a longer chunk 4 tokens count.
    """
    found = []
    rows = min(rows, len(contexts))
    for i in range(0, len(contexts), rows):
        picked = contexts[np.minimum(np.arange(i, i + rows), len(contexts) - 1)]
        twice, own = np.concatenate([picked, picked]), jax.random.fold_in(key, i)
        new: Any
        if isinstance(lm, NextVectorLM):
            new = calm.sample(lm, twice, max_new_tokens=brier_lm.TOKENS, key=own, stop=())
        else:
            new = density.sample(
                lm, twice, max_new=brier_lm.TOKENS, key=own, stop=(), quantize="renormalised"
            )
        found.append(new.tokens.reshape(2, rows, -1))
    first, second = np.concatenate(found, axis=1)[:, : len(contexts)]
    return first, second


def score(
    lm: NextVectorLM | DensityLM,
    held_out: np.ndarray,
    *,
    context: int,
    stride: int,
    limit: int,
    seed: int = 0,
) -> dict[str, Any]:
    """BrierLM of a model at positions that are the same for all models.

    Args:
      lm: the model.
      held_out: tokens [m].
      context: of `positions`, and
      stride: of `positions`, and
      limit: of `positions`.
      seed: of positions, draws and the bootstrap.

    Returns:
      "sampled", "shuffled" (the same draws held against the text after other contexts) and, for
      ordinary language models, "closed", each as `brier.judge` has it.
    """
    contexts, reference, groups = positions(
        held_out, context=context, stride=stride, limit=limit, seed=seed
    )
    key = jax.random.key(seed)
    first, second = continuations(lm, contexts, key)
    other = np.roll(np.arange(len(first)), 1)  # positions come in an order of chance
    found = {
        "sampled": brier_lm.judge(first, second, reference, groups=groups, seed=seed),
        "shuffled": brier_lm.judge(
            first[other], second[other], reference, groups=groups, seed=seed
        ),
    }
    if isinstance(lm, DensityLM) and lm.model.speaks and getattr(lm.model.head, "tied", False):
        plain = LanguageModel(lm.config, lm.params["trunk"], lm.tokenizer, lm.notes)
        found["closed"] = brier_lm.known(
            plain, contexts, (first, second), reference, groups=groups, seed=seed
        )
    return found


def judge(lm: NextVectorLM, held_out: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """What is known of a next-vector model beside its scores."""
    return {
        "chunk_size": lm.chunk_size,
        "latent_size": lm.model.autoencoder.latent_size,
        "reconstruction": reconstruction(lm.codec, held_out, seed=seed),
    }


def between(codec: Codec, first: list[int], second: list[int], points: int = 5) -> list[list[int]]:
    """Tokens at points on the line between the latents of two texts, from the first to the second.

    Each chunk of the one goes to that in its place in the other; what is longer is cut.

    Args:
      codec: the autoencoder.
      first: tokens, at least a chunk of them.
      second: tokens.
      points: how many, the ends among them.
    """
    size = codec.config.chunk_size
    count = min(len(first), len(second)) // size * size
    if not count:
        raise InputError(f"a text to go between has less than the {size} tokens of a chunk")
    ends = [codec.encode(np.reshape(tokens[:count], (-1, size)))[0] for tokens in (first, second)]
    shares = jnp.linspace(0.0, 1.0, points)[:, None, None]
    logits = codec.decode((1 - shares) * ends[0] + shares * ends[1])
    return [row.tolist() for row in np.asarray(jnp.argmax(logits, -1)).reshape(points, count)]


def curves(folders: Mapping[str, str | os.PathLike]) -> Figure | None:
    """Brier-1 of held-out text against the seconds of training, of runs that logged it.

    Args:
      folders: label -> folder that the program train wrote.
    """
    found = {}
    for label, folder in folders.items():
        run = as_path(folder) / "run"
        logs = [run / name for name in (run_folder.METRICS, run_folder.SPEED)]
        if all(log.is_file() for log in logs):
            metrics, speed = ([json.loads(line) for line in log.open()] for log in logs)
            seconds = dict(zip([s["step"] for s in speed], _spent(speed), strict=True))
            points = [(seconds[m["step"]], m["brier_1"]) for m in metrics if "brier_1" in m]
            if points:
                found[label] = np.array(points).T
    if not found:
        return None
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        axes.axhline(0, color="0.75", lw=0.7, zorder=0)
        for (label, (x, y)), colour in zip(found.items(), itertools.cycle(plots.COLOURS)):
            axes.plot(x, y, color=colour, marker="o", ms=2.5, label=label)
        axes.set(
            xlabel="seconds of training (autoencoders aside)", ylabel="Brier-1 of held-out text"
        )
        axes.legend(frameon=False, fontsize=8)
    return figure


def _spent(speed: list[dict[str, float]]) -> np.ndarray:
    """Seconds from the start, a dispatch that compiled (or was held up) counted as the median."""
    seconds = np.array([s["seconds"] for s in speed])
    middle = np.median(seconds)
    return np.cumsum(np.where(seconds > 3 * middle, middle, seconds))


def tables_of(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """BrierLM of all models, and reconstruction of those with an autoencoder."""

    def shown(numbers: dict[str, Any], places: int = 4) -> str:
        return "{value:.{p}f} ({low:.{p}f} to {high:.{p}f})".format(**numbers, p=places)

    ways = ("sampled", "shuffled", "closed")
    rows: list[list[Any]] = []
    for model, numbers in results.items():
        for way in [way for way in ways if way in numbers.get("brier", {})]:
            found = numbers["brier"][way]
            scores = [shown(found[f"brier_{n}"]) for n in brier_lm.ORDERS]
            size = numbers.get("chunk_size", 1)
            rows.append(
                [model, way, size, numbers["parameters"], *scores, shown(found["brier_lm"], 2)]
            )
    scored = tables.Table(
        "brier",
        "Brier-n of continuations drawn at held-out positions, and BrierLM (95 % intervals), of K"
        " tokens a step; with the text after other contexts; in closed form. More is better",
        [
            tables.Column("model"),
            tables.Column("draws"),
            tables.Column("K", format="d"),
            tables.Column("parameters", format=",d"),
            *[tables.Column(f"Brier-{n}") for n in brier_lm.ORDERS],
            tables.Column("BrierLM"),
        ],
        rows,
    )
    coded = [(model, numbers) for model, numbers in results.items() if "reconstruction" in numbers]
    shares = tables.Table(
        "reconstruction",
        "Tokens that the autoencoder gives back: from the mean, from a draw, with its noise again",
        [
            tables.Column("model"),
            tables.Column("K", format="d"),
            tables.Column("width", format="d"),
            *[tables.Column(name, format=".2%") for name in ("mean", "sampled", "noisy")],
        ],
        [
            [model, n["chunk_size"], n["latent_size"], *n["reconstruction"].values()]
            for model, n in coded
        ],
    )
    return ([scored] if rows else []) + ([shares] if coded else [])


def new_codec(
    key: jax.Array,
    *,
    vocab_size: int,
    hidden_size: int,
    chunk_size: int,
    tokenizer: Any = None,
    **sizes: Any,
) -> Codec:
    """An autoencoder whose MLPs are 8/3 times as wide as it is, in steps of 32, unless `sizes` say.

    Raises:
      InputError: for a setting that `AutoencoderConfig` does not have, or of another type.
    """
    known = [field.name for field in dataclasses.fields(AutoencoderConfig)]
    for name in sorted(set(sizes) - set(known)):
        raise InputError(f"an autoencoder has no setting {name!r}; it has {', '.join(known)}")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "chunk_size": chunk_size,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "mlp_size": -(-8 * hidden_size // 96) * 32,
    }
    notes = {} if tokenizer is None else {"eos_token_id": text.end_of_text(tokenizer)}
    return autoencoder.create(key, AutoencoderConfig(**(settings | sizes)), tokenizer, notes)
