"""What a transformer remembers of the tokens that it has seen, so that it can go on from there."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from continuous_lm.errors import InputError
from continuous_lm.models.config import TransformerConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, and when those were; room for S tokens in all."""

    keys: jax.Array  # [L, ..., S, K, H], rotated
    values: jax.Array  # [L, ..., S, K, H]
    durations: jax.Array  # [..., S], 0 where there is no token yet
    steps: jax.Array  # [..., S], time from the end of the token before, for windows
    end: jax.Array  # [...], when the last token ends
    filled: jax.Array  # int [], how many tokens there are


# The letters of their axes, with one leading axis.
AXES = KVCache(*cast(Any, ("L B S K H", "L B S K H", "B S", "B S", "B", "")))


def empty(
    config: TransformerConfig,
    length: int,
    batch: tuple[int, ...] = (),
    dtype: DTypeLike = jnp.float32,
) -> KVCache:
    """A cache with room for `length` tokens of each of the `batch` sequences, and none in it.

    Args:
      config: of the model.
      length: S.
      batch: the sequences' leading axes.
      dtype: of keys and values; the parameters' own.
    """
    whole = isinstance(length, int | np.integer) and not isinstance(length, bool)
    if not whole or length < 1:
        raise InputError(f"length is {length!r}; it must be a positive integer, of tokens")
    wide = jnp.promote_types(dtype, jnp.float32)
    shape = (config.num_layers, *batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        durations=jnp.zeros((*batch, length), wide),
        steps=jnp.zeros((*batch, length), wide),
        end=jnp.zeros(batch, wide),
        filled=jnp.zeros((), jnp.int32),
    )


def append(buffer: jax.Array, new: jax.Array, filled: jax.Array) -> jax.Array:
    """`buffer` [..., S] with `new` [..., T] from index `filled` on; leading axes broadcast."""
    new = jnp.broadcast_to(new, (*buffer.shape[:-1], new.shape[-1])).astype(buffer.dtype)
    return lax.dynamic_update_slice_in_dim(buffer, new, filled, axis=-1)


def joined(old: jax.Array, new: jax.Array, *, axis: int) -> jax.Array:
    """`old` and then `new` along `axis` (from the end); the axes before it broadcast."""
    batch = jnp.broadcast_shapes(old.shape[:axis], new.shape[:axis])
    parts = (jnp.broadcast_to(x, (*batch, *x.shape[axis:])) for x in (old, new))
    return jnp.concatenate(list(parts), axis=axis)


def remember(
    buffer: jax.Array, new: jax.Array, layer: jax.Array, filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's keys or values of new tokens, and reads that layer's of all.

    Args:
      buffer: [L, ..., S, K, H].
      new: [..., T, K, H].
      layer: int [].
      filled: int [], the index of the first new token.

    Returns:
      the buffer with them, and the layer's [..., S, K, H].
    """
    place = [layer, *[0] * (buffer.ndim - 4), filled, 0, 0]
    indices = [jnp.asarray(i, jnp.int32) for i in place]
    buffer = lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), indices)
    return buffer, lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False)
