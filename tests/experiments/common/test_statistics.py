"""Bootstrap intervals: the numbers of scipy, of means, of ratios, and their cover."""

import numpy as np
import pytest
import scipy.stats

from continuous_lm.experiments.common.statistics import (
    bootstrap_interval,
    bootstrap_means,
    percentile_interval,
)


def scipy_interval(samples, statistic, num_resamples):
    result = scipy.stats.bootstrap(
        samples,
        statistic,
        n_resamples=num_resamples,
        method="percentile",
        paired=len(samples) > 1,
        rng=np.random.default_rng(3),
    )
    return tuple(result.confidence_interval)


def test_a_mean_has_the_interval_of_scipy():
    values = np.random.default_rng(0).normal(3.0, 2.0, 37)
    expected = scipy_interval((values,), np.mean, 500)
    actual = bootstrap_interval(values, seed=3, num_resamples=500)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    other_seed = bootstrap_interval(values, seed=4, num_resamples=500)
    assert not np.allclose(other_seed, expected, rtol=1e-6)


def test_a_ratio_has_the_interval_of_scipy():
    generator = np.random.default_rng(0)
    sums = generator.normal(3.0, 2.0, 25)
    sizes = generator.integers(1, 9, 25)

    def ratio(sums, sizes, axis):
        return sums.sum(axis=axis) / sizes.sum(axis=axis)

    expected = scipy_interval((sums, sizes), ratio, 500)
    actual = bootstrap_interval(sums, sizes, seed=3, num_resamples=500)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    unweighted = bootstrap_interval(sums, seed=3, num_resamples=500)
    assert not np.allclose(unweighted, expected, rtol=1e-3)


def test_columns_share_their_resamples():
    sums = np.random.default_rng(0).normal(size=(11, 3))
    means = bootstrap_means(sums, seed=5)
    for column in range(3):
        alone = bootstrap_means(sums[:, column], seed=5)
        np.testing.assert_allclose(means[:, column], alone, rtol=1e-12)


def test_intervals_cover_the_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values, seed=0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)


def test_a_generator_is_advanced():
    values = np.random.default_rng(0).normal(size=20)
    generator = np.random.default_rng(7)
    first = bootstrap_interval(values, seed=generator)
    second = bootstrap_interval(values, seed=generator)
    assert first == bootstrap_interval(values, seed=7)
    assert second != first


def test_a_single_unit_has_no_width():
    assert bootstrap_interval([2.5], seed=0) == (2.5, 2.5)
    assert percentile_interval(np.full(9, 4.0)) == (4.0, 4.0)
