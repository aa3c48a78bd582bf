"""The dense form of attention over weighted keys: plainly right, in O(T S) memory."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import durations as time
from continuous_lm.attention.visibility import visible


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    clock: time.Clock | None,
    first: ArrayLike,
) -> jax.Array:
    """`attention.attend` with everything said, and nothing checked.

    Args:
      q: queries [..., T, K, G, H], grouped by the key/value head that they read.
      k: keys [..., S, K, H].
      v: values [..., S, K, H].
      weights: d [..., S], at least float32.
      scale: of the scores.
      softcap: bound of the scores, or None.
      window: in tokens, or None.
      clock: end times of the keys, for the window.
      first: index of the first query's own key.

    Returns:
      y [..., T, K, G, H] in the dtype of the weights.
    """
    dtype = weights.dtype
    # Axes stand as the products leave them: others would be copies, and in bfloat16 XLA for CPUs
    # knows no others.
    scores = jnp.einsum("...tkgh,...skh->...ktgs", q, k, preferred_element_type=dtype)
    scores = jnp.multiply(scale, scores)
    if softcap is not None:
        scores = jnp.multiply(softcap, jnp.tanh(jnp.divide(scores, softcap)))
    queries = jnp.asarray(first) + jnp.arange(q.shape[-4])
    seen = visible(queries, jnp.arange(k.shape[-3]), clock, window)
    p, total = weighted_exp(scores, weights[..., None, None, None, :], seen[..., None, :, None, :])
    y = jnp.einsum("...ktgs,...skh->...ktgh", p.astype(v.dtype), v, preferred_element_type=dtype)
    return jnp.swapaxes(y / total[..., None], -3, -4)


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
    present, log_weights = log(weights)
    peak = jax.lax.stop_gradient(jnp.max(scores + log_weights, axis=-1, keepdims=True))
    exponent = scores - jnp.where(jnp.isfinite(peak), peak, 0.0)
    p = weights * jnp.exp(bounded(exponent, present))
    total = jnp.sum(p, axis=-1)
    return p, jnp.where(total > 0, total, 1.0)


def log(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether each weight is there at all, and its logarithm: -inf, with no gradient, if not."""
    present = weights >= jnp.finfo(weights.dtype).tiny
    return present, jnp.where(present, jnp.log(jnp.where(present, weights, 1.0)), -jnp.inf)


def bounded(exponent: jax.Array, present: jax.Array) -> jax.Array:
    """Exponents s - m of which exp stays finite.

    A present key has exponent <= -log d. An absent one may exceed any peak; only the derivative
    exp(s - m) for its weight is used.
    """
    return jnp.where(present, exponent, jnp.minimum(exponent, 60.0))
