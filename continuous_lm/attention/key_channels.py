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

NUM_WEIGHT_CHANNELS = 3  # of log d: 8 bits each, together those of float32
# Smaller weights are raised to this in the keys. Such a key has no effect unless its score is 60
# above all others, and the gradient for a weight of 0 is the one here.
MIN_KEY_WEIGHT = 2.0**-100


def append_log_weights(
    q: jax.Array,
    k: jax.Array,
    d: jax.Array,
    *,
    scale: float,
    padded_width: int,
) -> tuple[jax.Array, jax.Array]:
    """Return q [B, T, N, H] and k [B, S, K, H], for weights d [B, S], `padded_width` wide."""
    c = 2.0 ** round(-math.log2(scale))
    missing_weight = jnp.maximum(MIN_KEY_WEIGHT - d, 0.0)
    d = d + lax.stop_gradient(missing_weight)
    x = jnp.log(d) / (scale * c)
    query_channels = jnp.full((*q.shape[:-1], NUM_WEIGHT_CHANNELS), c, q.dtype)
    key_channels = _split_bfloat16(x).astype(k.dtype)[:, :, None, :]
    key_channels = jnp.broadcast_to(key_channels, (*k.shape[:-1], NUM_WEIGHT_CHANNELS))
    return (
        _concatenate_to_width(padded_width, q, query_channels),
        _concatenate_to_width(padded_width, k, key_channels),
    )


def _split_bfloat16(x: jax.Array) -> jax.Array:
    """x as a sum of parts [..., NUM_WEIGHT_CHANNELS] that bfloat16 holds.

    The first has the gradient: that of one channel is that of all.
    """
    remainder = lax.stop_gradient(x)
    parts = []
    for _ in range(NUM_WEIGHT_CHANNELS):
        part = lax.reduce_precision(remainder, exponent_bits=8, mantissa_bits=7)
        remainder = remainder - part
        parts.append(part)
    zero_with_gradient = x - lax.stop_gradient(x)
    parts[0] = parts[0] + zero_with_gradient
    return jnp.stack(parts, axis=-1)


def scale_and_append_weights(
    v: jax.Array,
    d: jax.Array,
    *,
    padded_width: int,
) -> jax.Array:
    """[d v, d] for v [B, S, K, H] and d [B, S], with `padded_width` channels."""
    d = jnp.broadcast_to(d[:, :, None, None], (*v.shape[:-1], 1))
    weighted_values = (d * v).astype(v.dtype)
    return _concatenate_to_width(padded_width, weighted_values, d.astype(v.dtype))


def divide_by_weight_sum(y: jax.Array, head_width: int) -> jax.Array:
    """[y, 1] z to y of `head_width` channels; 0 where z is 0."""
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    weight_sum = y[..., head_width : head_width + 1]
    return y[..., :head_width] / jnp.where(weight_sum > 0, weight_sum, 1.0)


def zero_rows_without_weight(
    key_weights: jax.Array,
    y: jax.Array,
    query_offset: int = 0,
) -> jax.Array:
    """y [..., T, K, G, H], but 0 for queries that see no weight [..., S] at all.

    `query_offset` is the index of the first query's own key.
    """
    is_present = key_weights >= jnp.finfo(key_weights.dtype).tiny
    has_weight = jnp.cumsum(is_present, axis=-1) > 0
    has_weight = has_weight[..., query_offset : query_offset + y.shape[-4]]
    return jnp.where(has_weight[..., None, None, None], y, 0.0)


def round_up(
    width: int,
    extra: int,
    multiple: int,
) -> int:
    """The least multiple that holds `width` channels and `extra` ones."""
    return -(-(width + extra) // multiple) * multiple


def _concatenate_to_width(padded_width: int, *parts: jax.Array) -> jax.Array:
    """The parts side by side, and zeros up to `padded_width` channels."""
    x = jnp.concatenate(parts, axis=-1)
    padding = [(0, 0)] * x.ndim
    padding[-1] = (0, padded_width - x.shape[-1])
    return jnp.pad(x, padding)
