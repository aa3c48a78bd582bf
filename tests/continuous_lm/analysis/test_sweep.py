import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.analysis import sweep_batches
from continuous_lm.inputs import Inputs
from tests.models.test_transformer import CONFIG, LM, N, draw, random_lm

GROUPS = [[3], [5, 7, 39], []]


def direct(lm=LM, **arguments):
    p = jax.nn.softmax(lm(position=-1, **arguments))
    return np.array([sum(float(p[i]) for i in group) for group in GROUPS])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_point_equals_a_call_of_its_own(batch_size):
    tokens, d = draw()
    grid = clm.durations.scale(d, np.linspace(0, 1, 7), (3, 8))
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
    rows = LM.params["embedding"][tokens] * jnp.linspace(0.5, 1, 4)[:, None, None]
    times = clm.durations.end_times(d * jnp.linspace(0.5, 2, 4)[:, None])
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


def test_all_tokens_together_are_certain():
    tokens, d = draw()
    swept = clm.sweep.probabilities(LM, [range(40)], tokens=tokens, durations=d[None])
    np.testing.assert_allclose(swept, 1.0, atol=1e-6)


def test_vary_separates_mass_from_times():
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


def test_arguments_that_there_are_not():
    with pytest.raises(TypeError, match="duration"):
        clm.sweep.probabilities(LM, GROUPS, draw()[0], duration=np.ones((2, N)))


def test_groups_outside_of_the_vocabulary_are_named():
    with pytest.raises(clm.InputError, match=r"group 1\[0\] is 40"):
        clm.sweep.probabilities(
            LM, [[1], [40]], tokens=draw()[0], durations=np.ones((2, N))
        )


# --- What the points share ---------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """Prefixes are computed apart, however little they save."""
    monkeypatch.setattr(sweep_batches, "MIN_SAVED_FLOPS", 0)


def prefixes(monkeypatch):
    """The lengths of the prefixes that are computed from now on, filled up."""
    made, remember = [], sweep_batches._prefill

    def noted(model, params, inputs):
        made.append(inputs.durations.shape[-1])
        return remember(model, params, inputs)

    monkeypatch.setattr(sweep_batches, "_prefill", noted)
    return made


VARIANTS = {
    "plain": {},
    "windows": {"window": 4.0, "window_pattern": (True, False)},
    "learned positions": {"rope": None, "max_positions": 40},
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("what", ["both", "mass", "times"])
def test_a_prefix_changes_nothing(monkeypatch, variant, what):
    lm = random_lm(dataclasses.replace(CONFIG, **VARIANTS[variant]))
    made = prefixes(monkeypatch)
    tokens, d = draw(1, 24)
    changed = clm.sweep.change_durations(
        clm.durations.scale(d, np.linspace(0.1, 2, 5), (11, 15)), what
    )
    together = clm.sweep.probabilities(
        lm, GROUPS, tokens, batch_size=3, **changed._asdict()
    )
    assert made == [16]  # eleven tokens, or twelve, filled up
    for row, i in zip(together, range(5), strict=True):
        times = None if changed.times is None else np.asarray(changed.times)
        if times is not None and times.ndim == 2:
            times = times[i]
        point = {"durations": changed.durations[i], "times": times}
        alone = direct(lm, tokens=tokens, **point)
        np.testing.assert_allclose(row, alone, atol=2e-6)


@pytest.mark.usefixtures("eager")
def test_a_prefix_ends_where_points_differ_or_the_answer_stands(monkeypatch):
    made = prefixes(monkeypatch)
    tokens, d = draw(1, 24)
    grid = np.tile(d, (3, 1))
    grid[1, 20] = 9.0
    at = np.array([9, 21, 23])
    found = clm.sweep.probabilities(
        LM, GROUPS, tokens=tokens, durations=grid, position=at
    )
    assert made == [16]  # nine tokens
    for row, place, point in zip(found, at, grid, strict=True):
        alone = direct(tokens=tokens[: place + 1], durations=point[: place + 1])
        np.testing.assert_allclose(row, alone, atol=2e-6)
    grid[:, 0] = [1.0, 2.0, 3.0]
    clm.sweep.probabilities(LM, GROUPS, tokens=tokens, durations=grid)
    clm.sweep.probabilities(
        LM, GROUPS, tokens=tokens, durations=d, start=np.arange(3.0)
    )
    assert made == [
        16
    ]  # no more: they differ from the first token on, or begin at other times


@pytest.mark.usefixtures("eager")
def test_prefixes_of_different_lengths_in_one_set(monkeypatch):
    made, sweeps = prefixes(monkeypatch), []
    for n, first in ((27, 3), (30, 19), (29, 11)):
        tokens, d = draw(n, n)
        grid = clm.durations.scale(d, np.linspace(0.2, 1, 4), (first, first + 2))
        inputs = Inputs(tokens, durations=grid, start=jnp.float32(0.5))
        sweeps.append(clm.sweep.Sweep(4, n, lambda inputs=inputs: inputs))
    found = clm.sweep.run_group(LM, GROUPS, sweeps, 6)
    assert made == [32]  # nineteen tokens at most, filled up
    for swept, rows in zip(sweeps, found, strict=True):
        arguments = swept.make_inputs()._asdict()
        for row, d in zip(rows, arguments.pop("durations"), strict=True):
            np.testing.assert_allclose(row, direct(durations=d, **arguments), atol=2e-6)


def test_a_prefix_is_worth_a_program_of_its_own_for_large_models_alone(monkeypatch):
    made = prefixes(monkeypatch)
    tokens, d = draw(1, 24)
    grid = clm.durations.scale(d, np.linspace(0, 2, 5), (11, 15))
    clm.sweep.probabilities(LM, GROUPS, tokens=tokens, durations=grid)
    assert not made


# --- Many prompts ----------------------------------------------------------------------------


def several(count=9, seed=0):
    """Sweeps of different lengths and numbers of points, in mass, in time, of embeddings."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n, points = int(rng.integers(3, 40)), int(rng.integers(1, 6))
        tokens, d = draw(i, n)
        grid = np.asarray(d) * rng.uniform(0.5, 1.5, (points, 1)).astype(np.float32)
        changed = clm.sweep.change_durations(grid, ("both", "mass", "times")[i % 3])
        inputs = Inputs(tokens, None, *changed)
        if i % 2:
            rows = LM.params["embedding"][tokens] * 0.9
            inputs = inputs._replace(tokens=None, embeddings=rows)
        made.append(clm.sweep.Sweep(points, n, lambda inputs=inputs: inputs))
    return made


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.slow), 7, 100]
)
def test_sweeps_of_many_prompts_equal_one_by_one(batch_size):
    kinds = {}
    for swept in several():  # what is computed together has the same arguments
        kind = jax.tree.structure(swept.make_inputs())
        kinds.setdefault(kind, []).append(swept)
    for sweeps in kinds.values():
        sets = clm.sweep.group_by_program(LM, sweeps, batch_size)
        assert sorted(i for indices in sets for i in indices) == list(
            range(len(sweeps))
        )
        for indices in sets:
            chosen = [sweeps[i] for i in indices]
            assert len(indices) == 1 or sum(s.num_points for s in chosen) <= batch_size
            found = clm.sweep.run_group(LM, GROUPS, chosen, batch_size)
            for swept, rows in zip(chosen, found, strict=True):
                alone = clm.sweep.probabilities(
                    LM, GROUPS, **swept.make_inputs()._asdict()
                )
                np.testing.assert_allclose(rows, alone, atol=1e-6)


def test_many_prompts_run_few_programs():
    rng, sweeps = np.random.default_rng(0), []
    for n in rng.integers(3, 33, 40):  # two widths
        inputs = Inputs(np.zeros(n, int), durations=np.ones((5, n), np.float32))
        sweeps.append(clm.sweep.Sweep(5, int(n), lambda inputs=inputs: inputs))
    before = clm.sweep._group_probabilities._cache_size()
    for indices in clm.sweep.group_by_program(LM, sweeps, 10):
        clm.sweep.run_group(LM, GROUPS, [sweeps[i] for i in indices], 10)
    assert (
        clm.sweep._group_probabilities._cache_size() - before <= 4
    )  # and two numbers of sweeps


def test_what_is_computed_together_must_be_alike():
    tokens, d = draw()
    grid = np.tile(d, (2, 1))
    one = clm.sweep.Sweep(2, N, lambda: Inputs(tokens, durations=grid))
    other = clm.sweep.Sweep(
        2, N, lambda: Inputs(tokens, durations=grid, start=grid[0, 0])
    )
    with pytest.raises(clm.InputError, match="the same arguments"):
        clm.sweep.run_group(LM, GROUPS, [one, other])


def test_tokens_that_reach_a_threshold_are_found():
    tokens, d = draw()
    grid = clm.durations.scale(d, np.linspace(0, 1, 7), (3, 8))
    each = clm.sweep.probabilities(
        LM, [[i] for i in range(40)], tokens=tokens, durations=grid
    )
    for threshold in (0.02, 0.05, 0.9):
        found = clm.sweep.tokens_above(
            LM, threshold, tokens=tokens, durations=grid, batch_size=3
        )
        assert set(found) == set(np.flatnonzero(each.max(axis=0) >= threshold))
        peaks = each.max(axis=0)[found]
        assert (np.diff(peaks) <= 0).all()
