"""Nearest neighbours in a codebook: which of E code vectors lie closest to a vector.

A codebook of which B vectors take few scores is searched in one piece, where it lies. Others are
scanned in blocks, so that memory does not grow with them: [B, block_size] scores and the block's
codes.
Three metrics, each as a distance, smaller for what is nearer:

    euclidean   |x - c|^2, squared, as faiss gives it
    cosine      1 - x.c / (|x| |c|), and 1 where x or c is zero
    dot         -x.c

The search compares x.c - |c|^2 / 2, x.c / |c| or x.c: one matrix product a block, and |c|^2, which
is computed once. The distances of what it finds are computed anew from the vectors, without its
cancellation. Gradients flow through these distances alone: they cost k rows, not the codebook.
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
# Codes in a block: so many run at the speed of the matrix product.
DEFAULT_BLOCK_SIZE = 1024
# With up to so many scores (64 MB) codes are not cut into blocks: a block is copied, which would
# take longer than its product with few vectors.
MAX_UNBLOCKED_SCORES = 2**24
# Codes are multiplied by multiples of it: what is left over beside the full tiles of a matrix
# product is summed in another order, and its score would not be that of a double elsewhere.
TILE_SIZE = 16


class Neighbours(NamedTuple):
    """The codes nearest to some vectors, the nearest first; equally near ones by their index."""

    indices: jax.Array  # int32 [..., k]
    distances: jax.Array  # [..., k], at least float32


def squared_norms(codes: ArrayLike) -> jax.Array:
    """|c|^2 of each code, [E] of [E, W]: what the searches of one codebook share.

    >>> squared_norms([[3.0, 4.0], [0.0, 1.0]])
    Array([25.,  1.], dtype=float32)
    """
    return jnp.sum(jnp.square(as_float(codes)), axis=-1)


def distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    metric: str = "euclidean",
) -> jax.Array:
    """The distance of vectors to others, one to one.

    Args:
      x: [..., W].
      y: [..., W], of a shape that broadcasts with that of x.
      metric: "euclidean" (squared), "cosine" or "dot"; see the top of the module.

    Returns:
      distances [...], at least float32, with finite gradients everywhere.

    Raises:
      InputError: if the widths differ, or the metric is not known.

    >>> print(distance([1.0, 2.0], [[1.0, 0.0], [2.0, 4.0]]))
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
    """The code nearest to each vector: `k_nearest` with k = 1, without the axis of k.

    >>> codes = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> neighbours = nearest(
    ...     [[0.75, 0.0], [0.5, 0.0]], codes
    ... )  # the second one lies in the middle
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
    """The k codes nearest to each vector, by exact search.

    Products are float32 at the highest precision (float64 for such arrays), whatever the platform's
    default is. In those numbers equally near codes are taken by their index, the lowest first, in
    blocks, over devices or in one piece alike.

    Args:
      x: vectors [..., W].
      codes: the codebook [E, W]. If its rows lie spread over the devices of a mesh, each device
        searches its own, and k candidates of each are exchanged.
      k: how many, at most E.
      metric: "euclidean" (squared), "cosine" or "dot"; see the top of the module.
      norms: `squared_norms(codes)`; computed if left out.
      block_size: codes scored at once, rounded up to a multiple of 16; memory is that of
        [B, block_size] scores for B vectors. If left out, all codes where that is at most 2^24
        scores, else 1024.
      sharding: how the codes lie on a mesh. It is known outside of jit; inside it must be given, or
        the compiler brings all codes to every device.

    Returns:
      The neighbours, [..., k].

    Raises:
      InputError: if shapes do not fit, k is not 1, ..., E, the metric is not known; and, outside of
        jit, if a vector or code is not finite, or so large that float32 cannot hold its square.

    >>> codes = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> neighbours = k_nearest([0.75, 0.0], codes, 2)
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
    """What the compiled search depends on, apart from shapes."""

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
    """The neighbours of x [B, W] on one device."""
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
    """The neighbours of x [B, W] in codes that the mesh axes `mesh_axes` spread."""

    def search_shard(
        x,
        codes,
        norms,
    ):
        shard_spec = spec._replace(k=min(spec.k, len(codes)))
        indices, scores = _search_codes(shard_spec, x, codes, norms)
        distances = _distances(spec.metric, x, codes, indices)
        indices = indices + lax.axis_index(mesh_axes) * len(codes)
        # In the order of the devices, so that lower indices come first and win among equals.
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
        axis_names=set(mesh_axes),  # x stays as it is spread over the others
        check_vma=False,  # what all devices gathered is the same on all of them
    )
    return search_shard(x, codes, norms)


def _search_codes(
    spec: _SearchSpec,
    x: jax.Array,
    codes: jax.Array,
    norms: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Indices and scores [B, k] of the k largest scores, by falling score and then by index."""
    x, codes, norms = lax.stop_gradient((x, codes, norms))
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, codes.dtype), jnp.float32)
    x = x.astype(dtype)
    norms = norms.astype(dtype)
    k, metric, block_size = spec
    num_codes = len(codes)
    if block_size is None:  # codes of another dtype are cast, which is a copy, too
        is_small = len(x) * num_codes <= MAX_UNBLOCKED_SCORES and codes.dtype == dtype
        block_size = num_codes if is_small else DEFAULT_BLOCK_SIZE
    block_size = -(-block_size // TILE_SIZE) * TILE_SIZE
    if num_codes <= block_size:
        return _top_k(_scores(metric, x, codes.astype(dtype), norms), k)

    def search_block(carry, first):
        best_indices, best_scores = carry
        # The last block is as long as the others.
        begin = jnp.minimum(first, num_codes - block_size)
        indices = begin + jnp.arange(block_size, dtype=jnp.int32)
        block_codes = lax.dynamic_slice_in_dim(codes, begin, block_size)
        block_norms = lax.dynamic_slice_in_dim(norms, begin, block_size)
        scores = _scores(metric, x, block_codes.astype(dtype), block_norms)
        is_repeated = indices < first
        scores = jnp.where(is_repeated[:, None], -jnp.inf, scores)
        places, scores = _top_k(scores, min(k, block_size))
        # What was found before stands first, so that it wins among equals.
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
    """Scores [block_size, B], larger for what is nearer, in the dtype of x and the codes."""
    scores = _dot_products(codes, x)
    if len(codes) % TILE_SIZE:  # the last codes anew, as a full tile
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
    """x.c [block_size, B]: with few vectors 1.5 times as fast on CPUs as [B, block_size]."""
    return jnp.einsum("ew,bw->eb", codes, x, precision=lax.Precision.HIGHEST)


def _top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Places and values [B, k] of the k largest scores [block_size, B]; the first among equals."""
    if k > 1:
        best_scores, best_places = lax.top_k(scores.T, k)
        return best_places, best_scores
    best_scores = jnp.max(scores, axis=0)
    # In place of argmax, which CPUs do not vectorize; the first of all if they are not numbers.
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
    """Distances [B, k] of x [B, W] to the codes at `indices`, one of the k at a time."""
    columns = lax.map(lambda i: distance(x, codes[i], metric=metric), indices.T)
    return columns.T


def _sort_neighbours(indices: jax.Array, distances: jax.Array) -> Neighbours:
    """The neighbours [B, k] by distance, and by index where that is equal."""
    if indices.shape[1] > 1:
        distances, indices = lax.sort((distances, indices), dimension=1, num_keys=2)
    return Neighbours(indices.astype(jnp.int32), distances)


def _inverse_length(norms: jax.Array) -> jax.Array:
    """1 / |c| from |c|^2, and 0 where that is 0, with a gradient there."""
    return jnp.where(norms > 0, lax.rsqrt(jnp.where(norms > 0, norms, 1.0)), 0.0)


def _with_auto_axes(array: jax.Array) -> jax.Array:
    """The array, with axes of type Auto where it lies on a mesh, whatever jax.make_mesh chose."""
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
    """The mesh and its axes over which the rows of a codebook are spread, if they are."""
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
        raise InputError(f"k is {k}, but there are only {len(codes)} codes")


def _check_values(x: jax.Array, norms: jax.Array) -> None:
    """Refuses what is not finite, where it is known; a code shows it in its norm."""
    _check_finite("codes", norms)
    _check_finite("x", squared_norms(x))


def _check_finite(name: str, squared_lengths: jax.Array) -> None:
    if isinstance(squared_lengths, jax.core.Tracer):
        return
    invalid_indices = np.argwhere(~np.isfinite(np.asarray(squared_lengths)))
    if len(invalid_indices):
        index = invalid_indices[0].tolist()
        raise InputError(
            f"{name}{index or ''} is not finite, or too large for its square"
        )
