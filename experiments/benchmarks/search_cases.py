"""The benchmark's nearest neighbours and vector quantizers: faiss, vector-quantize-pytorch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize as q
from continuous_lm.experiments.benchmarks import baselines, timing
from continuous_lm.experiments.benchmarks.timing import Row

SHARE = 0.85  # of the matrix product's speed, at least
FASTER = {1: 1.2, 64: 1.4, 1024: 1.5}  # times as fast as faiss, at least, by batch
ROUNDS = {1: 6, 64: 3, 1024: 1}  # more of them where each is short

DECAY, THRESHOLD = 0.95, 1.0  # of codebooks


@jax.jit
def product(x: jax.Array, codes: jax.Array) -> jax.Array:
    """The scores [N, E] alone, which no exact search can do without."""
    return jnp.einsum("nw,ew->ne", x, codes, precision=jax.lax.Precision.HIGHEST)


def nearest(quick: bool, repeats: int) -> Iterator[Row]:
    """The nearest code to each vector, in float32."""
    books = {(256, 32): True} if quick else _BOOKS
    for (num_codes, width), with_faiss in books.items():
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((num_codes, width), np.float32)
        codes = jnp.asarray(vectors)
        norms = q.squared_norms(codes)
        index, absent = None, baselines.missing("faiss") if with_faiss else ""
        if with_faiss and not absent:
            index = baselines.load("faiss").IndexFlatL2(width)
            index.add(vectors)
        for batch in FASTER:
            x = rng.standard_normal((batch, width), np.float32)
            on_device = jnp.asarray(x)
            ways: dict[str, Callable[[], Any]] = {
                "ours": functools.partial(q.nearest, on_device, codes, norms=norms),
                "product": functools.partial(product, on_device, codes),
            }
            if index is not None:
                ways["faiss"] = functools.partial(index.search, x, 1)
                same = np.asarray(ways["ours"]().indices) == ways["faiss"]()[1][:, 0]
                if same.mean() < 0.99:  # but for ties
                    raise AssertionError(f"only {same.mean():.1%} of the codes are faiss's")
            seconds = timing.in_turns(ways, repeats * ROUNDS[batch])
            what = f"{num_codes} x {width}, batch {batch}"
            if index is not None:
                yield timing.times_as_fast(
                    f"{what}: times as fast as faiss", seconds["ours"], seconds["faiss"],
                    FASTER[batch],
                )  # fmt: skip
            elif absent:
                yield Row(f"{what}: times as fast as faiss", note=absent)
            yield timing.times_as_fast(
                f"{what}: share of the matrix product's speed",
                seconds["ours"],
                seconds["product"],
                SHARE,
            )


_BOOKS = {(32768, 2048): True, (131072, 1024): False}  # codes, width, and whether faiss is asked


def vector_quantizers(quick: bool, repeats: int) -> Iterator[Row]:
    """A step of training a codebook: codes, moving averages, revival of codes without use."""
    num_codes, width, batch = (32, 8, 64) if quick else (1024, 256, 4096)
    x = np.random.default_rng(0).standard_normal((batch, width), np.float32)
    key, on_device = jax.random.key(0), jnp.asarray(x)
    absent = baselines.missing("torch", "vector_quantize_pytorch")
    for stages in (0, 4):
        what = f"{stages} x {num_codes} residual codes" if stages else f"{num_codes} codes"
        what = f"{what} of {width}, batch {batch}: times as fast as vector-quantize-pytorch"
        if absent:
            yield Row(what, note=absent)
            continue
        ways = {
            "ours": _our_step(key, on_device, num_codes, stages),
            "theirs": _their_step(x, num_codes, stages),
        }
        seconds = timing.in_turns(ways, repeats)
        yield timing.times_as_fast(what, seconds["ours"], seconds["theirs"])


def _our_step(key: jax.Array, x: jax.Array, num_codes: int, stages: int) -> Callable[[], Any]:
    code: Any = q.quantize_residual if stages else q.quantize
    update: Any = q.update_residual_ema if stages else q.update_ema
    revive: Any = q.revive_residual if stages else q.revive
    if stages:
        codebook = q.init_residual(key, x, stages, num_codes, steps=1)
    else:
        codebook = q.init(key, x, num_codes, steps=1)

    @jax.jit
    def step(codebook: Any) -> Any:
        updated = update(codebook, x, code(codebook, x).indices, decay=DECAY)
        return revive(key, updated, x, threshold=THRESHOLD)

    def run() -> Any:
        nonlocal codebook
        codebook = step(codebook)
        return codebook

    return run


def _their_step(x: np.ndarray, num_codes: int, stages: int) -> Callable[[], Any]:
    torch, library = baselines.load("torch"), baselines.load("vector_quantize_pytorch")
    settings = dict(
        dim=x.shape[1],
        codebook_size=num_codes,
        decay=DECAY,
        kmeans_init=True,
        kmeans_iters=1,
        threshold_ema_dead_code=THRESHOLD,
    )
    if stages:
        module = library.ResidualVQ(num_quantizers=stages, **settings)
    else:
        module = library.VectorQuantize(**settings)
    rows = torch.from_numpy(x)[None]

    def run() -> Any:
        with torch.no_grad():
            return module(rows)[1]

    return run
