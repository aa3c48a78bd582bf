"""Attention as an integral over time: every key counts as long as its token lasts.

    y_i = sum_{j <= i} d_j exp(s_ij) v_j / sum_{j <= i} d_j exp(s_ij),
    s_ij = softcap(scale q_i . k_j)

With d = 1 this is causal softmax attention; with d the durations of the tokens it is the continuous
transformer of Marro et al. (arXiv:2504.03933, section 3); with d any quadrature weights it
integrates any sampled signal. Adding log d to the logits is the same, but has no gradient at d = 0.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import durations as time
from continuous_lm.errors import InputError


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: ArrayLike | None = None,
    steps: jax.Array | None = None,
) -> jax.Array:
    """Causal attention over weighted keys, in the dense form: O(T S) memory.

    Causality is by index: query i is the token of key S - T + i and sees the keys up to it,
    whatever their durations. Scores, weights and sums are held in at least float32.

    Args:
      q: queries [..., T, N, H], rotated.
      k: keys [..., S, K, H], rotated; K divides N.
      v: values [..., S, K, H].
      weights: d >= 0 of each key, [..., S]; all 1 if left out.
      scale: of the scores; 1 / sqrt(H) if left out.
      softcap: bound c of the scores, c tanh(s / c), before they are weighted.
      window: a key is visible while the time since its end is below this, in tokens.
      steps: time [..., S] from the end of the key before to the end of this one, for the window;
        the weights if left out.

    Returns:
      y [..., T, N, H] in the dtype of q. A query that sees no weight at all has no value: it
      gives 0 (callers that know the weights refuse them).

    Raises:
      InputError: if shapes do not fit.
    """
    _check_shapes(q, k, v, weights, steps)
    *_, num_heads, width = q.shape
    num_kv_heads = k.shape[-2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    weights = jnp.ones(k.shape[-3], dtype) if weights is None else weights.astype(dtype)

    q_grouped = q.reshape(*q.shape[:-2], num_kv_heads, num_heads // num_kv_heads, width)
    scores = scale * jnp.einsum(
        "...tkgh,...skh->...kgts", q_grouped, k, preferred_element_type=dtype
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = visible(q.shape[-3], weights if steps is None else steps.astype(dtype), window)
    p, total = weighted_exp(scores, weights[..., None, None, None, :], seen[..., None, None, :, :])
    y = jnp.einsum("...kgts,...skh->...tkgh", p.astype(v.dtype), v, preferred_element_type=dtype)
    y = y / jnp.moveaxis(total, -1, -3)[..., None]
    return y.reshape(*y.shape[:-3], num_heads, width).astype(q.dtype)


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
    tiny = jnp.finfo(scores.dtype).tiny
    scores = jnp.where(visible, scores, -jnp.inf)
    present = weights >= tiny
    logits = jnp.where(present, scores + jnp.log(jnp.where(present, weights, 1.0)), -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exponent = scores - jnp.where(jnp.isfinite(peak), peak, 0.0)
    # A present key has exponent <= -log d. An absent one may exceed any peak; only its derivative
    # exp(s - m) is used, and the bound keeps that finite.
    exponent = jnp.where(present, exponent, jnp.minimum(exponent, 60.0))
    p = weights * jnp.exp(exponent)
    total = jnp.sum(p, axis=-1)
    return p, jnp.where(total > 0, total, 1.0)


def visible(num_queries: int, steps: jax.Array, window: ArrayLike | None) -> jax.Array:
    """Which key each query sees: bool [T, S], or [..., T, S] with a window."""
    num_keys = steps.shape[-1]
    queries = jnp.arange(num_keys - num_queries, num_keys)
    causal = jnp.arange(num_keys) <= queries[:, None]
    if window is None:
        return causal
    clock = time.clock(jax.lax.stop_gradient(steps))
    distance = time.elapsed(clock, queries, jnp.arange(num_keys))
    # A few ulp inside the edge: a distance that should equal the window never falls inside it.
    return causal & (distance < window * (1.0 - 4.0 * jnp.finfo(steps.dtype).eps))


def _check_shapes(q, k, v, weights, steps) -> None:
    if q.ndim < 3 or k.shape != v.shape or k.ndim < 3 or q.shape[-1] != k.shape[-1]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they must be"
            " [..., T, N, H], [..., S, K, H] and [..., S, K, H]"
        )
    if q.shape[-2] % k.shape[-2]:
        raise InputError(f"{k.shape[-2]} key/value heads do not divide {q.shape[-2]} query heads")
    if q.shape[-3] > k.shape[-3]:
        raise InputError(
            f"{q.shape[-3]} queries for {k.shape[-3]} keys; queries are the last tokens of the keys"
        )
    for name, array in (("weights", weights), ("steps", steps)):
        if array is not None and (array.ndim < 1 or array.shape[-1] != k.shape[-3]):
            raise InputError(
                f"{name} has shape {list(array.shape)}; it must be [..., {k.shape[-3]}]"
            )
