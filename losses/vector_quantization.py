"""Losses of vector quantization: of codebooks, of commitment, and the entropy of code use."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


class CodeEntropy(NamedTuple):
    """Two entropies of an assignment to E codes, in nats, from 0 to log E."""

    # Mean entropy of a vector's own assignment: 0 when every one is sure.
    per_vector: jax.Array
    # Entropy of the mean assignment: log E when all codes are used alike.
    mean: jax.Array

    def loss(self, diversity: ArrayLike = 1.0) -> jax.Array:
        """per_vector - diversity * mean: least for sure assignments that use all codes alike."""
        return self.per_vector - diversity * self.mean


def codebook_loss(x: ArrayLike, code: ArrayLike) -> jax.Array:
    """|sg(x) - code|^2, which moves codes to the vectors they stand for.

    The second term of equation 3 of van den Oord et al. (arXiv:1711.00937): a sum over the width,
    where some programs take the mean.

    >>> import jax, jax.numpy as jnp
    >>> codebook_loss(jnp.array([1.0, 2.0]), jnp.zeros(2))
    Array(5., dtype=float32)
    >>> jax.grad(codebook_loss, argnums=(0, 1))(jnp.ones(1), jnp.zeros(1))
    (Array([0.], dtype=float32), Array([-2.], dtype=float32))

    Args:
      x: vectors [..., W]; they get no gradient.
      code: the code of each, [..., W].

    Returns:
      squared distances [...], at least float32.

    Raises:
      InputError: if shapes do not fit.
    """
    x, code = arguments.check(
        x=(x, "... W"),
        code=(code, "... W"),
    )
    difference = lax.stop_gradient(x) - code
    return jnp.sum(jnp.square(difference), axis=-1)


def commitment_loss(x: ArrayLike, code: ArrayLike) -> jax.Array:
    """|x - sg(code)|^2, which holds vectors to their codes.

    The third term of equation 3 of van den Oord et al. (arXiv:1711.00937) without its factor beta:
    a sum over the width.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(commitment_loss, argnums=(0, 1))(jnp.ones(1), jnp.zeros(1))
    (Array([2.], dtype=float32), Array([0.], dtype=float32))

    Args:
      x: vectors [..., W].
      code: the code of each, [..., W]; they get no gradient.

    Returns:
      squared distances [...], at least float32.

    Raises:
      InputError: if shapes do not fit.
    """
    return codebook_loss(code, x)


def code_entropy(
    logits: ArrayLike | None = None, *, probabilities: ArrayLike | None = None
) -> CodeEntropy:
    """The entropies of a soft assignment of vectors to codes.

    Their difference is the entropy penalty of Yu et al. (arXiv:2310.05737), which
    lookup-free and other quantizers train on; `loss` gives it. The assignment of a vector x may be
    softmax(-|x - codes|^2 / temperature), say. The means are over all leading axes, and over the
    vectors at hand: those of a small batch have less entropy than the data.

    >>> import jax.numpy as jnp
    >>> entropy = code_entropy(probabilities=jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> print(
    ...     f"{entropy.per_vector:.4f} {entropy.mean:.4f} {entropy.loss():.4f}"
    ... )  # mean: log 2
    0.0000 0.6931 -0.6931

    Args:
      logits: of the assignments, [..., E]; or
      probabilities: [..., E], adding up to 1. One of 0 gets no gradient.

    Returns:
      two scalars, at least float32.

    Raises:
      InputError: if neither or both are given, or, outside of jit, probabilities are none.
    """
    if (logits is None) == (probabilities is None):
        raise InputError("code_entropy takes either logits or probabilities")
    if logits is not None:
        (logits,) = arguments.check(logits=(logits, "... E"))
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        # Of a logit of -inf, log p would make a nan of 0.
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
    """-sum p log p over the last axis, with a gradient of 0 where p is 0."""
    finite_logs = jnp.log(jnp.where(p > 0, p, 1.0))
    return -jnp.sum(p * finite_logs, axis=-1)
