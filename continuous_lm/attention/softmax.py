"""Exponentials of scores under key weights, and their sum: stable, with finite gradients."""

import jax
import jax.numpy as jnp


def weighted_exp(
    scores: jax.Array, weights: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """p = d exp(s - m) for the visible keys (0 for the others), and its sum over keys.

    m is the largest s + log d of a row, so that p <= 1. Gradients are finite down to d = 0: log d
    enters only through m, which cancels and is held constant.

    Args:
      scores: s [..., S].
      weights: d >= 0, broadcastable to the scores.
      visible: mask, broadcastable to the scores.

    Returns:
      p [..., S] and its sum [...]; the sum is 1 where p is 0 throughout.
    """
    scores = jnp.where(visible, scores, -jnp.inf)
    present, log_weights = present_and_log(weights)
    peak = jax.lax.stop_gradient(jnp.max(scores + log_weights, axis=-1, keepdims=True))
    exponent = scores - jnp.where(jnp.isfinite(peak), peak, 0.0)
    p = weights * jnp.exp(clamp_for_absent_keys(exponent, present))
    total = jnp.sum(p, axis=-1)
    return p, jnp.where(total > 0, total, 1.0)


def present_and_log(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether each weight is there at all, and its logarithm: -inf, with no gradient, if not."""
    present = weights >= jnp.finfo(weights.dtype).tiny
    return present, jnp.where(present, jnp.log(jnp.where(present, weights, 1.0)), -jnp.inf)


def clamp_for_absent_keys(exponent: jax.Array, present: jax.Array) -> jax.Array:
    """Exponents s - m of which exp stays finite.

    A present key has exponent <= -log d. An absent one may exceed any peak; only the derivative
    exp(s - m) for its weight is used.
    """
    return jnp.where(present, exponent, jnp.minimum(exponent, 60.0))
