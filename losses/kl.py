"""Kullback-Leibler divergence of a latent Gaussian from the standard Gaussian, in nats."""

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
    """Compute KL(N(mean, diag(scale^2)) || N(0, I)) with a lower bound for each dimension.

        sum_w max(floor, (mean_w^2 + scale_w^2 - 1) / 2 - log scale_w)

    A dimension below the floor has no gradient, so training does not push it to the prior and
    collapse it ("free bits", Kingma et al., arXiv:1606.04934; used by CALM, arXiv:2510.27688).

    Args:
      mean: Means [..., W].
      scale: Standard deviations > 0, [..., W].
      floor: Lower bound >= 0 of the divergence of each dimension, in nats.

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit, `floor` is below 0, or (outside jit) a scale is not a
        positive finite number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> losses.gaussian_kl(jnp.array([0.0, 2.0]), jnp.ones(2))
      Array(2., dtype=float32)
      >>> losses.gaussian_kl(jnp.array([0.0, 2.0]), jnp.ones(2), floor=0.5)
      Array(2.5, dtype=float32)
    """
    if not floor >= 0:
        raise InputError(f"floor is {floor}; it must be >= 0 nats")
    mean, scale = arguments.check(
        mean=(mean, "... W"),
        scale=(scale, "... W"),
    )
    arguments.check_positive("scale", scale)
    # Near s = 1, s^2 - 1 cancels; (s - 1)(s + 1) does not.
    nats_of_scale = (scale - 1) * (scale + 1) / 2 - jnp.log(scale)
    nats_by_dimension = jnp.square(mean) / 2 + nats_of_scale
    return jnp.sum(jnp.maximum(nats_by_dimension, floor), axis=-1)
