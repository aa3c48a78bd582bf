"""Sweeps against calls of the model, their shared prefixes, and groups of sweeps."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from scipy.special import softmax

import continuous_lm as clm
from continuous_lm.analysis import sweep_batches
from continuous_lm.inputs import Inputs
from tests.models.test_transformer import CONFIG, LM, N, draw, random_lm

GROUPS = [[3], [5, 7, 39], []]


def direct(lm=LM, **arguments):
    """Probabilities of the groups, from one call of the model."""
    p = softmax(np.asarray(lm(position=-1, **arguments), np.float64))
    return np.array([p[group].sum() for group in GROUPS])


def scale(*arguments):
    return np.asarray(clm.durations.scale(*arguments))


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3, 7])
def test_every_point_equals_a_call_for_it(batch_size):
    tokens, d = draw()
    grid = scale(d, np.linspace(0, 1, 7), (3, 8))
    swept = clm.sweep.probabilities(
        LM, GROUPS, tokens=tokens, durations=grid, batch_size=batch_size
    )
    assert swept.shape == (7, 3)
    for row, point in zip(swept, grid, strict=True):
        np.testing.assert_allclose(
            row, direct(tokens=tokens, durations=point), atol=1e-6
        )


def test_embeddings_starts_and_times_can_vary():
    tokens, d = draw()
    table = np.asarray(LM.params["embedding"])
    rows = table[tokens] * np.linspace(0.5, 1, 4, dtype=np.float32)[:, None, None]
    stretched = d * np.linspace(0.5, 2, 4, dtype=np.float32)[:, None]
    times = np.asarray(clm.durations.end_times(stretched))
    varied = {"embeddings": rows, "times": times, "durations": d}
    swept = clm.sweep.probabilities(LM, GROUPS, batch_size=3, **varied)
    np.testing.assert_allclose(
        swept[2], direct(embeddings=rows[2], times=times[2], durations=d), atol=1e-6
    )
    learned = random_lm(dataclasses.replace(CONFIG, rope=None, max_positions=20))
    moved = clm.sweep.probabilities(
        learned, GROUPS, tokens=tokens, start=np.arange(3.0)
    )
    for row, start in zip(moved, range(3), strict=True):
        np.testing.assert_allclose(
            row, direct(learned, tokens=tokens, start=float(start)), atol=1e-6
        )
    assert np.abs(moved[0] - moved[1]).max() > 1e-4


def test_the_group_of_all_tokens_has_probability_1():
    tokens, d = draw()
    swept = clm.sweep.probabilities(LM, [range(40)], tokens=tokens, durations=d[None])
    np.testing.assert_allclose(swept, 1.0, atol=1e-6)


def test_change_durations_changes_mass_or_times_or_both():
    _, d = draw()
    both, mass, times = (
        clm.sweep.change_durations(d[None], what) for what in ("both", "mass", "times")
    )
    ends, ordinary = clm.durations.end_times(d)[None], np.arange(1.0, N + 1)[None]
    np.testing.assert_array_equal(both.durations, d[None])
    assert both.times is None
    np.testing.assert_array_equal(mass.durations, d[None])
    np.testing.assert_array_equal(mass.times, ordinary)
    np.testing.assert_array_equal(times.durations, np.ones((1, N)))
    np.testing.assert_array_equal(times.times, ends)
    with pytest.raises(clm.InputError, match="'neither'"):
        clm.sweep.change_durations(d, "neither")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "number of points"),
        ({"durations": np.ones((0, N))}, "number of points"),
        (
            {"durations": np.ones((2, N)), "start": np.ones(3)},
            r"number of points.*\[2, 3\]",
        ),
        ({"durations": np.ones((2, 2, N))}, "durations has shape"),
        ({"durations": np.ones((2, N + 1))}, "durations has shape"),
        ({"durations": np.full((2, N), np.nan)}, r"durations\[0, 0\] is nan"),
        ({"durations": np.ones((2, N)), "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(clm.InputError, match=message):
        clm.sweep.probabilities(LM, GROUPS, tokens=draw()[0], **arguments)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="duration"):
        clm.sweep.probabilities(LM, GROUPS, draw()[0], duration=np.ones((2, N)))


def test_groups_outside_of_the_vocabulary_are_named():
    with pytest.raises(clm.InputError, match=r"group 1\[0\] is 40"):
        clm.sweep.probabilities(
            LM, [[1], [40]], tokens=draw()[0], durations=np.ones((2, N))
        )


# --- Prefixes that all points share --------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """Prefixes are computed separately, even if they save little."""
    monkeypatch.setattr(sweep_batches, "MIN_SAVED_FLOPS", 0)


@pytest.fixture
def prefix_lengths(monkeypatch):
    """Padded lengths of the prefixes that are computed."""
    lengths, prefill = [], sweep_batches._prefill

    def recorded(model, params, inputs):
        lengths.append(inputs.durations.shape[-1])
        return prefill(model, params, inputs)

    monkeypatch.setattr(sweep_batches, "_prefill", recorded)
    return lengths


VARIANTS = {
    "plain": {},
    "windows": {"window": 4.0, "window_pattern": (True, False)},
    "learned positions": {"rope": None, "max_positions": 40},
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("variant", "change"),
    [
        case
        if case
        in (("plain", "both"), ("windows", "mass"), ("learned positions", "times"))
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(VARIANTS, ("both", "mass", "times"))
    ],
)
def test_a_shared_prefix_does_not_change_probabilities(prefix_lengths, variant, change):
    lm = random_lm(dataclasses.replace(CONFIG, **VARIANTS[variant]))
    tokens, d = draw(1, 24)
    grid = scale(d, np.linspace(0.1, 2, 5), (11, 15))
    changed = clm.sweep.change_durations(grid, change)
    swept = clm.sweep.probabilities(
        lm, GROUPS, tokens, batch_size=3, **changed._asdict()
    )
    assert prefix_lengths == [16]  # eleven tokens, or twelve, padded
    durations = np.asarray(changed.durations)
    times = None if changed.times is None else np.asarray(changed.times)
    for i, row in enumerate(swept):
        point_times = times[i] if np.ndim(times) == 2 else times
        alone = direct(lm, tokens=tokens, durations=durations[i], times=point_times)
        np.testing.assert_allclose(row, alone, atol=2e-6)


@pytest.mark.usefixtures("eager")
def test_a_prefix_ends_at_the_first_difference_or_answer(prefix_lengths):
    tokens, d = draw(1, 24)
    grid = np.tile(d, (3, 1))
    grid[1, 20] = 9.0
    positions = np.array([9, 21, 23])
    swept = clm.sweep.probabilities(
        LM, GROUPS, tokens=tokens, durations=grid, position=positions
    )
    assert prefix_lengths == [16]  # nine tokens, padded
    for row, position, d in zip(swept, positions, grid, strict=True):
        logits = LM(tokens, durations=d, position=position)
        p = softmax(np.asarray(logits, np.float64))
        expected = [p[group].sum() for group in GROUPS]
        np.testing.assert_allclose(row, expected, atol=2e-6)
    grid[:, 0] = [1.0, 2.0, 3.0]
    clm.sweep.probabilities(LM, GROUPS, tokens=tokens, durations=grid)
    clm.sweep.probabilities(
        LM, GROUPS, tokens=tokens, durations=d, start=np.arange(3.0)
    )
    # No prefix: these differ at the first token, or begin at different times.
    assert prefix_lengths == [16]


@pytest.mark.usefixtures("eager")
def test_prefixes_of_different_lengths_in_one_group(prefix_lengths):
    sweeps = []
    for n, first in ((27, 3), (30, 19), (29, 11)):
        tokens, d = draw(n, n)
        grid = scale(d, np.linspace(0.2, 1, 4), (first, first + 2))
        inputs = Inputs(tokens, durations=grid, start=np.float32(0.5))
        sweeps.append(clm.sweep.Sweep(4, n, lambda inputs=inputs: inputs))
    results = clm.sweep.run_group(LM, GROUPS, sweeps, 6)
    assert prefix_lengths == [32]  # nineteen tokens at most, padded
    for swept, rows in zip(sweeps, results, strict=True):
        arguments = swept.make_inputs()._asdict()
        for i in (0, 3):
            alone = direct(**arguments | {"durations": arguments["durations"][i]})
            np.testing.assert_allclose(rows[i], alone, atol=2e-6)


def test_small_models_compute_no_prefix(prefix_lengths):
    tokens, d = draw(1, 24)
    grid = scale(d, np.linspace(0, 2, 5), (11, 15))
    clm.sweep.probabilities(LM, GROUPS, tokens=tokens, durations=grid)
    assert not prefix_lengths


# --- Many prompts ----------------------------------------------------------------------------


def several(count=9, seed=0):
    """Sweeps of tokens or embeddings with different lengths, numbers of points and changes."""
    rng = np.random.default_rng(seed)
    sweeps = []
    for i in range(count):
        n, points = int(rng.integers(3, 40)), int(rng.integers(1, 6))
        tokens, d = draw(i, n)
        grid = d * rng.uniform(0.5, 1.5, (points, 1)).astype(np.float32)
        changed = clm.sweep.change_durations(grid, ("both", "mass", "times")[i % 3])
        inputs = Inputs(tokens, None, *changed)
        if i % 2:
            rows = np.asarray(LM.params["embedding"])[tokens] * np.float32(0.9)
            inputs = inputs._replace(tokens=None, embeddings=rows)
        sweeps.append(clm.sweep.Sweep(points, n, lambda inputs=inputs: inputs))
    return sweeps


@pytest.mark.parametrize(
    "batch_size",
    [
        pytest.param(1, marks=pytest.mark.slow),
        7,
        pytest.param(100, marks=pytest.mark.slow),
    ],
)
def test_groups_of_sweeps_equal_each_sweep(batch_size):
    sweeps_by_structure = {}  # sweeps of one group have the same arguments
    for swept in several():
        structure = jax.tree.structure(swept.make_inputs())
        sweeps_by_structure.setdefault(structure, []).append(swept)
    for sweeps in sweeps_by_structure.values():
        index_groups = clm.sweep.group_by_program(LM, sweeps, batch_size)
        indices = sorted(itertools.chain.from_iterable(index_groups))
        assert indices == list(range(len(sweeps)))
        for indices in index_groups:
            group = [sweeps[i] for i in indices]
            assert len(indices) == 1 or sum(s.num_points for s in group) <= batch_size
            results = clm.sweep.run_group(LM, GROUPS, group, batch_size)
            for swept, rows in zip(group, results, strict=True):
                inputs = swept.make_inputs()._asdict()
                alone = clm.sweep.probabilities(LM, GROUPS, **inputs)
                np.testing.assert_allclose(rows, alone, atol=1e-6)


def test_many_prompts_run_few_programs():
    rng, sweeps = np.random.default_rng(0), []
    for n in rng.integers(3, 33, 40):  # two widths
        inputs = Inputs(np.zeros(n, int), durations=np.ones((5, n), np.float32))
        sweeps.append(clm.sweep.Sweep(5, int(n), lambda inputs=inputs: inputs))
    before = clm.sweep._group_probabilities._cache_size()
    for indices in clm.sweep.group_by_program(LM, sweeps, 10):
        clm.sweep.run_group(LM, GROUPS, [sweeps[i] for i in indices], 10)
    # Two widths, and two numbers of sweeps.
    assert clm.sweep._group_probabilities._cache_size() - before <= 4


def test_groups_of_different_arguments_are_refused():
    tokens, d = draw()
    grid = np.tile(d, (2, 1))
    one = clm.sweep.Sweep(2, N, lambda: Inputs(tokens, durations=grid))
    other = clm.sweep.Sweep(
        2, N, lambda: Inputs(tokens, durations=grid, start=grid[0, 0])
    )
    with pytest.raises(clm.InputError, match="the same arguments"):
        clm.sweep.run_group(LM, GROUPS, [one, other])


def test_tokens_above_a_threshold_are_sorted_by_their_peaks():
    tokens, d = draw()
    grid = scale(d, np.linspace(0, 1, 7), (3, 8))
    peaks = clm.sweep.probabilities(
        LM, [[i] for i in range(40)], tokens=tokens, durations=grid
    ).max(axis=0)
    for threshold in (0.02, 0.05, 0.9):
        above = clm.sweep.tokens_above(
            LM, threshold, tokens=tokens, durations=grid, batch_size=3
        )
        assert set(above) == set(np.flatnonzero(peaks >= threshold))
        assert (np.diff(peaks[above]) <= 0).all()
