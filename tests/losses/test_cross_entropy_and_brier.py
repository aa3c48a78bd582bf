"""Cross-entropy and Brier scores: closed forms, exact expectations, and propriety."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import continuous_lm as clm
from continuous_lm import losses
from tests.fixtures.differences import check_gradient


def draw(seed=0, batch=(4, 3), size=6):
    rng = np.random.default_rng(seed)
    return 3 * rng.normal(size=(*batch, size)), rng.integers(0, size, batch)


class CrossEntropy(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equals_the_closed_form(self):
        logits, labels = draw()
        for smoothing in (0.0, 0.1):
            target = (1 - smoothing) * np.eye(6)[labels] + smoothing / 6
            expected = -(target * log_softmax(logits, axis=-1)).sum(axis=-1)
            function = functools.partial(losses.cross_entropy, smoothing=smoothing)
            actual = self.variant(function)(logits, labels)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_cross_entropy_gradients_match_finite_differences():
    logits, labels = draw()
    with jax.enable_x64(True):
        check_gradient(
            lambda z: losses.cross_entropy(z, labels, smoothing=0.1), logits, rtol=1e-6
        )


def test_masked_logits_do_not_change_the_loss_without_smoothing():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    np.testing.assert_allclose(losses.cross_entropy(logits, 1), np.log(2), rtol=1e-6)
    assert losses.cross_entropy(logits, 1, smoothing=0.1) == jnp.inf


def test_huge_logits_are_exact():
    logits = jnp.array([1e4, 1e4 + 1, 0.0])
    expected = np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(losses.cross_entropy(logits, 1), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(clm.InputError, match="smoothing is"):
        losses.cross_entropy(*draw(), smoothing=smoothing)


def test_brier_equals_the_squared_distance():
    logits, labels = draw()
    p = np.asarray(jax.nn.softmax(jnp.float32(logits)))
    expected = ((p - np.eye(6)[labels]) ** 2).sum(axis=-1)
    np.testing.assert_allclose(losses.brier(p, labels), expected, rtol=1e-5)
    assert losses.brier(jnp.eye(3), jnp.arange(3)).max() == 0
    assert losses.brier(jnp.eye(3), jnp.array([1, 2, 0])).min() == 2


def test_brier_is_proper():
    """The expected loss exceeds that of the truth by the squared distance from it."""
    rng = np.random.default_rng(0)
    truth, *others = rng.dirichlet(np.ones(5), size=20)
    labels = np.arange(5)

    def expected(p):
        return losses.brier(np.broadcast_to(p, (5, 5)), labels) @ truth

    for p in others:
        excess = expected(p) - expected(truth)
        np.testing.assert_allclose(
            excess, ((p - truth) ** 2).sum(), rtol=1e-4, atol=1e-6
        )


def all_pairs(p, num_tokens):
    """All pairs of samples of `num_tokens` of three kinds, and the probability of each pair."""
    grams = np.array(list(itertools.product(range(3), repeat=num_tokens)))
    index_pairs = np.array(list(itertools.product(range(len(grams)), repeat=2)))
    return (
        grams,
        grams[index_pairs[:, 0]],
        grams[index_pairs[:, 1]],
        p[index_pairs].prod(axis=1),
    )


@pytest.mark.parametrize("n", [1, 2])
def test_brier_n_is_unbiased(n):
    """The mean over all pairs of samples is 1 - the Brier score of the distribution of n-grams."""
    p = np.random.default_rng(n).dirichlet(np.ones(3**n))
    grams, first, second, weights = all_pairs(p, n)
    references = np.broadcast_to(grams[:, None], (len(grams), *first.shape))
    pairs = (np.broadcast_to(sample, references.shape) for sample in (first, second))
    scores = np.asarray(losses.brier_n(*pairs, references, n=n))
    assert scores.shape == (len(grams), len(weights), 1)
    expected = 1 - losses.brier(np.broadcast_to(p, (len(p), len(p))), np.arange(len(p)))
    np.testing.assert_allclose(scores[..., 0] @ weights, expected, rtol=1e-4, atol=1e-6)


def test_brier_n_is_proper():
    """Over references of the truth too, the greatest mean is the truth's own."""
    rng = np.random.default_rng(0)
    truth, *others = rng.dirichlet(np.ones(9), size=20)

    def expected(p):
        grams, first, second, weights = all_pairs(p, 2)
        references = np.broadcast_to(grams[:, None], (9, *first.shape))
        pairs = (
            np.broadcast_to(sample, references.shape) for sample in (first, second)
        )
        return (
            truth
            @ np.asarray(losses.brier_n(*pairs, references, n=2))[..., 0]
            @ weights
        )

    for p in others:
        difference = expected(truth) - expected(p)
        np.testing.assert_allclose(
            difference, ((p - truth) ** 2).sum(), rtol=1e-4, atol=1e-6
        )


class BrierN(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equals_a_loop(self):
        x, y, truth = np.random.default_rng(0).integers(0, 2, (3, 4, 7))
        for n in (1, 3):
            expected = [
                [
                    float((x[i, t : t + n] == truth[i, t : t + n]).all())
                    + float((y[i, t : t + n] == truth[i, t : t + n]).all())
                    - float((x[i, t : t + n] == y[i, t : t + n]).all())
                    for t in range(8 - n)
                ]
                for i in range(4)
            ]
            scores = self.variant(functools.partial(losses.brier_n, n=n))(x, y, truth)
            assert scores.dtype == jnp.float32
            np.testing.assert_array_equal(scores, expected)


def test_brier_lm_is_the_geometric_mean():
    x, y, truth = np.random.default_rng(0).integers(0, 20, (3, 50, 8))
    x[:30], y[5:35] = truth[:30], truth[5:35]
    means = [float(losses.brier_n(x, y, truth, n=n).mean()) for n in (1, 2, 3, 4)]
    assert 0 < min(means) < max(means) < 1
    expected = 100 * np.prod(means) ** 0.25
    np.testing.assert_allclose(losses.brier_lm(x, y, truth), expected, rtol=1e-5)
    two = losses.brier_lm(x, y, truth, orders=(1, 2))
    np.testing.assert_allclose(two, 100 * np.sqrt(means[0] * means[1]), rtol=1e-5)


def test_brier_lm_of_equal_wrong_samples_is_zero():
    x = jnp.zeros((2, 5), int)
    assert losses.brier_n(x, x, x + 1, n=1).mean() == -1
    assert losses.brier_lm(x, x, x + 1) == 0


@pytest.mark.parametrize("n", [0, 6, 1.0])
def test_lengths_out_of_range_are_refused(n):
    x = np.zeros((2, 5), int)
    with pytest.raises(clm.InputError, match="n is"):
        losses.brier_n(x, x, x, n=n)
    with pytest.raises(clm.InputError, match="orders is empty"):
        losses.brier_lm(x, x, x, orders=())
