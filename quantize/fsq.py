"""Finite scalar quantization: a few fixed levels for each dimension, and no codebook to learn.

Mentzer et al. (arXiv:2309.15505). A dimension with n levels is bounded by tanh and rounded to n
neighbouring integers, which are then divided by floor(n / 2): from -1 to 1 where n is odd, from -1
to 1 - 2 / n where it is even. The codes are all combinations, n_1 n_2 ... of them; the first
dimension's level is the index's lowest digit.
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

# By how much the bound lies above the outermost levels, so that rounding reaches them.
BOUND_MARGIN = 1e-3


class FiniteQuantized(NamedTuple):
    """Vectors as codes of a finite scalar quantizer."""

    vectors: jax.Array  # [..., W], from -1 to 1, with the gradient of `finite_bound`
    indices: jax.Array  # int32 [...]


def finite_bound(x: ArrayLike, levels: Sequence[int]) -> jax.Array:
    """Bounds each dimension smoothly to where it rounds to one of its levels.

    (n - 1) / 2 (1 + 0.001) tanh(x + shift) - offset. For even n the offset is 1/2, since as many
    integers lie on either side of -1/2, and the shift takes x = 0 to 0.

    Args:
      x: vectors [..., W].
      levels: n >= 2 of each of the W dimensions.

    Returns:
      [..., W], at least float32, in units of one level.

    Raises:
      InputError: if there are not W levels, all >= 2, or more combinations than int32 counts.

    >>> print(finite_bound(jnp.array([[-9.0, -9.0], [9.0, 9.0]]), (4, 5)).round(2))
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
    """Rounds each dimension to one of its levels, with straight-through gradients.

    Args:
      x: vectors [..., W].
      levels: n >= 2 of each of the W dimensions.

    Returns:
      the codes.

    Raises:
      InputError: if there are not W levels, all >= 2, or more combinations than int32 counts.

    >>> quantized = quantize_finite(jnp.array([[-9.0, 0.5], [0.0, 9.0]]), (4, 5))
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
    """The index int32 [...] of codes [..., W]: what `finite_vectors` takes back.

    Args:
      vectors: codes; others are rounded to the nearest.
      levels: n >= 2 of each of the W dimensions.

    Raises:
      InputError: if there are not W levels, all >= 2, or more combinations than int32 counts.

    >>> print(finite_indices([[-1.0, 0.5], [0.0, 1.0]], (4, 5)))
    [12 18]
    """
    vectors = as_float(vectors)
    num_levels = _check_levels(levels, vectors.shape, jnp.int32)
    zero_level = num_levels // 2
    digits = jnp.round(vectors * zero_level).astype(jnp.int32) + zero_level
    return _digits_to_index(jnp.clip(digits, 0, num_levels - 1), levels)


def finite_vectors(indices: ArrayLike, levels: Sequence[int]) -> jax.Array:
    """The codes float32 [..., W] of indices [...].

    Raises:
      InputError: if a number of levels is below 2, or there are more combinations than int32
        counts; outside of jit, if an index is not one of theirs.

    >>> print(finite_vectors([12, 18], (4, 5)))
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
    """The index of digits [..., W], each from 0 to n - 1."""
    return jnp.sum(digits * _place_values(tuple(levels)), axis=-1, dtype=jnp.int32)


@functools.cache
def _place_values(levels: tuple[int, ...]) -> np.ndarray:
    """What one level of each dimension counts in an index."""
    return np.cumprod((1, *levels[:-1])).astype(np.int32)


def _check_levels(
    levels: Sequence[int],
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> np.ndarray:
    """The levels as an array, if they can be used for vectors of this shape."""
    are_integers = all(map(is_integer, levels))
    if not are_integers or not len(levels) or min(levels) < 2:
        raise InputError(
            f"levels are {tuple(levels)}; they must be whole numbers, at least 2"
        )
    if math.prod(map(int, levels)) > np.iinfo(np.int32).max:
        raise InputError(
            f"levels {tuple(levels)} have more combinations than int32 can count"
        )
    if not shape or shape[-1] != len(levels):
        raise InputError(
            f"there are {len(levels)} levels for vectors {list(shape)}; give one for each dimension"
        )
    return np.asarray(levels).astype(dtype)
