"""Searches against problems whose solution is known, and on the embedded model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
    """A slack that lacks b at durations of 1: the least total change is b / max |w|."""
    return jax.tree_util.Partial(_line, w, b)  # compiled once for all


def test_lead_is_the_log_odds_against_the_best_other():
    logits = jnp.array([[1.0, 2.0, 3.0, 0.5], [4.0, 0.0, -1.0, 0.0]])
    p = jax.nn.softmax(logits)
    found = duration_search.answer_lead(logits, jnp.array([0, 1]))
    expected = jnp.log((p[:, 0] + p[:, 1]) / jnp.array([p[0, 2], p[1, 3]]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (duration_search.answer_lead(logits, jnp.array([0])) > 0).tolist() == [
        False,
        True,
    ]


@settings(max_examples=4)
@given(st.floats(0.1, 1.2))
def test_steering_a_line_is_nearly_optimal_and_sparse(b):
    """The first token may not change; of the others the third, of slope -3, is the strongest."""
    found = duration_search.find_durations(line(b), ONES, steps=40)
    assert found.slack >= 0
    assert b / 3 <= found.total <= 1.1 * b / 3 + 0.01
    assert found.total == pytest.approx(np.abs(found.durations - 1).sum())
    assert found.durations[0] == 1
    assert found.durations[3] == 1  # the weakest
    assert found.durations[2] < 1


def test_a_span_is_all_that_changes():
    found = duration_search.find_durations(line(0.3), ONES, span=(3, 5))
    assert found.slack >= 0
    assert (found.durations[:3] == 1).all()
    assert found.total <= 1.1 * 0.3 / 2
    with_first = duration_search.find_durations(line(0.3), ONES, span=(0, 5))
    assert with_first.total <= 1.1 * 0.3 / 5


def test_other_durations_than_one_and_absent_tokens():
    d0 = np.array([1.0, 2.0, 0.5, 0.0, 1.0], np.float32)
    found = duration_search.find_durations(lambda d: jnp.sum(W * (d - d0)) - 0.5, d0)
    assert found.slack >= 0
    assert found.durations[3] == 0
    assert found.total == pytest.approx(np.abs(found.durations - d0).sum())


def test_what_can_not_be_reached_comes_as_close_as_it_can():
    found = duration_search.find_durations(
        lambda d: -1.0 - (d[1] - 1.5) ** 2, ONES, steps=60
    )
    assert -1.05 < found.slack < 0
    chance = duration_search.random_search(line(100.0), ONES, evaluations=50)
    np.testing.assert_array_equal(chance.durations, ONES)
    assert chance.slack < 0


def test_probes_are_stretches_of_free_tokens():
    d, free = jnp.array([1.0, 1.0, 2.0, 1.0]), jnp.array([False, True, True, True])
    rows = np.asarray(duration_search.probe_durations(d, free))
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert (rows[:, 0] == 1).all()
    masks = {tuple(row) for row in (rows != np.asarray(d)).tolist()}
    assert {(False, True, False, False), (False, True, True, True)} <= masks
    factors = np.where(rows != np.asarray(d), rows / np.asarray(d), np.nan)
    assert set(np.unique(factors[np.isfinite(factors)])) == set(
        duration_search.PROBE_FACTORS
    )


def test_random_search_finds_and_is_reproducible():
    first = duration_search.random_search(line(0.5), ONES, evaluations=400, seed=3)
    again = duration_search.random_search(line(0.5), ONES, evaluations=400, seed=3)
    other = duration_search.random_search(line(0.5), ONES, evaluations=400, seed=4)
    np.testing.assert_array_equal(first.durations, again.durations)
    assert first.slack >= 0
    assert first.durations[0] == 1
    assert (first.durations != other.durations).any()
    longer = duration_search.random_search(line(0.5), ONES, evaluations=1600, seed=3)
    assert 0.5 / 3 <= longer.total < first.total


def test_pull_stops_where_the_slack_ends():
    found = shrinking.shrink_towards(
        lambda d: d[1] + d[2] - 1.0, [1, 0.9, 2.0], [0, 0, 0], rounds=6
    )
    assert found.durations[0] == 0
    assert found.durations[1] == 0  # the nearest to its target goes first
    assert 1.0 <= found.durations[2] < 1.02
    lost = shrinking.shrink_towards(lambda d: d[0] - 2.0, [1, 1], [0, 0])
    np.testing.assert_array_equal(lost.durations, [1, 1])
    assert lost.slack < 0


def test_evaluations_are_counted():
    calls = []

    def slack(d):
        jax.debug.callback(lambda _: calls.append(1), d[0])
        return jnp.sum(W * (d - 1.0)) - 0.5

    found = shrinking.shrink_towards(slack, [1, 2, 1, 1, 1.5], ONES)
    jax.effects_barrier()
    assert found.evaluations == len(calls) - 1  # one to report the slack


@settings(max_examples=4)
@given(st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4), st.floats(0.05, 2))
@example(
    [0.0, 1.0, 2.0, 0.5], 1.5
)  # Adam alone, and pulling in any order, were 0.11 off
def test_pruning_a_line_is_a_knapsack(w, tolerance):
    """What weighs least goes, whole; the best total is that of the fractional knapsack."""
    weights = np.array([1.0, *w], np.float32)
    found = prune(line(0.0, weights), ONES, tolerance=tolerance, steps=100)
    left, best = tolerance, 4.0
    for x in np.sort(w):
        gone = 1.0 if x <= 0 else min(1.0, left / x)
        left, best = left - gone * x, best - gone
        if gone < 1:
            break
    assert best - 1e-3 <= found.total <= best + 0.1
    assert found.durations[0] == 1
    assert (weights * (1 - found.durations)).sum() <= tolerance + 1e-4
    assert (found.durations <= 1).all()


@pytest.mark.slow
def test_a_pruned_prompt_holds_without_its_absent_tokens():
    tokens, d = draw()
    value = attribution.log_probability(LM, [3, 7], tokens=tokens)
    found = prune(value, d, tolerance=1.0, steps=60, rounds=2)
    assert found.total < d[1:].sum() - 0.1
    kept = np.union1d(np.flatnonzero(found.durations), [len(d) - 1])
    shorter = attribution.log_probability(LM, [3, 7], tokens=tokens[kept])
    left = attribution.evaluate(shorter, jnp.asarray(found.durations[kept])[None], 1)[0]
    assert left >= attribution.evaluate(value, d[None], 1)[0] - 1.0 - 1e-5


def paper(answer):
    lm = clm.load("apples", dtype="float32")
    read = prompt.encode_prompt(lm, lm.tokenizer, prompt.DEFAULT_PROMPT, answer)
    logits = attribution.next_token_logits(lm, tokens=read.tokens)
    slack = duration_search.Margin(logits, jnp.array(read.answer_tokens), 0.1)
    return lm, read, slack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "most"), [("3", 0.6), ("2", 1.6), ("1", 2.7), ("5", 0.6)]
)
def test_four_apples_become_another_number(answer, most):
    lm, read, slack = paper(answer)
    plain = np.ones(len(read.tokens))
    found = duration_search.find_durations(slack, plain)
    logits = lm(read.tokens, durations=found.durations, position=-1)
    assert int(logits.argmax()) in read.answer_tokens
    assert duration_search.answer_lead(logits, jnp.array(read.answer_tokens)) >= 0.1
    assert found.total < most
    chance = duration_search.random_search(slack, plain, evaluations=found.evaluations)
    assert chance.slack < 0 or found.total < chance.total


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
