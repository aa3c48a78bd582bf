"""Exact nearest-neighbour search: the codes of a codebook [E, W] nearest to a vector.

If B vectors and E codes give few scores, the search computes all scores in one product, without a
copy of the codebook. Otherwise it scans the codes in blocks, so that memory does not grow with E:
[B, block_size] scores and a copy of one block. Each metric is a distance, smaller for nearer codes:

    euclidean   |x - c|^2, squared, as in faiss
    cosine      1 - x.c / (|x| |c|), and 1 where x or c is zero
    dot         -x.c

The search compares the scores x.c - |c|^2 / 2, x.c / |c| or x.c: one matrix product for each block,
and |c|^2, computed once. The distances of the k results are then computed directly from the
vectors, which avoids the cancellation of that formula. Only these distances have gradients, so the
backward pass touches k rows for each vector, not the whole codebook.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import as_float, check_count, check_shapes
from continuous_lm.errors import InputError

METRICS = ("euclidean", "cosine", "dot")
# Number of codes in a block, large enough that the search runs at the speed of the matrix product.
DEFAULT_BLOCK_SIZE = 1024
# Up to this number of scores (64 MB) the codes are not divided into blocks: with few vectors,
# copying a block would take longer than the product.
MAX_UNBLOCKED_SCORES = 2**24
# The codes enter matrix products in multiples of this number. A product sums the rows of an
# incomplete tile in another order, so equal codes in different tiles would get different scores.
TILE_SIZE = 16


class Neighbours(NamedTuple):
    """Codes nearest to each vector, in order of distance; equal distances in order of index.

    Attributes:
      indices: Rows of the codebook, int32 [..., k].
      distances: Distances [..., k], at least float32.
    """

    indices: jax.Array
    distances: jax.Array


def squared_norms(codes: ArrayLike) -> jax.Array:
    """Compute |c|^2 of each code, to share it between searches of one codebook.

    Args:
      codes: Codebook [E, W].

    Returns:
      Squared norms [E], at least float32.

    Examples:
      >>> from continuous_lm import quantize
      >>> quantize.squared_norms([[3.0, 4.0], [0.0, 1.0]])
      Array([25.,  1.], dtype=float32)
    """
    return jnp.sum(jnp.square(as_float(codes)), axis=-1)


def distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    metric: str = "euclidean",
) -> jax.Array:
    """Compute the distances between pairs of vectors, not between all combinations.

    Args:
      x: Vectors [..., W].
      y: Vectors [..., W]; the leading axes broadcast with those of x.
      metric: "euclidean" (squared), "cosine" (1 - cosine similarity) or "dot" (minus the product).

    Returns:
      Distances [...], at least float32, with finite gradients everywhere.

    Raises:
      InputError: The widths differ, or the metric is unknown.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(quantize.distance([1.0, 2.0], [[1.0, 0.0], [2.0, 4.0]]))
      [4. 5.]
    """
    x = as_float(x)
    y = as_float(y)
    _check_metric(metric)
    check_shapes({"x": (x, "... W"), "y": (y, "... W")})
    if metric == "euclidean":
        return jnp.sum(jnp.square(x - y), axis=-1)
    product = jnp.sum(x * y, axis=-1)
    if metric == "dot":
        return -product
    inverse_length_x = _inverse_length(squared_norms(x))
    inverse_length_y = _inverse_length(squared_norms(y))
    return 1.0 - product * inverse_length_x * inverse_length_y


def nearest(
    x: ArrayLike,
    codes: ArrayLike,
    *,
    metric: str = "euclidean",
    norms: jax.Array | None = None,
    block_size: int | None = None,
    sharding: NamedSharding | None = None,
) -> Neighbours:
    """Find the code nearest to each vector: `k_nearest` with k = 1, without the axis of size k.

    Args:
      x: Vectors [..., W].
      codes: Codebook [E, W].
      metric: "euclidean" (squared), "cosine" or "dot"; see `distance`.
      norms: `squared_norms(codes)`; None: computed.
      block_size: Number of codes scored at a time; see `k_nearest`.
      sharding: Sharding of the codes; see `k_nearest`.

    Returns:
      Indices int32 [...] and distances [...].

    Raises:
      InputError: See `k_nearest`.

    Examples:
      >>> from continuous_lm import quantize
      >>> codes = [[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]
      >>> x = [
      ...     [0.75, 0.0],
      ...     [0.5, 0.0],
      ... ]  # the second one is as near to code 0 as to code 1
      >>> neighbours = quantize.nearest(x, codes)
      >>> print(neighbours.indices, neighbours.distances)
      [1 0] [0.0625 0.25  ]
    """
    neighbours = k_nearest(
        x,
        codes,
        1,
        metric=metric,
        norms=norms,
        block_size=block_size,
        sharding=sharding,
    )
    return Neighbours(*(array[..., 0] for array in neighbours))


def k_nearest(
    x: ArrayLike,
    codes: ArrayLike,
    k: int,
    *,
    metric: str = "euclidean",
    norms: jax.Array | None = None,
    block_size: int | None = None,
    sharding: NamedSharding | None = None,
) -> Neighbours:
    """Find the k codes nearest to each vector, by exact search.

    Products are computed in float32 at the highest precision (float64 for float64 arrays), whatever
    the default precision of the platform. Codes with equal scores are ordered by index. That order
    is the same in one piece, in blocks and over several devices.

    Args:
      x: Vectors [..., W].
      codes: Codebook [E, W]. If its rows are sharded over the devices of a mesh, each device
        searches its own rows, and the devices exchange k candidates each.
      k: Number of neighbours, from 1 to E.
      metric: "euclidean" (squared), "cosine" or "dot"; see `distance`.
      norms: `squared_norms(codes)`; None: computed.
      block_size: Number of codes scored at a time, rounded up to a multiple of 16. The search holds
        [B, block_size] scores for B vectors. None: all codes if that is at most 2^24 scores and no
        cast is needed, else 1024.
      sharding: Sharding of the codes on a mesh. None: read from the array, which is possible only
        outside jit. Inside jit, give it; otherwise the compiler copies all codes to every device.

    Returns:
      Indices int32 [..., k] and distances [..., k].

    Raises:
      InputError: The shapes do not fit, k is not in 1, ..., E, the metric is unknown, or (outside
        jit) a vector or code is not finite or its squared length overflows.

    Examples:
      >>> from continuous_lm import quantize
      >>> codes = [[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]
      >>> neighbours = quantize.k_nearest([0.75, 0.0], codes, k=2)
      >>> print(neighbours.indices, neighbours.distances)
      [1 0] [0.0625 0.5625]
    """
    x, codes = jnp.asarray(x), jnp.asarray(codes)
    _check(x, codes, k, metric, norms, block_size)
    x, codes = _with_auto_axes(x), _with_auto_axes(codes)
    codes_sharding = getattr(codes, "sharding", None) if sharding is None else sharding
    norms = squared_norms(codes) if norms is None else norms
    _check_values(x, norms)
    rows = x.reshape(-1, x.shape[-1])
    spec = _SearchSpec(int(k), metric, None if block_size is None else int(block_size))
    mesh, mesh_axes = _row_mesh_axes(codes_sharding)
    if mesh is not None:
        neighbours = _search_sharded(spec, mesh, mesh_axes, rows, codes, norms)
    else:
        neighbours = _search_one_device(spec, rows, codes, norms)
    return Neighbours(*(array.reshape(*x.shape[:-1], k) for array in neighbours))


class _SearchSpec(NamedTuple):
    """Static arguments of the compiled search."""

    k: int
    metric: str
    block_size: int | None


@functools.partial(jax.jit, static_argnums=0)
def _search_one_device(
    spec: _SearchSpec,
    x: jax.Array,
    codes: jax.Array,
    norms: jax.Array,
) -> Neighbours:
    """Return the neighbours of x [B, W] on one device."""
    indices, _ = _search_codes(spec, x, codes, norms)
    return _sort_neighbours(indices, _distances(spec.metric, x, codes, indices))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search_sharded(
    spec: _SearchSpec,
    mesh: Mesh,
    mesh_axes: tuple[str, ...],
    x: jax.Array,
    codes: jax.Array,
    norms: jax.Array,
) -> Neighbours:
    """Return the neighbours of x [B, W]; the rows of the codes are sharded over `mesh_axes`."""

    def search_shard(
        x,
        codes,
        norms,
    ):
        shard_spec = spec._replace(k=min(spec.k, len(codes)))
        indices, scores = _search_codes(shard_spec, x, codes, norms)
        distances = _distances(spec.metric, x, codes, indices)
        indices = indices + lax.axis_index(mesh_axes) * len(codes)
        # The order of the devices is the order of the indices, so top_k prefers lower indices.
        indices, scores, distances = lax.all_gather(
            (indices, scores, distances), mesh_axes, axis=1, tiled=True
        )
        best_places = lax.top_k(scores, spec.k)[1]
        return _sort_neighbours(
            jnp.take_along_axis(indices, best_places, axis=1),
            jnp.take_along_axis(distances, best_places, axis=1),
        )

    row_partition = PartitionSpec(mesh_axes)
    search_shard = jax.shard_map(
        search_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), row_partition, row_partition),
        out_specs=PartitionSpec(),
        axis_names=set(mesh_axes),  # over the other mesh axes x keeps its sharding
        check_vma=False,  # after all_gather the results are equal on all devices
    )
    return search_shard(x, codes, norms)


def _search_codes(
    spec: _SearchSpec,
    x: jax.Array,
    codes: jax.Array,
    norms: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return indices and scores [B, k] of the k largest scores, by falling score, then by index."""
    x, codes, norms = lax.stop_gradient((x, codes, norms))
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, codes.dtype), jnp.float32)
    x = x.astype(dtype)
    norms = norms.astype(dtype)
    k, metric, block_size = spec
    num_codes = len(codes)
    if (
        block_size is None
    ):  # a cast to `dtype` copies the codes, so that blocks are better
        is_small = len(x) * num_codes <= MAX_UNBLOCKED_SCORES and codes.dtype == dtype
        block_size = num_codes if is_small else DEFAULT_BLOCK_SIZE
    block_size = -(-block_size // TILE_SIZE) * TILE_SIZE
    if num_codes <= block_size:
        return _top_k(_scores(metric, x, codes.astype(dtype), norms), k)

    def search_block(carry, first):
        best_indices, best_scores = carry
        # All blocks have one length: the last one overlaps the block before.
        begin = jnp.minimum(first, num_codes - block_size)
        indices = begin + jnp.arange(block_size, dtype=jnp.int32)
        block_codes = lax.dynamic_slice_in_dim(codes, begin, block_size)
        block_norms = lax.dynamic_slice_in_dim(norms, begin, block_size)
        scores = _scores(metric, x, block_codes.astype(dtype), block_norms)
        is_repeated = indices < first
        scores = jnp.where(is_repeated[:, None], -jnp.inf, scores)
        places, scores = _top_k(scores, min(k, block_size))
        # Neighbours from earlier blocks come first, so that they win among equal scores.
        indices = jnp.concatenate([best_indices, indices[places]], axis=1)
        scores = jnp.concatenate([best_scores, scores], axis=1)
        places, scores = _top_k(scores.T, k)
        return (jnp.take_along_axis(indices, places, axis=1), scores), None

    no_neighbours = (
        jnp.zeros((len(x), k), jnp.int32),
        jnp.full((len(x), k), -jnp.inf, dtype),
    )
    first_codes = jnp.arange(0, num_codes, block_size, dtype=jnp.int32)
    neighbours, _ = lax.scan(search_block, no_neighbours, first_codes)
    return neighbours


def _scores(
    metric: str,
    x: jax.Array,
    codes: jax.Array,
    norms: jax.Array,
) -> jax.Array:
    """Compute scores [block_size, B], larger for nearer codes, in the dtype of x and the codes."""
    scores = _dot_products(codes, x)
    if len(codes) % TILE_SIZE:  # compute the last codes again, padded to a full tile
        last_codes = codes[-TILE_SIZE:]
        padding = TILE_SIZE - len(last_codes)
        full_tile = jnp.pad(last_codes, [(0, padding), (0, 0)])
        last_scores = _dot_products(full_tile, x)[: len(last_codes)]
        scores = scores.at[-TILE_SIZE:].set(last_scores)
    if metric == "euclidean":
        return scores - 0.5 * norms[:, None]
    if metric == "cosine":
        return scores * _inverse_length(norms)[:, None]
    return scores


def _dot_products(codes: jax.Array, x: jax.Array) -> jax.Array:
    """Compute x.c, [block_size, B].

    With few vectors this order of axes is 1.5 times faster on CPUs than [B, block_size].
    """
    return jnp.einsum("ew,bw->eb", codes, x, precision=lax.Precision.HIGHEST)


def _top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return places and values [B, k] of the k largest scores [block_size, B]; ties by place."""
    if k > 1:
        best_scores, best_places = lax.top_k(scores.T, k)
        return best_places, best_scores
    best_scores = jnp.max(scores, axis=0)
    # Replaces argmax, which XLA does not vectorize on CPUs. If a score is nan, the place is 0.
    places = jnp.arange(len(scores), dtype=jnp.int32)[:, None]
    best_places = jnp.where(scores < best_scores, len(scores), places)
    best_places = jnp.min(best_places, axis=0)
    return best_places[:, None], best_scores[:, None]


def _distances(
    metric: str,
    x: jax.Array,
    codes: jax.Array,
    indices: jax.Array,
) -> jax.Array:
    """Compute distances [B, k] of x [B, W] to the codes at `indices` [B, k].

    The loop over the k columns limits memory to one gathered code for each vector.
    """
    columns = lax.map(lambda i: distance(x, codes[i], metric=metric), indices.T)
    return columns.T


def _sort_neighbours(indices: jax.Array, distances: jax.Array) -> Neighbours:
    """Sort the neighbours [B, k] by distance, and by index where distances are equal."""
    if indices.shape[1] > 1:
        distances, indices = lax.sort((distances, indices), dimension=1, num_keys=2)
    return Neighbours(indices.astype(jnp.int32), distances)


def _inverse_length(norms: jax.Array) -> jax.Array:
    """Compute 1 / |c| from |c|^2, and 0 where that is 0, with a finite gradient."""
    return jnp.where(norms > 0, lax.rsqrt(jnp.where(norms > 0, norms, 1.0)), 0.0)


def _with_auto_axes(array: jax.Array) -> jax.Array:
    """Give an array on a mesh axes of type Auto, whatever type jax.make_mesh has chosen."""
    array_sharding = getattr(array, "sharding", None)
    if isinstance(array, jax.core.Tracer) or not isinstance(
        array_sharding, NamedSharding
    ):
        return array
    mesh = axes_lib.mesh_of(array)
    if mesh is None or all(kind == AxisType.Auto for kind in mesh.axis_types):
        return array
    return jax.device_put(
        array, NamedSharding(Mesh(mesh.devices, mesh.axis_names), array_sharding.spec)
    )


def _row_mesh_axes(codes_sharding: object) -> tuple[Mesh | None, tuple[str, ...]]:
    """Return the mesh and its axes that shard the rows of a codebook; (None, ()) if none do."""
    if not isinstance(codes_sharding, NamedSharding) or not codes_sharding.spec:
        return None, ()
    mesh_axes = codes_sharding.spec[0]
    if mesh_axes is None:
        return None, ()
    mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)
    mesh = Mesh(codes_sharding.mesh.devices, codes_sharding.mesh.axis_names)
    num_shards = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
    return (mesh, mesh_axes) if num_shards > 1 else (None, ())


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise InputError(
            f"metric is {metric!r}; it must be one of {', '.join(METRICS)}"
        )


def _check(
    x: jax.Array,
    codes: jax.Array,
    k: int,
    metric: str,
    norms: jax.Array | None,
    block_size: int | None,
) -> None:
    _check_metric(metric)
    check_shapes(
        {
            "codes": (codes, "E W"),
            "x": (x, "... W"),
            "norms": (norms, "E"),
        }
    )
    if not codes.size:
        raise InputError(
            f"codes has shape {list(codes.shape)}; E and W must be at least 1"
        )
    for name, array in {"x": x, "codes": codes}.items():
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise InputError(
                f"{name} has dtype {array.dtype}; it must hold real numbers"
            )
    check_count("k", k)
    if block_size is not None:
        check_count("block_size", block_size)
    if k > len(codes):
        raise InputError(
            f"k is {k}; it must be at most {len(codes)}, the number of codes"
        )


def _check_values(x: jax.Array, norms: jax.Array) -> None:
    """Raise InputError if a value is not finite, outside jit; a code is checked by its norm."""
    _check_finite("codes", norms)
    _check_finite("x", squared_norms(x))


def _check_finite(name: str, squared_lengths: jax.Array) -> None:
    if isinstance(squared_lengths, jax.core.Tracer):
        return
    invalid_indices = np.argwhere(~np.isfinite(np.asarray(squared_lengths)))
    if len(invalid_indices):
        index = invalid_indices[0].tolist()
        raise InputError(
            f"{name}{index or ''} is not finite, or so large that its squared length overflows"
        )
