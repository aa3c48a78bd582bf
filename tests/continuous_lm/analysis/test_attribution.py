"""Attributions against closed forms, and their completeness on models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

import continuous_lm as clm
from continuous_lm.analysis import attribution
from continuous_lm.analysis.deletion import deletion_curve
from continuous_lm.experiments.apples import prompts
from tests.models.test_transformer import LM, LM_WINDOWED, N, draw

METHODS = [
    attribution.integrated_gradients,
    attribution.gradient_times_input,
    attribution.leave_one_out,
]
W = np.array([0.5, -1.0, 2.0, 0.25, 0.0], np.float32)
D = np.array([1.0, 2.0, 0.5, 0.0, 1.0], np.float32)
BASE = np.array([1.0, 0.5, 1.5, 1.0, 0.0], np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_contributions_of_a_linear_function_are_exact(method):
    result = method(lambda d: W @ d + 3.0, D, BASE)
    np.testing.assert_allclose(result.contributions, W * (D - BASE), atol=1e-6)
    assert result.end_value == pytest.approx(float(W @ D + 3))
    assert result.baseline_value == pytest.approx(float(W @ BASE + 3))
    assert abs(result.residual) < 1e-5
    assert result.contributions[0] == 0.0  # its duration does not change


@pytest.mark.parametrize("steep", [0.0, 4.0, 9.0])
def test_contributions_of_a_softmax_match_its_integral(steep):
    """f = N / Z, the attention of one query, from only the first token to all tokens."""
    rng = np.random.default_rng(0)
    mass = np.exp(rng.normal(size=6) + np.array([0.0] + [steep] * 5))
    v = rng.normal(size=6)
    result = attribution.integrated_gradients(
        jax.tree_util.Partial(attention_output, mass, v), np.ones(6, np.float32)
    )
    # Along the path Z = z0 + alpha z1 and N = n0 + alpha n1; df/dd_j = m_j (v_j Z - N) / Z^2.
    z0, z1 = mass[0], mass[1:].sum()
    n0, n1 = (mass * v)[0], (mass * v)[1:].sum()
    inverse_z = np.log1p(z1 / z0) / z1
    n_over_z2 = n1 * inverse_z / z1 + (n0 - n1 * z0 / z1) * (1 / (z0 * (z0 + z1)))
    expected = mass * (v * inverse_z - n_over_z2)
    expected[0] = 0.0
    np.testing.assert_allclose(
        result.contributions, expected, atol=3e-3 * np.abs(expected).max()
    )


def attention_output(mass, v, d):
    return jnp.sum(d * (mass * v)) / jnp.sum(d * mass)


def cliff(w, middle, width, height, d):
    return height * jax.nn.sigmoid((w[1:] @ d[1:] / 4.0 - middle) / width)


@given(st.floats(0.05, 0.95), st.floats(0.01, 0.2), st.floats(-30, 30))
def test_contributions_at_a_steep_cliff(middle, width, height):
    """A function of w . d only: its change is distributed in proportion to w_j (d_j - base_j)."""
    w = np.array([1.0, 2.0, 0.5, 1.5])
    value = jax.tree_util.Partial(cliff, w, middle, width, height)
    result = attribution.integrated_gradients(value, np.ones(4))
    share = np.where(np.arange(4) > 0, w, 0) / 4.0
    np.testing.assert_allclose(
        result.contributions, share * result.change, atol=0.005 * abs(height) + 1e-6
    )
    assert result.relative_residual() < 0.01


@pytest.mark.slow
def test_more_nodes_are_more_exact():
    def value(d):
        return 30.0 * jax.nn.sigmoid((d[1] - 0.37) / 0.004) + jnp.sin(9.0 * d[1])

    errors = [
        abs(attribution.integrated_gradients(value, [1, 1], nodes=n).residual)
        for n in (16, 64, 256)
    ]
    assert errors[0] > 10 * errors[2]
    assert errors[2] < 1e-3


def test_panels_cover_the_path_and_are_narrow_at_cliffs():
    grid = np.linspace(0, 1, 101)
    edges = attribution.panel_edges(grid, np.where(grid < 0.4, 0.0, 9.0), 20)
    assert (edges[0], edges[-1]) == (0.0, 1.0)
    assert (np.diff(edges) > 0).all()
    assert np.diff(edges)[np.searchsorted(edges, 0.395) - 1] < 0.01
    flat = attribution.panel_edges(grid, np.zeros(101), 4)
    np.testing.assert_allclose(flat, np.array([0, 0.25, 0.5, 0.75, 1]) ** 2, atol=2e-3)
    points, weights = attribution.gauss_legendre(edges, 3)
    np.testing.assert_allclose(weights @ points**5, 1 / 6, rtol=1e-12)


def test_log_probability_is_that_of_a_group():
    tokens, d = draw()
    value = attribution.log_probability(LM, [7, 3, 3], tokens=tokens, position=5)
    logits = np.asarray(LM(tokens, durations=d, position=5), np.float64)
    expected = logsumexp(logits[[3, 7]]) - logsumexp(logits)
    np.testing.assert_allclose(once(value, d), expected, rtol=1e-5)
    rows = np.asarray(LM.params["embedding"])[tokens]
    by_rows = attribution.log_probability(
        LM, [3, 7], embeddings=rows, start=2.0, position=5
    )
    np.testing.assert_allclose(once(by_rows, d), expected, rtol=1e-5)


def model_value(lm=LM, position=8):
    tokens, d = draw()
    return attribution.log_probability(lm, [3, 7], tokens=tokens, position=position), d


def once(value, d):
    return float(attribution.evaluate(value, d[None], 1)[0])


def test_completeness_between_any_durations():
    value, d = model_value()
    baseline = np.roll(d, 1)
    result = attribution.integrated_gradients(value, d, baseline, batch_size=5)
    assert result.relative_residual() < 1e-3
    assert result.end_value == pytest.approx(once(value, d), rel=1e-5)
    assert result.baseline_value == pytest.approx(once(value, baseline), rel=1e-5)
    # Tokens after the position of the answer have no effect.
    assert (result.contributions[9:] == 0).all()
    assert (result.contributions[1:9] != 0).all()


@pytest.mark.slow
def test_the_residual_shows_jumps_of_windows():
    value, _ = model_value(LM_WINDOWED, position=-1)
    inside, across = np.full(N, 0.3), np.full(N, 1.0)
    assert attribution.integrated_gradients(value, inside).relative_residual() < 1e-3
    assert attribution.integrated_gradients(value, across).relative_residual() > 1e-2


def without(d, indices):
    """Durations with zeros at some indices."""
    d = d.copy()
    d[indices] = 0.0
    return d


def test_gradient_times_input_matches_finite_differences():
    value, d = model_value()
    result = attribution.gradient_times_input(value, d, without(d, [2, 5]))
    h = np.float32(1e-2)
    for j in (2, 5):
        step = h * np.eye(N, dtype=np.float32)[j]
        slope = (once(value, d + step) - once(value, d - step)) / (2 * h)
        np.testing.assert_allclose(result.contributions[j], slope * d[j], atol=2e-4)
    assert (np.delete(result.contributions, [2, 5]) == 0).all()


def test_leave_one_out_equals_calls_without_each_token():
    value, d = model_value()
    result = attribution.leave_one_out(value, d, batch_size=4)
    plain = once(value, d)
    expected = [0.0] + [plain - once(value, without(d, j)) for j in range(1, N)]
    np.testing.assert_allclose(result.contributions, expected, atol=1e-5)


def test_deletion_starts_with_the_most_important_token():
    """The first token stays."""
    value, d = model_value()
    importance = np.array([9.0, 1, 5, 5, -2, 0, 3, 4, 2, 8, -1, 7])
    curve = deletion_curve(value, d, importance)
    assert curve.order.tolist() == [9, 11, 2, 3, 7, 6, 8, 1, 5, 10, 4]
    for k in (0, 1, 4, 11):
        expected = once(value, without(d, curve.order[:k]))
        np.testing.assert_allclose(curve.values[k], expected, atol=1e-5)


def test_area_of_a_deletion_curve():
    curve = deletion_curve(lambda d: 2.0 * d[1] + d[2], [1, 1, 1], [0, 2, 1])
    np.testing.assert_allclose(curve.values, [3, 1, 0])
    assert curve.area == pytest.approx((0 - 2) / 4 + (-2 - 3) / 4)
    worse = deletion_curve(lambda d: 2.0 * d[1] + d[2], [1, 1, 1], [0, 1, 2])
    assert worse.area > curve.area


def sample_prompts(task, number, seed=5):
    """Yield the embedded model, tokens of a prompt padded to one length, and its last index."""
    lm, rng = clm.load("apples", dtype="float32"), np.random.default_rng(seed)
    for i in range(number):
        prompt = prompts.sample_prompt(rng, task, held_out=bool(i % 2))
        ids = clm.tokenization.encode(lm.tokenizer, prompt.text).ids
        tokens = np.zeros(-(-len(ids) // 32) * 32, np.int32)
        tokens[: len(ids)] = ids
        yield lm, tokens, len(ids) - 1


def residual(lm, tokens, position):
    best = int(lm(tokens, position=position).argmax())
    value = attribution.log_probability(lm, [best], tokens=tokens, position=position)
    return attribution.integrated_gradients(
        value, np.ones(len(tokens))
    ).relative_residual()


@pytest.mark.parametrize("task", ["sum"])
def test_completeness_on_the_embedded_model(task):
    assert max(residual(*prompt) for prompt in sample_prompts(task, 1)) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("task", prompts.TASK_WEIGHTS)
def test_completeness_on_every_task(task):
    prompts_of_task = sample_prompts(task, 10, seed=11)
    assert max(residual(*prompt) for prompt in prompts_of_task) < 0.01


def square(d):
    return jnp.sum(d**2)


BAD = {
    "nodes": lambda: attribution.integrated_gradients(square, [1, 1], nodes=6),
    "batch_size": lambda: attribution.integrated_gradients(
        square, [1, 1], batch_size=0
    ),
    r"durations have shape \[1, 2\]": lambda: attribution.integrated_gradients(
        square, [[1, 1]]
    ),
    r"durations\[1\] is nan": lambda: attribution.integrated_gradients(
        square, [1, float("nan")]
    ),
    r"baseline has shape \[3\]": lambda: attribution.leave_one_out(
        square, [1, 1], [1, 0, 0]
    ),
    r"baseline\[0\] is -1": lambda: attribution.gradient_times_input(
        square, [1, 1], [-1, 0]
    ),
    "not finite": lambda: attribution.integrated_gradients(
        lambda d: jnp.log(d[1]), [1, 1]
    ),
    r"attribution has shape \[1\]": lambda: deletion_curve(square, [1, 1], [1]),
    "answer has no tokens": lambda: attribution.log_probability(LM, [], tokens=[1, 2]),
    "answer.* is 40": lambda: attribution.log_probability(LM, [40], tokens=[1, 2]),
    r"tokens has shape \[1, 2\]": lambda: attribution.next_token_logits(
        LM, tokens=[[1, 2]]
    ),
    r"start has shape \[1\]": lambda: attribution.next_token_logits(
        LM, tokens=[1, 2], start=[0.5]
    ),
    "position is 2": lambda: attribution.next_token_logits(
        LM, tokens=[1, 2], position=2
    ),
    r"durations has shape \[3\].*T = 2": lambda: attribution.integrated_gradients(
        attribution.log_probability(LM, [1], tokens=[1, 2]), [1, 1, 1]
    ),
    "the first token has duration 0": lambda: attribution.next_token_logits(
        LM, tokens=[1, 2]
    )(jnp.zeros(2)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(clm.InputError, match=message):
        BAD[message]()


def test_the_argument_times_is_refused():
    with pytest.raises(TypeError, match="times"):
        attribution.next_token_logits(LM, tokens=[1, 2], times=[1, 2])
