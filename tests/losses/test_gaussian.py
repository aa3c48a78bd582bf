"""Gaussian likelihoods against scipy, finite differences and integrals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from continuous_lm import losses
from tests.fixtures.differences import check_gradient


def draw(seed=0, width=5, rank=2, batch=(3,)):
    """x, mean, scale, factor and a Cholesky factor, in float64."""
    rng = np.random.default_rng(seed)
    x, mean = rng.normal(size=(2, *batch, width))
    scale = rng.uniform(0.3, 2.0, (*batch, width))
    factor = rng.normal(size=(*batch, width, rank))
    cholesky = np.tril(rng.normal(size=(*batch, width, width)), -1) / np.sqrt(width)
    cholesky[..., range(width), range(width)] = rng.uniform(0.3, 2.0, (*batch, width))
    return x, mean, scale, factor, cholesky


def covariances(scale, factor, cholesky):
    """The covariance [..., W, W] that each of the three losses means."""
    diagonal = scale[..., None] ** 2 * np.eye(scale.shape[-1])
    return {
        "diagonal": diagonal,
        "low rank": factor @ np.swapaxes(factor, -1, -2) + diagonal,
        "full": cholesky @ np.swapaxes(cholesky, -1, -2),
    }


def nll(kind, x, mean, scale, factor, cholesky):
    match kind:
        case "diagonal":
            return losses.gaussian_nll(x, mean, scale)
        case "low rank":
            return losses.low_rank_gaussian_nll(x, mean, scale, factor)
        case _:
            return losses.full_gaussian_nll(x, mean, cholesky)


USED = {"diagonal": (0, 1, 2), "low rank": (0, 1, 2, 3), "full": (0, 1, 4)}  # of draw
KINDS = tuple(USED)


def _placed(args, places):
    """All arguments of `nll`, of those that it uses."""
    return [dict(zip(places, args, strict=True)).get(i) for i in range(5)]


class AgainstScipy(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_equals_the_density(self):
        for kind in KINDS:
            arrays = draw()
            x, mean, *others = arrays
            expected = [
                -multivariate_normal(m, c).logpdf(v)
                for v, m, c in zip(x, mean, covariances(*others)[kind], strict=True)
            ]
            actual = self.variant(functools.partial(nll, kind))(
                *map(jnp.float32, arrays)
            )
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "rank"), [(1, 1), (4, 4), (3, 6), (40, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_width_and_rank(kind, width, rank):
    arrays = draw(width, width, rank, batch=())
    x, mean, *others = arrays
    expected = -multivariate_normal(mean, covariances(*others)[kind]).logpdf(x)
    actual = jax.jit(functools.partial(nll, kind))(*map(jnp.float32, arrays))
    np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=3e-5)


diagonal_nll = jax.jit(losses.gaussian_nll)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_diagonal_equals_the_sum_of_normals(seed, unit, shift):
    x, mean, scale, *_ = draw(seed)
    x, mean, scale = (
        np.float32(x * unit + shift),
        np.float32(mean * unit + shift),
        scale * unit,
    )
    scale = np.float32(scale)
    args = (v.astype(np.float64) for v in (x, mean, scale))
    expected = -norm.logpdf(*args).sum(axis=-1)
    np.testing.assert_allclose(
        diagonal_nll(x, mean, scale), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "kind", ["low rank", "full", pytest.param("diagonal", marks=pytest.mark.slow)]
)
def test_leading_axes_broadcast(kind):
    x, mean, scale, factor, cholesky = draw(batch=(2, 3))
    shapes = [x[:, :1], mean[0], scale[1, 2], factor[0, 1], cholesky[1, 0]]
    full = [
        np.broadcast_to(a, (2, 3, *a.shape[-k:]))
        for a, k in zip(shapes, (1, 1, 1, 2, 2), strict=True)
    ]
    function = jax.jit(functools.partial(nll, kind))
    assert function(*shapes).shape == (2, 3)
    np.testing.assert_allclose(function(*shapes), function(*full), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind):
    with jax.enable_x64(True):
        arrays = draw(width=3, batch=(2,))
        used = [arrays[i] for i in USED[kind]]
        check_gradient(lambda *args: nll(kind, *_placed(args, USED[kind])), *used)


@pytest.mark.parametrize("kind", KINDS)
def test_proper(kind):
    """The expected loss is least at the truth, and exceeds it elsewhere by the divergence.

    The loss is quadratic in x, so that points with the mean and covariance of the truth give its
    expectation exactly.
    """
    with jax.enable_x64(True):
        true, other = (draw(seed, width=3, batch=()) for seed in (1, 2))
        p, q = (covariances(*arrays[2:])[kind] for arrays in (true, other))
        arms = np.sqrt(3) * np.linalg.cholesky(p).T
        points = jnp.asarray(np.concatenate([true[1] + arms, true[1] - arms]))

        places = USED[kind][1:]

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=tuple(range(len(places))))
        def expected(*model):
            return jnp.mean(nll(kind, *_placed((points, *model), (0, *places))))

        least, at_truth = expected(*(true[i] for i in places))
        more, elsewhere = expected(*(other[i] for i in places))
        for zero, slope in zip(at_truth, elsewhere, strict=True):
            np.testing.assert_allclose(zero, 0.0, atol=1e-12)
            assert np.abs(slope).max() > 1e-2
        difference = true[1] - other[1]
        divergence = (
            np.trace(np.linalg.solve(q, p))
            + difference @ np.linalg.solve(q, difference)
            - 3
            + np.linalg.slogdet(q)[1]
            - np.linalg.slogdet(p)[1]
        ) / 2
        assert divergence > 0.1
        np.testing.assert_allclose(more - least, divergence, rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "width"), [("diagonal", 1), *((kind, 2) for kind in KINDS)]
)
def test_integrates_to_one(kind, width):
    model = draw(3, width, 1, batch=())[1:]
    axis = np.linspace(-16, 16, 321)
    grid = np.stack(np.meshgrid(*[axis] * width), axis=-1)
    nats = jax.jit(functools.partial(nll, kind))(grid, *model)
    density = np.exp(-np.asarray(nats, np.float64))
    np.testing.assert_allclose(density.sum() * 0.1**width, 1.0, rtol=1e-4)


def test_three_losses_of_equal_covariances_agree():
    x, mean, scale, factor, _ = draw(batch=(4,))
    covariance = covariances(scale, factor, np.eye(5))["low rank"]
    low_rank_nll = jax.jit(losses.low_rank_gaussian_nll)
    low_rank = low_rank_nll(x, mean, scale, factor)
    full = jax.jit(losses.full_gaussian_nll)(x, mean, np.linalg.cholesky(covariance))
    np.testing.assert_allclose(low_rank, full, rtol=1e-5)
    diagonal = losses.gaussian_nll(x, mean, scale)
    without = low_rank_nll(x, mean, scale, 0 * factor)
    np.testing.assert_allclose(diagonal, without, rtol=1e-6)


def test_scaling_adds_the_logarithm_of_the_scale():
    x, mean, scale, *_ = draw()
    moved = losses.gaussian_nll(8 * x, 8 * mean, 8 * scale)
    expected = losses.gaussian_nll(x, mean, scale) + 5 * np.log(8)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_values_above_the_diagonal_have_no_effect():
    x, mean, *_, cholesky = map(jnp.float32, draw())
    other = cholesky + 1e6 * jnp.triu(jnp.ones((5, 5)), 1)
    function = jax.jit(
        jax.value_and_grad(lambda c: losses.full_gaussian_nll(x, mean, c).sum())
    )
    value, gradient = function(other)
    assert value == function(cholesky)[0]
    np.testing.assert_array_equal(jnp.triu(gradient, 1), 0.0)
    assert jnp.abs(jnp.tril(gradient)).max() > 0.1


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_low_rank_makes_no_square_matrix():
    x, mean, scale, factor, cholesky = draw(width=37, rank=3, batch=(1,))
    for function, args, squares in [
        (losses.low_rank_gaussian_nll, (x, mean, scale, factor), False),
        (
            losses.full_gaussian_nll,
            (x, mean, cholesky),
            True,
        ),  # that the test sees them
    ]:
        gradient = jax.grad(
            lambda *a, f=function: f(*a).sum(), argnums=range(len(args))
        )
        shapes = list(_shapes(jax.make_jaxpr(gradient)(*map(jnp.float32, args)).jaxpr))
        assert any(shape.count(37) > 1 for shape in shapes) == squares


def test_one_cholesky_factor_is_not_copied_for_many_vectors():
    """The factor is not copied for each of the 2000 vectors."""
    _, mean, *_, cholesky = draw(width=16, batch=())
    many = jnp.zeros((2000, 16))
    compiled = jax.jit(losses.full_gaussian_nll).lower(many, mean, cholesky).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2000 * 16 * 16 * 4 / 2


low_rank_with_gradient = jax.jit(
    jax.value_and_grad(losses.low_rank_gaussian_nll, argnums=(0, 1, 2, 3))
)


@pytest.mark.parametrize(("length", "exact"), [(1.0, True), (1e2, True), (1e5, False)])
def test_parallel_columns_have_finite_gradients(length, exact):
    """Long ones are beyond float32: then the loss is too large, with finite gradients."""
    rng = np.random.default_rng(0)
    x, mean, scale = rng.normal(size=8), np.zeros(8), np.ones(8)
    factor = np.repeat(rng.normal(size=(8, 1)), 4, axis=1) * length
    value, gradient = low_rank_with_gradient(
        *map(jnp.float32, (x, mean, scale, factor))
    )
    assert all(jnp.isfinite(g).all() for g in gradient)
    root = np.linalg.cholesky(factor @ factor.T + np.eye(8))
    distance = np.sum(np.linalg.solve(root, x) ** 2)
    expected = distance / 2 + np.log(np.diag(root)).sum() + 4 * np.log(2 * np.pi)
    if exact:
        np.testing.assert_allclose(value, expected, rtol=1e-3)
    else:
        assert expected + 1 < value < expected + 100
