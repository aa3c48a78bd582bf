"""Attention over weighted keys by JAX's own TPU kernel, "splash attention": O(T + S) memory.

It knows causal masks, soft-capping and grouped queries, but no weights: `channels` carry them.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.typing import ArrayLike

from continuous_lm.attention import key_channels
from continuous_lm.attention.blocked import in_one_batch
from continuous_lm.attention.visibility import WindowTimes

LANES = 128  # channels and lengths come in multiples of it
BLOCK = 512  # tokens in a block, at most


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: None = None,
    clock: WindowTimes | None = None,
    first: int = 0,
) -> jax.Array:
    """What `dense.attend` gives, from such arguments as `refusal` lets through."""
    del window, clock
    (num_queries, *heads, width), num_keys = q.shape[-4:], k.shape[-3]
    batch, (q, k, v, weights) = in_one_batch(q, k, v, weights)
    q = (scale * q).astype(q.dtype).reshape(len(q), num_queries, -1, width)
    if softcap is None:
        wide = key_channels.room(width, key_channels.PARTS, LANES)
        q, k = key_channels.in_keys(q, k, weights, scale=1.0, width=wide)
    else:
        v = key_channels.in_values(v, weights, width=key_channels.room(width, 1, LANES))
    kernel = _kernel(q.shape[2], _tiles(num_queries), _tiles(num_keys), first, softcap)
    y = jax.vmap(kernel)(*map(_tiled, (q, k, v)))
    y = jnp.moveaxis(y, 1, 2)[:, :num_queries]
    y = y[..., :width] if softcap is None else key_channels.divided(y, width)
    y = y.reshape(*batch, num_queries, *heads, width)
    return key_channels.where_any(weights.reshape(*batch, num_keys), y, first)


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    clock: WindowTimes | None,
    first: ArrayLike,
) -> str | None:
    """Why the kernel does not take arguments of `dense.attend`, if it does not."""
    del k, v, weights, clock
    if window is not None:
        return "splash attention's windows count tokens, not time"
    if q.dtype.itemsize > 4:
        return f"q is {q.dtype}; splash attention sums in float32"
    for name, value in {"scale": scale, "softcap": softcap, "first": first}.items():
        if isinstance(value, jax.Array):
            return f"{name} is an array; splash attention needs a number"
    return None


def _tiles(length: int) -> int:
    """The least multiple of `LANES` that holds `length`."""
    return key_channels.room(length, 0, LANES)


def _tiled(x: jax.Array) -> jax.Array:
    """x [B, T, N, H] as [B, N, T, H], T and H filled up to whole tiles."""
    pad = [(0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, -x.shape[3] % LANES)]
    return jnp.moveaxis(jnp.pad(x, pad), 1, 2)


def _kernel(num_heads: int, num_queries: int, num_keys: int, first: int, softcap: float | None):
    """The causal kernel: q [N, T, H], scaled, k [K, S, H] and v [K, S, H] to y [N, T, H]."""
    queries, keys = (math.gcd(n, BLOCK) for n in (num_queries, num_keys))
    causal = splash_attention_mask.CausalMask((num_queries, num_keys), offset=first)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * num_heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
    )
