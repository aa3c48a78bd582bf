"""Every program, run small, writes the numbers that are stored; see `golden`."""

import math

import numpy as np
import pytest

from continuous_lm.experiments import PROGRAMS
from tests import golden


@pytest.fixture(scope="module")
def stored():
    return golden.read()


# Two programs run in the fast tests, all of them in the slow ones.
FAST = ["sweeps/counting", "sweeps/interpolation"]
SLOW = [pytest.param(group, marks=pytest.mark.slow) for group in golden.GROUPS]


@pytest.mark.parametrize("group", [*FAST, *SLOW])
def test_outputs_are_as_stored(group, stored):
    if reason := golden.incomparable(group.partition("/")[0], stored):
        pytest.skip(reason)
    lines = golden.differing(group, stored)
    more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
    assert not lines, (
        f"{len(lines)} keys of {group} moved:\n" + "\n".join(lines[:20]) + more
    )


def test_every_program_is_run(stored):
    ran = {program for program, _ in golden.PROGRAMS.values()}
    # The first three measure this machine; device_costs is run through small_growth, and recipe
    # runs other programs.
    others = {"benchmark", "gpu_check", "vector_quantizers", "device_costs", "recipe"}
    assert set(PROGRAMS) - ran == others
    assert {key.partition("/")[0] for key in stored["values"]} == set(golden.GROUPS)


def test_differences_are_named():
    old = {"a/x": 1.0, "a/list": np.array([1e-9, 2.0]), "a/gone": "text", "a/near": 3.0}
    new = {"a/x": 1.1, "a/list": np.array([2e-9, 2.0]), "a/new": 4, "a/near": 3.000001}
    lines = [line for _, line in golden.differences(old, new).values()]
    assert len(lines) == 3
    assert lines[0].startswith("a/gone: 'text' -> 'nothing'")
    assert lines[1].startswith("a/new: 'nothing' -> 4")
    assert lines[2].startswith("a/x: 1.0 -> 1.1")
    assert not golden.differences({"x": 1.0}, {"x": 1.1}, {"x": 0.03})
    assert golden.differences({"x": 1.0}, {"x": 1.1}, {"x": 0.01})
    assert golden.differences({"x": 1e-4}, {"x": 1.005e-4})
    assert not golden.differences({"x": 1e-4}, {"x": 1.005e-4}, {})
    assert golden.differences({"x": 1e-4}, {"x": 1.2e-4}, {})
    assert not golden.differences({"x": "a"}, {"x": "b"}, {"x": math.inf})
