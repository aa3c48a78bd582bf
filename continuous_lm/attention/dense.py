"""The dense form of attention over weighted keys: plainly right, in O(T S) memory."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.attention.softmax import weighted_exp
from continuous_lm.attention.visibility import WindowTimes, visible


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    clock: WindowTimes | None,
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
