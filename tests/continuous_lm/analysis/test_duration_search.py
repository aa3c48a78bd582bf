"""Searches against problems whose solution is known, and on the embedded model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import softmax

import continuous_lm as clm
from continuous_lm.analysis import attribution, duration_search, shrinking
from continuous_lm.analysis.pruning import prune
from continuous_lm.experiments.common import prompt
from tests.models.test_transformer import LM, draw

W = np.array([5.0, 1.0, -3.0, 0.5, 2.0], np.float32)
ONES = np.ones(5, np.float32)


def _line(w, b, d):
    return jnp.sum(w * (d - 1.0)) - b


def line(b, w=W):
    """Return a slack that is -b at durations of 1: the least total change is b / max |w|."""
    return jax.tree_util.Partial(_line, w, b)  # compiled once for all


def test_answer_lead_is_the_log_odds_against_the_best_other_token():
    answer_lead = jax.jit(duration_search.answer_lead)
    logits = np.array([[1.0, 2.0, 3.0, 0.5], [4.0, 0.0, -1.0, 0.0]], np.float32)
    p = softmax(logits, axis=-1)
    leads = answer_lead(logits, np.array([0, 1]))
    expected = np.log((p[:, 0] + p[:, 1]) / [p[0, 2], p[1, 3]])
    np.testing.assert_allclose(leads, expected, rtol=1e-5)
    leads = np.asarray(answer_lead(logits, np.array([0])))
    assert (leads > 0).tolist() == [False, True]


@settings(max_examples=4)
@given(st.floats(0.1, 1.2))
def test_durations_for_a_linear_slack_are_nearly_optimal_and_sparse(b):
    """The first token may not change. Of the others, the third has the steepest slope, -3."""
    result = duration_search.find_durations(line(b), ONES, steps=40)
    assert result.slack >= 0
    assert b / 3 <= result.total <= 1.1 * b / 3 + 0.01
    assert result.total == pytest.approx(np.abs(result.durations - 1).sum())
    assert result.durations[0] == 1
    assert result.durations[3] == 1  # the flattest slope
    assert result.durations[2] < 1


def test_only_durations_in_the_span_change():
    result = duration_search.find_durations(line(0.3), ONES, span=(3, 5))
    assert result.slack >= 0
    assert (result.durations[:3] == 1).all()
    assert result.total <= 1.1 * 0.3 / 2
    with_first = duration_search.find_durations(line(0.3), ONES, span=(0, 5))
    assert with_first.total <= 1.1 * 0.3 / 5


def slack_around(d0, d):
    return jnp.sum(W * (d - d0)) - 0.5


def test_search_from_other_durations_than_one():
    d0 = np.array([1.0, 2.0, 0.5, 0.0, 1.0], np.float32)
    slack = jax.tree_util.Partial(slack_around, d0)
    result = duration_search.find_durations(slack, d0)
    assert result.slack >= 0
    assert result.durations[3] == 0
    assert result.total == pytest.approx(np.abs(result.durations - d0).sum())


def test_unreachable_slacks_are_approached():
    result = duration_search.find_durations(
        lambda d: -1.0 - (d[1] - 1.5) ** 2, ONES, steps=60
    )
    assert -1.05 < result.slack < 0
    by_chance = duration_search.random_search(line(100.0), ONES, evaluations=50)
    np.testing.assert_array_equal(by_chance.durations, ONES)
    assert by_chance.slack < 0


def test_probes_scale_runs_of_free_tokens():
    d = np.array([1.0, 1.0, 2.0, 1.0], np.float32)
    is_free = np.array([False, True, True, True])
    rows = np.asarray(duration_search.probe_durations(d, is_free))
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert (rows[:, 0] == 1).all()
    masks = {tuple(row) for row in (rows != d).tolist()}
    assert {(False, True, False, False), (False, True, True, True)} <= masks
    factors = (rows / d)[rows != d]
    assert set(np.unique(factors)) == set(duration_search.PROBE_FACTORS)


def test_random_search_is_reproducible():
    first = duration_search.random_search(line(0.5), ONES, evaluations=400, seed=3)
    again = duration_search.random_search(line(0.5), ONES, evaluations=400, seed=3)
    other = duration_search.random_search(line(0.5), ONES, evaluations=400, seed=4)
    np.testing.assert_array_equal(first.durations, again.durations)
    assert first.slack >= 0
    assert first.durations[0] == 1
    assert (first.durations != other.durations).any()
    longer = duration_search.random_search(line(0.5), ONES, evaluations=1600, seed=3)
    assert 0.5 / 3 <= longer.total < first.total


def test_shrinking_stops_at_slack_zero():
    result = shrinking.shrink_towards(
        lambda d: d[1] + d[2] - 1.0, [1, 0.9, 2.0], [0, 0, 0], rounds=6
    )
    assert result.durations[0] == 0
    assert result.durations[1] == 0  # the nearest to its target shrinks first
    assert 1.0 <= result.durations[2] < 1.02
    failed = shrinking.shrink_towards(lambda d: d[0] - 2.0, [1, 1], [0, 0])
    np.testing.assert_array_equal(failed.durations, [1, 1])
    assert failed.slack < 0


def test_evaluations_are_counted():
    calls = []

    def slack(d):
        jax.debug.callback(lambda _: calls.append(1), d[0])
        return jnp.sum(W * (d - 1.0)) - 0.5

    result = shrinking.shrink_towards(slack, [1, 2, 1, 1, 1.5], ONES)
    jax.effects_barrier()
    assert result.evaluations == len(calls) - 1  # one to report the slack


@settings(max_examples=4)
@given(st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4), st.floats(0.05, 2))
@example([0.0, 1.0, 2.0, 0.5], 1.5)  # 0.11 off with only Adam, or with another order
def test_pruning_a_linear_slack_solves_a_fractional_knapsack(w, tolerance):
    """Durations shrink to 0 in the order of their slopes, until the tolerance is used up."""
    weights = np.array([1.0, *w], np.float32)
    result = prune(line(0.0, weights), ONES, tolerance=tolerance, steps=100)
    capacity, least_total = tolerance, 4.0
    for weight in np.sort(w):
        removed = 1.0 if weight <= 0 else min(1.0, capacity / weight)
        capacity, least_total = capacity - removed * weight, least_total - removed
        if removed < 1:
            break
    assert least_total - 1e-3 <= result.total <= least_total + 0.1
    assert result.durations[0] == 1
    assert (weights * (1 - result.durations)).sum() <= tolerance + 1e-4
    assert (result.durations <= 1).all()


@pytest.mark.slow
def test_pruned_prompts_have_the_value_without_their_absent_tokens():
    tokens, d = draw()
    value = attribution.log_probability(LM, [3, 7], tokens=tokens)
    result = prune(value, d, tolerance=1.0, steps=60, rounds=2)
    assert result.total < d[1:].sum() - 0.1
    present = np.union1d(np.flatnonzero(result.durations), [len(d) - 1])
    shorter = attribution.log_probability(LM, [3, 7], tokens=tokens[present])
    durations = jnp.asarray(result.durations[present])[None]
    pruned_value = attribution.evaluate(shorter, durations, 1)[0]
    assert pruned_value >= attribution.evaluate(value, d[None], 1)[0] - 1.0 - 1e-5


def counting_problem(answer):
    """The embedded model, the counting prompt, and a slack that an answer leads."""
    lm = clm.load("apples", dtype="float32")
    encoded = prompt.encode_prompt(lm, lm.tokenizer, prompt.DEFAULT_PROMPT, answer)
    logits = attribution.next_token_logits(lm, tokens=encoded.tokens)
    slack = duration_search.Margin(logits, jnp.array(encoded.answer_tokens), 0.1)
    return lm, encoded, slack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "max_total"), [("3", 0.6), ("2", 1.6), ("1", 2.7), ("5", 0.6)]
)
def test_durations_turn_four_apples_into_another_number(answer, max_total):
    lm, encoded, slack = counting_problem(answer)
    ones, answers = np.ones(len(encoded.tokens)), jnp.array(encoded.answer_tokens)
    result = duration_search.find_durations(slack, ones)
    logits = lm(encoded.tokens, durations=result.durations, position=-1)
    assert int(logits.argmax()) in encoded.answer_tokens
    assert duration_search.answer_lead(logits, answers) >= 0.1
    assert result.total < max_total
    by_chance = duration_search.random_search(
        slack, ones, evaluations=result.evaluations
    )
    assert by_chance.slack < 0 or result.total < by_chance.total


BAD = {
    r"span \(3, 3\)": lambda: duration_search.find_durations(
        line(1), ONES, span=(3, 3)
    ),
    r"span \(1, 6\)": lambda: duration_search.random_search(
        line(1), ONES, span=(1, 6), evaluations=9
    ),
    "weights are": lambda: duration_search.find_durations(
        line(1), ONES, penalty_weights=(0.5, 1.0)
    ),
    "durations have one token": lambda: duration_search.find_durations(line(1), [1.0]),
    "steps is 2.5": lambda: prune(line(1), ONES, steps=2.5),
    "rounds is 1.5": lambda: duration_search.find_durations(line(1), ONES, rounds=1.5),
    "steps is 0": lambda: duration_search.find_durations(line(1), ONES, steps=0),
    "learning_rate is -1": lambda: prune(line(1), ONES, learning_rate=-1),
    "tolerance is 0": lambda: prune(line(1), ONES, tolerance=0),
    "tolerance is nan": lambda: prune(line(1), ONES, tolerance=float("nan")),
    "evaluations is 0": lambda: duration_search.random_search(
        line(1), ONES, evaluations=0
    ),
    "durations have shape": lambda: duration_search.find_durations(line(1), [ONES]),
    r"durations\[1\] is -1": lambda: prune(line(1), [1, -1, 1, 1, 1]),
    r"target has shape \[2\]": lambda: shrinking.shrink_towards(line(1), ONES, [1, 1]),
    "rounds is 0": lambda: shrinking.shrink_towards(line(1), ONES, ONES, rounds=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(clm.InputError, match=message):
        BAD[message]()
