"""Mixtures against scipy, and far from where their components are."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm

from continuous_lm import losses
from tests.fixtures.differences import check_gradient

gaussian_mixture_nll = jax.jit(losses.gaussian_mixture_nll)


def draw(seed=0, components=4, width=3, batch=(5,)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*batch, width))
    logits = rng.normal(size=(*batch, components))
    mean = rng.normal(size=(*batch, components, width))
    scale = rng.uniform(0.3, 2.0, (*batch, components, width))
    return x, logits, mean, scale


def reference(x, logits, mean, scale):
    x, logits, mean, scale = (
        np.asarray(a, np.float64) for a in (x, logits, mean, scale)
    )
    log_weights = logits - logsumexp(logits, axis=-1, keepdims=True)
    parts = norm.logpdf(x[..., None, :], mean, scale).sum(axis=-1)
    return -logsumexp(log_weights + parts, axis=-1)


class AgainstScipy(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equals_the_density(self):
        for components in (4,):
            args = draw(components, components)
            actual = self.variant(losses.gaussian_mixture_nll)(*map(jnp.float32, args))
            np.testing.assert_allclose(actual, reference(*args), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(-1e3, 1e3), st.permutations(range(4)))
def test_order_and_common_logits_have_no_effect(seed, shift, order):
    x, logits, mean, scale = draw(seed)
    y = gaussian_mixture_nll(
        x,
        np.float32(logits + shift)[..., order],
        mean[..., order, :],
        scale[..., order, :],
    )
    expected = reference(x, np.float32(logits + shift), mean, scale)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


def test_leading_axes_broadcast():
    x, logits, mean, scale = draw(batch=(2, 3))
    y = gaussian_mixture_nll(x[:, :1], logits[0], mean[1, 2], scale)
    full = [
        np.broadcast_to(a, (2, 3, *a.shape[-k:]))
        for a, k in ((x[:, :1], 1), (logits[0], 1))
    ]
    expected = reference(*full, np.broadcast_to(mean[1, 2], mean.shape), scale)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        check_gradient(losses.gaussian_mixture_nll, *draw(batch=(2,)))


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 2, 3))
def gradients(*args):
    return losses.gaussian_mixture_nll(*args).sum()


@pytest.mark.parametrize("distance", [1e2, 1e6, 1e15])
def test_distant_components_have_no_effect(distance):
    x, logits, mean, scale = map(jnp.float32, draw())
    far = mean.at[:, 1].add(distance)
    left = [jnp.delete(a, 1, axis=1) for a in (mean, scale)]
    weight = jax.nn.log_softmax(logits)[:, 1]
    expected = gaussian_mixture_nll(x, jnp.delete(logits, 1, axis=1), *left)
    y = gaussian_mixture_nll(x, logits, far, scale)
    np.testing.assert_allclose(
        y, expected - jnp.log1p(-jnp.exp(weight)), rtol=1e-5, atol=1e-5
    )
    for gradient in gradients(x, logits, far, scale):
        assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients(x, logits, far, scale)[2][:, 1], 0.0)


def test_far_from_all_components():
    """Every density underflows, and the loss and its gradient are right all the same."""
    x, logits, mean, scale = map(jnp.float32, draw())
    x = x + 1e4
    y = gaussian_mixture_nll(x, logits, mean, scale)
    np.testing.assert_allclose(y, reference(x, logits, mean, scale), rtol=1e-5)
    gradient = gradients(x, logits, mean, scale)
    assert all(jnp.isfinite(g).all() for g in gradient)
    assert (gradient[0] > 0).all()  # back to where the components are


def test_a_component_without_weight_is_not_there():
    x, logits, mean, scale = map(jnp.float32, draw())
    masked = logits.at[:, 2].set(-jnp.inf)
    expected = gaussian_mixture_nll(
        x, *(jnp.delete(a, 2, axis=1) for a in (logits, mean, scale))
    )
    y = gaussian_mixture_nll(x, masked, mean, scale)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    for gradient in gradients(x, masked, mean, scale):
        assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients(x, masked, mean, scale)[1][:, 2], 0.0)


def test_any_components():
    """A Laplace density and a Gaussian, by their own losses."""
    x = np.linspace(-3, 3, 13)
    nlls = np.stack([np.abs(x) + np.log(2), -norm.logpdf(x)], axis=-1)
    expected = -np.log(0.25 * np.exp(-nlls[:, 0]) + 0.75 * np.exp(-nlls[:, 1]))
    y = losses.mixture_nll(np.log([1.0, 3.0]), nlls)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_integrates_to_one(width):
    model = draw(3, 3, width, batch=())[1:]
    axis = np.linspace(-12, 12, 241)
    grid = np.stack(np.meshgrid(*[axis] * width), axis=-1)
    density = np.exp(-np.asarray(gaussian_mixture_nll(grid, *model), np.float64))
    np.testing.assert_allclose(density.sum() * 0.1**width, 1.0, rtol=1e-4)


def test_proper():
    """The expected loss, by quadrature, has its minimum at the truth."""
    with jax.enable_x64(True):
        grid = jnp.linspace(-15, 15, 3001)[:, None]
        true = list(map(jnp.asarray, draw(5, 2, 1, batch=())[1:]))
        weights = jnp.exp(-gaussian_mixture_nll(grid, *true)) * 0.01

        @jax.jit
        def expected(logits, mean, scale):
            return jnp.sum(weights * gaussian_mixture_nll(grid, logits, mean, scale))

        for gradient in jax.grad(expected, argnums=(0, 1, 2))(*true):
            np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
        least = expected(*true)
        for seed in range(20):
            rng = np.random.default_rng(seed)
            step = [0.3 * rng.normal(size=a.shape) for a in true[:2]]
            scale = true[2] * np.exp(0.3 * rng.normal(size=true[2].shape))
            assert expected(true[0] + step[0], true[1] + step[1], scale) > least + 1e-4
