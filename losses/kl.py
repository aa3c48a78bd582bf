"""Kullback-Leibler divergence of a latent Gaussian from the standard one, in nats."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


def gaussian_kl(
    mean: ArrayLike,
    scale: ArrayLike,
    *,
    floor: float = 0.0,
) -> jax.Array:
    """KL(N(mean, diag(scale^2)) || N(0, I)), each dimension clamped from below.

        sum_w max(floor, (mean_w^2 + scale_w^2 - 1) / 2 - log scale_w)

    A dimension below the floor gets no gradient, so that it is not pressed down to the prior and
    collapses ("free bits", Kingma et al., arXiv:1606.04934; so CALM, arXiv:2510.27688).

    >>> import jax.numpy as jnp
    >>> gaussian_kl(jnp.array([0.0, 2.0]), jnp.ones(2))
    Array(2., dtype=float32)
    >>> gaussian_kl(jnp.array([0.0, 2.0]), jnp.ones(2), floor=0.5)
    Array(2.5, dtype=float32)

    Args:
      mean: [..., W].
      scale: standard deviations > 0, [..., W].
      floor: nats >= 0 that each dimension may cost for free.

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit, the floor is below 0, or, outside of jit, a scale is not
        above 0.
    """
    if not floor >= 0:
        raise InputError(f"floor is {floor}; it must be >= 0 nats")
    mean, scale = arguments.check(
        mean=(mean, "... W"),
        scale=(scale, "... W"),
    )
    arguments.check_positive("scale", scale)
    # (s - 1)(s + 1) keeps the digits that s^2 - 1 loses near s = 1.
    nats_of_scale = (scale - 1) * (scale + 1) / 2 - jnp.log(scale)
    nats_by_dimension = jnp.square(mean) / 2 + nats_of_scale
    return jnp.sum(jnp.maximum(nats_by_dimension, floor), axis=-1)
