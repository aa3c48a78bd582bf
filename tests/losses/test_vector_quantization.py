"""Divergence from the prior and losses of codebooks: quadrature, closed forms, gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import entropy, norm

import continuous_lm as clm
from continuous_lm import losses
from tests.fixtures.differences import check_gradient


def divergences(mean, scale):
    """KL of each N(mean, scale^2) from N(0, 1), by quadrature."""

    def each(m, s):
        def integrand(x):
            return norm.pdf(x, m, s) * (norm.logpdf(x, m, s) - norm.logpdf(x))

        return quad(integrand, m - 12 * s, m + 12 * s)[0]

    return np.vectorize(each)(mean, scale)


class GaussianKL(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equals_the_integral(self):
        rng = np.random.default_rng(0)
        mean, scale = rng.normal(size=(3, 4)), rng.uniform(0.2, 2.0, (3, 4))
        each = divergences(mean, scale)
        for floor in (0.0, 0.5):
            function = functools.partial(losses.gaussian_kl, floor=floor)
            expected = np.maximum(each, floor).sum(axis=-1)
            assert (each < 0.5).any()
            assert (each > 0.5).any()
            np.testing.assert_allclose(
                self.variant(function)(mean, scale), expected, rtol=1e-5
            )


def test_kl_gradients_match_finite_differences():
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(3, 4)), rng.uniform(0.2, 2.0, (3, 4))
    with jax.enable_x64(True):
        check_gradient(losses.gaussian_kl, mean, scale, rtol=1e-6)


def test_dimensions_below_the_floor_have_no_gradient():
    gradient = jax.grad(
        functools.partial(losses.gaussian_kl, floor=0.5), argnums=(0, 1)
    )
    mean, scale = gradient(jnp.array([0.1, 3.0]), jnp.array([0.9, 2.0]))
    np.testing.assert_allclose(mean, [0.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(scale, [0.0, 1.5], rtol=1e-6)


def test_kl_near_the_prior_is_exact():
    scale = np.float32(1 + np.array([[1e-3], [-1e-3], [1e-2], [-1e-2]]))
    wide = scale.astype(np.float64)
    expected = ((wide**2 - 1) / 2 - np.log(wide))[:, 0]
    np.testing.assert_allclose(
        losses.gaussian_kl(np.zeros((4, 1)), scale), expected, rtol=1e-3
    )
    assert losses.gaussian_kl(np.zeros(3), np.ones(3)) == 0


@pytest.mark.parametrize("floor", [-0.1, float("nan")])
def test_floors_below_zero_are_refused(floor):
    with pytest.raises(clm.InputError, match="floor is"):
        losses.gaussian_kl(np.zeros(3), np.ones(3), floor=floor)


def test_codebook_and_commitment_losses_differ_only_in_gradients():
    rng = np.random.default_rng(0)
    x, code = map(jnp.float32, rng.normal(size=(2, 5, 3)))
    expected = ((x - code) ** 2).sum(axis=-1)
    moved = 2 * (x - code)
    for loss, signs in (
        (losses.codebook_loss, (0, -1)),
        (losses.commitment_loss, (1, 0)),
    ):
        np.testing.assert_allclose(loss(x, code), expected, rtol=1e-6)
        gradients = jax.grad(lambda *a, f=loss: f(*a).sum(), argnums=(0, 1))(x, code)
        for gradient, sign in zip(gradients, signs, strict=True):
            np.testing.assert_allclose(gradient, sign * moved, rtol=1e-6)


class Entropies(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equal_scipy(self):
        logits = 2 * np.random.default_rng(0).normal(size=(3, 4, 5))
        logits[0, 0, 1] = -np.inf
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        each, mean = entropy(p, axis=-1).mean(), entropy(p.mean(axis=(0, 1)))
        for name, values in (("logits", logits), ("probabilities", p)):
            actual = self.variant(lambda a, k=name: losses.code_entropy(**{k: a}))(
                values
            )
            np.testing.assert_allclose(actual, [each, mean], rtol=1e-5)
            np.testing.assert_allclose(actual.loss(2.0), each - 2 * mean, rtol=1e-5)


def test_entropy_gradients():
    logits = np.random.default_rng(0).normal(size=(4, 5))
    with jax.enable_x64(True):
        check_gradient(lambda z: losses.code_entropy(z).loss(0.5), logits, rtol=1e-6)
    masked = jnp.array([[0.0, 1.0, -jnp.inf], [200.0, 0.0, -jnp.inf]])
    gradient = jax.jit(jax.grad(lambda z: losses.code_entropy(z).loss()))
    assert jnp.isfinite(gradient(masked)).all()
    certain = jnp.eye(3)[:2]
    gradient = jax.jit(jax.grad(lambda p: losses.code_entropy(probabilities=p).loss()))
    assert jnp.isfinite(gradient(certain)).all()


def test_entropy_loss_is_least_for_certain_and_even_assignments():
    best = losses.code_entropy(probabilities=jnp.eye(4))
    np.testing.assert_allclose(best, [0.0, np.log(4)], atol=1e-6)
    for worse in (jnp.full((4, 4), 0.25), jnp.eye(4)[jnp.zeros(4, int)]):
        np.testing.assert_allclose(
            losses.code_entropy(probabilities=worse).loss(), 0, atol=1e-6
        )


def test_entropy_requires_either_logits_or_probabilities():
    for arguments in ({}, {"logits": np.zeros(3), "probabilities": np.full(3, 1 / 3)}):
        with pytest.raises(
            clm.InputError, match="exactly one of logits and probabilities"
        ):
            losses.code_entropy(**arguments)
