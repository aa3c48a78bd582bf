"""Negative log-likelihoods of mixtures, in nats (Bishop, "Mixture Density Networks", 1994)."""

import jax
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.losses.gaussian import gaussian_nll


def mixture_nll(logits: ArrayLike, nlls: ArrayLike) -> jax.Array:
    """-log sum_i w_i exp(-nll_i) with the weights w = softmax(logits).

    A component of logit -inf has no weight and gets no gradient, and neither does one whose own
    loss is inf, as long as another one is finite.

    >>> import jax.numpy as jnp
    >>> nll = mixture_nll(jnp.zeros(2), jnp.array([1.0, jnp.inf]))
    >>> print(f"{nll:.4f}")  # 1 + log(2)
    1.6931

    Args:
      logits: of the weights, [..., X].
      nlls: what x costs under each component, in nats, [..., X].

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit.
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
    """-log sum_i w_i N(x; mean_i, diag(scale_i^2)) with the weights w = softmax(logits).

    >>> import jax.numpy as jnp
    >>> mean = jnp.array([[0.0], [1e6]])  # one component is far away
    >>> nll = gaussian_mixture_nll(jnp.zeros(1), jnp.zeros(2), mean, jnp.ones((2, 1)))
    >>> print(f"{nll:.4f}")  # log(2 pi) / 2 + log(2)
    1.6121

    Args:
      x: [..., W].
      logits: of the weights, [..., X].
      mean: [..., X, W].
      scale: standard deviations > 0, [..., X, W].

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit, or, outside of jit, a scale is not above 0.
    """
    x, logits, mean, scale = arguments.check(
        x=(x, "... W"),
        logits=(logits, "... X"),
        mean=(mean, "... X W"),
        scale=(scale, "... X W"),
    )
    component_nlls = gaussian_nll(x[..., None, :], mean, scale)
    return mixture_nll(logits, component_nlls)
