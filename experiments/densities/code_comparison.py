"""From a drawn vector to a token, in several ways on the same draws: accuracy, noise, time.

Nearest rows, Euclidean and cosine, and the nearest few re-ranked by the density search the table
itself. Vector, residual and finite scalar quantization are fitted to the table's rows; their code
goes on to the row nearest to it.

Of a next-vector model with C tokens a vector, the decoder takes the rows' place: a draw is decoded
as it is, or after it was quantized by codes that were fitted to the latents of training chunks, or
after the nearest of these latents has taken its place.
"""

import time
from collections.abc import Callable
from typing import Any

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
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.language_model import LanguageModel

NUM_REPEATS = 5
FSQ_GROUP_SIZE = (
    4  # dimensions whose levels make one code of finite scalar quantization
)

Quantizer = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def make_quantizers(
    table: dict[str, jax.Array],
    key: jax.Array,
    *,
    codes: int,
    stages: int,
    levels: int,
    candidates: int,
) -> dict[str, Quantizer]:
    """Name -> (vectors [..., W], their density) to codes' vectors [..., W] and tokens [...]."""
    rows, norms = table["rows"], table["norms"]
    if codes > len(rows):
        raise InputError(f"--codes={codes}, but the table has {len(rows)} rows")
    if rows.shape[-1] % FSQ_GROUP_SIZE:
        raise InputError(
            f"vectors of width {rows.shape[-1]} do not fall into groups of {FSQ_GROUP_SIZE}"
        )

    def search_quantizer(way: str) -> Quantizer:
        def quantize_to_tokens(x, density):
            tokens = density_lib.quantize_to_tokens(
                way, density, x, table, num_candidates=candidates
            )
            return rows[tokens], tokens

        return quantize_to_tokens

    def coder_quantizer(code: Callable[[jax.Array], jax.Array]) -> Quantizer:
        def quantize_to_tokens(x, density):
            vectors = code(x)
            return vectors, quantize.nearest(vectors, rows, norms=norms).indices

        return quantize_to_tokens

    coder_by_name = fit_coders(key, rows, codes=codes, stages=stages, levels=levels)
    return {
        "nearest": search_quantizer("euclidean"),
        "cosine": search_quantizer("cosine"),
        "re-ranked": search_quantizer("rerank"),
        **{name: coder_quantizer(coder) for name, coder in coder_by_name.items()},
    }


def fit_coders(
    key: jax.Array, rows: jax.Array, *, codes: int, stages: int, levels: int
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Name -> from vectors [..., W] to the vectors of their codes, fitted to standardised rows."""
    codebook = quantize.init(key, rows, codes)
    residual_codebooks = quantize.init_residual(
        key, rows, stages, max(codes // stages, 2)
    )

    def round_to_levels(x):
        # A level a third of a standard deviation and more: tanh is nearly straight there.
        scale = 0.5 * (levels - 1)
        groups = (x / scale).reshape(*x.shape[:-1], -1, FSQ_GROUP_SIZE)
        vectors = quantize.quantize_finite(groups, (levels,) * FSQ_GROUP_SIZE).vectors
        clipped = jnp.clip(vectors, -1 + 1e-3, 1 - 1e-3)
        return scale * jnp.arctanh(clipped).reshape(x.shape)

    return {
        f"VQ, {codes}": lambda x: quantize.quantize(codebook, x).vectors,
        f"residual VQ, {stages} x {residual_codebooks.codes.shape[1]}": lambda x: (
            quantize.quantize_residual(residual_codebooks, x).vectors
        ),
        f"finite scalar, {levels} levels": round_to_levels,
    }


def compare_quantizers(
    lm: LanguageModel[DensityModel],
    held_out: np.ndarray,
    *,
    length: int,
    windows: int,
    seed: int,
    **settings: int,
) -> list[dict[str, Any]]:
    """Each way's numbers: see the top of the module.

    Args:
      lm: a density model that reads tokens.
      held_out: tokens int [m].
      length: of a window.
      windows: at most so many.
      seed: of draws and codebooks.
      **settings: of `make_quantizers`.
    """
    if lm.model.predicts_tokens:
        raise InputError("a token head draws tokens, no vectors; give a density model")
    tokens = window_batches.consecutive_windows(
        held_out, length=length, max_windows=windows
    )
    model = lm.model
    key, draw_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def draw_next_vectors(tokens):
        hidden = model.context_states(lm.params, model.make_inputs(tokens))
        density = model.distribution(lm.params, hidden)
        flat_density = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), density)
        return flat_density, flat_density.sample(draw_key)

    density, x = draw_next_vectors(tokens)
    targets, rows = tokens[:, 1:].reshape(-1), density_lib.token_table(lm)
    table = {"rows": rows, "norms": quantize.squared_norms(rows)}
    results = []
    for name, quantizer in make_quantizers(table, key, **settings).items():
        jitted_quantizer = jax.jit(quantizer)
        vectors, decoded_tokens = jitted_quantizer(x, density)
        first_density = jax.tree.map(lambda leaf: leaf[:1], density)
        row_indices = jnp.arange(len(rows))
        share_kept = None
        if name not in ("nearest", "cosine", "re-ranked"):
            share_kept = float(
                jnp.mean(quantizer(rows, first_density)[1] == row_indices)
            )
        results.append(
            {
                "way": name,
                "accuracy": float(np.mean(np.asarray(decoded_tokens) == targets)),
                "noise": float(jnp.mean((vectors - x) ** 2)),
                "kept": share_kept,
                "microseconds": 1e6
                * median_seconds(jitted_quantizer, x, density)
                / len(targets),
            }
        )
    return results


def compare_latent_quantizers(
    lm: LanguageModel[NextVectorModel],
    train_tokens: np.ndarray,
    held_out: np.ndarray,
    *,
    length: int,
    windows: int,
    seed: int,
    codes: int,
    stages: int,
    levels: int,
    max_train_chunks: int = 16_384,
) -> list[dict[str, Any]]:
    """Each way's numbers for the latents of a next-vector model, as `compare_quantizers` has them.

    Accuracy is by token, of draws for held-out text; "kept" are the tokens of held-out chunks that
    come back from their own latents.

    Args:
      lm: the model.
      train_tokens: tokens int [n], whose chunks' latents the codes are fitted to.
      held_out: tokens int [m].
      length: of a window, in tokens, which is rounded to chunks.
      windows: at most so many.
      seed: of draws and codebooks.
      codes: of the vector quantizer.
      stages: of the residual quantizer.
      levels: of finite scalar quantization.
      max_train_chunks: training chunks, at most.
    """
    model = lm.model
    chunk_size = model.chunk_size
    latent_size = model.autoencoder_config.latent_size
    if latent_size % FSQ_GROUP_SIZE:
        raise InputError(
            f"latents of width {latent_size} do not fall into groups of {FSQ_GROUP_SIZE}"
        )
    if length < 2 * chunk_size:
        raise InputError(
            f"--length={length} is less than two chunks of {chunk_size} tokens"
        )
    tokens = window_batches.consecutive_windows(
        held_out, length=length // chunk_size * chunk_size - 1, max_windows=windows
    )
    chunks = tokens.reshape(len(tokens), -1, chunk_size)
    targets = chunks[:, 1:].reshape(-1, chunk_size)
    train_chunks = np.asarray(
        train_tokens[: len(train_tokens) // chunk_size * chunk_size]
    ).reshape(-1, chunk_size)
    train_chunks = train_chunks[:: max(1, len(train_chunks) // max_train_chunks)][
        :max_train_chunks
    ]
    key, noise_key = jax.random.split(jax.random.key(seed))
    params = lm.params

    @jax.jit
    def draw_next_latents(chunks):
        hidden = model.context_states(params, ChunkInputs(chunks))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        noise = model.head.noise(noise_key, hidden.shape[:1])
        return model.transform(params, noise, hidden)

    codec = calm.autoencoder_of(lm)
    x = draw_next_latents(chunks)
    target_latents, _ = autoencoder.encode(codec, targets)
    latents, _ = autoencoder.encode(codec, train_chunks)
    if codes > len(latents):
        raise InputError(
            f"--codes={codes}, but there are {len(latents)} training chunks"
        )
    latent_mean, latent_deviation = jnp.mean(latents, axis=0), jnp.std(latents, axis=0)
    coder_by_name = {
        "decoder": lambda z: z,
        f"nearest of {len(latents)}": nearest_row_coder(latents),
    }
    fitted_coders = fit_coders(
        key,
        (latents - latent_mean) / latent_deviation,
        codes=codes,
        stages=stages,
        levels=levels,
    )

    def coder_in_latent_units(
        code: Callable[[jax.Array], jax.Array],
    ) -> Callable[[jax.Array], jax.Array]:
        return lambda z: (
            latent_mean + latent_deviation * code((z - latent_mean) / latent_deviation)
        )

    coder_by_name |= {
        name: coder_in_latent_units(coder) for name, coder in fitted_coders.items()
    }

    results = []
    for name, coder in coder_by_name.items():

        def decode_to_tokens(z, code=coder):
            vectors = code(z)
            return vectors, model.decode_tokens(params, vectors)

        jitted_decoder = jax.jit(decode_to_tokens)
        vectors, decoded_tokens = jitted_decoder(x)
        results.append(
            {
                "K": chunk_size,
                "way": name,
                "accuracy": float(np.mean(np.asarray(decoded_tokens) == targets)),
                "noise": float(jnp.mean((vectors - x) ** 2)),
                "kept": float(
                    np.mean(np.asarray(jitted_decoder(target_latents)[1]) == targets)
                ),
                "microseconds": 1e6 * median_seconds(jitted_decoder, x) / targets.size,
            }
        )
    return results


def nearest_row_coder(rows: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """From vectors [..., W] to the rows nearest to them."""
    norms = quantize.squared_norms(rows)
    return lambda x: rows[quantize.nearest(x, rows, norms=norms).indices]


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The median time of a call; the first one has been made."""
    seconds = []
    for _ in range(NUM_REPEATS):
        start_time = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start_time)
    return float(np.median(seconds))


def make_table(results: list[dict[str, Any]]) -> tables.Table:
    """The table of `compare_quantizers`."""
    columns = [
        *(
            [tables.Column("model"), tables.Column("K", format="d")]
            if "K" in results[0]
            else []
        ),
        tables.Column("way"),
        tables.Column("accuracy", format=".2%"),
        tables.Column("noise", format=".4f"),
        tables.Column("kept", format=".1%"),
        tables.Column("µs", format=".2f"),
    ]
    return tables.Table(
        "quantization",
        "From a draw to a token: accuracy against the text's token, squared distance between the"
        " draw and its code a dimension, rows (or tokens of chunks) whose code leads back to them,"
        " time of a token",
        columns,
        [list(quantizer_result.values()) for quantizer_result in results],
    )
