"""The dense form of attention over weighted keys: plainly right, in O(T S) memory."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.attention.softmax import weighted_exp
from continuous_lm.attention.visibility import WindowTimes, visibility_mask


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    window_times: WindowTimes | None,
    query_offset: ArrayLike,
) -> jax.Array:
    """`attention.attend` with everything said, and nothing checked.

    Args:
      q: queries [..., T, K, G, H], grouped by the key/value head that they read.
      k: keys [..., S, K, H].
      v: values [..., S, K, H].
      key_weights: d [..., S], at least float32.
      scale: of the scores.
      softcap: bound of the scores, or None.
      window: in tokens, or None.
      window_times: end times of the keys, for the window.
      query_offset: index of the first query's own key.

    Returns:
      y [..., T, K, G, H] in the dtype of the weights.
    """
    dtype = key_weights.dtype
    # Axes stand as the products leave them: others would be copies, and in bfloat16 XLA for CPUs
    # knows no others.
    scores = jnp.einsum("...tkgh,...skh->...ktgs", q, k, preferred_element_type=dtype)
    scores = jnp.multiply(scale, scores)
    if softcap is not None:
        scores = jnp.multiply(softcap, jnp.tanh(jnp.divide(scores, softcap)))
    query_indices = jnp.asarray(query_offset) + jnp.arange(q.shape[-4])
    mask = visibility_mask(query_indices, jnp.arange(k.shape[-3]), window_times, window)
    p, row_sum = weighted_exp(
        scores, key_weights[..., None, None, None, :], mask[..., None, :, None, :]
    )
    y = jnp.einsum(
        "...ktgs,...skh->...ktgh", p.astype(v.dtype), v, preferred_element_type=dtype
    )
    return jnp.swapaxes(y / row_sum[..., None], -3, -4)
