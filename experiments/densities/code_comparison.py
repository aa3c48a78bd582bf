"""From a drawn vector to a token, in several ways on the same draws: accuracy, noise, time.

Nearest rows, Euclidean and cosine, and the nearest few re-ranked by the density search the table
itself. Vector, residual and finite scalar quantization are fitted to the table's rows; their code
goes on to the row nearest to it.

Of a next-vector model with K tokens a vector, the decoder takes the rows' place: a draw is decoded
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
from continuous_lm.models import density as density_lib
from continuous_lm.models.calm.checkpoint import NextVectorLM
from continuous_lm.models.density.model import DensityLM

REPEATS = 5
GROUP = 4  # dimensions whose levels make one code of finite scalar quantization

Way = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def ways(
    table: dict[str, jax.Array],
    key: jax.Array,
    *,
    codes: int,
    stages: int,
    levels: int,
    candidates: int,
) -> dict[str, Way]:
    """Name -> (vectors [N, W], their density) to the vectors of the codes [N, W] and tokens [N]."""
    rows, norms = table["rows"], table["norms"]
    if codes > len(rows):
        raise InputError(f"--codes={codes}, but the table has {len(rows)} rows")
    if rows.shape[-1] % GROUP:
        raise InputError(f"vectors of width {rows.shape[-1]} do not fall into groups of {GROUP}")

    def searched(way: str) -> Way:
        def to_tokens(x, density):
            tokens = density_lib.quantized(way, density, x, table, candidates=candidates)
            return rows[tokens], tokens

        return to_tokens

    def coded(code: Callable[[jax.Array], jax.Array]) -> Way:
        def to_tokens(x, density):
            vectors = code(x)
            return vectors, quantize.nearest(vectors, rows, norms=norms).indices

        return to_tokens

    fitted = coders(key, rows, codes=codes, stages=stages, levels=levels)
    return {
        "nearest": searched("euclidean"),
        "cosine": searched("cosine"),
        "re-ranked": searched("rerank"),
        **{name: coded(code) for name, code in fitted.items()},
    }


def coders(
    key: jax.Array, rows: jax.Array, *, codes: int, stages: int, levels: int
) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Name -> from vectors [..., W] to the vectors of their codes, fitted to standardised rows."""
    book = quantize.init(key, rows, codes)
    books = quantize.init_residual(key, rows, stages, max(codes // stages, 2))

    def finite(x):
        # A level a third of a standard deviation and more: tanh is nearly straight there.
        scale = 0.5 * (levels - 1)
        groups = (x / scale).reshape(*x.shape[:-1], -1, GROUP)
        vectors = quantize.quantize_finite(groups, (levels,) * GROUP).vectors
        inside = jnp.clip(vectors, -1 + 1e-3, 1 - 1e-3)
        return scale * jnp.arctanh(inside).reshape(x.shape)

    return {
        f"VQ, {codes}": lambda x: quantize.quantize(book, x).vectors,
        f"residual VQ, {stages} x {books.codes.shape[1]}": lambda x: (
            quantize.quantize_residual(books, x).vectors
        ),
        f"finite scalar, {levels} levels": finite,
    }


def compare(
    lm: DensityLM, held_out: np.ndarray, *, length: int, windows: int, seed: int, **settings: int
) -> list[dict[str, Any]]:
    """Each way's numbers: see the top of the module.

    Args:
      lm: a density model that reads tokens.
      held_out: tokens int [m].
      length: of a window.
      windows: at most so many.
      seed: of draws and codebooks.
      **settings: of `ways`.
    """
    if lm.model.speaks:
        raise InputError("a token head draws tokens, no vectors; give a density model")
    tokens = window_batches.consecutive(held_out, length=length, limit=windows)
    variables = {"params": lm.params}
    key, draws = jax.random.split(jax.random.key(seed))

    @jax.jit
    def drawn(tokens):
        hidden = lm.model.apply(variables, tokens, method="predictions")
        density: Any = lm.model.apply(variables, hidden, method="distribution")
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), density)
        return flat, flat.sample(draws)

    density, x = drawn(tokens)
    targets, rows = tokens[:, 1:].reshape(-1), density_lib.token_rows(lm)
    table = {"rows": rows, "norms": quantize.squared_norms(rows)}
    results = []
    for name, way in ways(table, key, **settings).items():
        run = jax.jit(way)
        vectors, found = run(x, density)
        around = jax.tree.map(lambda leaf: leaf[:1], density)
        own = jnp.arange(len(rows))
        kept = None
        if name not in ("nearest", "cosine", "re-ranked"):
            kept = float(jnp.mean(way(rows, around)[1] == own))
        results.append(
            {
                "way": name,
                "accuracy": float(np.mean(np.asarray(found) == targets)),
                "noise": float(jnp.mean((vectors - x) ** 2)),
                "kept": kept,
                "microseconds": 1e6 * seconds_of(run, x, density) / len(targets),
            }
        )
    return results


def compare_chunks(
    lm: NextVectorLM,
    train: np.ndarray,
    held_out: np.ndarray,
    *,
    length: int,
    windows: int,
    seed: int,
    codes: int,
    stages: int,
    levels: int,
    seen: int = 16_384,
) -> list[dict[str, Any]]:
    """Each way's numbers for the latents of a next-vector model, as `compare` has them.

    Accuracy is by token, of draws for held-out text; "kept" are the tokens of held-out chunks that
    come back from their own latents.

    Args:
      lm: the model.
      train: tokens int [n], whose chunks' latents the codes are fitted to.
      held_out: tokens int [m].
      length: of a window, in tokens, which is rounded to chunks.
      windows: at most so many.
      seed: of draws and codebooks.
      codes: of the vector quantizer.
      stages: of the residual quantizer.
      levels: of finite scalar quantization.
      seen: training chunks, at most.
    """
    size, width = lm.chunk_size, lm.model.autoencoder.latent_size
    if width % GROUP:
        raise InputError(f"latents of width {width} do not fall into groups of {GROUP}")
    if length < 2 * size:
        raise InputError(f"--length={length} is less than two chunks of {size} tokens")
    tokens = window_batches.consecutive(held_out, length=length // size * size - 1, limit=windows)
    chunks = tokens.reshape(len(tokens), -1, size)
    targets = chunks[:, 1:].reshape(-1, size)
    known = np.asarray(train[: len(train) // size * size]).reshape(-1, size)
    known = known[:: max(1, len(known) // seen)][:seen]
    key, of_noise = jax.random.split(jax.random.key(seed))
    variables: Any = {"params": lm.params}

    @jax.jit
    def drawn(chunks):
        hidden: Any = lm.model.apply(variables, chunks, method="predictions")
        hidden = hidden.reshape(-1, hidden.shape[-1])
        noise = lm.model.head.noise(of_noise, hidden.shape[:1])
        return lm.model.apply(variables, noise, hidden, method="transform")

    x, own = drawn(chunks), lm.codec.encode(targets)[0]
    latents = lm.codec.encode(known)[0]
    if codes > len(latents):
        raise InputError(f"--codes={codes}, but there are {len(latents)} training chunks")
    middle, spread = jnp.mean(latents, axis=0), jnp.std(latents, axis=0)
    found = {"decoder": lambda z: z, f"nearest of {len(latents)}": nearest_to(latents)}
    rest = coders(key, (latents - middle) / spread, codes=codes, stages=stages, levels=levels)

    def scaled(code: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return lambda z: middle + spread * code((z - middle) / spread)

    found |= {name: scaled(code) for name, code in rest.items()}

    results = []
    for name, code in found.items():

        def to_tokens(z, code=code):
            vectors = code(z)
            return vectors, lm.model.apply(variables, vectors, method="tokens")

        run = jax.jit(to_tokens)
        vectors, got = run(x)
        results.append(
            {
                "K": size,
                "way": name,
                "accuracy": float(np.mean(np.asarray(got) == targets)),
                "noise": float(jnp.mean((vectors - x) ** 2)),
                "kept": float(np.mean(np.asarray(run(own)[1]) == targets)),
                "microseconds": 1e6 * seconds_of(run, x) / targets.size,
            }
        )
    return results


def nearest_to(rows: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """From vectors [N, W] to the rows nearest to them."""
    norms = quantize.squared_norms(rows)
    return lambda x: rows[quantize.nearest(x, rows, norms=norms).indices]


def seconds_of(run: Callable[..., Any], *arguments: Any) -> float:
    """The median time of a call; the first one has been made."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def table_of(results: list[dict[str, Any]]) -> tables.Table:
    """The table of `compare`."""
    columns = [
        *([tables.Column("model"), tables.Column("K", format="d")] if "K" in results[0] else []),
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
        [list(result.values()) for result in results],
    )
