"""Deletion curves: an objective as tokens are removed in the order of an attribution."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.analysis.attribution import (
    Objective,
    as_jit_argument,
    check_path,
    evaluate,
)
from continuous_lm.errors import InputError

__all__ = ["DeletionCurve", "deletion_curve"]


class DeletionCurve(NamedTuple):
    """Values of f as tokens are removed, the most important first.

    Attributes:
      order: indices of the removed tokens, int [num_removed].
      values: f after removing 0, 1, ..., num_removed of them, float64 [num_removed + 1].
    """

    order: np.ndarray
    values: np.ndarray

    @property
    def area(self) -> float:
        """Mean of f less its first value, by the trapezoid rule over the share that is gone.

        The lower, the sooner f falls: the better the order. In the unit of f.
        """
        share_of_token = 1.0 / max(len(self.order), 1)
        return float(np.trapezoid(self.values - self.values[0], dx=share_of_token))


def deletion_curve(
    objective: Objective,
    durations: ArrayLike,
    attribution: ArrayLike,
    baseline: ArrayLike | None = None,
    *,
    batch_size: int = 16,
) -> DeletionCurve:
    """Set tokens to their baseline in the order of an attribution, and evaluate f.

    Args:
      objective: f, durations [T] -> a scalar.
      durations: initial durations, [T].
      attribution: attribution of each token [T]. The largest is removed first, and the earlier one
        of two equals.
      baseline: durations of removed tokens [T], as in `integrated_gradients`. Tokens that already
        have this duration are not counted.
      batch_size: durations in one batch.

    Raises:
      InputError: if an array does not fit.
    """
    end, baseline = check_path(durations, baseline)
    importance = np.asarray(attribution, np.float64)
    if importance.shape != end.shape or not np.isfinite(importance).all():
        raise InputError(
            f"attribution has shape {list(importance.shape)}; it must be {list(end.shape)} finite"
            " numbers, one for each token"
        )
    order = np.argsort(-importance, kind="stable")
    order = order[np.asarray(end != baseline)[order]]
    rank = np.full(len(end), len(end))
    rank[order] = np.arange(len(order))
    is_removed = rank < np.arange(len(order) + 1)[:, None]
    rows = jnp.where(is_removed, baseline, end)
    objective_values = evaluate(as_jit_argument(objective), rows, batch_size)
    return DeletionCurve(order, np.asarray(objective_values, np.float64))
