"""What goes wrong in a quantizer, in numbers: unused codes, noise, collapsed vectors."""

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
    """How the codes of a codebook are used."""

    counts: jax.Array  # int32 [E]
    # exp of the entropy of the counts: E if all are used alike, 1 if one is.
    perplexity: jax.Array
    used_share: jax.Array  # part of the codes that occur at all, from 0 to 1


class QuantizationNoise(NamedTuple):
    """What quantization does to each vector."""

    distance: jax.Array  # [...], to the nearest code
    # [...] >= 0, by how much farther the second nearest lies; 0 is a tie.
    margin: jax.Array


class VectorSpread(NamedTuple):
    """In how many directions vectors differ."""

    variances: jax.Array  # [W], of each dimension
    effective_rank: jax.Array  # from 1 to W; 0 if all vectors are alike


def code_use(indices: ArrayLike, num_codes: int) -> CodeUse:
    """Counts of the codes, their perplexity and the part of them that is used.

    Args:
      indices: which code each vector has, int [...]; at least one.
      num_codes: E.

    Raises:
      InputError: if there are none; outside of jit, if one is not 0, ..., E - 1.

    >>> print(*code_use([0, 0, 1, 1], 4))
    [2 2 0 0] 2.0 0.5
    """
    check_count("num_codes", num_codes)
    if not np.size(indices):
        raise InputError("indices are empty; code use needs at least one")
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
    """How far vectors lie from their codes, and how much farther from the second nearest ones.

    Where the margin is small against the distance, a little noise changes the code.

    Args:
      x: vectors [..., W].
      codes: the codebook [E, W], E >= 2.
      metric: see `nearest`; "euclidean" is squared.
      block_size: see `nearest`.

    Raises:
      InputError: as `k_nearest` with k = 2.

    >>> print(*quantization_noise([1.0, 0.0], [[0.0, 0.0], [3.0, 0.0]]))
    1.0 3.0
    """
    distances = k_nearest(x, codes, 2, metric=metric, block_size=block_size).distances
    return QuantizationNoise(distances[..., 0], distances[..., 1] - distances[..., 0])


def spread(x: ArrayLike) -> VectorSpread:
    """Variances of the dimensions and effective rank: near 0 and 1 where vectors have collapsed.

    The effective rank is exp of the entropy of the singular values, divided by their sum (Roy and
    Vetterli, "The effective rank", 2007), here of the vectors less their mean.

    Args:
      x: vectors [..., W].

    Raises:
      InputError: if there are none, or, outside of jit, one is not finite.

    >>> print(*spread([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
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
    """exp of the entropy of a distribution."""
    logs = jnp.log(jnp.where(p > 0, p, 1.0))
    return jnp.exp(-jnp.sum(p * logs))
