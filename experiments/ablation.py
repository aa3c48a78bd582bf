"""From a drawn vector to a token, in several ways on the same draws: accuracy, noise, time.

Nearest rows, Euclidean and cosine, and the nearest few re-ranked by the density search the table
itself. Vector, residual and finite scalar quantization are fitted to the table's rows; their code
goes on to the row nearest to it.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize
from continuous_lm.errors import InputError
from continuous_lm.experiments import batches, tables
from continuous_lm.models import sampling
from continuous_lm.models.density import DensityLM

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
            tokens = sampling.quantized(way, density, x, table, candidates=candidates)
            return rows[tokens], tokens

        return to_tokens

    def coded(code: Callable[[jax.Array], jax.Array]) -> Way:
        def to_tokens(x, density):
            vectors = code(x)
            return vectors, quantize.nearest(vectors, rows, norms=norms).indices

        return to_tokens

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
        "nearest": searched("euclidean"),
        "cosine": searched("cosine"),
        "re-ranked": searched("rerank"),
        f"VQ, {codes}": coded(lambda x: quantize.quantize(book, x).vectors),
        f"residual VQ, {stages} x {books.codes.shape[1]}": coded(
            lambda x: quantize.quantize_residual(books, x).vectors
        ),
        f"finite scalar, {levels} levels": coded(finite),
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
    tokens = batches.consecutive(held_out, length=length, limit=windows)
    variables = {"params": lm.params}
    key, draws = jax.random.split(jax.random.key(seed))

    @jax.jit
    def drawn(tokens):
        hidden = lm.model.apply(variables, tokens, method="predictions")
        density: Any = lm.model.apply(variables, hidden, method="distribution")
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), density)
        return flat, flat.sample(draws)

    density, x = drawn(tokens)
    targets, rows = tokens[:, 1:].reshape(-1), sampling.token_rows(lm)
    table = {"rows": rows, "norms": quantize.squared_norms(rows)}
    results = []
    for name, way in ways(table, key, **settings).items():
        run = jax.jit(way)
        vectors, found = run(x, density)
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(run(x, density))
            seconds.append(time.perf_counter() - began)
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
                "microseconds": 1e6 * float(np.median(seconds)) / len(targets),
            }
        )
    return results


def table_of(results: list[dict[str, Any]]) -> tables.Table:
    """The table of `compare`."""
    columns = [
        tables.Column("way"),
        tables.Column("accuracy", format=".2%"),
        tables.Column("noise", format=".4f"),
        tables.Column("kept", format=".1%"),
        tables.Column("µs", format=".2f"),
    ]
    return tables.Table(
        "quantization",
        "From a draw to a token: accuracy against the text's token, squared distance between the"
        " draw and its code a dimension, rows whose code leads back to them, time of a vector",
        columns,
        [list(result.values()) for result in results],
    )
