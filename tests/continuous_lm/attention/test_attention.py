"""Each form against a plain float64 loop, closed forms and finite differences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm import attention

STATIC = ("scale", "softcap", "implementation", "block_size")
FORMS = {  # blocks so small that nine tokens are several, the last of them cut
    form: functools.partial(
        jax.jit(attention.attend, static_argnames=STATIC),
        implementation=form,
        block_size=4,
    )
    for form in ("dense", "blocked")
}


@pytest.fixture(params=FORMS, scope="module")
def attend(request):
    return FORMS[request.param]


def reference(q, k, v, d, scale=None, softcap=None, window=None, intervals=None):
    """The integral, one query and one head at a time, in float64."""
    q, k, v, d = (np.asarray(x, np.float64) for x in (q, k, v, d))
    intervals = d if intervals is None else np.asarray(intervals, np.float64)
    (num_queries, num_heads, width), num_keys = q.shape, len(k)
    y = np.zeros_like(q)
    for i, n in itertools.product(range(num_queries), range(num_heads)):
        last = num_keys - num_queries + i
        keys = [
            j
            for j in range(last + 1)
            if window is None or intervals[j + 1 : last + 1].sum() < window
        ]
        group = n // (num_heads // k.shape[1])
        s = k[keys, group] @ q[i, n] * (width**-0.5 if scale is None else scale)
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        p = d[keys] * np.exp(s - s.max())
        y[i, n] = p @ v[keys, group] / p.sum()
    return y


def draw(
    seed=0,
    num_queries=9,
    num_keys=9,
    num_heads=4,
    num_kv_heads=2,
    width=8,
    dtype=jnp.float32,
):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(num_queries, num_heads, width))
    k, v = rng.normal(size=(2, num_keys, num_kv_heads, width))
    d = rng.uniform(0.05, 3.0, num_keys)
    return tuple(np.asarray(x, dtype) for x in (q, k, v, d))


def replace(x, index, value):
    """A copy of an array with other values at an index."""
    x = np.array(x)
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("num_queries", "num_kv_heads", "softcap"),
    [(9, 4, None), (4, 2, 2.0), (1, 1, None), (9, 2, 2.0)],
)
def test_equals_the_integral(attend, num_queries, num_kv_heads, softcap):
    q, k, v, d = draw(num_queries=num_queries, num_kv_heads=num_kv_heads)
    for window in (None, 3.3, 0.01):
        options = {"softcap": softcap, "window": window, "scale": 1.3}
        y = attend(q, k, v, d, **options)
        np.testing.assert_allclose(y, reference(q, k, v, d, **options), atol=2e-6)


def test_leading_axes_are_free(attend):
    q, k, v, d = (np.stack([a, b]) for a, b in zip(draw(0), draw(1), strict=True))
    y = attend(q[:, None], k[:, None], v[:, None], d[:, None], window=2.0)
    for i in range(2):
        np.testing.assert_allclose(
            y[i, 0], reference(q[i], k[i], v[i], d[i], window=2.0), atol=2e-6
        )


def test_leading_axes_of_each_array_broadcast(attend):
    (q, k, v, d), (_, k2, _, d2) = draw(0), draw(1)
    y = attend(q, np.stack([k, k2]), v[None], np.stack([d, d2]), window=2.0)
    np.testing.assert_allclose(y[0], reference(q, k, v, d, window=2.0), atol=2e-6)
    np.testing.assert_allclose(y[1], reference(q, k2, v, d2, window=2.0), atol=2e-6)


def test_softcap_comes_before_the_weights(attend):
    q, k, v, d = draw()
    arrays = (4 * q, k, v, 100 * replace(d, 3, 1e-4))
    y = attend(*arrays, softcap=1.0)
    np.testing.assert_allclose(y, reference(*arrays, softcap=1.0), atol=2e-6)


def test_a_key_split_in_two_halves_changes_nothing(attend):
    q, k, v, d = draw(num_queries=1)
    halves = replace(d, 3, 0.5 * d[3])
    split = [np.insert(x, 3, x[3], axis=0) for x in (k, v, halves)]
    np.testing.assert_allclose(attend(q, *split), attend(q, k, v, d), atol=1e-6)


def test_keys_of_weight_zero_have_no_effect(attend):
    q, k, v, d = draw()
    y = attend(
        q, replace(k, 3, 30 * k[3]), replace(v, 3, 1e6), replace(d, 3, 0.0), window=4.0
    )
    without = attend(*(np.delete(x, 3, axis=0) for x in (q, k, v, d)), window=4.0)
    np.testing.assert_allclose(np.delete(y, 3, axis=0), without, atol=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(2.0**-20, 2.0**13, width=32))
def test_a_common_factor_of_the_weights_cancels(attend, seed, factor):
    q, k, v, d = draw(seed)
    scaled = attend(q, k, v, np.float32(factor) * d)
    np.testing.assert_allclose(scaled, attend(q, k, v, d), atol=2e-6)


def test_causality_does_not_come_from_times(attend):
    """Durations of 1e-4 do not change a time of 4096 in float32."""
    q, k, v, d = draw()
    d[0], d[4:] = 4096.0, 1e-4
    plain = np.asarray(attend(q, k, v, d))
    moved = attend(
        q, replace(k, slice(6, 9), k[6:] + 1), replace(v, slice(6, 9), v[6:] + 1), d
    )
    moved = np.asarray(moved)
    np.testing.assert_array_equal(moved[:6], plain[:6])
    assert (moved[6:] != plain[6:]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("before", [0, 4000])
def test_windows_measure_sums_of_durations(attend, before):
    """0.1 thirty times is 3, at any time: the key at the edge is not visible, the next one is."""
    rng = np.random.default_rng(0)
    n = before + 40
    q, k, v = rng.normal(size=(3, n, 1, 4)).astype(np.float32)
    d = replace(np.full(n, 0.1, np.float32), slice(before), 1.0)
    for window, visible in [(3.0, 30), (3.001, 31), (2.999, 30)]:
        y = attend(q[-1:], k, v, d, window=window)
        last = slice(n - visible, n)
        expected = reference(q[-1:], k[last], v[last], d[last])
        np.testing.assert_allclose(y, expected, atol=1e-6)


def test_windows_of_integer_length_count_tokens(attend):
    q, k, v, _ = draw()
    y = np.asarray(attend(q, k, v, window=3.0))
    expected = reference(q, k, v, np.ones(9), window=3.0)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    last = attend(q[-1:], k[-3:], v[-3:])
    np.testing.assert_allclose(y[-1:], last, atol=1e-6)


def test_windows_are_measured_in_intervals(attend):
    q, k, v, d = draw()
    intervals = d[::-1]
    y = attend(q, k, v, d, window=2.5, intervals=intervals)
    np.testing.assert_allclose(
        y, reference(q, k, v, d, window=2.5, intervals=intervals), atol=2e-6
    )


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (1.5, 2.5)])
def test_gradients_match_finite_differences(attend, softcap, window):
    with jax.enable_x64(True):
        q, k, v, d = draw(dtype=jnp.float64, num_queries=5)
        direction = draw(1, dtype=jnp.float64, num_queries=5)
        target = np.random.default_rng(2).normal(size=q.shape)

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
        def loss(q, k, v, d):
            y = attend(
                q, k, v, d, softcap=softcap, window=window, intervals=jnp.ones(9)
            )
            assert y.dtype == jnp.float64
            return jnp.sum(target * y)

        point, h = [q, k, v, d], 1e-5
        grads = loss(*point)[1]
        for i, x in enumerate(point):

            def value_at(x, i=i):
                return float(loss(*point[:i], x, *point[i + 1 :])[0])

            step = h * direction[i]
            numeric = (value_at(x + step) - value_at(x - step)) / (2 * h)
            exact = np.vdot(grads[i], direction[i])
            np.testing.assert_allclose(exact, numeric, rtol=1e-8)


@functools.cache
def sum_of_squares(attend):
    """The value and the gradients of a loss of q, k, v, d, compiled."""

    def loss(*arrays):
        return jnp.sum(attend(*arrays) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def test_gradients_at_weight_zero_match_one_sided_differences(attend):
    with jax.enable_x64(True):
        q, k, v, d = draw(dtype=jnp.float64)
        d[3] = d[8] = 0.0
        value, grads = sum_of_squares(attend)(q, k, v, d)
        for j in (3, 8):
            h = 1e-6
            a, b, c = (
                float(sum_of_squares(attend)(q, k, v, replace(d, j, n * h))[0])
                for n in range(3)
            )
            assert a == float(value)
            numeric = (-3 * a + 4 * b - c) / (2 * h)
            np.testing.assert_allclose(grads[3][j], numeric, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-8])
@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_gradients_of_tiny_weights_are_finite(attend, size, loud):
    q, k, v, d = draw()
    k[3] *= loud
    _, grads = sum_of_squares(attend)(q, k, v, replace(d, 3, size))
    assert all(np.isfinite(g).all() for g in grads)


def test_queries_without_any_weight_give_zeros(attend):
    q, k, v, d = draw()
    d[:2] = 0.0
    y = np.asarray(attend(q, k, v, d))
    np.testing.assert_array_equal(y[:2], 0.0)
    np.testing.assert_allclose(y[2:], reference(q[2:], k, v, d), atol=2e-6)
    assert np.isfinite(sum_of_squares(attend)(q, k, v, d)[1][3]).all()


def test_low_precision_accumulates_in_float32(attend):
    """4096 equal keys: a bfloat16 sum would stop growing at 256."""
    n = 4096
    q, k = (np.zeros((1, 1, 2), jnp.bfloat16), np.ones((n, 1, 2), jnp.bfloat16))
    y = attend(q, k, replace(k, slice(n // 2), 0), np.ones(n, np.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), 0.5, atol=2e-3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4, 8), (3, 3, 8), (3, 3, 8), (3,)), "3 key/value heads do not divide 4"),
        (
            ((3, 4, 8), (3, 2, 8), (3, 2, 6), (3,)),
            r"v has shape \[3, 2, 6\]; it must be \[..., S, K, H\] with H = 8, as in q",
        ),
        (
            ((4, 8), (3, 2, 8), (3, 2, 8), (3,)),
            r"q has shape \[4, 8\]; it must be \[..., T, N, H\]",
        ),
        (((4, 4, 8), (3, 2, 8), (3, 2, 8), (3,)), "4 queries for 3 keys"),
        (((3, 4, 8), (3, 2, 8), (3, 2, 8), (4,)), r"key_weights has shape \[4\]"),
        (
            ((3, 4, 8), (2, 3, 2, 8), (5, 3, 2, 8), (3,)),
            r"broadcast: \[2\] of k, \[5\] of v",
        ),
        (
            ((3, 4, 8), (2, 3, 2, 8), (3, 2, 8), (5, 3)),
            r"broadcast: \[2\] of k, \[5\] of key_weights",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(attend, shapes, message):
    with pytest.raises(clm.InputError, match=message):
        attend(*map(np.zeros, shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_offset": 2}, "query_offset is 2; it must be from 0 to 1"),
        ({"query_offset": -1}, "query_offset is -1"),
        ({"window": 0}, "window is 0; it must be above 0"),
        ({"window": float("nan")}, "window is nan"),
    ],
)
def test_numbers_that_do_not_fit_are_named(options, message):
    shapes = ((2, 4, 8), (3, 2, 8), (3, 2, 8), (3,))
    with pytest.raises(clm.InputError, match=message):
        clm.attention.attend(*map(np.zeros, shapes), **options)
