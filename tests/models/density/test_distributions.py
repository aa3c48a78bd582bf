"""Densities against scipy in float64, numerical integrals, and the moments of their samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from continuous_lm.models.density.distributions import (
    Categorical,
    FullGaussian,
    Gaussian,
    LowRankGaussian,
    Mixture,
)
from continuous_lm.models.samplers import temper_logits

KEY = jax.random.key(0)
NAMES = ("gaussian", "low rank", "full", "mixture")
RANK, COMPONENTS = 2, 3
SOME = [
    pytest.param(n, marks=() if n == "mixture" else pytest.mark.slow) for n in NAMES
]


def make(name, lead=(), width=2, seed=0, scale=1.0, dtype=np.float64):
    """A density with these leading axes, of standard deviations of about `scale`."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=(*lead, *shape)).astype(dtype)  # noqa: E731
    positive = lambda *shape: (scale * np.exp(0.3 * normal(*shape))).astype(dtype)  # noqa: E731
    match name:
        case "gaussian":
            made = Gaussian(normal(width), positive(width))
        case "low rank":
            factor = (0.8 * scale * normal(width, RANK)).astype(dtype)
            made = LowRankGaussian(normal(width), positive(width), factor)
        case "full":
            lower = np.tril(0.8 * scale * normal(width, width), -1) / width**0.5
            cholesky = lower + positive(width)[..., None] * np.eye(width)
            made = FullGaussian(normal(width), cholesky.astype(dtype))
        case "mixture":
            shape = (COMPONENTS, width)
            made = Mixture(normal(COMPONENTS), 2 * normal(*shape), positive(*shape))
    return jax.tree.map(jnp.asarray, made)


def parts(density):
    """Weights, means and covariances [X, ...] of a density without leading axes."""
    d = jax.tree.map(np.asarray, density)
    match d:
        case Mixture():
            weights = np.exp(d.logits - logsumexp(d.logits))
            return weights, d.means, [np.diag(s**2) for s in d.scales]
        case LowRankGaussian():
            covariance = d.factor @ d.factor.T + np.diag(d.scale**2)
        case FullGaussian():
            covariance = np.tril(d.cholesky) @ np.tril(d.cholesky).T
        case _:
            covariance = np.diag(d.scale**2)
    return np.ones(1), d.mean[None], [covariance]


def moments(density):
    """The mean and covariance."""
    weights, means, covariances = parts(density)
    mean = weights @ means
    second = sum(
        w * (c + np.outer(m, m))
        for w, m, c in zip(weights, means, covariances, strict=True)
    )
    return mean, second - np.outer(mean, mean)


def reference(density, x):
    """log p(x) [...] by scipy, for x [..., W]."""
    logs = [
        np.log(w) + np.asarray(stats.multivariate_normal(m, c).logpdf(x))
        for w, m, c in zip(*parts(density), strict=True)
    ]
    return logsumexp(np.stack(logs), axis=0)


def at(density, *index):
    return jax.tree.map(lambda a: a[index], density)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_log_density_is_that_of_scipy(name):
    density = make(name, (2,), 3)
    x = 2 * np.random.default_rng(1).normal(size=(4, 1, 3))
    found = density.log_prob(x)
    assert found.shape == (4, 2)
    assert found.dtype == jnp.float64
    table = x[:, 0]
    rows = density.log_probs(table)
    assert rows.shape == (2, 4)
    for i in range(2):
        expected = reference(at(density, i), table)
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(rows[i], expected, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(
            density.mean[i], moments(at(density, i))[0], rtol=1e-12
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 2])
def test_densities_integrate_to_one(name, width):
    """Over a grid that is fine and wide: the trapezoidal rule is then exact to rounding."""
    density = make(name, width=width)
    line = np.linspace(-16.0, 16.0, 301)
    grid = np.stack(np.meshgrid(*[line] * width), axis=-1).reshape(-1, width)
    cell = (line[1] - line[0]) ** width
    for logs in (density.log_prob(grid), density.log_probs(grid)):
        assert np.exp(logs).sum() * cell == pytest.approx(1.0, abs=1e-6)


@functools.partial(jax.jit, static_argnums=2)
def draw(density, temperature, count):
    """Samples [Z, W]."""
    keys = jax.random.split(KEY, count)
    return jax.vmap(lambda key: density.sample(key, temperature))(keys)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_moments(name):
    density = make(name, width=3)
    if name == "full":  # what is above the diagonal is nobody's business
        density = density._replace(
            cholesky=density.cholesky + np.triu(np.ones((3, 3)), 1)
        )
    count = 20000
    mean, covariance = moments(density)
    likely = reference(density, mean)  # and with it, that the shape is right
    entropies = []
    for temperature in (1.0, 0.25):
        x = np.asarray(draw(density, temperature, count))
        if name == "mixture" and temperature != 1.0:
            mean, covariance = moments(
                Mixture(
                    density.logits / temperature,
                    density.means,
                    density.scales * temperature**0.5,
                )
            )
            wanted = covariance
        else:
            wanted = temperature * covariance
        error = np.sqrt(np.diag(wanted) / count)
        assert (np.abs(x.mean(axis=0) - mean) < 5 * error).all()
        spread = np.sqrt(np.diag(wanted))
        found = np.cov(x.T) / np.outer(spread, spread)
        np.testing.assert_allclose(found, wanted / np.outer(spread, spread), atol=0.06)
        entropies.append(np.mean(reference(density, x)))
    assert entropies[1] > entropies[0]  # colder is likelier
    assert np.isfinite(likely)


@pytest.mark.parametrize("name", NAMES)
def test_at_temperature_0_the_likeliest_is_drawn(name):
    density = make(name, (4,), 3)
    drawn = density.sample(KEY, 0.0)
    expected = density.mean
    if name == "mixture":
        best = np.argmax(density.logits, axis=-1)
        expected = density.means[np.arange(4), best]
    np.testing.assert_array_equal(drawn, expected)


def test_ties_at_temperature_0_go_to_the_first_whatever_the_key():
    tied = Mixture(jnp.zeros(5), jnp.arange(5.0)[:, None], jnp.ones((5, 1)))
    drawn = jax.vmap(lambda key: tied.sample(key, 0.0))(jax.random.split(KEY, 20))
    np.testing.assert_array_equal(drawn, np.zeros((20, 1)))


@pytest.mark.parametrize("name", SOME)
def test_a_shifted_density_is_moved(name):
    density = make(name, (), 3)
    rng = np.random.default_rng(3)
    x, by = rng.normal(size=3), rng.normal(size=(4, 3))
    moved = density.shifted(by)  # several shifts at once
    expected = [reference(density, x - one) for one in by]
    np.testing.assert_allclose(moved.log_prob(x), expected, rtol=1e-11)
    np.testing.assert_allclose(moved.log_probs(x[None])[:, 0], expected, rtol=1e-10)
    np.testing.assert_allclose(moved.mean, density.mean + by, rtol=1e-12)
    assert moved.sample(KEY).shape == (4, 3)
    still = density.shifted(np.zeros(3))
    np.testing.assert_array_equal(still.sample(KEY), density.sample(KEY))


@pytest.mark.parametrize("name", SOME)
def test_transformations_and_gradients(name):
    """Under jit, vmap and grad; gradients against central differences, in x and parameters."""
    density = make(name, (2,), 3)
    x = np.random.default_rng(4).normal(size=(2, 3))

    def total(density, x):
        over_rows = jax.nn.softmax(density.log_probs(x), axis=-1)[..., 0]
        return jax.vmap(lambda d, x: d.log_prob(x))(density, x).sum() + over_rows.sum()

    value = jax.jit(total)
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(density, x)
    rng = np.random.default_rng(5)
    towards = jax.tree.map(
        lambda a: rng.normal(size=a.shape), (density, jnp.asarray(x))
    )
    step = lambda h: jax.tree.map(lambda a, b: a + h * b, (density, x), towards)  # noqa: E731
    slope = (value(*step(1e-5)) - value(*step(-1e-5))) / 2e-5
    products = jax.tree.map(lambda g, b: (g * b).sum(), gradients, towards)
    assert slope == pytest.approx(float(sum(jax.tree.leaves(products))), rel=1e-7)
    assert abs(slope) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_in_float32_lose_little(name):
    """The squares that are expanded cancel: about 1e-6 of the largest of them, in nats.

    Rows and means of size 1 (and the rows 50 away from 0), scales of about 0.05 and 48 dimensions:
    the squares are of the order 5e4 nats.
    """
    density = make(name, (3,), 48, scale=0.05, dtype=np.float32)
    away = np.float32(50.0)
    table = np.random.default_rng(6).normal(size=(40, 48)).astype(np.float32) + away
    density = density.shifted(jnp.full(48, away))
    exact = [
        reference(
            jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), density), table
        )
        for i in range(3)
    ]
    found = density.log_probs(table)
    assert found.dtype == jnp.float32
    size = np.abs(exact).max()
    assert size > 1e4
    np.testing.assert_allclose(found, exact, atol=2e-6 * size, rtol=0)
    np.testing.assert_allclose(
        density.log_prob(table[:, None]).T, exact, atol=2e-6 * size, rtol=0
    )


def test_a_component_without_weight_is_not_there():
    some = make("mixture", width=2)
    never = some._replace(logits=some.logits.at[0].set(-jnp.inf))
    rest = jax.tree.map(lambda a: a[1:], some)
    x = np.random.default_rng(7).normal(size=(5, 2))
    np.testing.assert_allclose(never.log_probs(x), reference(rest, x), rtol=1e-12)
    gradient = jax.grad(lambda means: never._replace(means=means).log_probs(x).sum())(
        never.means
    )
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], [0.0, 0.0])
    drawn = np.asarray(draw(never._replace(scales=1e-9 * never.scales), 1.0, 200))
    assert (np.abs(drawn - never.means[0]).max(axis=-1) > 1e-3).all()


def test_dtypes_mix():
    """A float32 density over a float64 table."""
    density = make("mixture", width=2, dtype=np.float32)
    x = np.random.default_rng(8).normal(size=(5, 2))
    np.testing.assert_allclose(density.log_probs(x), density.log_prob(x), rtol=1e-5)


# --- Categorical -----------------------------------------------------------------------------


def test_a_categorical_is_a_softmax():
    logits = np.random.default_rng(0).normal(size=(4, 1, 6)) * 2
    categorical = Categorical(jnp.asarray(logits))
    p = np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))
    np.testing.assert_allclose(categorical.probabilities, p, rtol=1e-12)
    tokens = np.array(
        [5, 0]
    )  # broadcast over the first axis, and the logits over the second
    found = categorical.log_prob(tokens)
    np.testing.assert_allclose(found, np.log(p[:, 0])[:, tokens], rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_by_their_probability(temperature):
    logits = jnp.array([0.3, -1.0, 1.2, 0.0])
    keys = jax.random.split(KEY, 4000)
    drawn = jax.vmap(lambda key: Categorical(logits).sample(key, temperature))(keys)
    assert drawn.dtype == jnp.int32
    p = np.exp(logits / temperature)
    counts = np.bincount(drawn, minlength=4)
    assert stats.chisquare(counts, len(keys) * p / p.sum()).pvalue > 1e-3


def test_tempered_logits_do_not_overflow():
    logits = jnp.array([[1e5, 0.0, -1e5], [1.0, 1.0, -jnp.inf]], jnp.float32)
    for temperature in (0.0, 1e-45, 1e-30, 1.0, 1e30):
        found = temper_logits(logits, temperature)
        assert not np.isnan(found).any()
        np.testing.assert_array_equal(found.max(axis=-1), [0.0, 0.0])
    np.testing.assert_allclose(
        temper_logits(logits, jnp.array([2.0, 1.0]))[0], [0.0, -5e4, -1e5]
    )
    assert Categorical(logits[0]).sample(KEY, 0.0) == 0
