"""What the programs do with next-vector models: train their two stages, evaluate, compare.

reconstruction   the share of a chunk's tokens that the autoencoder gives back, from its mean,
                 from a draw of its posterior, and with as much noise added again
brier            draws held against the text that follows: see `brier_lm`
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
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from continuous_lm import losses
from continuous_lm.errors import InputError
from continuous_lm.experiments.calm import brier_lm
from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.training import fit, run_log, text, window_batches
from continuous_lm.io.atomic_files import absolute_path
from continuous_lm.models import calm, density
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import Autoencoder, AutoencoderConfig
from continuous_lm.models.calm.chunk_inputs import ChunkInputs
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.model import DensityLM
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params
from continuous_lm.models.transformer import Transformer

CODEC_WINDOW_TOKENS = 64  # of a window from which the autoencoder's chunks are cut
NUM_TARGET_DRAWS = 16  # draws of the posterior for each chunk of a training step
NUM_LOSS_WINDOWS, NUM_SCORE_WINDOWS = (
    32,
    128,
)  # held-out windows that a training run takes its loss and scores of


def train_codec(
    codec: LanguageModel[Autoencoder],
    train_data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike,
    config: fit.FitConfig,
    settings: Mapping[str, Any] | None = None,
    label: str = "training",
) -> LanguageModel[Autoencoder]:
    """Trains an autoencoder on the chunks of tokens [n], or goes on with the run in `folder`.

    Args:
      codec: with its first parameters.
      train_data: what to train on.
      held_out: whose reconstruction is logged with each checkpoint.
      folder: of the run; see `training.fit`.
      config: how to train; a row of a batch is a window of 64 tokens, or a little more, and the
        seed is that of the data's order too.
      settings: other settings that must be the same for a run to go on.
      label: of the progress bar.
    """
    codec_config = codec.model.config
    chunk_size = codec_config.chunk_size
    length = -(-CODEC_WINDOW_TOKENS // chunk_size) * chunk_size

    def loss(params, batch, key):
        chunks = batch.reshape(-1, chunk_size)
        nats = autoencoder.chunk_losses(codec_config, params, chunks, key)
        return jnp.mean(nats), {}

    held_out_chunks = _held_out_windows(held_out, length).reshape(-1, chunk_size)
    held_out_share: Callable = jax.jit(
        lambda params: _reconstructed_share(
            codec_config, params, held_out_chunks, jax.random.key(0), 1.0
        )
    )
    params = fit.fit(
        loss,
        codec.params,
        window_batches.shuffled_windows(
            train_data,
            length=length - 1,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        folder=folder,
        config=config,
        settings={"autoencoder": dataclasses.asdict(codec_config), **(settings or {})}
        | {"batch_size": config.batch_size},
        evaluate=lambda params: {"reconstructed": float(held_out_share(params))},
        tokens_per_step=length * config.batch_size,
        label=label,
    )
    return codec.with_params(params)


def train(
    lm: LanguageModel[NextVectorModel],
    train_data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike,
    config: fit.FitConfig,
    length: int,
    settings: Mapping[str, Any] | None = None,
    label: str = "training",
) -> LanguageModel[NextVectorModel]:
    """Trains a next-vector model on tokens [n], its autoencoder frozen, or goes on with a run.

    Args:
      lm: the model with its first parameters.
      train_data: what to train on.
      held_out: what the loss is logged of, with each checkpoint.
      folder: of the run; see `training.fit`.
      config: how to train; its seed is that of the data's order too.
      length: chunks that are read in a sequence.
      settings: other settings that must be the same for a run to go on.
      label: of the progress bar.
    """
    model = lm.model
    chunk_size = model.chunk_size
    window_tokens = chunk_size * (length + 1)

    def loss(params, batch, key):
        inputs = ChunkInputs(batch.reshape(*batch.shape[:-1], -1, chunk_size))
        return jnp.mean(model.loss(params, inputs, key)), {}

    loss_windows, score_windows = (
        _held_out_windows(held_out, window_tokens, limit)
        for limit in (NUM_LOSS_WINDOWS, NUM_SCORE_WINDOWS)
    )
    held_out_loss: Callable = jax.jit(
        lambda params: loss(params, loss_windows, jax.random.key(0))[0]
    )

    @jax.jit
    def draws_and_reference(params):
        """Two chunks for each of many held-out ones, and these: [2, B, T, C] and [B, T, C]."""
        chunks = score_windows.reshape(len(score_windows), -1, chunk_size)
        hidden = model.context_states(params, ChunkInputs(jnp.asarray(chunks)))
        draws = model.sample_chunks(params, jax.random.key(0), hidden, 2)
        return draws, chunks[:, 1:]

    def evaluate(params):
        (first, second), reference = draws_and_reference(params)
        orders = [n for n in brier_lm.NGRAM_LENGTHS if n <= chunk_size]
        scores = {
            f"brier_{n}": float(
                jnp.mean(
                    losses.brier_n(
                        first[..., :n], second[..., :n], reference[..., :n], n=n
                    )
                )
            )
            for n in orders
        }
        return {"held_out": float(held_out_loss(params)), **scores}

    params = fit.fit(
        loss,
        lm.params,
        window_batches.shuffled_windows(
            train_data,
            length=window_tokens - 1,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        folder=folder,
        config=config,
        is_frozen=lambda path: path.startswith("autoencoder/"),
        settings={
            "length": length,
            "batch_size": config.batch_size,
            **(settings or {}),
        },
        evaluate=evaluate,
        tokens_per_step=length * chunk_size * config.batch_size,
        label=label,
    )
    return lm.with_params(params)


def _held_out_windows(
    tokens: np.ndarray, length: int, limit: int = NUM_LOSS_WINDOWS
) -> np.ndarray:
    """Held-out windows of so many tokens, [k, length]."""
    return window_batches.consecutive_windows(
        tokens, length=length - 1, max_windows=limit
    )


def _reconstructed_share(
    codec_config: AutoencoderConfig,
    params: Params,
    chunks: ArrayLike,
    key: jax.Array,
    noise_factor: float,
) -> jax.Array:
    """Share of tokens recovered from latents with `noise_factor` times the posterior's noise."""
    mean, log_scale = autoencoder.encode_chunks(codec_config, params, chunks)
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    latents = mean + noise_factor * jnp.exp(log_scale) * noise
    tokens = autoencoder.decode_tokens(codec_config, params, latents)
    return jnp.mean(tokens == chunks)


def reconstruction_shares(
    codec: LanguageModel[Autoencoder], tokens: np.ndarray, *, seed: int = 0
) -> dict[str, float]:
    """Shares of the tokens [n] that come back: from the mean, from a draw, and with noise again.

    "noisy" is a draw to which noise of the posterior's own scale is added once more.
    """
    codec_config = codec.model.config
    chunk_size = codec_config.chunk_size
    window_batches.check_length(tokens, chunk_size - 1, "the held-out data")
    chunks = np.asarray(tokens[: len(tokens) // chunk_size * chunk_size]).reshape(
        -1, chunk_size
    )
    jitted_share = jax.jit(_reconstructed_share, static_argnums=0)
    shares: dict[str, list[float]] = {"mean": [], "sampled": [], "noisy": []}
    chunk_batches = np.array_split(chunks, -(-len(chunks) // 4096))
    for i, chunk_batch in enumerate(chunk_batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for name, noise_factor in {
            "mean": 0.0,
            "sampled": 1.0,
            "noisy": 2**0.5,
        }.items():
            shares[name].append(
                float(
                    jitted_share(
                        codec_config, codec.params, chunk_batch, key, noise_factor
                    )
                )
            )
    batch_sizes = [len(chunk_batch) for chunk_batch in chunk_batches]
    return {
        name: float(np.average(batch_shares, weights=batch_sizes))
        for name, batch_shares in shares.items()
    }


def evaluation_positions(
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
    window_length = context + brier_lm.CONTINUATION_LENGTH
    window_batches.check_length(held_out, window_length - 1, "the held-out data")
    starts = np.arange(0, len(held_out) - window_length + 1, stride)
    if limit < len(starts):
        starts = starts[np.arange(limit) * len(starts) // limit]
    starts = np.random.default_rng(seed).permutation(starts)
    windows = np.asarray(held_out)[starts[:, None] + np.arange(window_length)]
    return windows[:, :context], windows[:, context:], starts // window_length


def draw_continuations(
    lm: LanguageModel[NextVectorModel] | DensityLM,
    contexts: np.ndarray,
    key: jax.Array,
    *,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Two independent continuations of 4 tokens of each context, int [n, 4] each.

    A model whose chunks are shorter goes on from its own draws; of a longer chunk 4 tokens count.
    """
    token_batches = []
    batch_size = min(batch_size, len(contexts))
    for i in range(0, len(contexts), batch_size):
        batch_contexts = contexts[
            np.minimum(np.arange(i, i + batch_size), len(contexts) - 1)
        ]
        repeated_contexts, batch_key = (
            np.concatenate([batch_contexts, batch_contexts]),
            jax.random.fold_in(key, i),
        )
        generated: Any
        if isinstance(lm.model, NextVectorModel):
            generated = calm.sample(
                lm,
                repeated_contexts,
                max_new_tokens=brier_lm.CONTINUATION_LENGTH,
                key=batch_key,
                stop=(),
            )
        else:
            generated = density.sample(
                lm,
                repeated_contexts,
                max_new_items=brier_lm.CONTINUATION_LENGTH,
                key=batch_key,
                stop=(),
                quantize="renormalised",
            )
        token_batches.append(generated.tokens.reshape(2, batch_size, -1))
    first, second = np.concatenate(token_batches, axis=1)[:, : len(contexts)]
    return first, second


def evaluate_brier_lm(
    lm: LanguageModel[NextVectorModel] | DensityLM,
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
      context: of `evaluation_positions`, and
      stride: of `evaluation_positions`, and
      limit: of `evaluation_positions`.
      seed: of positions, draws and the bootstrap.

    Returns:
      "sampled", "shuffled" (the same draws held against the text after other contexts) and, for
      ordinary language models, "closed", each as `brier_lm.brier_lm_from_samples` has it.
    """
    contexts, reference, groups = evaluation_positions(
        held_out, context=context, stride=stride, limit=limit, seed=seed
    )
    key = jax.random.key(seed)
    first, second = draw_continuations(lm, contexts, key)
    shuffled_order = np.roll(
        np.arange(len(first)), 1
    )  # positions come in an order of chance
    results = {
        "sampled": brier_lm.brier_lm_from_samples(
            first, second, reference, groups=groups, seed=seed
        ),
        "shuffled": brier_lm.brier_lm_from_samples(
            first[shuffled_order],
            second[shuffled_order],
            reference,
            groups=groups,
            seed=seed,
        ),
    }
    if (
        isinstance(lm, DensityLM)
        and lm.model.predicts_tokens
        and getattr(lm.model.head, "tied", False)
    ):
        language_model = LanguageModel(
            Transformer(lm.config), lm.params["trunk"], lm.tokenizer, lm.hf_fields
        )
        results["closed"] = brier_lm.brier_lm_from_model(
            language_model,
            contexts,
            (first, second),
            reference,
            groups=groups,
            seed=seed,
        )
    return results


def evaluate_autoencoder(
    lm: LanguageModel[NextVectorModel], held_out: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """What is known of a next-vector model beside its scores."""
    return {
        "chunk_size": lm.model.chunk_size,
        "latent_size": lm.model.autoencoder_config.latent_size,
        "reconstruction": reconstruction_shares(
            calm.autoencoder_of(lm), held_out, seed=seed
        ),
    }


def interpolate_texts(
    codec: LanguageModel[Autoencoder],
    first: list[int],
    second: list[int],
    num_points: int = 5,
) -> list[list[int]]:
    """Tokens at points on the line between the latents of two texts, from the first to the second.

    Each chunk of the one goes to that in its place in the other; what is longer is cut.

    Args:
      codec: the autoencoder.
      first: tokens, at least a chunk of them.
      second: tokens.
      num_points: how many, the ends among them.
    """
    chunk_size = codec.model.config.chunk_size
    num_tokens = min(len(first), len(second)) // chunk_size * chunk_size
    if not num_tokens:
        raise InputError(
            f"a text to go between has less than the {chunk_size} tokens of a chunk"
        )
    end_latents = [
        autoencoder.encode(codec, np.reshape(tokens[:num_tokens], (-1, chunk_size)))[0]
        for tokens in (first, second)
    ]
    fractions = jnp.linspace(0.0, 1.0, num_points)[:, None, None]
    latents = (1 - fractions) * end_latents[0] + fractions * end_latents[1]
    logits = autoencoder.decode(codec, latents)
    return [
        row.tolist()
        for row in np.asarray(jnp.argmax(logits, -1)).reshape(num_points, num_tokens)
    ]


def plot_learning_curves(folders: Mapping[str, str | os.PathLike]) -> Figure | None:
    """Brier-1 of held-out text against the seconds of training, of runs that logged it.

    Args:
      folders: label -> folder that the program train wrote.
    """
    curve_by_label = {}
    for label, folder in folders.items():
        run_folder_path = absolute_path(folder) / "run"
        log_paths = [
            run_folder_path / name
            for name in (run_log.METRICS_FILE, run_log.SPEED_FILE)
        ]
        if all(log.is_file() for log in log_paths):
            metrics, speed = (
                [json.loads(line) for line in log.open()] for log in log_paths
            )
            seconds = dict(
                zip(
                    [speed_record["step"] for speed_record in speed],
                    _elapsed_seconds(speed),
                    strict=True,
                )
            )
            curve_points = [
                (seconds[record["step"]], record["brier_1"])
                for record in metrics
                if "brier_1" in record
            ]
            if curve_points:
                curve_by_label[label] = np.array(curve_points).T
    if not curve_by_label:
        return None
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        axes.axhline(0, color="0.75", lw=0.7, zorder=0)
        for (label, (x, y)), color in zip(
            curve_by_label.items(), itertools.cycle(plots.COLOURS)
        ):
            axes.plot(x, y, color=color, marker="o", ms=2.5, label=label)
        axes.set(
            xlabel="seconds of training (autoencoders aside)",
            ylabel="Brier-1 of held-out text",
        )
        axes.legend(frameon=False, fontsize=8)
    return figure


def _elapsed_seconds(speed: list[dict[str, float]]) -> np.ndarray:
    """Seconds from the start, a dispatch that compiled (or was held up) counted as the median."""
    seconds = np.array([record["seconds"] for record in speed])
    median_seconds = np.median(seconds)
    return np.cumsum(np.where(seconds > 3 * median_seconds, median_seconds, seconds))


def make_tables(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """BrierLM of all models, and reconstruction of those with an autoencoder."""

    def format_interval(numbers: dict[str, Any], places: int = 4) -> str:
        return "{value:.{p}f} ({low:.{p}f} to {high:.{p}f})".format(**numbers, p=places)

    draw_kinds = ("sampled", "shuffled", "closed")
    rows: list[list[Any]] = []
    for model, metrics in results.items():
        for draw_kind in [
            draw_kind
            for draw_kind in draw_kinds
            if draw_kind in metrics.get("brier", {})
        ]:
            brier_scores = metrics["brier"][draw_kind]
            scores = [
                format_interval(brier_scores[f"brier_{n}"])
                for n in brier_lm.NGRAM_LENGTHS
            ]
            chunk_size = metrics.get("chunk_size", 1)
            rows.append(
                [
                    model,
                    draw_kind,
                    chunk_size,
                    metrics["parameters"],
                    *scores,
                    format_interval(brier_scores["brier_lm"], 2),
                ]
            )
    brier_table = tables.Table(
        "brier",
        "Brier-n of continuations drawn at held-out positions, and BrierLM (95 % intervals), of K"
        " tokens a step; with the text after other contexts; in closed form. More is better",
        [
            tables.Column("model"),
            tables.Column("draws"),
            tables.Column("K", format="d"),
            tables.Column("parameters", format=",d"),
            *[tables.Column(f"Brier-{n}") for n in brier_lm.NGRAM_LENGTHS],
            tables.Column("BrierLM"),
        ],
        rows,
    )
    models_with_codec = [
        (model, metrics)
        for model, metrics in results.items()
        if "reconstruction" in metrics
    ]
    reconstruction_table = tables.Table(
        "reconstruction",
        "Tokens that the autoencoder gives back: from the mean, from a draw, with its noise again",
        [
            tables.Column("model"),
            tables.Column("K", format="d"),
            tables.Column("width", format="d"),
            *[
                tables.Column(name, format=".2%")
                for name in ("mean", "sampled", "noisy")
            ],
        ],
        [
            [model, n["chunk_size"], n["latent_size"], *n["reconstruction"].values()]
            for model, n in models_with_codec
        ],
    )
    return ([brier_table] if rows else []) + (
        [reconstruction_table] if models_with_codec else []
    )


def create_codec(
    key: jax.Array,
    *,
    vocab_size: int,
    hidden_size: int,
    chunk_size: int,
    tokenizer: Any = None,
    **sizes: Any,
) -> LanguageModel[Autoencoder]:
    """An autoencoder whose MLPs are 8/3 times as wide as it is, in steps of 32, unless `sizes` say.

    Raises:
      InputError: for a setting that `AutoencoderConfig` does not have, or of another type.
    """
    setting_names = [field.name for field in dataclasses.fields(AutoencoderConfig)]
    for name in sorted(set(sizes) - set(setting_names)):
        raise InputError(
            f"an autoencoder has no setting {name!r}; it has {', '.join(setting_names)}"
        )
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "chunk_size": chunk_size,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "mlp_size": -(-8 * hidden_size // 96) * 32,
    }
    hf_fields = (
        {} if tokenizer is None else {"eos_token_id": text.end_of_text_id(tokenizer)}
    )
    return autoencoder.create(
        key, AutoencoderConfig(**(settings | sizes)), tokenizer, hf_fields
    )
