"""Exponentials of scores under key weights, and their sum: stable, with finite gradients."""

import jax
import jax.numpy as jnp


def weighted_exp(
    scores: jax.Array,
    key_weights: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """p = d exp(s - m) for the visible keys (0 for the others), and its sum over keys.

    m is the largest s + log d of a row, so that p <= 1. Gradients are finite down to d = 0: log d
    enters only through m, which cancels and is held constant.

    Args:
      scores: s [..., S].
      key_weights: d >= 0, broadcastable to the scores.
      mask: whether a query sees a key, broadcastable to the scores.

    Returns:
      p [..., S] and its sum [...]; the sum is 1 where p is 0 throughout.
    """
    scores = jnp.where(mask, scores, -jnp.inf)
    is_present, log_key_weights = present_and_log(key_weights)
    row_max = jnp.max(scores + log_key_weights, axis=-1, keepdims=True)
    row_max = jax.lax.stop_gradient(row_max)
    exponent = scores - jnp.where(jnp.isfinite(row_max), row_max, 0.0)
    p = key_weights * jnp.exp(clamp_for_absent_keys(exponent, is_present))
    row_sum = jnp.sum(p, axis=-1)
    return p, jnp.where(row_sum > 0, row_sum, 1.0)


def softcap(x: jax.Array, cap: float | jax.Array | None) -> jax.Array:
    """c tanh(x / c), between -c and c; x itself where the cap c is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def softcap_and_slope(
    x: jax.Array, cap: float | None
) -> tuple[jax.Array, jax.Array | float]:
    """`softcap` and its derivative for x, which is 1 where the cap is None."""
    if cap is None:
        return x, 1.0
    tanh = jnp.tanh(x / cap)
    return cap * tanh, 1.0 - jnp.square(tanh)


def lift_keys(per_key: jax.Array) -> jax.Array:
    """[..., S] as [..., 1, 1, 1, S]: it broadcasts with scores [..., K, T, G, S]."""
    return jnp.expand_dims(per_key, (-4, -3, -2))


def lift_mask(mask: jax.Array) -> jax.Array:
    """[..., T, S] as [..., 1, T, 1, S]: it broadcasts with scores [..., K, T, G, S]."""
    return jnp.expand_dims(mask, (-4, -2))


def present_and_log(key_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whether each weight is nonzero, and its logarithm: -inf, without gradient, at 0."""
    is_present = key_weights >= jnp.finfo(key_weights.dtype).tiny
    log_present_weights = jnp.log(jnp.where(is_present, key_weights, 1.0))
    return is_present, jnp.where(is_present, log_present_weights, -jnp.inf)


def clamp_for_absent_keys(exponent: jax.Array, is_present: jax.Array) -> jax.Array:
    """Exponents s - m of which exp stays finite.

    A present key has exponent <= -log d. An absent one may exceed any peak; only the derivative
    exp(s - m) for its weight is used.
    """
    return jnp.where(is_present, exponent, jnp.minimum(exponent, 60.0))
