"""Evaluation of next-vector models, and BrierLM of models of any kind at the same positions.

reconstruction   the share of a chunk's tokens that the autoencoder gives back, from its mean,
                 from a draw of its posterior, and with as much noise added again
brier            draws scored against the text that follows: see `brier_lm`
shuffled         the same draws scored against the text that follows other contexts
"""

import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from continuous_lm.errors import InputError
from continuous_lm.experiments.calm import brier_lm
from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.training import run_log, train_program, window_batches
from continuous_lm.io.atomic_files import absolute_path
from continuous_lm.models import calm, density
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import Autoencoder, AutoencoderConfig
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params
from continuous_lm.models.samplers import Temperature
from continuous_lm.models.transformer import Transformer

CHUNKS_PER_BATCH = 4096
# Standard deviations of the noise around the posterior's mean, in units of the posterior's own.
NOISE_FACTORS = {"mean": 0.0, "sampled": 1.0, "noisy": 2**0.5}
DRAW_KINDS = ("sampled", "shuffled", "closed")

Interval = Mapping[str, float]  # "value", "low", "high"


# --- Reconstruction -------------------------------------------------------------------------------


def reconstructed_share(
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
    decoded_tokens = autoencoder.decode_tokens(codec_config, params, latents)
    return jnp.mean(decoded_tokens == chunks)


def reconstruction_shares(
    codec: LanguageModel[Autoencoder], tokens: np.ndarray, *, seed: int = 0
) -> dict[str, float]:
    """Shares of the tokens [n] that come back: from the mean, from a draw, and with noise again.

    "noisy" is a draw to which noise of the posterior's own scale is added once more.
    """
    chunk_size = codec.model.config.chunk_size
    window_batches.check_length(tokens, chunk_size - 1, "the held-out data")
    num_tokens = len(tokens) // chunk_size * chunk_size
    chunks = np.asarray(tokens[:num_tokens]).reshape(-1, chunk_size)
    chunk_batches = np.array_split(chunks, -(-len(chunks) // CHUNKS_PER_BATCH))
    jitted_share = jax.jit(reconstructed_share, static_argnums=0)
    shares: dict[str, list[float]] = {name: [] for name in NOISE_FACTORS}
    for i, chunk_batch in enumerate(chunk_batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        for name, noise_factor in NOISE_FACTORS.items():
            share = jitted_share(
                codec.model.config, codec.params, chunk_batch, key, noise_factor
            )
            shares[name].append(float(share))
    batch_sizes = [len(chunk_batch) for chunk_batch in chunk_batches]
    return {
        name: float(np.average(batch_shares, weights=batch_sizes))
        for name, batch_shares in shares.items()
    }


def evaluate_autoencoder(
    lm: LanguageModel[NextVectorModel], held_out: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """Numbers of a next-vector model beside its scores: its sizes and reconstruction."""
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
    """Decode points on the line between the latents of two texts, from the first to the second.

    Chunk i of the first text moves to chunk i of the second; the longer text is cut.

    Args:
      codec: the autoencoder.
      first: tokens, at least one chunk.
      second: tokens, at least one chunk.
      num_points: number of points, with both ends.
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


# --- BrierLM --------------------------------------------------------------------------------------


def evaluation_positions(
    held_out: np.ndarray, *, context: int, stride: int, limit: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select the positions of a comparison: contexts and their next tokens.

    Args:
      held_out: tokens [m].
      context: number of tokens before each position.
      stride: tokens from one position to the next.
      limit: largest number of positions, spread over the text.
      seed: seed of their random order.

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
    lm: LanguageModel[NextVectorModel] | LanguageModel[DensityModel],
    contexts: np.ndarray,
    key: jax.Array,
    *,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two independent continuations of 4 tokens of each context, int [n, 4] each.

    A model with shorter chunks continues from its own draws; longer chunks are cut to 4 tokens.
    """
    batch_size = min(batch_size, len(contexts))
    token_batches = []
    for start in range(0, len(contexts), batch_size):
        # The last batch is filled up, so that there is one program.
        batch_indices = np.minimum(
            np.arange(start, start + batch_size), len(contexts) - 1
        )
        batch_contexts = contexts[batch_indices]
        tokens = _draw_tokens(
            lm,
            np.concatenate([batch_contexts, batch_contexts]),
            jax.random.fold_in(key, start),
        )
        token_batches.append(tokens.reshape(2, batch_size, -1))
    first, second = np.concatenate(token_batches, axis=1)[:, : len(contexts)]
    return first, second


def _draw_tokens(
    lm: LanguageModel[NextVectorModel] | LanguageModel[DensityModel],
    contexts: np.ndarray,
    key: jax.Array,
) -> np.ndarray:
    """A continuation of each context, int [n, 4]; no token ends it."""
    # A density is renormalised over the table, which makes logits of it.
    is_next_vector = isinstance(lm.model, NextVectorModel)
    return generate(
        lm,
        contexts,
        sampler=calm.Repetition() if is_next_vector else Temperature(),
        max_new_tokens=brier_lm.CONTINUATION_LENGTH,
        key=key,
        stop=(),
    ).tokens


def evaluate_brier_lm(
    lm: LanguageModel[NextVectorModel] | LanguageModel[DensityModel],
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
      context: as in `evaluation_positions`.
      stride: as in `evaluation_positions`.
      limit: as in `evaluation_positions`.
      seed: seed of positions, draws and the bootstrap.

    Returns:
      "sampled", "shuffled" (the same draws scored against the text after other contexts) and, for
      ordinary language models, "closed", each as `brier_lm.brier_lm_from_samples` has it.
    """
    contexts, reference, groups = evaluation_positions(
        held_out, context=context, stride=stride, limit=limit, seed=seed
    )
    first, second = draw_continuations(lm, contexts, jax.random.key(seed))
    # Positions come in an order of chance: the one before is another context.
    shuffled_order = np.roll(np.arange(len(first)), 1)
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
    language_model = _as_language_model(lm)
    if language_model is not None:
        results["closed"] = brier_lm.brier_lm_from_model(
            language_model,
            contexts,
            (first, second),
            reference,
            groups=groups,
            seed=seed,
        )
    return results


def _as_language_model(
    lm: LanguageModel[NextVectorModel] | LanguageModel[DensityModel],
) -> LanguageModel[Transformer] | None:
    """The ordinary language model that a tied token head makes of a trunk; None for others."""
    if not isinstance(lm.model, DensityModel) or not lm.model.is_trunks_own:
        return None
    return density.trunk_of(lm)


# --- Tables and figures ---------------------------------------------------------------------------


def make_tables(results: Mapping[str, Mapping[str, Any]]) -> list[tables.Table]:
    """BrierLM of all models, and reconstruction of those with an autoencoder; empty ones go."""
    all_tables = [make_brier_table(results), make_reconstruction_table(results)]
    return [table for table in all_tables if table.rows]


def make_brier_table(results: Mapping[str, Mapping[str, Any]]) -> tables.Table:
    """A row for each model and kind of draws."""
    rows: list[list[tables.Cell]] = []
    for model, metrics in results.items():
        brier_by_kind = metrics.get("brier", {})
        for draw_kind in DRAW_KINDS:
            if draw_kind not in brier_by_kind:
                continue
            scores = brier_by_kind[draw_kind]
            rows.append(
                [
                    model,
                    draw_kind,
                    metrics.get("chunk_size", 1),
                    metrics["parameters"],
                    *(
                        _format_interval(scores[f"brier_{n}"], 4)
                        for n in brier_lm.NGRAM_LENGTHS
                    ),
                    _format_interval(scores["brier_lm"], 2),
                ]
            )
    columns = [
        tables.Column("model"),
        tables.Column("draws"),
        tables.Column("K", format="d"),
        tables.Column("parameters", format=",d"),
        *(tables.Column(f"Brier-{n}") for n in brier_lm.NGRAM_LENGTHS),
        tables.Column("BrierLM"),
    ]
    return tables.Table(
        "brier",
        "Brier-n of continuations drawn at held-out positions, and BrierLM (95 % intervals), of K"
        " tokens a step; with the text after other contexts; in closed form. More is better",
        columns,
        rows,
    )


def _format_interval(interval: Interval, places: int) -> str:
    value = f"{interval['value']:.{places}f}"
    low = f"{interval['low']:.{places}f}"
    high = f"{interval['high']:.{places}f}"
    return f"{value} ({low} to {high})"


RECONSTRUCTION_TABLE = tables.TableSpec(
    "reconstruction",
    "Tokens that the autoencoder gives back: from the mean, from a draw, with its noise again",
    (
        tables.Column("K", "chunk_size", "d"),
        tables.Column("width", "latent_size", "d"),
        *(
            tables.Column(name, f"reconstruction.{name}", ".2%")
            for name in NOISE_FACTORS
        ),
    ),
)


def make_reconstruction_table(
    results: Mapping[str, Mapping[str, Any]],
) -> tables.Table:
    """A row for each model with an autoencoder."""
    return RECONSTRUCTION_TABLE.fill(
        {
            model: metrics
            for model, metrics in results.items()
            if "reconstruction" in metrics
        }
    )


def plot_learning_curves(
    folders: Mapping[str, str | os.PathLike[str]],
) -> Figure | None:
    """Brier-1 of held-out text against the seconds of training, of runs that logged it.

    Args:
      folders: label -> folder that a training program wrote.
    """
    curves: dict[str, np.ndarray] = {}
    for label, folder in folders.items():
        curve = _read_learning_curve(absolute_path(folder) / train_program.RUN_FOLDER)
        if curve is not None:
            curves[label] = curve
    if not curves:
        return None
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        axes.axhline(0, color="0.75", lw=0.7, zorder=0)
        colors = itertools.cycle(plots.COLOURS)
        for (label, (seconds, scores)), color in zip(
            curves.items(), colors, strict=False
        ):
            axes.plot(seconds, scores, color=color, marker="o", ms=2.5, label=label)
        axes.set(
            xlabel="seconds of training (autoencoders aside)",
            ylabel="Brier-1 of held-out text",
        )
        axes.legend(frameon=False, fontsize=8)
    return figure


def _read_learning_curve(run_folder: pathlib.Path) -> np.ndarray | None:
    """Seconds and Brier-1 [2, n] of a run; None if it logged none."""
    metrics_path = run_folder / run_log.METRICS_FILE
    speed_path = run_folder / run_log.SPEED_FILE
    if not metrics_path.is_file() or not speed_path.is_file():
        return None
    speed_records = _read_json_lines(speed_path)
    steps = [record["step"] for record in speed_records]
    elapsed_by_step = dict(zip(steps, _elapsed_seconds(speed_records), strict=True))
    curve_points = [
        (elapsed_by_step[record["step"]], record["brier_1"])
        for record in _read_json_lines(metrics_path)
        if "brier_1" in record
    ]
    return np.array(curve_points).T if curve_points else None


def _read_json_lines(path: pathlib.Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _elapsed_seconds(speed_records: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Seconds from the start, a dispatch that compiled (or was held up) counted as the median."""
    seconds = np.array([record["seconds"] for record in speed_records])
    median_seconds = np.median(seconds)
    return np.cumsum(np.where(seconds > 3 * median_seconds, median_seconds, seconds))
