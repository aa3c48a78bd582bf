"""Attention over weighted keys by JAX's own TPU kernel, "splash attention": O(T + S) memory.

It knows causal masks, soft-capping and grouped queries, but no weights: `key_channels` carry
them.
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
from continuous_lm.attention.blocked import flatten_batch
from continuous_lm.attention.visibility import WindowTimes

LANES = 128  # channels and lengths come in multiples of it
MAX_BLOCK_SIZE = 512  # tokens in a block, at most


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: None = None,
    window_times: WindowTimes | None = None,
    query_offset: int = 0,
) -> jax.Array:
    """What `dense.attend` gives, from such arguments as `why_unsupported` lets through."""
    del window, window_times
    (num_queries, *head_counts, head_width), num_keys = q.shape[-4:], k.shape[-3]
    batch_shape, (q, k, v, key_weights) = flatten_batch(q, k, v, key_weights)
    q = (scale * q).astype(q.dtype).reshape(len(q), num_queries, -1, head_width)
    if softcap is None:
        padded_width = key_channels.round_up(
            head_width, key_channels.NUM_WEIGHT_CHANNELS, LANES
        )
        q, k = key_channels.append_log_weights(
            q, k, key_weights, scale=1.0, padded_width=padded_width
        )
    else:
        v = key_channels.scale_and_append_weights(
            v, key_weights, padded_width=key_channels.round_up(head_width, 1, LANES)
        )
    kernel = _make_kernel(
        q.shape[2],
        _round_up_to_lanes(num_queries),
        _round_up_to_lanes(num_keys),
        query_offset,
        softcap,
    )
    y = jax.vmap(kernel)(*map(_to_kernel_layout, (q, k, v)))
    y = jnp.moveaxis(y, 1, 2)[:, :num_queries]
    y = (
        y[..., :head_width]
        if softcap is None
        else key_channels.divide_by_weight_sum(y, head_width)
    )
    y = y.reshape(*batch_shape, num_queries, *head_counts, head_width)
    return key_channels.zero_rows_without_weight(
        key_weights.reshape(*batch_shape, num_keys), y, query_offset
    )


def why_unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    window_times: WindowTimes | None,
    query_offset: ArrayLike,
) -> str | None:
    """Why the kernel does not take arguments of `dense.attend`, if it does not."""
    del k, v, key_weights, window_times
    if window is not None:
        return "splash attention's windows count tokens, not time"
    if q.dtype.itemsize > 4:
        return f"q is {q.dtype}; splash attention sums in float32"
    for name, value in {
        "scale": scale,
        "softcap": softcap,
        "query_offset": query_offset,
    }.items():
        if isinstance(value, jax.Array):
            return f"{name} is an array; splash attention needs a number"
    return None


def _round_up_to_lanes(length: int) -> int:
    """The least multiple of `LANES` that holds `length`."""
    return key_channels.round_up(length, 0, LANES)


def _to_kernel_layout(x: jax.Array) -> jax.Array:
    """x [B, T, N, H] as [B, N, T, H], T and H filled up to whole tiles."""
    padding = [(0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, -x.shape[3] % LANES)]
    return jnp.moveaxis(jnp.pad(x, padding), 1, 2)


def _make_kernel(
    num_heads: int,
    num_queries: int,
    num_keys: int,
    query_offset: int,
    softcap: float | None,
):
    """The causal kernel: q [N, T, H], scaled, k [K, S, H] and v [K, S, H] to y [N, T, H]."""
    query_block, key_block = (
        math.gcd(n, MAX_BLOCK_SIZE) for n in (num_queries, num_keys)
    )
    causal_mask = splash_attention_mask.CausalMask(
        (num_queries, num_keys), offset=query_offset
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal_mask] * num_heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
    )
