"""Weights of keys for attention kernels that know none, carried by extra channels of the heads.

In the keys, exact where a kernel sums products in float32, and not with soft-capping:

    scale (q_i . k_j + c x_j) = s_ij + log d_j,    x_j = log d_j / (scale c)

with x_j in parts that bfloat16 holds exactly, one a channel, and c, a power of two near 1 / scale,
in the same channels of the queries. A kernel's gradient for x_j, over d_j, is that for the weight.

In the values, with soft-capping too, rounded once more:

    sum_j p_ij [d_j v_j, d_j] = z_i [y_i, 1],    p = softmax(s)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

PARTS = 3  # of log d: 8 bits each, together those of float32
# What is lighter weighs this much in the keys. It is not seen unless its score is 60 above all
# others, and the gradient for a weight of 0 is the one here.
LEAST = 2.0**-100


def in_keys(
    q: jax.Array, k: jax.Array, d: jax.Array, *, scale: float, width: int
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, N, H] and k [B, S, K, H] with `width` channels in place of H, weights d [B, S]."""
    c = 2.0 ** round(-math.log2(scale))
    d = d + lax.stop_gradient(jnp.maximum(LEAST - d, 0.0))
    x = jnp.log(d) / (scale * c)
    rest, parts = lax.stop_gradient(x), []
    for _ in range(PARTS):
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    parts[0] = parts[0] + (x - lax.stop_gradient(x))  # the gradient of one channel is that of all
    ones = jnp.full((*q.shape[:-1], PARTS), c, q.dtype)
    keys = jnp.stack(parts, axis=-1).astype(k.dtype)[:, :, None, :]
    keys = jnp.broadcast_to(keys, (*k.shape[:-1], PARTS))
    return _widened(width, q, ones), _widened(width, k, keys)


def in_values(v: jax.Array, d: jax.Array, *, width: int) -> jax.Array:
    """[d v, d] for v [B, S, K, H] and d [B, S], with `width` channels."""
    d = jnp.broadcast_to(d[:, :, None, None], (*v.shape[:-1], 1))
    return _widened(width, (d * v).astype(v.dtype), d.astype(v.dtype))


def divided(y: jax.Array, width: int) -> jax.Array:
    """[y, 1] z to y of `width` channels; 0 where z is 0."""
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    z = y[..., width : width + 1]
    return y[..., :width] / jnp.where(z > 0, z, 1.0)


def where_any(weights: jax.Array, y: jax.Array, first: int = 0) -> jax.Array:
    """y [..., T, K, G, H], but 0 for queries that see no weight [..., S] at all.

    `first` is the index of the first query's own key.
    """
    present = jnp.cumsum(weights >= jnp.finfo(weights.dtype).tiny, axis=-1) > 0
    present = present[..., first : first + y.shape[-4]]
    return jnp.where(present[..., None, None, None], y, 0.0)


def room(width: int, extra: int, multiple: int) -> int:
    """The least multiple that holds `width` channels and `extra` ones."""
    return -(-(width + extra) // multiple) * multiple


def _widened(width: int, *parts: jax.Array) -> jax.Array:
    """The parts side by side, and zeros up to `width` channels."""
    x = jnp.concatenate(parts, axis=-1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
