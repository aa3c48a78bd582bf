"""The KV cache: keys and values of the tokens so far, from which a transformer goes on."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from continuous_lm.arguments import check_count
from continuous_lm.models.config import TransformerConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, and when those were; room for S tokens in all."""

    keys: jax.Array  # [L, ..., S, K, H], rotated
    values: jax.Array  # [L, ..., S, K, H]
    durations: jax.Array  # [..., S], 0 where there is no token yet
    intervals: jax.Array  # [..., S], time from the end of the token before, for windows
    end_time: jax.Array  # [...], when the last token ends
    num_tokens: jax.Array  # int [], how many tokens there are


# The letters of their axes, with one leading axis.
CACHE_AXES = KVCache(*cast(Any, ("L B S K H", "L B S K H", "B S", "B S", "B", "")))


def empty(
    config: TransformerConfig,
    length: int,
    batch_shape: tuple[int, ...] = (),
    dtype: DTypeLike = jnp.float32,
) -> KVCache:
    """A cache with room for `length` tokens of each of the `batch_shape` sequences, and none in it.

    Args:
      config: of the model.
      length: S.
      batch_shape: the sequences' leading axes.
      dtype: of keys and values; the parameters' own.
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


def update_layer(
    buffer: jax.Array, new: jax.Array, layer_index: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's keys or values of new tokens, and reads that layer's of all.

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
