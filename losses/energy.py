"""The energy score: a strictly proper score of a model that can only be sampled."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


def energy_score(
    samples: ArrayLike,
    targets: ArrayLike,
    *,
    beta: float = 1.0,
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
    their differences computed again in the backward pass, so that memory is O(num_targets + Z), not
    O(num_targets Z).

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
    samples, targets = arguments.check(
        samples=(samples, "Z ... W"),
        targets=(targets, "num_targets ... W"),
    )
    num_samples = len(samples)
    num_targets = len(targets)
    if num_samples < 2:
        raise InputError(f"samples are {num_samples}; there must be at least 2")
    if num_targets < 1:
        raise InputError(f"targets are {num_targets}; there must be at least 1")
    num_axes = max(samples.ndim, targets.ndim)
    samples = _insert_leading_axes(samples, num_axes)
    targets = _insert_leading_axes(targets, num_axes)
    sample_target_sums = jax.lax.map(
        lambda sample: _sum_of_distances(sample, targets, beta), samples
    )
    # The distance of a sample from itself is 0, so that it can be among the others.
    sample_sample_sums = jax.lax.map(
        lambda sample: _sum_of_distances(sample, samples, beta), samples
    )
    num_pairs = num_samples * (num_samples - 1)
    return (
        2 * sample_target_sums.mean(axis=0) / num_targets
        - sample_sample_sums.sum(axis=0) / num_pairs
    )


def _insert_leading_axes(draws: jax.Array, num_axes: int) -> jax.Array:
    """Draws [num_draws, ..., W] with axes of size 1 behind the first, `num_axes` in all."""
    missing_axes = range(1, 1 + num_axes - draws.ndim)
    return jnp.expand_dims(draws, tuple(missing_axes))


@jax.checkpoint
def _sum_of_distances(
    point: jax.Array,
    others: jax.Array,
    beta: float,
) -> jax.Array:
    """sum_y |x - y|^beta [...] of x [..., W] and y [num_others, ..., W]; gradient 0 at x = y."""
    squared_distances = jnp.sum(jnp.square(point - others), axis=-1)
    is_apart = squared_distances > 0
    # The inner one keeps the power's gradient finite where the outer one drops it.
    positive_distances = jnp.where(is_apart, squared_distances, 1.0)
    distances = jnp.where(is_apart, positive_distances ** (beta / 2), 0.0)
    return jnp.sum(distances, axis=0)
