"""Attention over weighted keys by cuDNN's fused kernels, on NVIDIA GPUs: O(T + S) memory.

They know causal masks and grouped queries, but no weights of keys: `channels` carry them. Nor do
they know soft-capping, and their windows count tokens. `jax.nn.dot_product_attention` calls them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.attention import key_channels
from continuous_lm.attention.blocked import in_one_batch
from continuous_lm.attention.visibility import WindowTimes

MULTIPLE = 8  # of which widths must be


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: float,
    softcap: None = None,
    window: None = None,
    clock: WindowTimes | None = None,
    first: int = 0,
) -> jax.Array:
    """What `dense.attend` gives, from such arguments as `refusal` lets through."""
    del softcap, window, clock, first
    batch, (q, k, v, weights) = in_one_batch(q, k, v, weights)
    heads, width = q.shape[2:4], q.shape[4]
    wide = key_channels.room(width, key_channels.PARTS, MULTIPLE)
    q = q.reshape(*q.shape[:2], -1, width)
    q, k = key_channels.in_keys(q, k, weights, scale=scale, width=wide)
    v = jnp.pad(v, [(0, 0), (0, 0), (0, 0), (0, wide - width)])
    # JAX's rule for cuDNN under `jax.vmap` wants an axis in all arrays, cotangents too, or in none.
    never = sum(lax.stop_gradient(x[0, 0, 0, 0]) for x in (q, k, v)) < -jnp.inf
    q, k, v = (jnp.where(never, 0, x) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    y = jnp.where(never, 0, y)[..., :width].reshape(*batch, y.shape[1], *heads, width)
    return key_channels.where_any(weights.reshape(*batch, -1), y)


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: float | jax.Array,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    clock: WindowTimes | None,
    first: ArrayLike,
) -> str | None:
    """Why cuDNN as it is on this machine does not take arguments of `dense.attend`, if so."""
    del clock
    if softcap is not None:
        return "cuDNN has no soft-capping"
    if window is not None:
        return "cuDNN's windows count tokens, not time"
    if q.shape[-4] != k.shape[-3] or not isinstance(first, int):
        return "cuDNN wants a query for every key"
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)}:
        # In float16 the gradients for small weights would vanish.
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cuDNN takes bfloat16"
    if isinstance(scale, jax.Array):
        return "scale is an array; cuDNN needs a number"
    try:  # JAX knows the limits of each GPU and each version
        jax.eval_shape(functools.partial(attend, scale=scale), q, k, v, weights)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
