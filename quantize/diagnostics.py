"""Diagnostics of a quantizer: unused codes, quantization noise, collapsed vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import (
    as_float,
    as_indices,
    check_count,
    check_integers,
)
from continuous_lm.errors import InputError
from continuous_lm.quantize.kmeans import check_vectors, count_codes
from continuous_lm.quantize.nearest import DEFAULT_BLOCK_SIZE, k_nearest


class CodeUse(NamedTuple):
    """Usage statistics of the codes of a codebook.

    Attributes:
      counts: Number of vectors of each code, int32 [E].
      perplexity: exp of the entropy of the counts: E if all codes are used equally, 1 if only one
        is used.
      used_share: Fraction of the codes that occur, from 0 to 1.
    """

    counts: jax.Array
    perplexity: jax.Array
    used_share: jax.Array


class QuantizationNoise(NamedTuple):
    """Distance and margin of each quantized vector, in units of the metric.

    Attributes:
      distance: Distance to the nearest code, [...].
      margin: Distance to the second nearest code minus `distance`, [...]; 0 for a tie.
    """

    distance: jax.Array
    margin: jax.Array


class VectorSpread(NamedTuple):
    """Variances and effective rank of a set of vectors.

    Attributes:
      variances: Variance of each dimension, [W].
      effective_rank: Effective number of directions in which the vectors differ, from 1 to W; 0 if
        all vectors are equal.
    """

    variances: jax.Array
    effective_rank: jax.Array


def code_use(indices: ArrayLike, num_codes: int) -> CodeUse:
    """Count the codes, and compute the perplexity and the used fraction of the codebook.

    Args:
      indices: Code of each vector, int [...], at least one.
      num_codes: Number of codes, E.

    Returns:
      Counts int32 [E], and two scalars float32.

    Raises:
      InputError: There are no indices, or (outside jit) one is not in 0, ..., E - 1.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(*quantize.code_use([0, 0, 1, 1], num_codes=4))
      [2 2 0 0] 2.0 0.5
    """
    check_count("num_codes", num_codes)
    if not np.size(indices):
        raise InputError("indices are empty; give at least one")
    check_integers("indices", indices, 0, num_codes)
    counts = count_codes(as_indices(indices).reshape(-1), num_codes, jnp.int32)
    frequencies = counts / jnp.sum(counts)
    used_share = jnp.mean(counts > 0, dtype=frequencies.dtype)
    return CodeUse(counts, _perplexity(frequencies), used_share)


def quantization_noise(
    x: ArrayLike,
    codes: ArrayLike,
    *,
    metric: str = "euclidean",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> QuantizationNoise:
    """Compute the distance of each vector to its code, and the margin to the second nearest code.

    If the margin is small compared with the distance, a small change of the vector changes its
    code.

    Args:
      x: Vectors [..., W].
      codes: Codebook [E, W] with E >= 2.
      metric: "euclidean" (squared), "cosine" or "dot"; see `k_nearest`.
      block_size: Number of codes scored at a time; see `k_nearest`.

    Returns:
      Distances and margins, [...] each, at least float32.

    Raises:
      InputError: See `k_nearest` with k = 2.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(*quantize.quantization_noise([1.0, 0.0], [[0.0, 0.0], [3.0, 0.0]]))
      1.0 3.0
    """
    distances = k_nearest(x, codes, 2, metric=metric, block_size=block_size).distances
    return QuantizationNoise(distances[..., 0], distances[..., 1] - distances[..., 0])


def spread(x: ArrayLike) -> VectorSpread:
    """Compute the variance of each dimension and the effective rank of vectors.

    Variances near 0 and a rank near 1 mean that the vectors have collapsed. The effective rank is
    exp of the entropy of the normalized singular values (Roy and Vetterli, "The effective rank",
    2007). The mean of the vectors is subtracted first.

    Args:
      x: Vectors [..., W], at least one.

    Returns:
      Variances [W] and a scalar, at least float32.

    Raises:
      InputError: There are no vectors, or (outside jit) a vector is not finite.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(*quantize.spread([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
      [0.5 0.5] 2.0
    """
    x = as_float(x)
    check_vectors(x)
    x = x.reshape(-1, x.shape[-1])
    x = x - jnp.mean(x, axis=0)
    singular_values = jnp.linalg.svd(x, compute_uv=False)
    total = jnp.sum(singular_values)
    shares = singular_values / jnp.where(total > 0, total, 1.0)
    effective_rank = jnp.where(total > 0, _perplexity(shares), 0.0)
    return VectorSpread(jnp.mean(jnp.square(x), axis=0), effective_rank)


def _perplexity(p: jax.Array) -> jax.Array:
    """Compute exp of the entropy of a distribution."""
    logs = jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.exp(-jnp.sum(p * logs))
