"""Draws at a temperature against the exact distributions, which wrong algorithms do not meet."""

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
# Some share their first or their last token: equality is that of all of them.
ITEMS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 7]], np.int32)
batched = jax.jit(repeated_draws.repetition_sample, static_argnames="n")
P = np.array([0.35, 0.25, 0.2, 0.15, 0.05])


def tempered(p, t):
    weights = p ** (1 / t)
    return weights / weights.sum()


def counted(items):
    """How often each of ITEMS came."""
    return (np.asarray(items)[:, None] == ITEMS).all(axis=-1).sum(axis=0)


def chi_square(items, p):
    counts = counted(items)
    assert counts.sum() == len(items)
    return stats.chisquare(counts, len(items) * p).pvalue


def drawn(*shape, seed=0):
    return ITEMS[np.random.default_rng(seed).choice(len(P), shape, p=P)]


# --- Exact -----------------------------------------------------------------------------------


def exact(key, p, t):
    """20 000 rows with distributions [5] or [20 000, 5]."""
    edges = jnp.cumsum(jnp.broadcast_to(p, (ROWS, len(P))), axis=-1)[:, :-1]

    def draw(key):
        return jnp.asarray(ITEMS)[
            jnp.sum(jax.random.uniform(key, (ROWS, 1)) >= edges, axis=-1)
        ]

    return repeated_draws.rejection_sample(
        key, draw, temperature=jnp.broadcast_to(t, ROWS), max_rounds=2000
    )


jitted_exact = jax.jit(exact)


def exactly(t, p=P):  # one program for all
    shapes = (ROWS, len(P)), (ROWS,)
    return jitted_exact(
        KEY,
        *(
            np.broadcast_to(np.float32(x), s)
            for x, s in zip((p, t), shapes, strict=True)
        ),
    )


@pytest.mark.parametrize("t", [1.0, 1 / 2, 1 / 3, 0.4, 0.7], ids=lambda t: f"{t:.2f}")
def test_exact_draws_are_those_of_the_tempered_distribution(t):
    found = exactly(t)
    assert found.accepted.all()
    assert found.items.dtype == jnp.int32
    assert chi_square(found.items, tempered(P, t)) > 1e-3
    # The same test tells neighbouring temperatures apart.
    for other in (1.0, 1 / 2, 1 / 3, 1 / 4, 0.37, 0.43, 0.62):
        if abs(other - t) > 0.01:
            assert chi_square(found.items, tempered(P, other)) < 1e-6


def rejected(rng, t, *, num=ROWS, reuse=False, shift=0):
    """`exact` one row after another in numpy, with defects on demand.

    reuse: a draw that fails begins the next attempt. shift: a miss counts as the one so much later.
    """
    n = math.floor(1 / t + 1e-9)
    a = 1 / t - n
    draws = iter(rng.choice(len(P), p=P, size=80 * num).tolist())
    chances = iter(rng.uniform(size=40 * num).tolist())

    def attempt(first):
        """The item, or None, and the draw that it ended with."""
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

    made, over = [], None
    while len(made) < num:
        item, last = attempt(next(draws) if over is None else over)
        over = last if reuse else None
        if item is not None:
            made.append(item)
    return ITEMS[made]


def test_wrong_rejections_fail_the_chi_square_test():
    rng = np.random.default_rng(0)
    for t in (1 / 2, 0.4):
        assert chi_square(rejected(rng, t), tempered(P, t)) > 1e-3
        assert chi_square(rejected(rng, t, reuse=True), tempered(P, t)) < 1e-6
    assert chi_square(rejected(rng, 0.4, shift=1), tempered(P, 0.4)) < 1e-6


def test_rounds_are_as_many_as_rejection_takes():
    """Attempts at 1/2 are of two draws, and succeed with the probability of a repetition."""
    success = np.sum(P**2)
    rounds = np.asarray(exactly(0.5).num_rounds)
    assert (rounds % 2 == 0).all()
    error = (
        2 * np.sqrt(1 - success) / success / np.sqrt(ROWS)
    )  # of a geometric distribution's mean
    assert abs(rounds.mean() - 2 / success) < 4 * error
    assert (np.asarray(exactly(1.0).num_rounds) == 1).all()


def test_rows_have_distributions_and_temperatures_of_their_own():
    each = np.stack([P, P[::-1], np.eye(5)[2] * 0.999 + 0.0002, P])
    t = np.array([0.5, 0.5, 0.5, 0.4], np.float32)
    size = ROWS // 4
    found = exactly(np.repeat(t, size), np.repeat(each, size, axis=0))
    assert found.accepted.all()
    for i, (p, at) in enumerate(zip(each, t, strict=True)):
        items = found.items[i * size : (i + 1) * size]
        if i == 2:
            assert counted(items)[2] == size
        else:
            assert chi_square(items, tempered(p, at)) > 1e-3
    # Neighbours that take long do not change a row: the sure one is done after its two draws.
    assert found.num_rounds[2 * size : 3 * size].max() <= 6
    assert found.num_rounds[:size].max() > 20


def test_nobody_waits_for_rows_that_are_done():
    def draw(key):
        first = jax.random.categorical(
            key, jnp.zeros(100_000), shape=(2, 1)
        )  # never twice
        return first.at[1].set(7).astype(jnp.int32)

    @jax.jit
    def drawn(done):
        return repeated_draws.rejection_sample(
            KEY, draw, temperature=0.5, max_rounds=50, is_done=done
        )

    found = drawn(jnp.array([True, False]))
    assert found.num_rounds.tolist() == [0, 2]
    assert found.items[1, 0] == 7
    assert drawn(jnp.array([False, False])).num_rounds.tolist() == [50, 2]


def test_rows_that_are_not_accepted_hold_the_last_draw_and_say_so():
    def numbers(key):
        """New ones each time, but in row 0."""
        new = jax.random.key_data(key).astype(jnp.int32)[None] + jnp.arange(4)[:, None]
        return new.at[0].set(5)

    run = functools.partial(repeated_draws.rejection_sample, draw=numbers, max_rounds=4)
    t = np.array([0.4, 0.4, 0.5, 0.5], np.float32)
    found = jax.jit(run)(KEY, temperature=t)
    jax.tree.map(np.testing.assert_array_equal, found, run(KEY, temperature=t))
    assert found.accepted.tolist() == [True, False, False, False]
    assert found.num_rounds.tolist() == [3, 4, 4, 4]
    last = jax.random.split(jax.random.fold_in(KEY, 3))[0]  # of four draws
    np.testing.assert_array_equal(found.items, numbers(last))


# --- Batch -----------------------------------------------------------------------------------


def by_counting(candidates, n):
    """The probability of each distinct item of one row [Z, C]."""
    counts = Counter(map(tuple, np.asarray(candidates).tolist()))
    for m in range(n, 0, -1):
        chances = {item: math.comb(c, m) for item, c in counts.items() if c >= m}
        if chances:
            return {item: w / sum(chances.values()) for item, w in chances.items()}
    raise AssertionError


def by_weights(candidates, n):
    return gathered(*repeated_draws.repetition_weights(candidates, n=n))


def gathered(items, logs):
    """The same from what `weights` gives for one row."""
    p, found = softmax(np.asarray(logs, np.float64), axis=0), Counter()
    for item, weight in zip(
        map(tuple, np.asarray(items).tolist()), p.tolist(), strict=True
    ):
        found[item] += weight
    return {item: weight for item, weight in found.items() if weight}


@given(
    shape=st.sampled_from([(1, 1, 2), (5, 2, 2), (30, 3, 10)]),  # N, O and n
    most=st.sampled_from([1, 2, 2**31 - 1]),
    seed=st.integers(0, 99),
)
def test_weights_are_those_of_counting(shape, most, seed):
    num, length, n = shape
    rng = np.random.default_rng(seed)
    candidates = rng.integers(-most, most, (num, 8, length), endpoint=True).astype(
        np.int32
    )
    items, logs = repeated_draws.repetition_weights(candidates, n=n)
    for row in range(8):
        expected = by_counting(candidates[:, row], n)
        found = gathered(items[:, row], logs[:, row])
        assert found.keys() == expected.keys()
        for item, weight in expected.items():
            np.testing.assert_allclose(found[item], weight, rtol=1e-5)


def test_weights_of_many_candidates_keep_their_digits():
    """C(985, 10) is 7e22, of which float32 makes nothing that is not finite."""
    candidates = np.repeat([[3, 1], [3, 2], [4, 1]], [505, 480, 15], axis=0)
    candidates = np.random.default_rng(0).permutation(candidates).astype(np.int32)
    expected, found = by_counting(candidates, 10), by_weights(candidates, 10)
    assert found.keys() == expected.keys()
    for item, weight in expected.items():
        np.testing.assert_allclose(found[item], weight, rtol=1e-5)


def test_what_does_not_repeat_often_enough_falls_back():
    rows = np.array([[1, 1, 1, 2, 2], [1, 1, 3, 2, 2], [5, 1, 3, 2, 4]]).T[..., None]
    wanted = [{1: 1.0}, {1: 0.5, 2: 0.5}, dict.fromkeys(range(1, 6), 0.2)]
    items, logs = repeated_draws.repetition_weights(rows, n=4)
    for i, expected in enumerate(wanted):  # each row on its own
        found = gathered(items[:, i], logs[:, i])
        assert found == pytest.approx({(k,): v for k, v in expected.items()})


def splits(num, size):
    """All counts [M, size] of `num` candidates."""
    bars = np.array(list(itertools.combinations(range(num + size - 1), size - 1)), int)
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=-1)
    edges[:, -1] = num + size - 1
    return np.diff(edges, axis=1) - 1


def combinations(counts, m):
    return np.vectorize(math.comb, otypes=[float])(counts, m)


def of_batch(p, num, n, weigh=combinations):
    """The distribution of what `batch` draws from `num` candidates, by enumeration."""
    counts = splits(num, len(p))
    weights = weigh(counts, np.minimum(n, counts.max(axis=1, keepdims=True)))
    chances = stats.multinomial.pmf(counts, num, p)
    return chances @ (weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("n", [2, 3])
def test_batch_draws_are_those_of_the_enumeration(n):
    num = 20
    items = batched(KEY, drawn(num, ROWS), n=n)
    assert items.shape == (ROWS, 2)
    if n == 2:
        plain = repeated_draws.repetition_sample(
            KEY, drawn(num, ROWS), n=n
        )  # without jit
        np.testing.assert_array_equal(plain, items)
    assert chi_square(items, of_batch(P, num, n)) > 1e-3
    wrong = {
        "each copy counts for itself": of_batch(
            P, num, n, lambda c, m: c * combinations(c, m)
        ),
        "powers": of_batch(P, num, n, lambda c, m: c**n),
        "T too low": of_batch(P, num, n + 1),
        "T too high": of_batch(P, num, n - 1),
    }
    for name, p in wrong.items():
        assert chi_square(items, p) < 1e-6, name


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_batch_draws_of_many_are_those_of_the_tempered_distribution(n):
    items = batched(KEY, drawn(512, 2000), n=n)
    assert chi_square(items, tempered(P, 1 / n)) > 1e-3
    for other in (n - 1, n + 1):
        assert chi_square(items, tempered(P, 1 / other)) < 1e-6


@functools.partial(jax.jit, static_argnames=("num", "n"))
def shares(counts, num, n):
    """What `weights` gives three items with these counts [M, 3], by arrays of candidates."""
    edges = jnp.cumsum(counts, axis=-1)
    candidates = jnp.sum(jnp.arange(num)[:, None, None] >= edges, axis=-1)
    items, logs = repeated_draws.repetition_weights(candidates[..., None], n=n)
    return jnp.einsum(
        "nm,nmv->mv", jax.nn.softmax(logs, axis=0), jax.nn.one_hot(items[..., 0], 3)
    )


@pytest.mark.parametrize("n", [2, 3])
def test_the_bias_of_the_batch_form_falls_as_candidates_grow(n):
    """Total variation from the tempered distribution, over all that candidates can be."""
    p = np.array([0.5, 0.3, 0.2])
    found = []
    for num in (4, 16, 64, 256):
        shared = of_batch(p, num, n)
        if num == 256:  # ours, not the reference's
            counts = splits(num, 3)
            chances = stats.multinomial.pmf(counts, num, p)
            likely = chances > 1e-9
            ours = chances[likely] @ np.asarray(
                shares(counts[likely], num, n), np.float64
            )
            np.testing.assert_allclose(ours, shared, atol=1e-5)
            shared = ours
        assert shared[0] < tempered(p, 1 / n)[0]  # too flat
        found.append(0.5 * np.abs(shared - tempered(p, 1 / n)).sum())
    assert found[0] < 0.2
    for before, after in itertools.pairwise(found):
        assert after < before / 2
    assert 3.5 < found[-2] / found[-1] < 4.5  # as 1 / N in the end


def test_rows_do_not_touch_each_other():
    candidates = drawn(9, 2, 3)
    items, logs = repeated_draws.repetition_weights(candidates, n=3)
    flat = candidates.reshape(9, 6, 2)
    for row, (i, j) in enumerate(np.ndindex(2, 3)):
        expected = by_counting(flat[:, row], 3)
        assert gathered(items[:, i, j], logs[:, i, j]) == pytest.approx(expected)
    keys, how = (
        jax.random.split(KEY, 6),
        functools.partial(repeated_draws.repetition_sample, n=3),
    )
    mapped = jax.jit(jax.vmap(how, in_axes=(0, 1)))(keys, flat)
    for i in range(6):
        np.testing.assert_array_equal(mapped[i], batched(keys[i], flat[:, i], n=3))
    # Draws of equal rows are independent.
    same = np.broadcast_to(drawn(20, 1), (20, ROWS, 2))
    weights = by_counting(same[:, 0], 2)
    p = np.array([weights.get(tuple(item), 0.0) for item in ITEMS.tolist()])
    counts = counted(batched(KEY, same, n=2))
    assert stats.chisquare(counts[p > 0], ROWS * p[p > 0]).pvalue > 1e-3


# --- Arguments -------------------------------------------------------------------------------


def test_order_is_the_whole_number_in_the_temperature():
    for n in (1, 2, 3, 7, 100):
        assert repeated_draws.inverse_temperature(1 / n) == n
        assert repeated_draws.inverse_temperature(np.float32(1 / n)) == n
    assert repeated_draws.inverse_temperature(0.3333333) == 3
    for t in (0.4, 2.0, 0.0, -1.0, 0.333, 0.501, [0.5]):
        with pytest.raises(clm.InputError, match="needs 1, 1/2, 1/3"):
            repeated_draws.inverse_temperature(t)
    with pytest.raises(clm.InputError, match="temperature is nan"):
        repeated_draws.inverse_temperature(math.nan)


def sure(key):
    return jnp.zeros((4, 2), jnp.int32)


@pytest.mark.parametrize("t", [0.0, -0.5, 1.5, math.nan])
def test_temperatures_out_of_range_are_refused(t):
    with pytest.raises(clm.InputError, match="temperature is"):
        repeated_draws.rejection_sample(KEY, sure, temperature=t, max_rounds=10)


def test_arguments_that_do_not_fit_are_refused():
    def exact(function=sure, **more):
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
