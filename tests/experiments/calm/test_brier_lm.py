"""BrierLM against enumeration, known sources, and the coverage of its intervals."""

import time

import jax
import numpy as np
import pytest
from flax import traverse_util
from scipy.special import softmax

import continuous_lm as clm
from continuous_lm import losses
from continuous_lm.experiments.calm import brier_lm
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.transformer import parameter_table

KEY = jax.random.key(0)
V, T = 5, 6
ROWS = 150  # at once: as many in all tests, so that there is one program
NAMES = ("brier_1", "brier_2", "brier_3", "brier_4")


def values(actual, end="value"):
    return np.array([actual[name][end] for name in NAMES])


# --- Sources and models ----------------------------------------------------------------------


def chain(seed=0, sharpness=1.5):
    """The transitions of a Markov chain, [V, V]."""
    logits = sharpness * np.random.default_rng(seed).normal(size=(V, V))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def going_on(transitions, contexts, rng):
    """4 tokens that the chain draws after each context, int [n, 4]."""
    created, last = [], np.asarray(contexts)[:, -1]
    for _ in range(4):
        edges = np.cumsum(transitions[last], axis=1)
        last = np.minimum((rng.uniform(size=(len(last), 1)) > edges).sum(axis=1), V - 1)
        created.append(last)
    return np.stack(created, axis=1)


def ngrams(transitions, contexts, n=4):
    return brier_lm.ngram_probabilities(lambda c: transitions[c[:, -1]], contexts, n)


def transformer(**fields):
    config = TransformerConfig(
        **dict(vocab_size=V, hidden_size=V, mlp_size=4, num_layers=2)
        | dict(num_heads=2, num_kv_heads=1, head_dim=4)
        | fields
    )
    rng = np.random.default_rng(1)
    flat = {
        path: np.float32(
            path.endswith("scale") + 0.7 * rng.normal(size=declaration.shape)
        )
        for path, declaration in parameter_table(config).items()
    }
    return config, flat


def random_lm():
    config, flat = transformer()
    return clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(flat, sep="/")
    )


def chain_lm(transitions):
    """A transformer that is the chain: its layers add nothing, and its head has the logits."""
    config, flat = transformer()
    flat = {
        path: np.ones_like(value) if path.endswith("scale") else np.zeros_like(value)
        for path, value in flat.items()
    }
    flat["embedding"] = np.eye(V, dtype=np.float32)
    normed = np.sqrt(V / (1 + V * config.norm_eps))  # of the embedding's one entry
    flat["head"] = np.float32(np.log(np.maximum(transitions, 1e-30)).T / normed)
    return clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(flat, sep="/")
    )


# --- Sampled ---------------------------------------------------------------------------------


def test_each_brier_n_is_unbiased():
    """At one position."""
    p = ngrams(chain(), [[2]])[0]
    rng = np.random.default_rng(0)
    reference = going_on(chain(), [[2]], rng)[0]
    context = np.full((10_000, 1), 2)
    samples = [going_on(chain(), context, rng) for _ in range(2)]
    options = np.tile(reference, (10_000, 1))
    actual = brier_lm.brier_lm_from_samples(*samples, options)
    assert actual["positions"] == 10_000
    collisions = brier_lm.collision_probabilities(p[None])[0]
    for n, name in enumerate(NAMES, start=1):
        chance = p.sum(axis=tuple(range(n, 4)))[tuple(reference[:n])]
        expected = 2 * chance - np.sum(p.sum(axis=tuple(range(n, 4))) ** 2)
        np.testing.assert_allclose(expected, 2 * chance - collisions[n - 1])
        # The variance of 1{first = r} + 1{second = r} - 1{first = second}.
        equal = collisions[n - 1]
        variance = 2 * chance + equal - 2 * chance**2 - expected**2
        assert abs(actual[name]["value"] - expected) < 4 * np.sqrt(variance / 10_000)
        width = actual[name]["high"] - actual[name]["low"]
        np.testing.assert_allclose(
            width, 2 * 1.96 * np.sqrt(variance / 10_000), rtol=0.15
        )


def test_a_deterministic_source_that_is_known_has_100():
    tokens = np.random.default_rng(0).integers(0, 9, (100, 4))
    actual = brier_lm.brier_lm_from_samples(tokens, tokens, tokens)
    complete = {"value": 1.0, "low": 1.0, "high": 1.0}
    assert actual == {
        "positions": 100,
        **dict.fromkeys(NAMES, complete),
        "brier_lm": {"value": 100.0, "low": 100.0, "high": 100.0},
    }
    assert (
        brier_lm.brier_lm_from_probabilities(np.zeros((100, 4)), np.ones((100, 4)))
        == actual
    )


def test_a_random_source_that_is_known_gives_its_collision_rates():
    transitions, rng = chain(), np.random.default_rng(1)
    contexts = rng.integers(0, V, (10_000, 1))
    first, second, reference = (going_on(transitions, contexts, rng) for _ in range(3))
    actual = brier_lm.brier_lm_from_samples(first, second, reference)
    rates = brier_lm.collision_probabilities(ngrams(transitions, np.arange(V)[:, None]))
    rates = rates[contexts[:, 0]].mean(axis=0)
    assert rates[0] > 2 * rates[3]
    errors = (values(actual, "high") - values(actual, "low")) / 3.92
    assert (np.abs(values(actual) - rates) < 4 * errors).all()
    # What another source draws is worth less.
    other = [going_on(chain(seed=5), contexts, rng) for _ in range(2)]
    assert (
        values(brier_lm.brier_lm_from_samples(*other, reference), "high")
        < values(actual, "low")
    ).all()


def test_values_are_those_of_counting_and_of_the_losses():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 3, (400, 4))
    first, second = (
        np.where(
            rng.uniform(size=(400, 4)) < 0.9, reference, rng.integers(0, 3, (400, 4))
        )
        for _ in range(2)
    )
    actual = brier_lm.brier_lm_from_samples(first, second, reference)
    means = []
    for n, name in enumerate(NAMES, start=1):
        scores = [
            int((a[:n] == r[:n]).all())
            + int((b[:n] == r[:n]).all())
            - int((a[:n] == b[:n]).all())
            for a, b, r in zip(first, second, reference, strict=True)
        ]
        means.append(np.mean(scores))
        assert actual[name]["value"] == pytest.approx(means[-1], rel=1e-6)
    assert len(set(means)) == 4
    assert actual["brier_lm"]["value"] == pytest.approx(
        100 * np.prod(means) ** 0.25, rel=1e-6
    )
    # The losses' BrierLM takes n-grams from each token on: at n = 4 they are the same.
    theirs = losses.brier_lm(first, second, reference, orders=(4,))
    np.testing.assert_allclose(100 * actual["brier_4"]["value"], theirs, rtol=1e-5)


def test_not_positive_is_0():
    reference = np.tile(np.arange(4), (100, 1))
    first = reference.copy()
    first[:, 3] = 9  # never the fourth, and always the same
    actual = brier_lm.brier_lm_from_samples(first, first, reference)
    assert values(actual).tolist() == [1.0, 1.0, 1.0, -1.0]
    assert actual["brier_lm"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    first[:6] = reference[:6]
    second = reference.copy()
    second[6:, 3] = 8
    actual = brier_lm.brier_lm_from_samples(first, second, reference)
    assert actual["brier_4"]["low"] > 0
    np.testing.assert_allclose(actual["brier_lm"]["value"], 100 * 0.06**0.25)
    # Two that are not positive do not make a positive product.
    first[:, 2] = 9
    assert (
        brier_lm.brier_lm_from_samples(first, first, reference)["brier_lm"]["value"]
        == 0.0
    )


# --- Intervals -------------------------------------------------------------------------------


def test_intervals_cover_the_truth_when_groups_are_those_that_vary():
    """Positions of a group are alike: as groups they are covered, as single ones they are not."""
    rng, truth = np.random.default_rng(0), 0.5
    groups = np.repeat(rng.permutation(60) * 7, rng.integers(1, 10, 60))
    covered, alone = [], []
    for seed in range(200):
        level = rng.uniform(0.2, 0.8, 500)[groups]
        logs = np.zeros((len(groups), 4))
        logs[:, 0] = np.log(level)
        collision = np.full_like(logs, 0.5)
        for cover, options in ((covered, groups), (alone, None)):
            actual = brier_lm.brier_lm_from_probabilities(
                logs, collision, groups=options, seed=seed, resamples=200
            )
            interval = actual["brier_3"]
            cover.append(interval["low"] <= 2 * truth - 0.5 <= interval["high"])
            assert interval["low"] <= interval["value"] <= interval["high"]
    assert 0.88 < np.mean(covered) < 0.99
    assert np.mean(alone) < 0.75


def test_a_resample_is_of_whole_groups():
    """Two groups, one of them large: what three kinds of resamples can give."""
    logs = np.log(np.repeat([[0.9], [0.5]], [9, 1], axis=0)) * np.array([1, 0, 0, 0])
    collision = np.full((10, 4), 0.5)
    groups = np.array([4] * 9 + [2])
    actual = brier_lm.brier_lm_from_probabilities(logs, collision, groups=groups)[
        "brier_1"
    ]
    np.testing.assert_allclose(actual["value"], 0.9 * 1.3 + 0.1 * 0.5)
    np.testing.assert_allclose([actual["low"], actual["high"]], [0.5, 1.3])
    single = brier_lm.brier_lm_from_probabilities(logs[:1], collision[:1])["brier_1"]
    assert single["low"] == single["high"] == single["value"]


def test_seeds_repeat_and_order_does_not_matter():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2, (3, 400, 4))
    groups = np.repeat(np.arange(40), 10)
    actual = brier_lm.brier_lm_from_samples(*tokens, groups=groups, seed=3)
    assert brier_lm.brier_lm_from_samples(*tokens, groups=groups, seed=3) == actual
    assert brier_lm.brier_lm_from_samples(*tokens, groups=groups, seed=4) != actual
    order = rng.permutation(400)
    shuffled = brier_lm.brier_lm_from_samples(
        *tokens[:, order], groups=groups[order], seed=3
    )
    for name in (*NAMES, "brier_lm"):
        assert shuffled[name] == pytest.approx(actual[name])


def test_many_positions_are_judged_in_a_moment():
    tokens = np.random.default_rng(0).integers(0, 2, (3, 100_000, 4))
    groups = np.repeat(np.arange(1000), 100)
    began = time.process_time()
    brier_lm.brier_lm_from_samples(*tokens, groups=groups)
    assert time.process_time() - began < 5  # of which compiling takes the most


# --- Closed form -----------------------------------------------------------------------------


def test_enumeration_is_of_products_of_conditionals():
    transitions = chain()
    contexts = np.array([[0, 1], [3, 2]])
    p = ngrams(transitions, contexts)
    assert p.shape == (2, V, V, V, V)
    t = transitions
    np.testing.assert_allclose(p[1, 4, 0, 0, 3], t[2, 4] * t[4, 0] * t[0, 0] * t[0, 3])
    rates = brier_lm.collision_probabilities(p)
    square = t**2  # the collision rate of a chain is a product of matrices
    for row, last in enumerate((1, 2)):
        state = np.eye(V)[last]
        for n in range(4):
            state = state @ square
            np.testing.assert_allclose(rates[row, n], state.sum())
    with pytest.raises(clm.InputError, match="are enumerated"):
        ngrams(transitions, contexts, 12)


def probabilities(lm, contexts):
    """Return probabilities of all 4-grams after each context, by whole forward passes."""
    room = len(contexts) * V**3, contexts.shape[1] + 3

    def next_probs(rows):
        padded = np.zeros(room, np.int32)  # one shape, and so one program
        padded[: len(rows), : rows.shape[1]] = rows
        logits = np.asarray(
            lm(padded, position=np.int32(rows.shape[1] - 1)), np.float64
        )
        return softmax(logits[: len(rows)], axis=-1)

    return brier_lm.ngram_probabilities(next_probs, contexts, 4)


def log_probs_of(p, reference):
    """Return log-probabilities of the references' tokens [n, 4], from those of all 4-grams."""
    rows = np.arange(len(p))
    chances = [
        p.sum(axis=tuple(range(n + 1, 5)))[(rows, *reference[:, :n].T)]
        for n in range(1, 5)
    ]
    return np.diff(np.log(chances), axis=0, prepend=0.0).T


def test_sampled_and_closed_values_of_a_discrete_model_are_those_of_enumeration():
    lm, rng = random_lm(), np.random.default_rng(0)
    few = rng.integers(0, V, (5, T))
    p = probabilities(lm, few)
    group = np.repeat(np.arange(5), 80)
    # Half of the references are samples of the model, so that no score is all collisions.
    model_samples = np.stack(
        np.unravel_index(p.reshape(5, -1).argmax(axis=1), p.shape[1:]), axis=1
    )[group]
    other = rng.integers(0, V, model_samples.shape)
    reference = np.where(
        rng.uniform(size=(len(model_samples), 1)) < 0.5, model_samples, other
    )
    logs, rates = (
        log_probs_of(p[group], reference),
        brier_lm.collision_probabilities(p)[group],
    )
    exact = brier_lm.brier_lm_from_probabilities(logs, rates)
    actual = brier_lm.evaluate_language_model(
        lm, few[group], reference, KEY, batch_size=ROWS
    )
    assert len(group) % ROWS  # the last chunk is not full
    assert (np.abs(values(exact)) > 0.01).all()
    errors = {}
    for kind in ("sampled", "closed"):
        errors[kind] = (
            values(actual[kind], "high") - values(actual[kind], "low")
        ) / 3.92
        off = np.abs(values(actual[kind]) - values(exact))
        assert (off < 4 * errors[kind]).all()
    assert (errors["closed"] < errors["sampled"]).all()
    # References are fixed: in closed form only collisions of 2-grams and longer are random.
    off = np.abs(values(actual["closed"]) - values(exact))
    assert off[0] < 1e-5
    p = p.reshape(5, -1)
    spread = np.sqrt(
        np.mean(np.sum(p**3, axis=1) - np.sum(p**2, axis=1) ** 2) / 2 / len(group)
    )
    assert off[3] < 4 * spread


def test_chunks_have_draws_of_their_own():
    """Were they the same, so were the sums of both groups."""
    contexts, reference = np.zeros((2 * ROWS, T), int), np.zeros((2 * ROWS, 4), int)
    groups = np.repeat([0, 1], ROWS)
    actual = brier_lm.evaluate_language_model(
        random_lm(), contexts, reference, KEY, groups=groups, batch_size=ROWS
    )
    assert actual["sampled"]["brier_1"]["low"] < actual["sampled"]["brier_1"]["high"]
    np.testing.assert_allclose(
        *(actual["closed"]["brier_1"][end] for end in ("low", "high"))
    )


def test_what_is_forced_is_what_whole_passes_say():
    lm, rng = random_lm(), np.random.default_rng(2)
    contexts, following = rng.integers(0, V, (5, T)), rng.integers(0, V, (3, 5, 4))
    many = np.arange(ROWS) % 5
    model = lm.model.clone(config=lm.config.at_length(T + 4))
    logs, collision = brier_lm._score_continuations(
        model,
        lm.params,
        contexts[many].astype(np.int32),
        following[:, many].astype(np.int32),
    )
    p = probabilities(lm, contexts)
    for tokens, actual in zip(following, logs[:, :5], strict=True):
        np.testing.assert_allclose(
            actual, log_probs_of(p, tokens), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(
        collision[:5], brier_lm.collision_probabilities(p)[:, 0], rtol=1e-5
    )
    # As equal as rows of one batch are: on some versions of JAX the last bit goes by their place.
    np.testing.assert_allclose(logs[:, -5:], logs[:, :5], rtol=1e-6)


def test_a_model_that_is_its_source_gives_its_collision_rates_or_100():
    transitions, rng = chain(), np.random.default_rng(0)
    contexts = rng.integers(0, V, (400, T))
    reference = going_on(transitions, contexts, rng)
    actual = brier_lm.evaluate_language_model(
        chain_lm(transitions), contexts, reference, KEY, batch_size=ROWS
    )
    rates = brier_lm.collision_probabilities(
        ngrams(transitions, np.arange(V)[:, None])
    )[contexts[:, -1]]
    for kind in ("sampled", "closed"):
        error = (values(actual[kind], "high") - values(actual[kind], "low")) / 3.92
        assert (np.abs(values(actual[kind]) - rates.mean(axis=0)) < 4 * error).all()

    turn = np.roll(np.eye(V), 1, axis=1)  # after v comes v + 1
    contexts = contexts[:ROWS]
    reference = going_on(turn, contexts, rng)
    assert reference[0].tolist() == [(contexts[0, -1] + i) % V for i in range(1, 5)]
    actual = brier_lm.evaluate_language_model(
        chain_lm(turn), contexts, reference, KEY, batch_size=ROWS
    )
    assert actual["sampled"]["brier_lm"] == {
        "value": 100.0,
        "low": 100.0,
        "high": 100.0,
    }
    assert actual["closed"]["brier_lm"]["value"] == pytest.approx(100.0)


# --- Arguments -------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused():
    tokens = np.zeros((3, 4), int)
    for wrong, match in [
        (tokens[:2], "rows are 2 of first, 3 of second, 3 of reference"),
        (tokens[:, :3], r"first is int64 \[3, 3\]"),
        (tokens.astype(float), "first is float64"),
    ]:
        with pytest.raises(clm.InputError, match=match):
            brier_lm.brier_lm_from_samples(wrong, tokens, tokens)
    with pytest.raises(clm.InputError, match="no positions"):
        brier_lm.brier_lm_from_samples(tokens[:0], tokens[:0], tokens[:0])
    for groups in (np.zeros(2, int), np.zeros(3)):
        with pytest.raises(clm.InputError, match=r"groups must be int \[3\]"):
            brier_lm.brier_lm_from_samples(tokens, tokens, tokens, groups=groups)
    with pytest.raises(clm.InputError, match="resamples is 0"):
        brier_lm.brier_lm_from_samples(tokens, tokens, tokens, resamples=0)
    logs, half = np.zeros((3, 4)), np.full((3, 4), 0.5)
    for arguments, match in [
        ((logs[:2], half), "it must be"),
        ((logs[:, :2], half), "reference_log_probs has shape"),
        ((logs + 1, half), "above 0"),
        ((logs * np.nan, half), "no numbers"),
        ((logs, half + 1), "collision has entries"),
        ((logs, half - 1), "collision has entries"),
    ]:
        with pytest.raises(clm.InputError, match=match):
            brier_lm.brier_lm_from_probabilities(*arguments)
    lm = random_lm()
    for contexts, match in [
        (tokens[:2], "contexts are"),
        (tokens[0], "contexts are"),
        (tokens + V, "contexts"),
    ]:
        with pytest.raises(clm.InputError, match=match):
            brier_lm.evaluate_language_model(lm, contexts, tokens, KEY)
    with pytest.raises(clm.InputError, match=r"reference\[0, 0\] is 5"):
        brier_lm.evaluate_language_model(lm, tokens, tokens + V, KEY)
