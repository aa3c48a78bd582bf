import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from tests.models.test_transformer import CONFIG, LM, N, draw, random_lm

GROUPS = [[3], [5, 7, 39], []]


def direct(lm=LM, **arguments):
    p = jax.nn.softmax(lm(at=-1, **arguments))
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
        np.testing.assert_allclose(row, direct(tokens=tokens, durations=point), atol=1e-6)


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
    moved = clm.sweep.probabilities(learned, GROUPS, tokens=tokens, start=np.arange(3.0))
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
    both, mass, times = (clm.sweep.vary(d[None], what) for what in ("both", "mass", "times"))
    ends, ordinary = clm.durations.end_times(d)[None], np.arange(1.0, N + 1)[None]
    np.testing.assert_array_equal(both["durations"], d[None])
    assert "times" not in both
    np.testing.assert_array_equal(mass["durations"], d[None])
    np.testing.assert_array_equal(mass["times"], ordinary)
    np.testing.assert_array_equal(times["durations"], np.ones((1, N)))
    np.testing.assert_array_equal(times["times"], ends)
    with pytest.raises(clm.InputError, match="'neither'"):
        clm.sweep.vary(d, "neither")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "number of points"),
        ({"durations": np.ones((0, N))}, "number of points"),
        ({"durations": np.ones((2, N)), "start": np.ones(3)}, r"number of points.*\[2, 3\]"),
        ({"durations": np.ones((2, 2, N))}, "durations has shape"),
        ({"durations": np.ones((2, N + 1))}, "durations has shape"),
        ({"durations": np.full((2, N), np.nan)}, r"durations\[0, 0\] is nan"),
        ({"duration": np.ones((2, N))}, "no argument duration;"),
        ({"durations": np.ones((2, N)), "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(clm.InputError, match=message):
        clm.sweep.probabilities(LM, GROUPS, tokens=draw()[0], **arguments)


def test_groups_outside_of_the_vocabulary_are_named():
    with pytest.raises(clm.InputError, match=r"group 1\[0\] is 40"):
        clm.sweep.probabilities(LM, [[1], [40]], tokens=draw()[0], durations=np.ones((2, N)))
