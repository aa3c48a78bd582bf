"""The energy score: a strictly proper score of a model that can only be sampled."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


def energy_score(
    samples: ArrayLike, targets: ArrayLike, *, beta: float = 1.0
) -> jax.Array:
    """An unbiased estimate of 2 E|X - Y|^beta - E|X - X'|^beta; less is better.

    X and X' are independent draws of the model and Y is one of the data:

        2 / (Z num_targets) sum_{z, j} |x_z - y_j|^beta
          - 1 / (Z (Z - 1)) sum_{z != z'} |x_z - x_z'|^beta

    Its expectation is least when the model is the distribution of the data, and only then, for
    0 < beta < 2; at 2 the mean alone would count. It is twice the score of Gneiting and Raftery
    (2007, section 4.3) with its sign turned, and the energy loss of CALM (Shao et al.,
    arXiv:2510.27688), where the targets are draws of the autoencoder's posterior.

    Two points that coincide add nothing to the gradient. Samples are taken one after the other, and
    their differences computed again in the backward
    pass, so that memory is O(num_targets + Z), not O(num_targets Z).

    >>> import jax.numpy as jnp
    >>> samples = jnp.array([[0.0], [2.0]])
    >>> energy_score(samples, jnp.array([[1.0]]))  # 2 * 1 - 2
    Array(0., dtype=float32)

    Args:
      samples: independent draws of the model, [Z, ..., W] with Z >= 2.
      targets: draws of the data, [num_targets, ..., W] with num_targets >= 1.
      beta: exponent of the Euclidean distance, 0 < beta < 2.

    Returns:
      [...], in units of x to the power of beta, at least float32.

    Raises:
      InputError: if shapes do not fit, there are too few samples, or beta is out of range.
    """
    if not 0 < beta < 2:
        raise InputError(
            f"beta is {beta}; the score is strictly proper for 0 < beta < 2 only"
        )
    x, y = arguments.check(
        samples=(samples, "Z ... W"), targets=(targets, "num_targets ... W")
    )
    for name, array, min_count in (("samples", x, 2), ("targets", y, 1)):
        if len(array) < min_count:
            raise InputError(
                f"{name} are {len(array)}; there must be at least {min_count}"
            )
    ndim = max(x.ndim, y.ndim)
    x, y = (
        draws.reshape(len(draws), *(1,) * (ndim - draws.ndim), *draws.shape[1:])
        for draws in (x, y)
    )
    sample_target_sums = jax.lax.map(
        lambda sample: _sum_of_distances(sample, y, beta), x
    )
    # The distance of a sample from itself is 0, so that it can be among the others.
    sample_sample_sums = jax.lax.map(
        lambda sample: _sum_of_distances(sample, x, beta), x
    )
    num_pairs = len(x) * (len(x) - 1)
    return (
        2 * sample_target_sums.mean(axis=0) / len(y)
        - sample_sample_sums.sum(axis=0) / num_pairs
    )


@jax.checkpoint
def _sum_of_distances(point: jax.Array, others: jax.Array, beta: float) -> jax.Array:
    """sum_y |x - y|^beta [...] of x [..., W] and y [num_others, ..., W]; gradient 0 at x = y."""
    squared_distances = jnp.sum(jnp.square(point - others), axis=-1)
    is_apart = squared_distances > 0
    # The inner one keeps the power's gradient finite where the outer one drops it.
    distances = jnp.where(
        is_apart, jnp.where(is_apart, squared_distances, 1.0) ** (beta / 2), 0.0
    )
    return jnp.sum(distances, axis=0)
