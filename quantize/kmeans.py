"""K-means clustering: a codebook from data, by k-means++ and Lloyd's algorithm."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_count, check_numbers, check_shapes
from continuous_lm.errors import InputError
from continuous_lm.quantize.nearest import DEFAULT_BLOCK_SIZE, distance, nearest


class Clusters(NamedTuple):
    """Clusters of vectors.

    Attributes:
      centres: Cluster centres [E, W].
      counts: Number of vectors nearest to each centre, [E], in the dtype of the centres.
    """

    centres: jax.Array
    counts: jax.Array


def kmeans(
    key: jax.Array,
    x: ArrayLike,
    num_codes: int,
    *,
    steps: int = 10,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Clusters:
    """Cluster vectors by k-means in squared Euclidean distance.

    The initialization is k-means++ (Arthur and Vassilvitskii, 2007): each centre is a vector
    sampled with probability proportional to its squared distance from the previous centres. Lloyd's
    steps then move each centre to the mean of the vectors nearest to it. If some centres have no
    vectors, the first of them moves to the vector farthest from its centre, the second to the
    second farthest, and so on.

    Args:
      key: PRNG key.
      x: Vectors [..., W]. With fewer than `num_codes` distinct vectors, some centres are equal;
        only the first of equal centres has vectors.
      num_codes: Number of clusters, E.
      steps: Number of Lloyd's steps, >= 0; each compares all vectors with all centres.
      block_size: Number of centres scored at a time; see `k_nearest`.

    Returns:
      Centres [E, W] and counts [E], at least float32.

    Raises:
      InputError: Shapes or numbers do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> x = [[0.0], [2.0], [10.0], [12.0], [14.0]]
      >>> clusters = quantize.kmeans(jax.random.key(0), x, num_codes=2)
      >>> print(jnp.sort(clusters.centres, axis=0).T, jnp.sort(clusters.counts))
      [[ 1. 12.]] [2. 3.]
    """
    x = lax.stop_gradient(as_float(x))
    check_vectors(x)
    check_count("num_codes", num_codes)
    check_count("steps", steps, minimum=0)
    return _kmeans(
        key, x.reshape(-1, x.shape[-1]), int(num_codes), int(steps), block_size
    )


@functools.partial(jax.jit, static_argnames=("num_codes", "block_size"))
def _kmeans(
    key: jax.Array,
    x: jax.Array,
    num_codes: int,
    steps: jax.Array,
    block_size: int,
) -> Clusters:
    centres = _init_plus_plus(key, x, num_codes)

    def move_centres(_, centres):
        return _lloyd_step(x, centres, block_size)

    centres = lax.fori_loop(0, steps, move_centres, centres)
    neighbours = nearest(x, centres, block_size=block_size)
    counts = count_codes(neighbours.indices, num_codes, x.dtype)
    return Clusters(centres, counts)


def _init_plus_plus(
    key: jax.Array,
    x: jax.Array,
    num_codes: int,
) -> jax.Array:
    """Sample the initial centres [E, W] by k-means++."""

    def draw_centre(i, carry):
        centres, distances = carry
        log_weights = jnp.log(distances)  # -inf for vectors equal to a centre
        index = jax.random.categorical(jax.random.fold_in(key, i), log_weights)
        new_centre = x[index]
        distances = jnp.minimum(distances, distance(x, new_centre))
        return centres.at[i].set(new_centre), distances

    initial_carry = (
        jnp.zeros((num_codes, x.shape[1]), x.dtype),
        jnp.ones(len(x), x.dtype),
    )
    # The first centre is drawn uniformly, by distances of 1. These are not real distances and
    # would limit the minimum below, so the carry is made again from the first centre.
    centres, _ = draw_centre(0, initial_carry)
    carry = centres, distance(x, centres[0])
    centres, _ = lax.fori_loop(1, num_codes, draw_centre, carry)
    return centres


def _lloyd_step(
    x: jax.Array,
    centres: jax.Array,
    block_size: int,
) -> jax.Array:
    num_codes = len(centres)
    indices, distances = nearest(x, centres, block_size=block_size)
    counts = count_codes(indices, num_codes, x.dtype)
    means = sum_by_code(x, indices, num_codes) / jnp.maximum(counts, 1.0)[:, None]
    farthest = x[lax.top_k(distances, min(num_codes, len(x)))[1]]
    is_empty = counts == 0
    return jnp.where(
        is_empty[:, None],
        farthest[count_selected_before(is_empty) % len(farthest)],
        means,
    )


def count_codes(
    indices: jax.Array,
    num_codes: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Count the occurrences of each code in `indices` [B], as an array [E] of this dtype."""
    return jnp.zeros(num_codes, jnp.int32).at[indices].add(1).astype(dtype)


def sum_by_code(
    x: jax.Array,
    indices: jax.Array,
    num_codes: int,
) -> jax.Array:
    """Compute the sum [E, W] of the vectors [B, W] of each code."""
    return jax.ops.segment_sum(x, indices, num_codes)


def count_selected_before(is_selected: jax.Array) -> jax.Array:
    """Count the selected entries before each entry, int [E]."""
    return jnp.cumsum(is_selected) - is_selected


def check_vectors(x: jax.Array, codes: jax.Array | None = None) -> None:
    """Raise InputError unless x is [..., W], not empty, finite and as wide as codes [E, W]."""
    check_shapes({"codes": (codes, "E W"), "x": (x, "... W")})
    if x.ndim < 2 or not x.size:
        raise InputError(
            f"x has shape {list(x.shape)}; it must be [..., W] and not empty"
        )
    check_numbers("x", x)
