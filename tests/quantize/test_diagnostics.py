"""Diagnostics against NumPy."""

import jax
import numpy as np
import pytest
from scipy import stats

import continuous_lm as clm
from continuous_lm import quantize


def test_code_use():
    rng = np.random.default_rng(0)
    indices = rng.zipf(1.5, (40, 10)) % 50
    counts = np.bincount(indices.ravel(), minlength=64)
    use = quantize.code_use(indices, 64)
    np.testing.assert_array_equal(use.counts, counts)
    np.testing.assert_allclose(use.perplexity, np.exp(stats.entropy(counts)), rtol=1e-5)
    np.testing.assert_allclose(use.used_share, np.mean(counts > 0))


def test_code_use_of_all_codes_and_of_one():
    assert quantize.code_use(np.arange(8), 8).perplexity == pytest.approx(8)
    assert quantize.code_use([3, 3], 8)[1:] == (1.0, 0.125)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_quantization_noise(metric):
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=(30, 5)), rng.normal(size=(20, 5))
    if metric == "euclidean":
        distances = ((x[:, None] - codes) ** 2).sum(-1)
    else:
        lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(codes, axis=1)
        distances = 1 - x @ codes.T / lengths
    first = np.sort(distances, axis=1)
    noise = quantize.quantization_noise(x, codes, metric=metric)
    np.testing.assert_allclose(noise.distance, first[:, 0], atol=1e-5)
    np.testing.assert_allclose(noise.margin, first[:, 1] - first[:, 0], atol=1e-5)


def test_spread():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 25, 6)) @ rng.normal(size=(6, 6)) + 3.0
    rows = x.reshape(100, 6)
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    spread = quantize.spread(x)
    np.testing.assert_allclose(spread.variances, rows.var(0), rtol=1e-5)
    np.testing.assert_allclose(
        spread.effective_rank, np.exp(stats.entropy(values)), rtol=1e-5
    )


def test_spread_of_collapsed_vectors():
    rng = np.random.default_rng(0)
    line = rng.normal(size=(200, 1)) * np.array([1.0, 2.0, -1.0])
    assert quantize.spread(line).effective_rank == pytest.approx(1.0, abs=1e-4)
    assert quantize.spread(np.ones((10, 3))).effective_rank == 0
    np.testing.assert_array_equal(quantize.spread(np.ones((10, 3))).variances, 0)
    even = quantize.spread(rng.normal(size=(20_000, 3)))
    assert even.effective_rank == pytest.approx(3.0, abs=1e-3)


def test_works_inside_of_jit():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(quantize.spread)(x).effective_rank,
        quantize.spread(x).effective_rank,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize.code_use([0, 8], 8), "indices[1] is 8"),
        (lambda: quantize.code_use([0.5], 8), "must hold integers"),
        (lambda: quantize.code_use([0], 0), "num_codes is 0"),
        (lambda: quantize.code_use(np.zeros(0, int), 8), "indices are empty"),
        (
            lambda: quantize.quantization_noise(np.ones(3), np.ones((1, 3))),
            "at most 1, the number of codes",
        ),
        (lambda: quantize.spread(np.ones((0, 3))), "x has shape [0, 3]"),
        (lambda: quantize.spread([[1.0, np.nan]]), "x[0, 1] is nan"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(clm.InputError) as refused:
        call()
    assert message in str(refused.value)
