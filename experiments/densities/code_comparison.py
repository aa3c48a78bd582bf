"""Compare maps from a sampled vector to a token on the same samples: accuracy, noise, time.

Three maps search the table: the Euclidean or cosine nearest row, and the nearest few re-ranked by
the density. Vector, residual and finite scalar quantization are fitted to the table's rows; a code
is mapped to its nearest row.

A next-vector model with C tokens a vector has a decoder instead of a table. It decodes the sample
itself, its code of a quantizer fitted to the latents of training chunks, or the nearest of these
latents.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize
from continuous_lm.errors import InputError
from continuous_lm.experiments.common import tables
from continuous_lm.experiments.training import window_batches
from continuous_lm.models import calm
from continuous_lm.models import density as density_lib
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.chunk_inputs import ChunkInputs
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.distributions import Density
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.language_model import LanguageModel

NUM_REPEATS = 5  # of a call whose time is measured
FSQ_GROUP_SIZE = 4  # dimensions whose levels make one finite scalar code
SEARCHES = {"nearest": "euclidean", "cosine": "cosine", "re-ranked": "rerank"}

Coder = Callable[[jax.Array], jax.Array]
Quantizer = Callable[[jax.Array, Density], tuple[jax.Array, jax.Array]]


class Settings(NamedTuple):
    """Settings of the comparison.

    Attributes:
      length: tokens of a window; rounded to chunks for next-vector models.
      windows: largest number of windows.
      seed: seed of samples and codebooks.
      codes: codes of the vector quantizer.
      stages: stages of the residual quantizer.
      levels: levels of each dimension in finite scalar quantization.
      candidates: number of rows to re-rank.
    """

    length: int
    windows: int
    seed: int
    codes: int
    stages: int
    levels: int
    candidates: int = 16


# --- Ways -----------------------------------------------------------------------------------------


def make_quantizers(
    table: dict[str, jax.Array], key: jax.Array, settings: Settings
) -> dict[str, Quantizer]:
    """Name -> (vectors [..., W], their density) to codes' vectors [..., W] and tokens [...]."""
    rows = table["rows"]
    norms = table["norms"]
    if settings.codes > len(rows):
        raise InputError(
            f"--codes={settings.codes}, but the table has {len(rows)} rows"
        )
    _check_groups("vectors", rows.shape[-1])

    def search_quantizer(method: str) -> Quantizer:
        def quantize_to_tokens(x, density):
            if method == "rerank":
                tokens = density_lib.rerank(
                    density, x, rows, settings.candidates, norms=norms
                )
            else:
                tokens = quantize.nearest(x, rows, metric=method, norms=norms).indices
            return rows[tokens], tokens

        return quantize_to_tokens

    def coder_quantizer(code: Coder) -> Quantizer:
        def quantize_to_tokens(x, density):
            vectors = code(x)
            nearest = quantize.nearest(vectors, rows, norms=norms)
            return vectors, nearest.indices

        return quantize_to_tokens

    coders = fit_coders(key, rows, settings)
    return {
        **{name: search_quantizer(method) for name, method in SEARCHES.items()},
        **{name: coder_quantizer(coder) for name, coder in coders.items()},
    }


def _check_groups(what: str, width: int) -> None:
    if width % FSQ_GROUP_SIZE:
        raise InputError(
            f"{what} of width {width} do not fall into groups of {FSQ_GROUP_SIZE}"
        )


def fit_coders(key: jax.Array, rows: jax.Array, settings: Settings) -> dict[str, Coder]:
    """Name -> from vectors [..., W] to the vectors of their codes, fitted to standardised rows."""
    levels = settings.levels
    codebook = quantize.init(key, rows, settings.codes)
    residual_codebooks = quantize.init_residual(
        key, rows, settings.stages, max(settings.codes // settings.stages, 2)
    )
    codes_per_stage = residual_codebooks.codes.shape[1]

    def round_to_levels(x):
        # A level a third of a standard deviation and more: tanh is nearly straight there.
        scale = 0.5 * (levels - 1)
        groups = (x / scale).reshape(*x.shape[:-1], -1, FSQ_GROUP_SIZE)
        vectors = quantize.quantize_finite(groups, (levels,) * FSQ_GROUP_SIZE).vectors
        clipped = jnp.clip(vectors, -1 + 1e-3, 1 - 1e-3)
        return scale * jnp.arctanh(clipped).reshape(x.shape)

    return {
        f"VQ, {settings.codes}": lambda x: quantize.quantize(codebook, x).vectors,
        f"residual VQ, {settings.stages} x {codes_per_stage}": lambda x: (
            quantize.quantize_residual(residual_codebooks, x).vectors
        ),
        f"finite scalar, {levels} levels": round_to_levels,
    }


# --- Rows of a table ------------------------------------------------------------------------------


def compare_quantizers(
    lm: LanguageModel[DensityModel], held_out: np.ndarray, settings: Settings
) -> list[dict[str, Any]]:
    """Each way's numbers: see the top of the module.

    Args:
      lm: a density model that reads tokens.
      held_out: tokens int [m].
      settings: how ways are compared.
    """
    if lm.model.predicts_tokens:
        raise InputError("a token head draws tokens, no vectors; give a density model")
    tokens = window_batches.consecutive_windows(
        held_out, length=settings.length, max_windows=settings.windows
    )
    key, draw_key = jax.random.split(jax.random.key(settings.seed))
    density, x = _draw_next_vectors(lm, tokens, draw_key)
    targets = tokens[:, 1:].reshape(-1)
    rows = density_lib.token_table(lm)
    table = {"rows": rows, "norms": quantize.squared_norms(rows)}
    results = []
    for name, quantizer in make_quantizers(table, key, settings).items():
        jitted_quantizer = jax.jit(quantizer)
        vectors, decoded_tokens = jitted_quantizer(x, density)
        share_kept = None
        if name not in SEARCHES:
            first_density = jax.tree.map(lambda leaf: leaf[:1], density)
            _, own_tokens = quantizer(rows, first_density)
            share_kept = float(jnp.mean(own_tokens == jnp.arange(len(rows))))
        seconds = median_seconds(functools.partial(jitted_quantizer, x, density))
        results.append(
            {
                "way": name,
                "accuracy": float(np.mean(np.asarray(decoded_tokens) == targets)),
                "noise": float(jnp.mean((vectors - x) ** 2)),
                "kept": share_kept,
                "microseconds": 1e6 * seconds / len(targets),
            }
        )
    return results


def _draw_next_vectors(
    lm: LanguageModel[DensityModel], tokens: np.ndarray, key: jax.Array
) -> tuple[Density, jax.Array]:
    """Densities of the tokens after the first, [B T, ...], and a draw of each, [B T, W]."""
    model = lm.model

    @jax.jit
    def draw(tokens):
        hidden = model.context_states(lm.params, model.make_inputs(tokens))
        density = model.distribution(lm.params, hidden)
        flat_density = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), density)
        return flat_density, flat_density.sample(key)

    density, x = draw(tokens)
    return density, x


# --- Latents of an autoencoder --------------------------------------------------------------------


def compare_latent_quantizers(
    lm: LanguageModel[NextVectorModel],
    train_tokens: np.ndarray,
    held_out: np.ndarray,
    settings: Settings,
    *,
    max_train_chunks: int = 16_384,
) -> list[dict[str, Any]]:
    """Each way's numbers for the latents of a next-vector model, as `compare_quantizers` has them.

    Accuracy is by token, of draws for held-out text; "kept" are the tokens of held-out chunks that
    come back from their own latents.

    Args:
      lm: the model.
      train_tokens: tokens int [n], whose chunks' latents the codes are fitted to.
      held_out: tokens int [m].
      settings: how ways are compared; there are no candidates.
      max_train_chunks: training chunks, at most.
    """
    model = lm.model
    chunk_size = model.chunk_size
    _check_groups("latents", model.autoencoder_config.latent_size)
    chunks = _held_out_chunks(held_out, chunk_size, settings)
    targets = chunks[:, 1:].reshape(-1, chunk_size)
    key, noise_key = jax.random.split(jax.random.key(settings.seed))
    x = _draw_next_latents(lm, chunks, noise_key)
    codec = calm.autoencoder_of(lm)
    target_latents, _ = autoencoder.encode(codec, targets)
    train_chunks = _spread_chunks(train_tokens, chunk_size, max_train_chunks)
    latents, _ = autoencoder.encode(codec, train_chunks)
    results = []
    for name, coder in make_latent_coders(key, latents, settings).items():

        def decode_to_tokens(z, code=coder):
            vectors = code(z)
            return vectors, model.decode_tokens(lm.params, vectors)

        jitted_decoder = jax.jit(decode_to_tokens)
        vectors, decoded_tokens = jitted_decoder(x)
        _, own_tokens = jitted_decoder(target_latents)
        seconds = median_seconds(functools.partial(jitted_decoder, x))
        results.append(
            {
                "K": chunk_size,
                "way": name,
                "accuracy": float(np.mean(np.asarray(decoded_tokens) == targets)),
                "noise": float(jnp.mean((vectors - x) ** 2)),
                "kept": float(np.mean(np.asarray(own_tokens) == targets)),
                "microseconds": 1e6 * seconds / targets.size,
            }
        )
    return results


def _held_out_chunks(
    held_out: np.ndarray, chunk_size: int, settings: Settings
) -> np.ndarray:
    """The chunks of held-out windows, int [B, T, C]."""
    if settings.length < 2 * chunk_size:
        raise InputError(
            f"--length={settings.length} is less than two chunks of {chunk_size} tokens"
        )
    window_tokens = settings.length // chunk_size * chunk_size
    tokens = window_batches.consecutive_windows(
        held_out, length=window_tokens - 1, max_windows=settings.windows
    )
    return tokens.reshape(len(tokens), -1, chunk_size)


def _spread_chunks(tokens: np.ndarray, chunk_size: int, limit: int) -> np.ndarray:
    """At most so many chunks of tokens [n], spread over them, int [k, C]."""
    num_tokens = len(tokens) // chunk_size * chunk_size
    chunks = np.asarray(tokens[:num_tokens]).reshape(-1, chunk_size)
    return chunks[:: max(1, len(chunks) // limit)][:limit]


def _draw_next_latents(
    lm: LanguageModel[NextVectorModel], chunks: np.ndarray, key: jax.Array
) -> jax.Array:
    """A draw of the head for each chunk int [B, T, C] after the first, [B (T - 1), W]."""
    model = lm.model

    @jax.jit
    def draw(chunks):
        hidden = model.context_states(lm.params, ChunkInputs(chunks))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        noise = model.head.noise(key, hidden.shape[:1])
        return model.transform(lm.params, noise, hidden)

    latents: jax.Array = draw(chunks)
    return latents


def make_latent_coders(
    key: jax.Array, latents: jax.Array, settings: Settings
) -> dict[str, Coder]:
    """Name -> from latents [..., W] to the vectors that are decoded in their place.

    Args:
      key: PRNG key of codebooks.
      latents: latents of training chunks [n, W], to which codes are fitted, standardised.
      settings: settings of the codes.
    """
    if settings.codes > len(latents):
        raise InputError(
            f"--codes={settings.codes}, but there are {len(latents)} training chunks"
        )
    mean = jnp.mean(latents, axis=0)
    deviation = jnp.std(latents, axis=0)

    def in_latent_units(code: Coder) -> Coder:
        return lambda z: mean + deviation * code((z - mean) / deviation)

    fitted_coders = fit_coders(key, (latents - mean) / deviation, settings)
    return {
        "decoder": lambda z: z,
        f"nearest of {len(latents)}": nearest_row_coder(latents),
        **{name: in_latent_units(coder) for name, coder in fitted_coders.items()},
    }


def nearest_row_coder(rows: jax.Array) -> Coder:
    """From vectors [..., W] to the rows nearest to them."""
    norms = quantize.squared_norms(rows)
    return lambda x: rows[quantize.nearest(x, rows, norms=norms).indices]


def median_seconds(call: Callable[[], object]) -> float:
    """The median time of a call; the first one has been made."""
    seconds = []
    for _ in range(NUM_REPEATS):
        start_time = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start_time)
    return float(np.median(seconds))


# --- The table ------------------------------------------------------------------------------------


def make_table(results: list[dict[str, Any]]) -> tables.Table:
    """The table of both comparisons; rows of next-vector models have a model and a K."""
    columns = [
        tables.Column("way"),
        tables.Column("accuracy", format=".2%"),
        tables.Column("noise", format=".4f"),
        tables.Column("kept", format=".1%"),
        tables.Column("µs", format=".2f"),
    ]
    if "K" in results[0]:
        columns = [tables.Column("model"), tables.Column("K", format="d"), *columns]
    return tables.Table(
        "quantization",
        "From a draw to a token: accuracy against the text's token, squared distance between the"
        " draw and its code a dimension, rows (or tokens of chunks) whose code leads back to them,"
        " time of a token",
        columns,
        [list(numbers.values()) for numbers in results],
    )
