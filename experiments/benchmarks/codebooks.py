"""Codebooks that are trained by moving averages: ours, and vector-quantize-pytorch's.

Both are plain, or residual if there are stages.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
from jax.typing import ArrayLike

from continuous_lm import quantize as q
from continuous_lm.experiments.benchmarks import baselines

if TYPE_CHECKING:
    import torch


class CodebookSettings(NamedTuple):
    """Settings of a codebook and of its training."""

    num_codes: int
    num_stages: int = 0  # 0: a plain codebook
    decay: float = 0.95
    kmeans_steps: int = 1  # on the first batch
    revival_threshold: float = 1.0  # codes with a smaller count are replaced


def init(key: jax.Array, x: ArrayLike, settings: CodebookSettings) -> q.Codebook:
    """Our codebook, by k-means on vectors [B, W]."""
    num_codes, steps = settings.num_codes, settings.kmeans_steps
    if settings.num_stages:
        return q.init_residual(key, x, settings.num_stages, num_codes, steps=steps)
    return q.init(key, x, num_codes, steps=steps)


def quantize(
    codebook: q.Codebook, x: ArrayLike, settings: CodebookSettings
) -> q.Quantized:
    """Our codes of vectors [B, W]."""
    if settings.num_stages:
        return q.quantize_residual(codebook, x)
    return q.quantize(codebook, x)


def train_step(
    key: jax.Array, codebook: q.Codebook, x: ArrayLike, settings: CodebookSettings
) -> q.Codebook:
    """Our codebook after a batch [B, W]: moving averages, then new codes for those without use."""
    update: Callable[..., q.Codebook] = q.update_ema
    revive: Callable[..., q.Codebook] = q.revive
    if settings.num_stages:
        update, revive = q.update_residual_ema, q.revive_residual
    indices = quantize(codebook, x, settings).indices
    codebook = update(codebook, x, indices, decay=settings.decay)
    return revive(key, codebook, x, threshold=settings.revival_threshold)


def make_theirs(width: int, settings: CodebookSettings) -> "torch.nn.Module":
    """vector-quantize-pytorch's module for vectors [1, B, W]."""
    library = baselines.import_baseline("vector_quantize_pytorch")
    make_module = library.VectorQuantize
    if settings.num_stages:
        make_module = functools.partial(
            library.ResidualVQ, num_quantizers=settings.num_stages
        )
    return make_module(
        dim=width,
        codebook_size=settings.num_codes,
        decay=settings.decay,
        kmeans_init=True,
        kmeans_iters=settings.kmeans_steps,
        threshold_ema_dead_code=settings.revival_threshold,
    )
