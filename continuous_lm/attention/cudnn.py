"""Attention over weighted keys by cuDNN's fused kernels, on NVIDIA GPUs: O(T + S) memory.

They know causal masks and grouped queries, but no weights of keys: `key_channels` carry them. Nor
do they know soft-capping, and their windows count tokens. `jax.nn.dot_product_attention` calls
them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.attention import key_channels
from continuous_lm.attention.blocked import flatten_batch
from continuous_lm.attention.visibility import WindowTimes

WIDTH_MULTIPLE = 8  # of which widths must be


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: float,
    softcap: None = None,
    window: None = None,
    window_times: WindowTimes | None = None,
    query_offset: int = 0,
) -> jax.Array:
    """What `dense.attend` gives, from such arguments as `why_unsupported` lets through."""
    del softcap, window, window_times, query_offset
    batch_shape, (q, k, v, key_weights) = flatten_batch(q, k, v, key_weights)
    head_counts, head_width = q.shape[2:4], q.shape[4]
    padded_width = key_channels.round_up(
        head_width, key_channels.NUM_WEIGHT_CHANNELS, WIDTH_MULTIPLE
    )
    q = q.reshape(*q.shape[:2], -1, head_width)
    q, k = key_channels.append_log_weights(
        q, k, key_weights, scale=scale, padded_width=padded_width
    )
    v = jnp.pad(v, [(0, 0), (0, 0), (0, 0), (0, padded_width - head_width)])
    # JAX's rule for cuDNN under `jax.vmap` wants an axis in all arrays, cotangents too, or in none.
    always_false = sum(lax.stop_gradient(x[0, 0, 0, 0]) for x in (q, k, v)) < -jnp.inf
    q, k, v = (jnp.where(always_false, 0, x) for x in (q, k, v))
    y = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
    )
    y = jnp.where(always_false, 0, y)[..., :head_width].reshape(
        *batch_shape, y.shape[1], *head_counts, head_width
    )
    return key_channels.zero_rows_without_weight(
        key_weights.reshape(*batch_shape, -1), y
    )


def why_unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: float | jax.Array,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    window_times: WindowTimes | None,
    query_offset: ArrayLike,
) -> str | None:
    """Why cuDNN as it is on this machine does not take arguments of `dense.attend`, if so."""
    del window_times
    if softcap is not None:
        return "cuDNN has no soft-capping"
    if window is not None:
        return "cuDNN's windows count tokens, not time"
    if q.shape[-4] != k.shape[-3] or not isinstance(query_offset, int):
        return "cuDNN wants a query for every key"
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        # In float16 the gradients for small weights would vanish.
        return (
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cuDNN takes bfloat16"
        )
    if isinstance(scale, jax.Array):
        return "scale is an array; cuDNN needs a number"
    try:  # JAX knows the limits of each GPU and each version
        jax.eval_shape(functools.partial(attend, scale=scale), q, k, v, key_weights)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
