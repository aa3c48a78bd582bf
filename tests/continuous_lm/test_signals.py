"""Signals: the ordinary model as a special case, and how fast samples converge."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm import signals
from continuous_lm.attention import attend
from tests.models.test_transformer import CONFIG, LM, draw, random_lm

JUMP = ("constant", "trapezoid")
PAIRS = [
    (k, r)
    for k in signals.SIGNAL_KINDS
    for r in signals.QUADRATURE_RULES
    if (k, r) != JUMP
]


# As functions call it: without jit, each of its operations is a program.
sample = jax.jit(signals.sample, static_argnames=("kind", "rule", "points"))


def apply(lm, samples, **arguments):
    e, times, weights = samples
    return lm(embeddings=e, times=times, durations=weights, **arguments)


@pytest.mark.parametrize("kind", signals.SIGNAL_KINDS)
def test_one_sample_at_each_right_end_is_the_ordinary_model(kind):
    lm, (tokens, d) = LM, draw()
    rows = np.asarray(lm.params["embedding"])[tokens]
    samples = signals.sample(rows, d, kind=kind, start=0.7)
    np.testing.assert_array_equal(samples.embeddings, rows)
    np.testing.assert_array_equal(samples.weights, d)
    np.testing.assert_array_equal(samples.times, clm.durations.end_times(d, 0.7))
    ordinary = lm(tokens, durations=d, start=0.7)
    np.testing.assert_array_equal(apply(lm, samples), ordinary)


@pytest.mark.slow
def test_gradients_of_samples_at_right_ends_are_those_of_the_ordinary_model():
    tokens, d = draw()
    rows = np.asarray(LM.params["embedding"])[tokens]

    def sampled(d):
        e, times, weights = signals.sample(rows, d, kind="linear")
        arguments = {"embeddings": e, "times": times, "durations": weights}
        return LM.model.apply({"params": LM.params}, position=-1, **arguments).max()

    def ordinary(d):
        return LM.model.apply(
            {"params": LM.params}, tokens, durations=d, position=-1
        ).max()

    np.testing.assert_allclose(
        jax.jit(jax.grad(sampled))(d), jax.jit(jax.grad(ordinary))(d), atol=1e-5
    )
    d[4] = 0.0
    assert np.isfinite(jax.jit(jax.grad(sampled))(d)).all()


@settings(max_examples=20)
@given(
    st.sampled_from(PAIRS),
    st.sampled_from([1, 3]),
    st.lists(st.floats(0.125, 4, width=32), min_size=3, max_size=3),
    st.floats(-5, 5, width=32),
)
def test_weights_of_ordered_samples_sum_to_the_durations(pair, points, d, start):
    (kind, rule), d = pair, np.array(d, np.float32)
    e = np.arange(2.0 * len(d), dtype=np.float32).reshape(-1, 2)
    s = sample(e, d, start=start, kind=kind, rule=rule, points=points)
    s = jax.tree.map(np.asarray, s)
    number = len(d) * points + (rule != "rectangle")
    assert s.embeddings.shape == (number, 2)
    assert s.times.shape == s.weights.shape == (number,)
    assert (np.diff(s.times) >= 0).all()
    assert (s.weights >= 0).all()
    assert s.times[0] >= start - 1e-5
    end = start + d.sum(dtype=np.float64)
    np.testing.assert_allclose(s.times[-1], end, atol=1e-5)
    np.testing.assert_array_equal(s.embeddings[-1], e[-1])  # the end of the signal
    np.testing.assert_allclose(s.weights.sum(), d.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "points", "degree"),
    [
        ("rectangle", 3, 0),
        ("trapezoid", 1, 1),
        ("gauss", 1, 1),
        ("gauss", 2, 3),
        ("gauss", 3, 5),
    ],
)
def test_rules_are_exact_up_to_their_degree(rule, points, degree):
    with jax.enable_x64(True):
        d = np.array([0.5, 1.5, 0.25, 1.0])
        s = sample(np.ones((4, 1)), d, start=1.0, rule=rule, points=points)
        times, weights = np.asarray(s.times), np.asarray(s.weights)
        for power in range(degree + 2):
            exact = (4.25 ** (power + 1) - 1.0) / (power + 1)
            error = abs(float(weights @ times**power) - exact)
            assert (error < 1e-9) == (power <= degree)


def test_linear_signals_follow_lines_and_cubic_ones_parabolas():
    with jax.enable_x64(True):
        d = np.array([0.5, 1.5, 0.25, 1.0])
        knots = np.cumsum(d)
        for kind, curve in (
            ("linear", lambda t: 2 * t - 1),
            ("cubic", lambda t: t**2 - 3 * t + 1),
        ):
            e, e0 = curve(knots)[:, None], np.array([curve(0.0)])
            s = sample(e, d, kind=kind, rule="gauss", points=4, initial=e0)
            expected = curve(np.asarray(s.times))
            np.testing.assert_allclose(values_of(s), expected, atol=1e-12)
        s = sample(e, d, kind="constant", rule="gauss", points=2)
        steps = np.append(np.repeat(e[:, 0], 2), e[-1, 0])
        np.testing.assert_array_equal(values_of(s), steps)
        s = sample(e[:1], d[:1], kind="cubic", points=2, initial=e0)
        np.testing.assert_allclose(values_of(s)[0], (e[0, 0] + e0[0]) / 2)


def values_of(samples):
    """The first component of each sample."""
    return np.asarray(samples.embeddings)[:, 0]


def test_signals_start_with_their_first_value():
    s = signals.sample(np.array([[2.0], [4.0]]), [1, 1], rule="trapezoid", points=2)
    np.testing.assert_allclose(values_of(s), [2, 2, 2, 3, 4])
    np.testing.assert_allclose(s.times, [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(s.weights, [0.25, 0.5, 0.5, 0.5, 0.25])


def orders(errors):
    """The order of convergence between refinements by 2."""
    errors = np.asarray(errors)
    return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize(
    ("rule", "points", "order"),
    [("rectangle", 1, 1), ("trapezoid", 1, 2), ("gauss", 1, 2), ("gauss", 2, 4)],
)
def test_attention_converges_at_the_order_of_its_rule(rule, points, order):
    """Keys and values are smooth functions of time; the query is at the end."""
    with jax.enable_x64(True):

        @functools.partial(jax.jit, static_argnums=(0, 1, 2))
        def attended(intervals, rule, points):
            knots = np.linspace(0.0, 2.0, intervals + 1)
            s = signals.sample(
                knots[1:, None],
                np.diff(knots),
                initial=knots[:1],
                rule=rule,
                points=points,
            )
            t = s.embeddings  # the signal is time itself
            q = jnp.array([[[1.0, -0.5]]])
            k = jnp.stack([jnp.sin(3 * t), jnp.cos(2 * t)], axis=-1)
            v = jnp.stack([jnp.exp(t), jnp.sin(5 * t)], axis=-1)
            return attend(q, k, v, s.weights)[0, 0]

        exact = attended(4, "gauss", 12)
        sizes = (16, 32)
        errors = [np.abs(attended(n, rule, points) - exact).max() for n in sizes]
        np.testing.assert_allclose(orders(errors)[-1], order, atol=0.15)


@pytest.mark.parametrize(
    "kind", ["linear", pytest.param("cubic", marks=pytest.mark.slow)]
)
def test_logits_of_a_model_converge_at_order_1(kind):
    """For every rule, so that the extrapolation of two refinements is more exact."""
    with jax.enable_x64(True):
        lm = random_lm(CONFIG, dtype=jnp.float64)
        tokens, d = draw(n=4)
        rows = np.asarray(lm.params["embedding"])[tokens]
        d = d.astype(np.float64)

        def logits(points, rule="rectangle"):
            s = sample(rows, d, kind=kind, rule=rule, points=points)
            return np.asarray(apply(lm, s, position=-1))

        by_points = [logits(n) for n in (32, 64, 128, 256)]
        extrapolated = [2 * b - a for a, b in itertools.pairwise(by_points)]
        exact = extrapolated[-1]
        errors = [np.abs(p - exact).max() for p in by_points[:-1]]
        np.testing.assert_allclose(orders(errors), 1.0, atol=0.1)
        assert np.abs(extrapolated[0] - exact).max() < 0.3 * errors[1]
        for rule in ("trapezoid", "gauss"):  # to the same limit
            others = [np.abs(logits(n, rule) - exact).max() for n in (32, 64)]
            np.testing.assert_allclose(orders(others), 1.0, atol=0.2)
            assert others[1] < 2 * errors[1]


E2 = np.ones((2, 3))
BAD = {
    "rule is 'simpson'": lambda: signals.sample(E2, [1, 1], rule="simpson"),
    "kind is 'quartic'": lambda: signals.sample(E2, [1, 1], kind="quartic"),
    "points is 0": lambda: signals.sample(E2, [1, 1], points=0),
    "points is 1.5": lambda: signals.sample(E2, [1, 1], points=1.5),
    "jumps at its knots": lambda: signals.sample(
        E2, [1, 1], kind="constant", rule="trapezoid"
    ),
    "durations hold a 0": lambda: signals.sample(E2, [1, 0], kind="cubic"),
    r"durations\[0\] is -1": lambda: signals.sample(E2, [-1, 1]),
    r"durations has shape \[3\]": lambda: signals.sample(E2, [1, 1, 1]),
    r"durations have shape \[1, 2\]": lambda: signals.sample(E2, [[1, 1]]),
    r"embeddings have shape \[3\]": lambda: signals.sample(np.ones(3), [1, 1, 1]),
    r"embeddings\[0, 0\] is nan": lambda: signals.sample(E2 * np.nan, [1, 1]),
    r"initial has shape \[2\]": lambda: signals.sample(E2, [1, 1], initial=np.ones(2)),
    r"start has shape \[2\]": lambda: signals.sample(E2, [1, 1], start=[0, 1]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(clm.InputError, match=message):
        BAD[message]()


@pytest.mark.parametrize("kind", signals.SIGNAL_KINDS)
def test_integers_are_interpolated_as_numbers(kind):
    values = np.array([[0], [1], [3]])
    durations = np.array([1.0, 2.0, 1.0])
    samples = signals.sample(values, durations, kind=kind, points=4)
    expected = signals.sample(values.astype(np.float32), durations, kind=kind, points=4)
    np.testing.assert_array_equal(samples.embeddings, expected.embeddings)
