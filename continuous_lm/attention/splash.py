"""Attention over weighted keys by JAX's own TPU kernel, "splash attention": O(T + S) memory.

It knows causal masks, soft-capping and grouped queries, but no weights: `key_channels` carry
them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from continuous_lm.attention import key_channels
from continuous_lm.attention.problem import AttentionProblem, find_array

LANES = 128  # channels and lengths come in multiples of it
MAX_BLOCK_SIZE = 512  # tokens in a block, at most


def attend(problem: AttentionProblem) -> jax.Array:
    """The result of `dense.attend`, for a problem that `why_unsupported` lets through."""
    batch_shape, flat_problem = problem.flatten_batch()
    num_queries, *head_counts, head_width = flat_problem.q.shape[1:]
    query_offset = int(problem.query_offset)
    q, k, v = _carry_weights(flat_problem)
    kernel = _make_kernel(
        num_heads=q.shape[2],
        num_queries=_round_up_to_lanes(num_queries),
        num_keys=_round_up_to_lanes(problem.num_keys),
        query_offset=query_offset,
        softcap=problem.static_softcap,
    )
    y = jax.vmap(kernel)(*map(_to_kernel_layout, (q, k, v)))
    y = jnp.moveaxis(y, 1, 2)[:, :num_queries]
    if problem.softcap is None:
        y = y[..., :head_width]
    else:
        y = key_channels.divide_by_weight_sum(y, head_width)
    return key_channels.zero_rows_without_weight(
        flat_problem.key_weights.reshape(*batch_shape, problem.num_keys),
        y.reshape(*batch_shape, num_queries, *head_counts, head_width),
        query_offset,
    )


def _carry_weights(
    problem: AttentionProblem,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, T, N, H], scaled, k and v [B, S, K, H], with channels that carry the weights.

    The keys carry them, or, with soft-capping, the values.
    """
    q, k, v, key_weights = problem.arrays
    head_width = problem.head_width
    q = (problem.static_scale * q).astype(q.dtype)
    q = q.reshape(*q.shape[:2], -1, head_width)
    if problem.softcap is None:
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
    return q, k, v


def why_unsupported(problem: AttentionProblem) -> str | None:
    """Return the reason why the kernel does not support a problem, or None."""
    if problem.window is not None:
        return "splash attention's windows count tokens, not time"
    if problem.q.dtype.itemsize > 4:
        return f"q is {problem.q.dtype}; splash attention sums in float32"
    name = find_array(
        {
            "scale": problem.scale,
            "softcap": problem.softcap,
            "query_offset": problem.query_offset,
        }
    )
    if name is not None:
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
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The causal kernel: q [N, T, H], scaled, k [K, S, H] and v [K, S, H] to y [N, T, H]."""
    query_block = math.gcd(num_queries, MAX_BLOCK_SIZE)
    key_block = math.gcd(num_keys, MAX_BLOCK_SIZE)
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
