"""The benchmark's nearest neighbours and vector quantizers: faiss, vector-quantize-pytorch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize as q
from continuous_lm.experiments.benchmarks import baselines, codebooks, timing
from continuous_lm.experiments.benchmarks.codebooks import CodebookSettings
from continuous_lm.experiments.benchmarks.timing import Row

MIN_PRODUCT_SHARE = 0.85  # of the matrix product's speed, at least
MIN_SPEEDUPS = {
    1: 1.2,
    64: 1.4,
    1024: 1.5,
}  # times as fast as faiss, at least, by batch
ROUNDS_PER_REPEAT = {1: 6, 64: 3, 1024: 1}  # more of them where each is short


@jax.jit
def dense_scores(x: jax.Array, codes: jax.Array) -> jax.Array:
    """The scores [B, E] alone, which no exact search can do without."""
    return jnp.einsum("bw,ew->be", x, codes, precision=jax.lax.Precision.HIGHEST)


def nearest_code_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """The nearest code to each vector, in float32."""
    codebook_shapes = {(256, 32): True} if quick else _CODEBOOK_SHAPES
    for (num_codes, width), with_faiss in codebook_shapes.items():
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((num_codes, width), np.float32)
        codes = jnp.asarray(vectors)
        norms = q.squared_norms(codes)
        faiss_index: Any = None
        missing_reason = baselines.why_missing("faiss") if with_faiss else ""
        if with_faiss and not missing_reason:
            faiss_index = baselines.import_baseline("faiss").IndexFlatL2(width)
            faiss_index.add(vectors)
        for batch_size in MIN_SPEEDUPS:
            x = rng.standard_normal((batch_size, width), np.float32)
            device_x = jnp.asarray(x)
            callables: dict[str, Callable[[], Any]] = {
                "ours": functools.partial(q.nearest, device_x, codes, norms=norms),
                "product": functools.partial(dense_scores, device_x, codes),
            }
            if faiss_index is not None:
                callables["faiss"] = functools.partial(faiss_index.search, x, 1)
                is_same_code = (
                    np.asarray(callables["ours"]().indices)
                    == callables["faiss"]()[1][:, 0]
                )
                if is_same_code.mean() < 0.99:  # but for ties
                    raise AssertionError(
                        f"only {is_same_code.mean():.1%} of the codes are faiss's"
                    )
            seconds = timing.time_in_turns(
                callables, repeats * ROUNDS_PER_REPEAT[batch_size]
            )
            label = f"{num_codes} x {width}, batch {batch_size}"
            if faiss_index is not None:
                yield timing.speedup_row(
                    f"{label}: times as fast as faiss", seconds["ours"], seconds["faiss"],
                    MIN_SPEEDUPS[batch_size],
                )  # fmt: skip
            elif missing_reason:
                yield Row(f"{label}: times as fast as faiss", note=missing_reason)
            yield timing.speedup_row(
                f"{label}: share of the matrix product's speed",
                seconds["ours"],
                seconds["product"],
                MIN_PRODUCT_SHARE,
            )


_CODEBOOK_SHAPES = {
    (32768, 2048): True,
    (131072, 1024): False,
}  # codes, width, and whether faiss is asked


def vector_quantizer_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """A step of training a codebook: codes, moving averages, revival of codes without use."""
    num_codes, width, batch_size = (32, 8, 64) if quick else (1024, 256, 4096)
    x = np.random.default_rng(0).standard_normal((batch_size, width), np.float32)
    missing_reason = baselines.why_missing("torch", "vector_quantize_pytorch")
    for num_stages in (0, 4):
        label = f"{num_codes} codes"
        if num_stages:
            label = f"{num_stages} x {num_codes} residual codes"
        label = f"{label} of {width}, batch {batch_size}: times as fast as vector-quantize-pytorch"
        if missing_reason:
            yield Row(label, note=missing_reason)
            continue
        settings = CodebookSettings(num_codes, num_stages)
        callables = {
            "ours": _make_our_step(x, settings),
            "theirs": _make_their_step(x, settings),
        }
        seconds = timing.time_in_turns(callables, repeats)
        yield timing.speedup_row(label, seconds["ours"], seconds["theirs"])


def _make_our_step(x: np.ndarray, settings: CodebookSettings) -> Callable[[], object]:
    key = jax.random.key(0)
    vectors = jnp.asarray(x)
    codebook = codebooks.init(key, vectors, settings)
    train_step = jax.jit(codebooks.train_step, static_argnums=3)

    def run_step() -> object:
        nonlocal codebook
        codebook = train_step(key, codebook, vectors, settings)
        return codebook

    return run_step


def _make_their_step(x: np.ndarray, settings: CodebookSettings) -> Callable[[], object]:
    torch = baselines.import_baseline("torch")
    quantizer = codebooks.make_theirs(x.shape[1], settings)
    vectors = torch.from_numpy(x)[None]

    def run_step() -> object:
        with torch.no_grad():
            return quantizer(vectors)[1]

    return run_step
