"""Cross-entropy of a distribution over tokens, in nats."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    smoothing: float = 0.0,
) -> jax.Array:
    """-log softmax(logits)[label], by optax, in at least float32.

    With smoothing s the target is (1 - s) onehot(label) + s / V (Szegedy et al., arXiv:1512.00567,
    section 7).

    >>> import jax.numpy as jnp
    >>> nll = cross_entropy(jnp.zeros(4), 3)
    >>> print(f"{nll:.4f}")  # log(4)
    1.3863

    Args:
      logits: [..., V].
      labels: int [...], from 0 to V - 1.
      smoothing: 0 <= s < 1.

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit, smoothing is out of range, or, outside of jit, a label is.
    """
    import optax  # late: it would be half of what importing the package costs

    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing is {smoothing}; it must be from 0 to below 1")
    (logits,) = arguments.check(logits=(logits, "... V"))
    *leading_shape, num_classes = logits.shape
    labels = arguments.check_labels("labels", labels, tuple(leading_shape), num_classes)
    # A logit of 1e4 has no digits left for a loss of 0.1.
    max_logits = jnp.max(logits, axis=-1, keepdims=True)
    logits = logits - jax.lax.stop_gradient(max_logits)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing == 0:  # and a logit of -inf that is no label costs nothing
        return nats
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    uniform_nats = log_normalizer - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * nats + smoothing * uniform_nats
