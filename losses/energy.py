"""Energy score: a strictly proper score of a model that can be sampled but has no density."""

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
    """Estimate 2 E|X - Y|^beta - E|X - X'|^beta without bias; lower is better.

    X and X' are independent samples of the model and Y is a sample of the data. The estimate is

        2 / (Z num_targets) sum_{z, j} |x_z - y_j|^beta
          - 1 / (Z (Z - 1)) sum_{z != z'} |x_z - x_z'|^beta

    For 0 < beta < 2 its expectation is least only if the model has the distribution of the data. At
    beta = 2 it would depend only on the mean. The score is minus twice that of Gneiting and Raftery
    (2007, section 4.3). It is the energy loss of CALM (Shao et al., arXiv:2510.27688), where the
    targets are samples of the autoencoder's posterior.

    Two points that coincide contribute a gradient of 0. Samples are processed sequentially and
    their distances are recomputed in the backward pass. Memory is therefore O(num_targets + Z)
    instead of O(num_targets Z).

    Args:
      samples: Independent samples of the model, [Z, ..., W] with Z >= 2.
      targets: Samples of the data, [num_targets, ..., W] with num_targets >= 1.
      beta: Exponent of the Euclidean distance, 0 < beta < 2.

    Returns:
      Scores [...], in the unit of x to the power of beta, at least float32.

    Raises:
      InputError: The shapes do not fit, there are too few samples or targets, or `beta` is out of
        range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> samples = jnp.array([[0.0], [2.0]])
      >>> losses.energy_score(samples, jnp.array([[1.0]]))  # 2 * 1 - 2
      Array(0., dtype=float32)
    """
    if not 0 < beta < 2:
        raise InputError(
            f"beta is {beta}; it must be in (0, 2), where the score is strictly proper"
        )
    samples, targets = arguments.check(
        samples=(samples, "Z ... W"),
        targets=(targets, "num_targets ... W"),
    )
    num_samples = len(samples)
    num_targets = len(targets)
    if num_samples < 2:
        raise InputError(f"samples: got {num_samples}; at least 2 are required")
    if num_targets < 1:
        raise InputError(f"targets: got {num_targets}; at least 1 is required")
    num_axes = max(samples.ndim, targets.ndim)
    samples = _insert_leading_axes(samples, num_axes)
    targets = _insert_leading_axes(targets, num_axes)
    sample_target_sums = jax.lax.map(
        lambda sample: _sum_of_distances(sample, targets, beta), samples
    )
    # The sum may include the sample itself: its distance is 0.
    sample_sample_sums = jax.lax.map(
        lambda sample: _sum_of_distances(sample, samples, beta), samples
    )
    num_pairs = num_samples * (num_samples - 1)
    return (
        2 * sample_target_sums.mean(axis=0) / num_targets
        - sample_sample_sums.sum(axis=0) / num_pairs
    )


def _insert_leading_axes(samples: jax.Array, num_axes: int) -> jax.Array:
    """Insert axes of size 1 behind the first axis of [num_samples, ..., W].

    The result has `num_axes` axes.
    """
    missing_axes = range(1, 1 + num_axes - samples.ndim)
    return jnp.expand_dims(samples, tuple(missing_axes))


@jax.checkpoint
def _sum_of_distances(
    point: jax.Array,
    others: jax.Array,
    beta: float,
) -> jax.Array:
    """Compute sum_y |x - y|^beta [...], with gradient 0 at x = y.

    Args:
      point: x [..., W].
      others: y [num_others, ..., W].
      beta: Exponent of the distance.
    """
    squared_distances = jnp.sum(jnp.square(point - others), axis=-1)
    is_apart = squared_distances > 0
    # Two selections: the first keeps the gradient of the power finite (0 * inf would be nan),
    # the second sets the distance and its gradient to 0.
    positive_distances = jnp.where(is_apart, squared_distances, 1.0)
    distances = jnp.where(is_apart, positive_distances ** (beta / 2), 0.0)
    return jnp.sum(distances, axis=0)
