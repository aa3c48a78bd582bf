"""K-means: a codebook from data, by k-means++ and Lloyd's steps."""

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
    """E clusters of vectors."""

    centres: jax.Array  # [E, W]
    counts: jax.Array  # [E], vectors nearest to each, in the dtype of the centres


def kmeans(
    key: jax.Array,
    x: ArrayLike,
    num_codes: int,
    *,
    steps: int = 10,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Clusters:
    """Clusters of vectors: means that lie near all of them, in squared Euclidean distance.

    The start is k-means++ (Arthur and Vassilvitskii, 2007): each centre is a vector drawn in
    proportion to its squared distance from the centres before. Then Lloyd's steps move each centre
    to the mean of the vectors nearest to it; one that has none moves to the vector that lies
    farthest from its own centre, the next one to the next farthest.

    Args:
      key: PRNG key.
      x: vectors [..., W]; fewer than `num_codes` different ones leave some centres alike, of which
        all but the first have no vectors.
      num_codes: E, how many clusters.
      steps: Lloyd's steps, >= 0; each compares all vectors with all centres.
      block_size: see `nearest`.

    Returns:
      the clusters.

    Raises:
      InputError: if shapes or numbers do not fit; outside of jit, if a vector is not finite.

    >>> clusters = kmeans(jax.random.key(0), [[0.0], [2.0], [10.0], [12.0], [14.0]], 2)
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
    """The start [E, W]."""

    def draw_centre(i, carry):
        centres, distances = carry
        log_weights = jnp.log(distances)  # -inf where a centre lies already
        index = jax.random.categorical(jax.random.fold_in(key, i), log_weights)
        new_centre = x[index]
        distances = jnp.minimum(distances, distance(x, new_centre))
        return centres.at[i].set(new_centre), distances

    initial_carry = (
        jnp.zeros((num_codes, x.shape[1]), x.dtype),
        jnp.ones(len(x), x.dtype),
    )
    # The first is drawn evenly: what "ones" stand for is no distance, and would cap the others.
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
    """How often each code occurs in `indices` [B], as [E]."""
    return jnp.zeros(num_codes, jnp.int32).at[indices].add(1).astype(dtype)


def sum_by_code(
    x: jax.Array,
    indices: jax.Array,
    num_codes: int,
) -> jax.Array:
    """The sum [E, W] of the vectors [B, W] of each code."""
    return jax.ops.segment_sum(x, indices, num_codes)


def count_selected_before(is_selected: jax.Array) -> jax.Array:
    """How many are chosen before each, int [E]."""
    return jnp.cumsum(is_selected) - is_selected


def check_vectors(x: jax.Array, codes: jax.Array | None = None) -> None:
    """Refuses what is not vectors [..., W], at least one, finite, and as wide as codes [E, W]."""
    check_shapes({"codes": (codes, "E W"), "x": (x, "... W")})
    if x.ndim < 2 or not x.size:
        raise InputError(
            f"x has shape {list(x.shape)}; it must be [..., W], with vectors in it"
        )
    check_numbers("x", x)
