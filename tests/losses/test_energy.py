"""The energy score against loops, exact expectations and closed forms."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import norm

import continuous_lm as clm
from continuous_lm import losses
from tests.fixtures.differences import check_gradient

energy_score = jax.jit(losses.energy_score, static_argnames="beta")

# Each is another program.
BETAS = (
    1.0,
    *(pytest.param(beta, marks=pytest.mark.slow) for beta in (0.3, 1.7, 1.95)),
)


def draw(seed=0, samples=4, targets=3, width=2, batch=(5,)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, *batch, width))
    return x, rng.normal(size=(targets, *batch, width)) + 0.5


def reference(x, y, beta):
    """One position, pair by pair."""
    across = np.mean([np.linalg.norm(a - b) ** beta for a in x for b in y])
    within = [np.linalg.norm(a - b) ** beta for a, b in itertools.permutations(x, 2)]
    return 2 * across - np.mean(within)


class AgainstLoop(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equals_the_sum_over_pairs(self):
        for beta, samples, targets in [(1.0, 2, 1), (0.3, 4, 3)]:
            x, y = draw(samples=samples, targets=targets)
            score = self.variant(functools.partial(losses.energy_score, beta=beta))
            expected = [reference(x[:, i], y[:, i], beta) for i in range(5)]
            np.testing.assert_allclose(score(x, y), expected, rtol=1e-5, atol=1e-5)


def test_leading_axes_broadcast():
    x, _ = draw(batch=(2, 1))
    _, y = draw(batch=(3,))
    score = losses.energy_score(x, y)
    assert score.shape == (2, 3)
    for i, k in itertools.product(range(2), range(3)):
        np.testing.assert_allclose(
            score[i, k], reference(x[:, i, 0], y[:, k], 1.0), rtol=1e-5
        )
    np.testing.assert_allclose(
        losses.energy_score(y, x)[1, 2], reference(y[:, 2], x[:, 1, 0], 1.0)
    )


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_match_finite_differences(beta):
    with jax.enable_x64(True):
        check_gradient(
            functools.partial(losses.energy_score, beta=beta), *draw(), rtol=1e-6
        )


@pytest.mark.parametrize("beta", BETAS)
def test_points_that_coincide_have_a_gradient(beta):
    x, y = map(jnp.float32, draw())
    x = x.at[1].set(x[0])
    y = y.at[2].set(x[3])
    gradient = jax.jit(
        jax.grad(
            lambda x, y: losses.energy_score(x, y, beta=beta).sum(), argnums=(0, 1)
        )
    )
    for g in gradient(x, y):
        assert jnp.isfinite(g).all()
        assert jnp.abs(g).max() > 0.01
    for g in gradient(jnp.ones_like(x), jnp.ones_like(y)):
        np.testing.assert_array_equal(g, 0.0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_samples", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_unbiased(beta, num_samples):
    """Over all draws of samples from four points, the mean is 2 E|X - Y|^b - E|X - X'|^b."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        points, p, q = rng.normal(size=(4, 2)), *rng.dirichlet(np.ones(4), size=2)
        draws = np.array(list(itertools.product(range(4), repeat=num_samples)))
        pairs = np.array(list(itertools.product(range(4), repeat=2)))
        x, y = points[draws.T][:, :, None], points[pairs.T][:, None]
        scores = energy_score(x, y, beta=beta)  # [draws, pairs]
        mean = p[draws].prod(axis=1) @ scores @ q[pairs].prod(axis=1)
        distances = cdist(points, points) ** beta
        np.testing.assert_allclose(
            mean, 2 * p @ distances @ q - p @ distances @ p, rtol=1e-10
        )


@pytest.mark.parametrize("beta", BETAS)
def test_proper(beta):
    """The exact expectation over models p of five points is least at the truth, and only there."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        points, truth = rng.normal(size=(5, 2)), rng.dirichlet(np.ones(5))
        x = points[np.array(list(itertools.product(range(5), repeat=2))).T]
        scores = energy_score(x[:, :, None], points[None, None], beta=beta) @ truth

        @jax.jit
        def expected(logits):
            p = jax.nn.softmax(logits)
            return jnp.outer(p, p).ravel() @ scores

        at_truth = jnp.log(truth)
        np.testing.assert_allclose(jax.grad(expected)(at_truth), 0.0, atol=1e-12)
        for step in 0.5 * rng.normal(size=(30, 5)):
            assert expected(at_truth + step) > expected(at_truth) + 1e-5


def test_closed_form_of_normals():
    """Twice the CRPS of a normal (Gneiting and Raftery, 2007, section 4.2), by 16000 draws."""
    mean, scale, y = 0.7, 1.3, 1.5
    z = (y - mean) / scale
    crps = scale * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    x = np.random.default_rng(0).normal(mean, scale, size=(8, 2000, 1))
    scores = np.asarray(energy_score(x, np.full((1, 1, 1), y)))
    error = scores.std() / np.sqrt(len(scores))
    assert error < 0.02
    assert abs(scores.mean() - 2 * crps) < 4 * error


@pytest.mark.parametrize(("mean", "scale"), [(0.3, 1.0), (0.0, 1.3), (0.0, 0.8)])
def test_the_true_distribution_has_the_least_score(mean, scale):
    """With as many samples as in training, the difference is many standard errors."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 20000, 2)), rng.normal(size=(4, 20000, 2))
    other = np.asarray(energy_score(mean + scale * x, y) - energy_score(x, y))
    assert other.mean() > 5 * other.std() / np.sqrt(len(other))


def test_memory_does_not_grow_with_pairs():
    x, y = jnp.zeros((16, 64, 32)), jnp.zeros((32, 64, 32))
    gradient = jax.jit(
        jax.grad(lambda x, y: losses.energy_score(x, y).sum(), argnums=(0, 1))
    )
    used = gradient.lower(x, y).compile().memory_analysis().temp_size_in_bytes
    assert used < 16 * 32 * 64 * 32 * 4 / 3


@pytest.mark.parametrize("beta", [0.0, -1.0, 2.0, 3.0, float("nan")])
def test_improper_exponents_are_refused(beta):
    with pytest.raises(clm.InputError, match="beta is"):
        losses.energy_score(*draw(), beta=beta)


@pytest.mark.parametrize(
    ("samples", "targets", "culprit"), [(1, 3, "samples"), (4, 0, "targets")]
)
def test_too_few_samples_are_refused(samples, targets, culprit):
    with pytest.raises(clm.InputError, match=f"{culprit}: got"):
        losses.energy_score(*draw(samples=samples, targets=targets))
