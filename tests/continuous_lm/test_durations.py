import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import continuous_lm as clm
from continuous_lm.arguments import check_integers
from continuous_lm.attention.visibility import elapsed_times, exact_end_times
from continuous_lm.durations import check_durations as check_durations
from continuous_lm.durations import durations_from_times, end_times, scale, translate

positive = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(0.125, 8, width=32)
)


@given(positive, st.floats(-100, 100, width=32))
def test_times_and_durations_round_trip(d, start):
    times = end_times(d, start)
    np.testing.assert_allclose(
        times, start + np.cumsum(d.astype(np.float64)), rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(durations_from_times(times, start), d, atol=2e-4)


def test_ordinary_sentence_ends_at_the_integers():
    np.testing.assert_array_equal(end_times(np.ones(4)), [1, 2, 3, 4])
    np.testing.assert_array_equal(
        end_times(np.ones(3), start=[0, 10]), [[1, 2, 3], [11, 12, 13]]
    )


def test_scale_changes_only_the_span():
    d = scale(jnp.ones(5), jnp.array([0.5, 0.0]), (1, 3))
    np.testing.assert_array_equal(d, [[1, 0.5, 0.5, 1, 1], [1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(scale(jnp.ones(2), 3.0), [3, 3])


@pytest.mark.parametrize("span", [(2, 2), (3, 1), (-1, 2), (0, 6)])
def test_scale_refuses_spans_outside_of_the_tokens(span):
    with pytest.raises(clm.InputError, match="span"):
        scale(jnp.ones(5), 0.5, span)


def test_translate():
    np.testing.assert_array_equal(translate([1.0, 2.0], [0.0, 5.0]), [[1, 2], [6, 7]])


def test_low_precision_is_widened_and_float64_is_kept():
    assert end_times(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert end_times(jnp.ones(3, jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -0.5, 1.0], r"durations\[1\] is -0.5"),
        ([1.0, 1.0, np.nan], r"durations\[2\] is nan"),
        ([[1, 1, 1], [1, 1, np.inf]], r"durations\[1, 2\] is inf"),
        ([1.0, 1e60, 1.0], r"durations\[1\] is inf"),
        ([3e38, 3e38, 1.0], "durations add up to 6e"),
        (
            [1.0, 1.0],
            r"durations has shape \[2\]; it must be \[..., T\] with T = 3, as in tokens",
        ),
        (1.0, r"durations has shape \[\]; it must be \[..., T\]"),
        ([True, False, True], "dtype bool"),
        ([1j, 1, 1], "dtype complex"),
    ],
)
def test_check_names_the_array_and_its_position(values, message):
    with pytest.raises(clm.InputError, match=message):
        check_durations(np.asarray(values), 3)


def test_check_is_pure_inside_jit():
    assert (
        jax.jit(lambda d: check_durations(d, 2) or d.sum())(jnp.array([-1.0, 2.0]))
        == 1.0
    )


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e7])
def test_distances_in_time_stay_exact(scale):
    d = (scale * np.random.default_rng(0).uniform(1e-4, 2.0, (2, 5000))).astype(
        np.float32
    )
    d[1, 7] = 0.0
    ends = np.cumsum(d.astype(np.float64), axis=-1)
    later, earlier = np.array([4999, 4000]), np.array([4995, 3990])
    exact = ends[:, later, None] - ends[:, None, earlier]
    plain = np.cumsum(d, axis=-1)
    assert (
        np.abs(plain[:, later, None] - plain[:, None, earlier] - exact).max()
        > 1e-4 * scale
    )
    clock = jax.jit(exact_end_times)(jnp.asarray(d))
    np.testing.assert_allclose(
        elapsed_times(clock, later, earlier), exact, rtol=3e-7, atol=1e-8 * scale
    )


@pytest.mark.parametrize(
    "steps",
    [
        [0, 100, -100, 3],
        [3e38, 1e38, 0, 0],
        [1e-30, 2e-30, 0, 1e-31],
        [0, 0, 0, 0],
        [-5, -1, 7, 2],
    ],
)
def test_elapsed_times_of_any_steps(steps):
    """Times that go back, and steps near the least and the largest float32."""
    steps = np.array(steps, np.float32)
    ends, index = np.cumsum(steps.astype(np.float64)), np.arange(4)
    passed = elapsed_times(exact_end_times(jnp.asarray(steps)), index, index)
    exact = ends[:, None] - ends
    np.testing.assert_allclose(passed, exact, atol=1e-6 * np.abs(steps).max())


def test_elapsed_times_of_float16_steps_are_float32():
    passed = elapsed_times(
        exact_end_times(jnp.full(3000, 0.1, jnp.float16)),
        np.array([2999]),
        np.array([0]),
    )
    np.testing.assert_allclose(passed, 2999 * float(np.float16(0.1)), rtol=1e-6)


def test_elapsed_times_of_float64_steps_are_exact():
    with jax.enable_x64(True):
        d = jnp.full(5000, 0.1, jnp.float64).at[0].set(1e9)
        passed = elapsed_times(exact_end_times(d), jnp.array([4999]), jnp.array([4969]))
        np.testing.assert_allclose(passed, 3.0, rtol=1e-14)


def test_integers_are_checked_before_they_are_cut_to_32_bits():
    with pytest.raises(
        clm.InputError, match=r"tokens\[1\] is 4294967298; every entry must be"
    ):
        check_integers("tokens", [1, 2**32 + 2], 0, 10)
