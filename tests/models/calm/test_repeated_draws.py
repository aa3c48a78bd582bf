"""Samples at a temperature against the exact distributions, which wrong algorithms fail."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax

import continuous_lm as clm
from continuous_lm.models.calm import repeated_draws

KEY = jax.random.key(0)
ROWS = 20_000
# Some share their first or their last token: items are equal if all tokens are.
ITEMS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 7]], np.int32)
repetition_sample = jax.jit(repeated_draws.repetition_sample, static_argnames="n")
repetition_weights = jax.jit(repeated_draws.repetition_weights, static_argnames="n")
P = np.array([0.35, 0.25, 0.2, 0.15, 0.05])


def tempered(p, t):
    weights = p ** (1 / t)
    return weights / weights.sum()


def count_items(items):
    """Return the count of each of ITEMS."""
    return (np.asarray(items)[:, None] == ITEMS).all(axis=-1).sum(axis=0)


def chi_square(items, p):
    counts = count_items(items)
    assert counts.sum() == len(items)
    return stats.chisquare(counts, len(items) * p).pvalue


def random_items(*shape, seed=0):
    return ITEMS[np.random.default_rng(seed).choice(len(P), shape, p=P)]


# --- Rejection, which is exact ---------------------------------------------------------------


@jax.jit
def rejection_sample(key, p, t):
    """Sample 20 000 rows with distributions p [20 000, 5] at temperatures t [20 000]."""
    edges = jnp.cumsum(jnp.broadcast_to(p, (ROWS, len(P))), axis=-1)[:, :-1]

    def draw(key):
        return jnp.asarray(ITEMS)[
            jnp.sum(jax.random.uniform(key, (ROWS, 1)) >= edges, axis=-1)
        ]

    return repeated_draws.rejection_sample(
        key, draw, temperature=jnp.broadcast_to(t, ROWS), max_rounds=2000
    )


def sample_rows(t, p=P):
    """Broadcast the arguments, so that all tests run one program."""
    p = np.broadcast_to(np.float32(p), (ROWS, len(P)))
    return rejection_sample(KEY, p, np.broadcast_to(np.float32(t), ROWS))


@pytest.mark.parametrize("t", [1.0, 1 / 2, 1 / 3, 0.4, 0.7], ids=lambda t: f"{t:.2f}")
def test_rejection_samples_the_tempered_distribution(t):
    result = sample_rows(t)
    assert result.accepted.all()
    assert result.items.dtype == jnp.int32
    assert chi_square(result.items, tempered(P, t)) > 1e-3
    # The same test distinguishes similar temperatures.
    for other in (1.0, 1 / 2, 1 / 3, 1 / 4, 0.37, 0.43, 0.62):
        if abs(other - t) > 0.01:
            assert chi_square(result.items, tempered(P, other)) < 1e-6


def reject_in_numpy(rng, t, *, num=ROWS, reuse=False, shift=0):
    """`rejection_sample` row by row in numpy, optionally with a defect.

    reuse: a sample that fails starts the next attempt. shift: a miss counts as that many later.
    """
    n = math.floor(1 / t + 1e-9)
    a = 1 / t - n
    draws = iter(rng.choice(len(P), p=P, size=80 * num).tolist())
    chances = iter(rng.uniform(size=40 * num).tolist())

    def attempt(first):
        """Return the item and None; or None and the last sample, if the attempt fails."""
        for _ in range(n - 1):
            if (new := next(draws)) != first:
                return None, new
        if a > 1e-9:
            for i in itertools.count(1):
                if (new := next(draws)) == first:
                    break
                if next(chances) < a / (i + shift):
                    return None, new
        return first, None

    indices, unused = [], None
    while len(indices) < num:
        item, last = attempt(next(draws) if unused is None else unused)
        unused = last if reuse else None
        if item is not None:
            indices.append(item)
    return ITEMS[indices]


def test_wrong_rejections_fail_the_chi_square_test():
    rng = np.random.default_rng(0)
    for t in (1 / 2, 0.4):
        assert chi_square(reject_in_numpy(rng, t), tempered(P, t)) > 1e-3
        assert chi_square(reject_in_numpy(rng, t, reuse=True), tempered(P, t)) < 1e-6
    assert chi_square(reject_in_numpy(rng, 0.4, shift=1), tempered(P, 0.4)) < 1e-6


def test_the_mean_number_of_rounds_is_that_of_a_geometric_distribution():
    """Attempts at 1/2 take two samples, and succeed with the probability of a repetition."""
    success = np.sum(P**2)
    rounds = np.asarray(sample_rows(0.5).num_rounds)
    assert (rounds % 2 == 0).all()
    error = 2 * np.sqrt(1 - success) / success / np.sqrt(ROWS)
    assert abs(rounds.mean() - 2 / success) < 4 * error
    assert (np.asarray(sample_rows(1.0).num_rounds) == 1).all()


def test_each_row_has_its_distribution_and_temperature():
    distributions = np.stack([P, P[::-1], np.eye(5)[2] * 0.999 + 0.0002, P])
    temperatures = np.array([0.5, 0.5, 0.5, 0.4], np.float32)
    size = ROWS // 4
    result = sample_rows(
        np.repeat(temperatures, size), np.repeat(distributions, size, axis=0)
    )
    result = jax.tree.map(np.asarray, result)
    assert result.accepted.all()
    for i, (p, t) in enumerate(zip(distributions, temperatures, strict=True)):
        items = result.items[i * size : (i + 1) * size]
        if i == 2:
            assert count_items(items)[2] == size
        else:
            assert chi_square(items, tempered(p, t)) > 1e-3
    # Slow rows do not change others: those that are nearly certain need two samples.
    assert result.num_rounds[2 * size : 3 * size].max() <= 6
    assert result.num_rounds[:size].max() > 20


def test_rounds_end_when_all_rows_are_done():
    def draw(key):
        """An item that never repeats in row 0, and always does in row 1."""
        return jax.random.bits(key, (2, 1)).astype(jnp.int32).at[1].set(7)

    @jax.jit
    def run(is_done):
        return repeated_draws.rejection_sample(
            KEY, draw, temperature=0.5, max_rounds=50, is_done=is_done
        )

    result = run(np.array([True, False]))
    assert result.num_rounds.tolist() == [0, 2]
    assert np.asarray(result.items)[1, 0] == 7
    assert run(np.array([False, False])).num_rounds.tolist() == [50, 2]


def test_rows_without_accepted_samples_have_the_last_one():
    def draw(key):
        """New numbers for each key, but in row 0."""
        new = jax.random.key_data(key).astype(jnp.int32)[None] + jnp.arange(4)[:, None]
        return new.at[0].set(5)

    run = functools.partial(repeated_draws.rejection_sample, draw=draw, max_rounds=4)
    t = np.array([0.4, 0.4, 0.5, 0.5], np.float32)
    result = jax.jit(run)(KEY, temperature=t)
    assert result.accepted.tolist() == [True, False, False, False]
    assert result.num_rounds.tolist() == [3, 4, 4, 4]
    last_key = jax.random.split(jax.random.fold_in(KEY, 3))[0]  # of four samples
    np.testing.assert_array_equal(result.items, jax.jit(draw)(last_key))


# --- Repetition in a batch of candidates -----------------------------------------------------


def by_counting(candidates, n):
    """Return the probability of each distinct item of one row [Z, C]."""
    counts = Counter(map(tuple, np.asarray(candidates).tolist()))
    for m in range(n, 0, -1):
        chances = {item: math.comb(c, m) for item, c in counts.items() if c >= m}
        if chances:
            return {item: w / sum(chances.values()) for item, w in chances.items()}
    raise AssertionError


def probabilities(items, logs):
    """Return the same probabilities from the items and weights of one row."""
    p, weights = softmax(np.asarray(logs, np.float64), axis=0), Counter()
    for item, weight in zip(
        map(tuple, np.asarray(items).tolist()), p.tolist(), strict=True
    ):
        weights[item] += weight
    return {item: weight for item, weight in weights.items() if weight}


@given(
    shape=st.sampled_from([(1, 1, 2), (5, 2, 2), (30, 3, 10)]),  # N, O and n
    most=st.sampled_from([1, 2, 2**31 - 1]),
    seed=st.integers(0, 99),
)
def test_weights_equal_those_of_counting(shape, most, seed):
    num, length, n = shape
    rng = np.random.default_rng(seed)
    candidates = rng.integers(-most, most, (num, 8, length), endpoint=True).astype(
        np.int32
    )
    items, logs = map(np.asarray, repetition_weights(candidates, n=n))
    for row in range(8):
        assert_same_probabilities(
            probabilities(items[:, row], logs[:, row]),
            by_counting(candidates[:, row], n),
        )


def assert_same_probabilities(actual, expected):
    assert actual.keys() == expected.keys()
    for item, weight in expected.items():
        np.testing.assert_allclose(actual[item], weight, rtol=1e-5)


def test_weights_of_many_candidates_are_exact():
    """C(985, 10) is 7e22, and products of such numbers overflow float32."""
    candidates = np.repeat([[3, 1], [3, 2], [4, 1]], [505, 480, 15], axis=0)
    candidates = np.random.default_rng(0).permutation(candidates).astype(np.int32)
    actual = probabilities(*repetition_weights(candidates, n=10))
    assert_same_probabilities(actual, by_counting(candidates, 10))


def test_items_that_repeat_less_often_are_used_if_none_repeats_n_times():
    rows = np.array([[1, 1, 1, 2, 2], [1, 1, 3, 2, 2], [5, 1, 3, 2, 4]]).T[..., None]
    expected = [{1: 1.0}, {1: 0.5, 2: 0.5}, dict.fromkeys(range(1, 6), 0.2)]
    items, logs = map(np.asarray, repetition_weights(rows, n=4))
    for i, weights in enumerate(expected):
        actual = probabilities(items[:, i], logs[:, i])
        assert actual == pytest.approx({(k,): v for k, v in weights.items()})


def splits(num, size):
    """Return all counts [M, size] of `num` candidates."""
    bars = np.array(list(itertools.combinations(range(num + size - 1), size - 1)), int)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=-1)
    edges[:, -1] = num + size - 1
    return np.diff(edges, axis=1) - 1


def combinations(counts, m):
    return np.vectorize(math.comb, otypes=[float])(counts, m)


def repetition_distribution(p, num, n, weigh=combinations):
    """Return the distribution of samples from `num` candidates, by enumeration."""
    counts = splits(num, len(p))
    weights = weigh(counts, np.minimum(n, counts.max(axis=1, keepdims=True)))
    chances = stats.multinomial.pmf(counts, num, p)
    return chances @ (weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("n", [2, 3])
def test_repetition_samples_the_distribution_of_the_enumeration(n):
    num = 20
    items = repetition_sample(KEY, random_items(num, ROWS), n=n)
    assert items.shape == (ROWS, 2)
    distribution = functools.partial(repetition_distribution, P, num)
    assert chi_square(items, distribution(n)) > 1e-3
    wrong = {
        "weights times counts": distribution(n, lambda c, m: c * combinations(c, m)),
        "powers": distribution(n, lambda c, m: c**n),
        "T too low": distribution(n + 1),
        "T too high": distribution(n - 1),
    }
    for name, p in wrong.items():
        assert chi_square(items, p) < 1e-6, name


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_repetition_of_many_candidates_samples_the_tempered_distribution(n):
    items = repetition_sample(KEY, random_items(512, 2000), n=n)
    assert chi_square(items, tempered(P, 1 / n)) > 1e-3
    for other in (n - 1, n + 1):
        assert chi_square(items, tempered(P, 1 / other)) < 1e-6


@functools.partial(jax.jit, static_argnames=("num", "n"))
def shares(counts, num, n):
    """Return the probabilities of three items with counts [M, 3], by arrays of candidates."""
    edges = jnp.cumsum(counts, axis=-1)
    candidates = jnp.sum(jnp.arange(num)[:, None, None] >= edges, axis=-1)
    items, logs = repeated_draws.repetition_weights(candidates[..., None], n=n)
    return jnp.einsum(
        "nm,nmv->mv", jax.nn.softmax(logs, axis=0), jax.nn.one_hot(items[..., 0], 3)
    )


@pytest.mark.parametrize("n", [2, 3])
def test_the_bias_of_repetition_falls_as_1_over_the_candidates(n):
    """The bias is the total variation from the tempered distribution, over all candidates."""
    p = np.array([0.5, 0.3, 0.2])
    biases = []
    for num in (4, 16, 64, 256):
        distribution = repetition_distribution(p, num, n)
        if num == 256:  # that of the package, not of the reference
            counts = splits(num, 3)
            chances = stats.multinomial.pmf(counts, num, p)
            likely = chances > 1e-9
            ours = chances[likely] @ np.asarray(
                shares(counts[likely], num, n), np.float64
            )
            np.testing.assert_allclose(ours, distribution, atol=1e-5)
            distribution = ours
        assert distribution[0] < tempered(p, 1 / n)[0]  # too flat
        biases.append(0.5 * np.abs(distribution - tempered(p, 1 / n)).sum())
    assert biases[0] < 0.2
    for before, after in itertools.pairwise(biases):
        assert after < before / 2
    assert 3.5 < biases[-2] / biases[-1] < 4.5


def test_rows_are_independent():
    candidates = random_items(9, 2, 3)
    items, logs = map(np.asarray, repetition_weights(candidates, n=3))
    flat = candidates.reshape(9, 6, 2)
    for row, (i, j) in enumerate(np.ndindex(2, 3)):
        expected = by_counting(flat[:, row], 3)
        actual = probabilities(items[:, i, j], logs[:, i, j])
        assert actual == pytest.approx(expected)
    keys = jax.random.split(KEY, 6)
    sample = functools.partial(repeated_draws.repetition_sample, n=3)
    mapped = np.asarray(jax.jit(jax.vmap(sample, in_axes=(0, 1)))(keys, flat))
    for i in range(6):
        alone = repetition_sample(keys[i], flat[:, i], n=3)
        np.testing.assert_array_equal(mapped[i], alone)
    # Samples of equal rows are independent.
    same = np.broadcast_to(random_items(20, 1), (20, ROWS, 2))
    weights = by_counting(same[:, 0], 2)
    p = np.array([weights.get(tuple(item), 0.0) for item in ITEMS.tolist()])
    counts = count_items(repetition_sample(KEY, same, n=2))
    assert stats.chisquare(counts[p > 0], ROWS * p[p > 0]).pvalue > 1e-3


# --- Arguments -------------------------------------------------------------------------------


def test_inverse_temperatures_must_be_integers():
    for n in (1, 2, 3, 7, 100):
        assert repeated_draws.inverse_temperature(1 / n) == n
        assert repeated_draws.inverse_temperature(np.float32(1 / n)) == n
    assert repeated_draws.inverse_temperature(0.3333333) == 3
    for t in (0.4, 2.0, 0.0, -1.0, 0.333, 0.501, [0.5]):
        with pytest.raises(clm.InputError, match="needs 1, 1/2, 1/3"):
            repeated_draws.inverse_temperature(t)
    with pytest.raises(clm.InputError, match="temperature is nan"):
        repeated_draws.inverse_temperature(math.nan)


def draw_zeros(key):
    return jnp.zeros((4, 2), jnp.int32)


@pytest.mark.parametrize("t", [0.0, -0.5, 1.5, math.nan])
def test_temperatures_out_of_range_are_refused(t):
    with pytest.raises(clm.InputError, match="temperature is"):
        repeated_draws.rejection_sample(KEY, draw_zeros, temperature=t, max_rounds=10)


def test_arguments_that_do_not_fit_are_refused():
    def exact(function=draw_zeros, **more):
        return repeated_draws.rejection_sample(
            KEY, function, **dict(temperature=0.5, max_rounds=2) | more
        )

    with pytest.raises(clm.InputError, match="max_rounds is 0"):
        exact(max_rounds=0)
    with pytest.raises(clm.InputError, match=r"temperature has shape \[3\]"):
        exact(temperature=np.full(3, 0.5))
    with pytest.raises(clm.InputError, match=r"draws are float32 \[4, 2\]"):
        exact(lambda key: jax.random.uniform(key, (4, 2)))
    with pytest.raises(clm.InputError, match=r"draws are int32 \[4\]"):
        exact(lambda key: jax.random.randint(key, (4,), 0, 3))
    for n in (0, 1.5, True):
        with pytest.raises(clm.InputError, match=f"n is {n}"):
            repeated_draws.repetition_sample(KEY, ITEMS, n=n)
    with pytest.raises(clm.InputError, match="candidates have dtype float32"):
        repeated_draws.repetition_sample(KEY, jnp.ones((3, 2)), n=1)
    for shape in [(3,), (0, 2), (3, 0)]:
        with pytest.raises(clm.InputError, match="candidates have shape"):
            repeated_draws.repetition_sample(KEY, np.ones(shape, int), n=1)
