"""Negative log-likelihoods of mixtures, in nats (Bishop, "Mixture Density Networks", 1994)."""

import jax
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.losses.gaussian import gaussian_nll


def mixture_nll(logits: ArrayLike, nlls: ArrayLike) -> jax.Array:
    """Compute -log sum_i w_i exp(-nll_i) with the weights w = softmax(logits).

    A component with logit -inf has weight 0 and gradient 0. The gradient of a component with nll
    inf is also 0 if another component is finite.

    Args:
      logits: Logits of the weights, [..., X].
      nlls: Negative log-likelihood of x under each component, in nats, [..., X].

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> nats = losses.mixture_nll(jnp.zeros(2), jnp.array([1.0, jnp.inf]))
      >>> print(f"{nats:.4f}")  # 1 + log(2)
      1.6931
    """
    logits, nlls = arguments.check(
        logits=(logits, "... X"),
        nlls=(nlls, "... X"),
    )
    log_weights = jax.nn.log_softmax(logits, axis=-1)
    return -jax.nn.logsumexp(log_weights - nlls, axis=-1)


def gaussian_mixture_nll(
    x: ArrayLike,
    logits: ArrayLike,
    mean: ArrayLike,
    scale: ArrayLike,
) -> jax.Array:
    """Compute -log sum_i w_i N(x; mean_i, diag(scale_i^2)) with w = softmax(logits).

    Args:
      x: Vectors [..., W].
      logits: Logits of the weights, [..., X].
      mean: Means of the components, [..., X, W].
      scale: Standard deviations > 0, [..., X, W].

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a scale is not a positive finite number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> x, logits = jnp.zeros(1), jnp.zeros(2)
      >>> mean = jnp.array([[0.0], [1e6]])  # the second component is far away
      >>> nats = losses.gaussian_mixture_nll(x, logits, mean, jnp.ones((2, 1)))
      >>> print(f"{nats:.4f}")  # log(2 pi) / 2 + log(2)
      1.6121
    """
    x, logits, mean, scale = arguments.check(
        x=(x, "... W"),
        logits=(logits, "... X"),
        mean=(mean, "... X W"),
        scale=(scale, "... X W"),
    )
    component_nlls = gaussian_nll(x[..., None, :], mean, scale)
    return mixture_nll(logits, component_nlls)
