"""Finite scalar quantization: a few fixed levels for each dimension, without a learned codebook.

Source: Mentzer et al., arXiv:2309.15505. A dimension with n levels is bounded by tanh and rounded
to n consecutive integers. Division by floor(n / 2) gives values from -1 to 1 for odd n, and from -1
to 1 - 2 / n for even n. The codes are all n_1 n_2 ... n_W combinations of levels. In the index of a
code, the level of the first dimension is the lowest digit.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from continuous_lm.arguments import as_float, check_integers, is_integer
from continuous_lm.errors import InputError
from continuous_lm.quantize.straight_through import straight_through

# The bound exceeds the outermost levels by this fraction, so that rounding reaches them.
BOUND_MARGIN = 1e-3


class FiniteQuantized(NamedTuple):
    """Vectors quantized by finite scalar quantization.

    Attributes:
      vectors: Codes [..., W], from -1 to 1; their gradient is that of `finite_bound` divided by
        floor(n / 2).
      indices: Index of each code, int32 [...].
    """

    vectors: jax.Array
    indices: jax.Array


def finite_bound(x: ArrayLike, levels: Sequence[int]) -> jax.Array:
    """Bound each dimension smoothly to the range that rounds to its levels.

    The bound is (n - 1) / 2 (1 + 0.001) tanh(x + shift) - offset. For even n the offset is 1/2, so
    that the range holds n integers, and the shift maps x = 0 to 0. For odd n both are 0.

    Args:
      x: Vectors [..., W].
      levels: Number of levels n >= 2 of each of the W dimensions.

    Returns:
      Bounded vectors [..., W], at least float32, where neighbouring levels are 1 apart.

    Raises:
      InputError: `levels` are not W integers >= 2, or int32 cannot count their combinations.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(quantize.finite_bound([[-9.0, -9.0], [9.0, 9.0]], (4, 5)).round(2))
      [[-2. -2.]
       [ 1.  2.]]
    """
    x = as_float(x)
    num_levels = _check_levels(levels, x.shape, x.dtype)
    half_range = (num_levels - 1) * (1 + BOUND_MARGIN) / 2
    offset = np.where(num_levels % 2 == 0, 0.5, 0.0).astype(x.dtype)
    shift = np.arctanh(offset / half_range)
    return jnp.tanh(x + shift) * half_range - offset


def quantize_finite(x: ArrayLike, levels: Sequence[int]) -> FiniteQuantized:
    """Round each dimension to one of its levels, with straight-through gradients.

    Args:
      x: Vectors [..., W].
      levels: Number of levels n >= 2 of each of the W dimensions.

    Returns:
      Codes [..., W], at least float32, and their indices.

    Raises:
      InputError: `levels` are not W integers >= 2, or int32 cannot count their combinations.

    Examples:
      >>> from continuous_lm import quantize
      >>> quantized = quantize.quantize_finite([[-9.0, 0.5], [0.0, 9.0]], (4, 5))
      >>> print(quantized.vectors, quantized.indices)
      [[-1.   0.5]
       [ 0.   1. ]] [12 18]
    """
    bounded = finite_bound(x, levels)
    digits = jnp.round(bounded)
    zero_level = _check_levels(levels, bounded.shape, jnp.int32) // 2
    vectors = straight_through(bounded, digits) / zero_level.astype(bounded.dtype)
    level_indices = digits.astype(jnp.int32) + zero_level
    return FiniteQuantized(vectors, _digits_to_index(level_indices, levels))


def finite_indices(vectors: ArrayLike, levels: Sequence[int]) -> jax.Array:
    """Compute the indices of codes; the inverse of `finite_vectors`.

    Args:
      vectors: Codes [..., W]; other vectors are rounded to the nearest code.
      levels: Number of levels n >= 2 of each of the W dimensions.

    Returns:
      Indices int32 [...].

    Raises:
      InputError: `levels` are not W integers >= 2, or int32 cannot count their combinations.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(quantize.finite_indices([[-1.0, 0.5], [0.0, 1.0]], (4, 5)))
      [12 18]
    """
    vectors = as_float(vectors)
    num_levels = _check_levels(levels, vectors.shape, jnp.int32)
    zero_level = num_levels // 2
    digits = jnp.round(vectors * zero_level).astype(jnp.int32) + zero_level
    return _digits_to_index(jnp.clip(digits, 0, num_levels - 1), levels)


def finite_vectors(indices: ArrayLike, levels: Sequence[int]) -> jax.Array:
    """Return the codes at these indices.

    Args:
      indices: Indices int [...], from 0 to the product of the levels minus 1.
      levels: Number of levels n >= 2 of each of the W dimensions.

    Returns:
      Codes float32 [..., W].

    Raises:
      InputError: `levels` are not integers >= 2, int32 cannot count their combinations, or (outside
        jit) an index is out of range.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(quantize.finite_vectors([12, 18], (4, 5)))
      [[-1.   0.5]
       [ 0.   1. ]]
    """
    num_levels = _check_levels(levels, (len(levels),), jnp.int32)
    check_integers("indices", indices, 0, math.prod(levels))
    zero_level = num_levels // 2
    indices = jnp.asarray(indices, jnp.int32)[..., None]
    digits = indices // _place_values(tuple(levels)) % num_levels
    centred_digits = (digits - zero_level).astype(jnp.float32)
    return centred_digits / zero_level.astype(np.float32)


def _digits_to_index(digits: jax.Array, levels: Sequence[int]) -> jax.Array:
    """Compute the index of digits [..., W], each from 0 to n - 1."""
    return jnp.sum(digits * _place_values(tuple(levels)), axis=-1, dtype=jnp.int32)


@functools.cache
def _place_values(levels: tuple[int, ...]) -> np.ndarray:
    """Return the place value of each dimension: the factor of its digit in an index."""
    return np.cumprod((1, *levels[:-1])).astype(np.int32)


def _check_levels(
    levels: Sequence[int],
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> np.ndarray:
    """Return the levels as an array; raise InputError unless they fit vectors of this shape."""
    are_integers = all(map(is_integer, levels))
    if not are_integers or not len(levels) or min(levels) < 2:
        raise InputError(f"levels are {tuple(levels)}; they must be integers >= 2")
    if math.prod(map(int, levels)) > np.iinfo(np.int32).max:
        raise InputError(
            f"levels are {tuple(levels)}; int32 cannot count so many combinations"
        )
    if not shape or shape[-1] != len(levels):
        raise InputError(
            f"levels has {len(levels)} entries for vectors of shape {list(shape)};"
            " give one for each entry of the last axis"
        )
    return np.asarray(levels).astype(dtype)
