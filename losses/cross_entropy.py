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
    """Compute -log softmax(logits)[label] in nats, by optax, in at least float32.

    With smoothing s the target distribution is (1 - s) onehot(label) + s / V (Szegedy et al.,
    arXiv:1512.00567, section 7).

    Args:
      logits: Logits [..., V].
      labels: Integers [...] from 0 to V - 1.
      smoothing: Label smoothing s, 0 <= s < 1.

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit, `smoothing` is out of range, or (outside jit) a label is
        out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> nats = losses.cross_entropy(jnp.zeros(4), 3)
      >>> print(f"{nats:.4f}")  # log(4)
      1.3863
    """
    import optax  # imported here because it takes half of the package's import time

    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing is {smoothing}; it must be in [0, 1)")
    (logits,) = arguments.check(logits=(logits, "... V"))
    *leading_shape, num_classes = logits.shape
    labels = arguments.check_labels("labels", labels, tuple(leading_shape), num_classes)
    # Near 1e4 float32 resolves 1e-3, too coarse for a loss of 0.1: subtract the maximum first.
    max_logits = jnp.max(logits, axis=-1, keepdims=True)
    logits = logits - jax.lax.stop_gradient(max_logits)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing == 0:  # below, a logit of -inf would give 0 * inf = nan
        return nats
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    uniform_nats = log_normalizer - jnp.mean(logits, axis=-1)
    return (1 - smoothing) * nats + smoothing * uniform_nats
