"""Vector-quantization losses: codebook loss, commitment loss and code entropy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


class CodeEntropy(NamedTuple):
    """Entropies of a soft assignment of vectors to E codes, in nats, from 0 to log E.

    Attributes:
      per_vector: Mean entropy of the assignments of single vectors; 0 if every assignment is
        certain.
      mean: Entropy of the mean assignment; log E if all codes are used equally.
    """

    per_vector: jax.Array
    mean: jax.Array

    def loss(self, diversity: ArrayLike = 1.0) -> jax.Array:
        """Compute per_vector - diversity * mean, least for certain and equally used codes."""
        return self.per_vector - diversity * self.mean


def codebook_loss(x: ArrayLike, code: ArrayLike) -> jax.Array:
    """Compute |stop_gradient(x) - code|^2, whose gradient moves codes to their vectors.

    This is the second term of equation 3 of van den Oord et al. (arXiv:1711.00937). It sums over
    the width W; some implementations take the mean.

    Args:
      x: Vectors [..., W]; their gradient is 0.
      code: Code of each vector, [..., W].

    Returns:
      Squared distances [...], at least float32.

    Raises:
      InputError: The shapes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> losses.codebook_loss(jnp.array([1.0, 2.0]), jnp.zeros(2))
      Array(5., dtype=float32)
      >>> jax.grad(losses.codebook_loss, argnums=(0, 1))(jnp.ones(1), jnp.zeros(1))
      (Array([0.], dtype=float32), Array([-2.], dtype=float32))
    """
    x, code = arguments.check(
        x=(x, "... W"),
        code=(code, "... W"),
    )
    difference = lax.stop_gradient(x) - code
    return jnp.sum(jnp.square(difference), axis=-1)


def commitment_loss(x: ArrayLike, code: ArrayLike) -> jax.Array:
    """Compute |x - stop_gradient(code)|^2, whose gradient moves vectors to their codes.

    This is the third term of equation 3 of van den Oord et al. (arXiv:1711.00937) without its
    factor beta. It sums over the width W.

    Args:
      x: Vectors [..., W].
      code: Code of each vector, [..., W]; their gradient is 0.

    Returns:
      Squared distances [...], at least float32.

    Raises:
      InputError: The shapes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> jax.grad(losses.commitment_loss, argnums=(0, 1))(jnp.ones(1), jnp.zeros(1))
      (Array([2.], dtype=float32), Array([0.], dtype=float32))
    """
    return codebook_loss(code, x)


def code_entropy(
    logits: ArrayLike | None = None, *, probabilities: ArrayLike | None = None
) -> CodeEntropy:
    """Compute the entropies of a soft assignment of vectors to codes.

    `CodeEntropy.loss` combines them to the entropy penalty of Yu et al. (arXiv:2310.05737), used to
    train lookup-free quantizers. One possible assignment of a vector x is softmax(-|x - codes|^2 /
    temperature). The means are over all leading axes. The mean assignment of a small batch has less
    entropy than that of the data.

    Args:
      logits: Logits of the assignments, [..., E]. Give either `logits` or `probabilities`.
      probabilities: Assignments [..., E]; the last axis sums to 1. A probability of 0 has gradient
        0 in `per_vector`.

    Returns:
      Two scalars, at least float32.

    Raises:
      InputError: Neither or both arguments are given, or (outside jit) `probabilities` are not a
        distribution.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> entropy = losses.code_entropy(probabilities=jnp.eye(2))
      >>> print(f"{entropy.per_vector:.4f}, {entropy.mean:.4f}")  # 0 and log(2)
      0.0000, 0.6931
      >>> print(f"{entropy.loss():.4f}")
      -0.6931
    """
    if (logits is None) == (probabilities is None):
        raise InputError("code_entropy: give exactly one of logits and probabilities")
    if logits is not None:
        (logits,) = arguments.check(logits=(logits, "... E"))
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        # For a logit of -inf, p log p would be 0 * -inf = nan.
        finite_logs = jnp.where(probabilities > 0, log_probabilities, 0.0)
        entropies = -jnp.sum(probabilities * finite_logs, axis=-1)
    else:
        assert probabilities is not None
        (probabilities,) = arguments.check(probabilities=(probabilities, "... E"))
        arguments.check_distribution("probabilities", probabilities)
        entropies = _entropy(probabilities)
    leading_axes = tuple(range(probabilities.ndim - 1))
    mean_probabilities = jnp.mean(probabilities, axis=leading_axes)
    return CodeEntropy(jnp.mean(entropies), _entropy(mean_probabilities))


def _entropy(p: jax.Array) -> jax.Array:
    """Compute -sum p log p over the last axis, with gradient 0 where p is 0."""
    finite_logs = jnp.log(jnp.where(p > 0, p, 1.0))
    return -jnp.sum(p * finite_logs, axis=-1)
