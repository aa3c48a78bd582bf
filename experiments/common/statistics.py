"""Bootstrap intervals of means (percentile method): one way for all programs.

Observations that belong together, such as the tokens of one window, are summed to one unit first.
Units are drawn with replacement, as many as there are; the mean of such a resample is the sum of
its units over the sum of their sizes. Quantiles of these means bound the interval.
"""

import numpy as np
from numpy.typing import ArrayLike

NUM_RESAMPLES = 1000
INTERVAL_QUANTILES = (0.025, 0.975)

Seed = int | np.random.Generator


def bootstrap_means(
    sums: ArrayLike,
    sizes: ArrayLike | None = None,
    *,
    seed: Seed,
    num_resamples: int = NUM_RESAMPLES,
) -> np.ndarray:
    """Means of resamples, float64 [num_resamples, ...].

    Args:
      sums: the sum of each unit [num_units, ...]; a single observation is its own sum.
      sizes: observations in each unit [num_units]; None for one in each.
      seed: a number, or a generator, which is advanced.
      num_resamples: resamples to draw.
    """
    unit_sums = np.asarray(sums, np.float64)
    num_units = len(unit_sums)
    unit_sizes = np.ones(num_units) if sizes is None else np.asarray(sizes, np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty((num_resamples, *unit_sums.shape[1:]))
    for resample in range(num_resamples):  # all at once would need too much memory
        unit_indices = generator.integers(num_units, size=num_units)
        unit_counts = np.bincount(unit_indices, minlength=num_units)
        means[resample] = unit_counts @ unit_sums / (unit_counts @ unit_sizes)
    return means


def percentile_interval(estimates: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a number, from its estimates by resamples [num_resamples]."""
    low, high = np.quantile(estimates, INTERVAL_QUANTILES)
    return float(low), float(high)


def bootstrap_interval(
    sums: ArrayLike,
    sizes: ArrayLike | None = None,
    *,
    seed: Seed,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """The 95 % interval of a mean; arguments as in `bootstrap_means`, `sums` [num_units]."""
    means = bootstrap_means(sums, sizes, seed=seed, num_resamples=num_resamples)
    return percentile_interval(means)
