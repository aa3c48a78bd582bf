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
            density = Gaussian(normal(width), positive(width))
        case "low rank":
            factor = (0.8 * scale * normal(width, RANK)).astype(dtype)
            density = LowRankGaussian(normal(width), positive(width), factor)
        case "full":
            lower = np.tril(0.8 * scale * normal(width, width), -1) / width**0.5
            cholesky = lower + positive(width)[..., None] * np.eye(width)
            density = FullGaussian(normal(width), cholesky.astype(dtype))
        case "mixture":
            shape = (COMPONENTS, width)
            density = Mixture(normal(COMPONENTS), 2 * normal(*shape), positive(*shape))
    return jax.tree.map(jnp.asarray, density)


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
    """The distribution at an index of the leading axes, in float64 numpy."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64)[index], density)


# Each compiles once for a kind and a shape. Without jit, every operation is a program.
log_prob = jax.jit(lambda density, x: density.log_prob(x))
log_probs = jax.jit(lambda density, rows: density.log_probs(rows))
mean_of = jax.jit(lambda density: density.mean)
shift = jax.jit(lambda density, offset: density.shifted(offset))
sample = jax.jit(lambda density, key, temperature: density.sample(key, temperature))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_equal_those_of_scipy(name):
    density = make(name, (2,), 3)
    table = 2 * np.random.default_rng(1).normal(size=(4, 3))
    by_vector = np.asarray(log_prob(density, table[:, None]))
    assert by_vector.shape == (4, 2)
    assert by_vector.dtype == np.float64
    by_row, means = np.asarray(log_probs(density, table)), np.asarray(mean_of(density))
    assert by_row.shape == (2, 4)
    for i in range(2):
        expected = reference(at(density, i), table)
        np.testing.assert_allclose(by_vector[:, i], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(by_row[i], expected, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(means[i], moments(at(density, i))[0], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1, 2])
def test_densities_integrate_to_one(name, width):
    """Over a grid that is fine and wide: the trapezoidal rule is then exact to rounding."""
    density = make(name, width=width)
    line = np.linspace(-16.0, 16.0, 301)
    grid = np.stack(np.meshgrid(*[line] * width), axis=-1).reshape(-1, width)
    cell = (line[1] - line[0]) ** width
    for logs in (log_prob(density, grid), log_probs(density, grid)):
        assert np.exp(logs).sum() * cell == pytest.approx(1.0, abs=1e-6)


@functools.partial(jax.jit, static_argnums=2)
def draw(density, temperature, count):
    """Samples [Z, W]."""
    keys = jax.random.split(KEY, count)
    return jax.vmap(lambda key: density.sample(key, temperature))(keys)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_moments(name):
    density = make(name, width=3)
    if name == "full":  # values above the diagonal have no effect
        density = density._replace(
            cholesky=np.asarray(density.cholesky) + np.triu(np.ones((3, 3)), 1)
        )
    count = 20000
    mean, covariance = moments(density)
    log_probs_of_samples = []
    for temperature in (1.0, 0.25):
        x = np.asarray(draw(density, temperature, count))
        expected = temperature * covariance
        if name == "mixture":
            exact = at(density, ...)
            tempered = Mixture(
                exact.logits / temperature, exact.means, exact.scales * temperature**0.5
            )
            mean, expected = moments(tempered)
        deviations = np.sqrt(np.diag(expected))
        assert (np.abs(x.mean(axis=0) - mean) < 5 * deviations / count**0.5).all()
        scale = np.outer(deviations, deviations)
        np.testing.assert_allclose(np.cov(x.T) / scale, expected / scale, atol=0.06)
        log_probs_of_samples.append(np.mean(reference(density, x)))
    assert log_probs_of_samples[1] > log_probs_of_samples[0]
    assert np.isfinite(log_probs_of_samples).all()


@pytest.mark.parametrize("name", NAMES)
def test_sampling_at_temperature_0_returns_the_mode(name):
    density = make(name, (4,), 3)
    if name == "mixture":
        mode = at(density, np.arange(4), np.argmax(density.logits, axis=-1)).means
    else:
        mode = mean_of(density)
    np.testing.assert_array_equal(sample(density, KEY, 0.0), mode)


def test_ties_at_temperature_0_go_to_the_first_component_for_every_key():
    tied = Mixture(np.zeros(5), np.arange(5.0)[:, None], np.ones((5, 1)))
    np.testing.assert_array_equal(draw(tied, 0.0, 20), np.zeros((20, 1)))


@pytest.mark.parametrize("name", SOME)
def test_shifted_densities(name):
    density = make(name, (), 3)
    rng = np.random.default_rng(3)
    x, offsets = rng.normal(size=3), rng.normal(size=(4, 3))
    shifted = shift(density, offsets)
    expected = [reference(density, x - offset) for offset in offsets]
    np.testing.assert_allclose(log_prob(shifted, x), expected, rtol=1e-11)
    by_row = np.asarray(log_probs(shifted, x[None]))[:, 0]
    np.testing.assert_allclose(by_row, expected, rtol=1e-10)
    means = np.asarray(mean_of(density)) + offsets
    np.testing.assert_allclose(mean_of(shifted), means, rtol=1e-12)
    assert sample(shifted, KEY, 1.0).shape == (4, 3)
    np.testing.assert_array_equal(
        sample(shift(density, np.zeros(3)), KEY, 1.0), sample(density, KEY, 1.0)
    )


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
    point = jax.tree.map(np.asarray, (density, x))
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), point)

    def value_at(step):
        moved = jax.tree.map(lambda a, b: a + step * b, point, direction)
        return float(value(*moved))

    slope = (value_at(1e-5) - value_at(-1e-5)) / 2e-5
    products = jax.tree.map(
        lambda g, b: (np.asarray(g) * b).sum(), gradients, direction
    )
    assert slope == pytest.approx(sum(jax.tree.leaves(products)), rel=1e-7)
    assert abs(slope) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_in_float32_lose_little(name):
    """The squares that are expanded cancel: about 1e-6 of the largest of them, in nats.

    Rows and means of size 1 (and the rows 50 away from 0), scales of about 0.05 and 48 dimensions:
    the squares are of the order 5e4 nats.
    """
    density = make(name, (3,), 48, scale=0.05, dtype=np.float32)
    offset = np.float32(50.0)
    table = np.random.default_rng(6).normal(size=(40, 48)).astype(np.float32) + offset
    density = density.shifted(jnp.full(48, offset))
    exact = [reference(at(density, i), table) for i in range(3)]
    by_row = log_probs(density, table)
    assert by_row.dtype == jnp.float32
    size = np.abs(exact).max()
    assert size > 1e4
    np.testing.assert_allclose(by_row, exact, atol=2e-6 * size, rtol=0)
    by_vector = log_prob(density, table[:, None]).T
    np.testing.assert_allclose(by_vector, exact, atol=2e-6 * size, rtol=0)


def test_components_of_weight_zero_have_no_effect():
    mixture = at(make("mixture", width=2), ...)
    without_first = mixture._replace(logits=np.append(-np.inf, mixture.logits[1:]))
    x = np.random.default_rng(7).normal(size=(5, 2))
    expected = reference(at(mixture, slice(1, None)), x)
    np.testing.assert_allclose(log_probs(without_first, x), expected, rtol=1e-12)

    def total(means):
        return without_first._replace(means=means).log_probs(x).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(mixture.means))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], [0.0, 0.0])
    narrow = without_first._replace(scales=1e-9 * mixture.scales)
    samples = np.asarray(draw(narrow, 1.0, 200))
    assert (np.abs(samples - mixture.means[0]).max(axis=-1) > 1e-3).all()


def test_float32_densities_score_float64_tables():
    density = make("mixture", width=2, dtype=np.float32)
    x = np.random.default_rng(8).normal(size=(5, 2))
    by_row, by_vector = log_probs(density, x), log_prob(density, x)
    np.testing.assert_allclose(by_row, by_vector, rtol=1e-5)


# --- Categorical -----------------------------------------------------------------------------


def test_probabilities_of_a_categorical_are_a_softmax():
    logits = np.random.default_rng(0).normal(size=(4, 1, 6)) * 2
    categorical = Categorical(jnp.asarray(logits))
    p = np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))
    probabilities = jax.jit(lambda categorical: categorical.probabilities)
    np.testing.assert_allclose(probabilities(categorical), p, rtol=1e-12)
    tokens = np.array([5, 0])  # broadcast with the first axis, logits with the second
    expected = np.log(p[:, 0])[:, tokens]
    np.testing.assert_allclose(log_prob(categorical, tokens), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_frequencies_of_sampled_tokens_match_their_probabilities(temperature):
    logits, count = np.array([0.3, -1.0, 1.2, 0.0]), 4000
    tokens = draw(Categorical(logits), temperature, count)
    assert tokens.dtype == jnp.int32
    p = np.exp(logits / temperature)
    counts = np.bincount(tokens, minlength=4)
    assert stats.chisquare(counts, count * p / p.sum()).pvalue > 1e-3


def test_tempered_logits_do_not_overflow():
    temper = jax.jit(temper_logits)
    logits = np.array([[1e5, 0.0, -1e5], [1.0, 1.0, -np.inf]], np.float32)
    for temperature in (0.0, 1e-45, 1e-30, 1.0, 1e30):
        tempered = np.asarray(temper(logits, temperature))
        assert not np.isnan(tempered).any()
        np.testing.assert_array_equal(tempered.max(axis=-1), [0.0, 0.0])
    by_row = np.asarray(temper(logits, np.array([2.0, 1.0])))
    np.testing.assert_allclose(by_row[0], [0.0, -5e4, -1e5])
    assert sample(Categorical(logits[0]), KEY, 0.0) == 0
