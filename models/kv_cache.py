"""KV cache: keys and values of the tokens so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_count
from continuous_lm.errors import InputError
from continuous_lm.models.config import TransformerConfig

__all__ = [
    "CACHE_AXES",
    "CachedLayer",
    "KVCache",
    "Past",
    "PrefixLayer",
    "append",
    "check_room",
    "check_shape",
    "concatenate",
    "empty",
    "extend",
    "place",
    "update_layer",
]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, and when those were; room for S tokens in all."""

    keys: jax.Array  # [L, ..., S, K, H], rotated
    values: jax.Array  # [L, ..., S, K, H]
    durations: jax.Array  # [..., S], 0 where there is no token yet
    intervals: jax.Array  # [..., S], time from the end of the token before, for windows
    end_time: jax.Array  # [...], when the last token ends
    num_tokens: jax.Array  # int [], how many tokens there are


# The letters of the axes of a `KVCache` with one leading axis, by its fields.
CACHE_AXES = {
    "keys": "L B S K H",
    "values": "L B S K H",
    "durations": "B S",
    "intervals": "B S",
    "end_time": "B",
    "num_tokens": "",
}


class CachedLayer(NamedTuple):
    """The stacks of all layers in a cache, and which layer is meant."""

    keys: jax.Array  # [L, ..., S, K, H]
    values: jax.Array  # [L, ..., S, K, H]
    layer_index: jax.Array  # int []


class PrefixLayer(NamedTuple):
    """One layer's keys and values of the tokens of a prefix, which are only read."""

    keys: jax.Array  # [..., S, K, H]
    values: jax.Array  # [..., S, K, H]


Past = (
    CachedLayer | PrefixLayer | None
)  # keys and values of earlier tokens in one layer


def empty(
    config: TransformerConfig,
    length: int,
    batch_shape: tuple[int, ...] = (),
    dtype: DTypeLike = jnp.float32,
) -> KVCache:
    """A cache with room for `length` tokens of each of the `batch_shape` sequences, and none in it.

    Args:
      config: config of the model.
      length: S.
      batch_shape: the sequences' leading axes.
      dtype: dtype of keys and values; the parameters' own.
    """
    check_count("length", length)
    float_dtype = jnp.promote_types(dtype, jnp.float32)
    shape = (
        config.num_layers,
        *batch_shape,
        length,
        config.num_kv_heads,
        config.head_dim,
    )
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        durations=jnp.zeros((*batch_shape, length), float_dtype),
        intervals=jnp.zeros((*batch_shape, length), float_dtype),
        end_time=jnp.zeros(batch_shape, float_dtype),
        num_tokens=jnp.zeros((), jnp.int32),
    )


def place(mesh: Mesh | None, cache: KVCache) -> KVCache:
    """The cache where the letters of its axes say; see `axes.place`."""
    placed = {
        field: axes_lib.place(mesh, array, CACHE_AXES[field])
        for field, array in cache._asdict().items()
    }
    return KVCache(**placed)


def check_shape(config: TransformerConfig, cache: KVCache, cache_name: str) -> None:
    """Raise InputError for a cache or prefix of another model."""
    expected_shape = (
        config.num_layers,
        *cache.end_time.shape,
        cache.durations.shape[-1],
        config.num_kv_heads,
        config.head_dim,
    )
    if cache.keys.shape != expected_shape:
        raise InputError(
            f"the {cache_name}'s keys have shape {list(cache.keys.shape)}; this model's are"
            f" {list(expected_shape)}"
        )


def check_room(cache: KVCache, num_new: int) -> None:
    """Raise InputError for a cache without room for the tokens, if its length is not traced."""
    if isinstance(cache.num_tokens, jax.core.Tracer):
        return
    capacity = cache.durations.shape[-1]
    if int(cache.num_tokens) + num_new > capacity:
        raise InputError(
            f"the cache holds {int(cache.num_tokens)} tokens and has room for {capacity}:"
            f" {num_new} more do not fit; make it longer"
        )


def append(buffer: jax.Array, new: jax.Array, offset: jax.Array) -> jax.Array:
    """`buffer` [..., S] with `new` [..., T] from index `offset` on; leading axes broadcast."""
    new = jnp.broadcast_to(new, (*buffer.shape[:-1], new.shape[-1])).astype(
        buffer.dtype
    )
    return lax.dynamic_update_slice_in_dim(buffer, new, offset, axis=-1)


def concatenate(past: jax.Array, new: jax.Array, *, axis: int) -> jax.Array:
    """`past` and then `new` along `axis` (from the end); the axes before it broadcast."""
    batch_shape = jnp.broadcast_shapes(past.shape[:axis], new.shape[:axis])
    broadcast_parts = (
        jnp.broadcast_to(x, (*batch_shape, *x.shape[axis:])) for x in (past, new)
    )
    return jnp.concatenate(list(broadcast_parts), axis=axis)


def extend(
    past: Past, k: jax.Array, v: jax.Array, offset: jax.Array | None
) -> tuple[jax.Array, jax.Array, Past]:
    """Keys and values of one layer, of the past tokens and the new ones.

    Args:
      past: keys and values of the earlier tokens.
      k: keys [..., T, K, H] of the new tokens.
      v: values [..., T, K, H].
      offset: int [], the index of the first new token in a cache.

    Returns:
      keys and values [..., S, K, H], and the past with the new ones in it.
    """
    if isinstance(past, PrefixLayer):
        past_keys, past_values = past
        k = concatenate(past_keys.astype(k.dtype), k, axis=-3)
        v = concatenate(past_values.astype(v.dtype), v, axis=-3)
    elif isinstance(past, CachedLayer):
        assert offset is not None
        cached_keys, k = update_layer(past.keys, k, past.layer_index, offset)
        cached_values, v = update_layer(past.values, v, past.layer_index, offset)
        past = CachedLayer(cached_keys, cached_values, past.layer_index)
    return k, v, past


def update_layer(
    buffer: jax.Array, new: jax.Array, layer_index: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Write one layer's keys or values of new tokens, and read that layer's of all.

    Args:
      buffer: [L, ..., S, K, H].
      new: [..., T, K, H].
      layer_index: int [].
      offset: int [], the index of the first new token.

    Returns:
      the buffer with them, and the layer's [..., S, K, H].
    """
    starts = [layer_index, *[0] * (buffer.ndim - 4), offset, 0, 0]
    start_indices = [jnp.asarray(i, jnp.int32) for i in starts]
    buffer = lax.dynamic_update_slice(
        buffer, new[None].astype(buffer.dtype), start_indices
    )
    return buffer, lax.dynamic_index_in_dim(buffer, layer_index, 0, keepdims=False)
