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
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, d))


@pytest.mark.parametrize(("num_queries", "num_kv_heads"), [(9, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3.3, 0.01])
def test_equals_the_integral(attend, num_queries, num_kv_heads, softcap, window):
    q, k, v, d = draw(num_queries=num_queries, num_kv_heads=num_kv_heads)
    options = {"softcap": softcap, "window": window, "scale": 1.3}
    y = attend(q, k, v, d, **options)
    np.testing.assert_allclose(y, reference(q, k, v, d, **options), atol=2e-6)


def test_leading_axes_are_free(attend):
    q, k, v, d = (jnp.stack([a, b]) for a, b in zip(draw(0), draw(1), strict=True))
    y = attend(q[:, None], k[:, None], v[:, None], d[:, None], window=2.0)
    for i in range(2):
        np.testing.assert_allclose(
            y[i, 0], reference(q[i], k[i], v[i], d[i], window=2.0), atol=2e-6
        )


def test_each_has_leading_axes_of_its_own(attend):
    """Keys turned to two times, values that have none."""
    (q, k, v, d), (_, k2, _, d2) = draw(0), draw(1)
    y = attend(q, jnp.stack([k, k2]), v[None], jnp.stack([d, d2]), window=2.0)
    np.testing.assert_allclose(y[0], reference(q, k, v, d, window=2.0), atol=2e-6)
    np.testing.assert_allclose(y[1], reference(q, k2, v, d2, window=2.0), atol=2e-6)


def test_softcap_comes_before_the_weights(attend):
    q, k, v, d = draw()
    y = attend(4 * q, k, v, 100 * d.at[3].set(1e-4), softcap=1.0)
    np.testing.assert_allclose(
        y, reference(4 * q, k, v, 100 * d.at[3].set(1e-4), softcap=1.0), atol=2e-6
    )


def test_a_split_key_equals_the_whole(attend):
    q, k, v, d = draw(num_queries=1)
    halves = d.at[3].mul(0.5)
    split = [jnp.insert(x, 3, x[3], axis=0) for x in (k, v, halves)]
    np.testing.assert_allclose(attend(q, *split), attend(q, k, v, d), atol=1e-6)


def test_a_key_of_weight_zero_is_not_there(attend):
    q, k, v, d = draw()
    left = [jnp.delete(x, 3, axis=0) for x in (q, k, v, d)]
    y = attend(q, k.at[3].mul(30.0), v.at[3].set(1e6), d.at[3].set(0.0), window=4.0)
    np.testing.assert_allclose(
        jnp.delete(y, 3, axis=0), attend(*left, window=4.0), atol=1e-6
    )


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(2.0**-20, 2.0**13, width=32))
def test_a_common_factor_of_the_weights_cancels(attend, seed, factor):
    q, k, v, d = draw(seed)
    np.testing.assert_allclose(
        attend(q, k, v, factor * d), attend(q, k, v, d), atol=2e-6
    )


def test_the_future_never_leaks(attend):
    """Durations that float32 cannot see next to the time: causality must not come from times."""
    q, k, v, d = draw()
    d = d.at[0].set(4096.0).at[4:].set(1e-4)
    moved = attend(q, k.at[6:].add(1.0), v.at[6:].add(1.0), d)
    np.testing.assert_array_equal(moved[:6], attend(q, k, v, d)[:6])
    assert (moved[6:] != attend(q, k, v, d)[6:]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("before", [0, 4000])
def test_windows_measure_sums_of_durations(attend, before):
    """0.1 thirty times is 3, at any time: the key at the edge is not visible, the next one is."""
    rng = np.random.default_rng(0)
    n = before + 40
    q, k, v = (jnp.asarray(rng.normal(size=(n, 1, 4)), jnp.float32) for _ in range(3))
    d = jnp.full(n, 0.1).at[:before].set(1.0)
    for window, visible in [(3.0, 30), (3.001, 31), (2.999, 30)]:
        y = attend(q[-1:], k, v, d, window=window)
        cut = slice(n - visible, n)
        np.testing.assert_allclose(y, attend(q[-1:], k[cut], v[cut], d[cut]), atol=1e-6)


def test_windows_of_whole_tokens_count_like_indices(attend):
    q, k, v, _ = draw()
    ones = jnp.ones(9)
    np.testing.assert_allclose(
        attend(q, k, v, window=3.0), reference(q, k, v, ones, window=3.0), atol=1e-6
    )
    cut = attend(q[-1:], k[-3:], v[-3:])
    np.testing.assert_allclose(attend(q, k, v, window=3.0)[-1:], cut, atol=1e-6)


def test_intervals_move_the_window_apart_from_the_weights(attend):
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
        target = jnp.asarray(np.random.default_rng(2).normal(size=q.shape))

        def loss(q, k, v, d):
            y = attend(
                q, k, v, d, softcap=softcap, window=window, intervals=jnp.ones(9)
            )
            assert y.dtype == jnp.float64
            return jnp.sum(target * y)

        loss = jax.jit(loss)
        grads = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, d)
        for i, h in itertools.product(range(4), [1e-5]):
            shifted = [
                [
                    x + sign * h * direction[i] if i == j else x
                    for j, x in enumerate((q, k, v, d))
                ]
                for sign in (1, -1)
            ]
            numeric = (loss(*shifted[0]) - loss(*shifted[1])) / (2 * h)
            np.testing.assert_allclose(
                jnp.vdot(grads[i], direction[i]), numeric, rtol=1e-8
            )


def test_gradient_at_weight_zero_is_the_one_sided_difference(attend):
    with jax.enable_x64(True):
        q, k, v, d = draw(dtype=jnp.float64)
        d = d.at[3].set(0.0).at[8].set(0.0)
        loss = lambda d: jnp.sum(attend(q, k, v, d) ** 2)  # noqa: E731
        grads = jax.grad(loss)(d)
        for j in (3, 8):
            h = 1e-6
            a, b, c = loss(d), loss(d.at[j].add(h)), loss(d.at[j].add(2 * h))
            np.testing.assert_allclose(
                grads[j], (-3 * a + 4 * b - c) / (2 * h), rtol=1e-5
            )


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-8])
@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_gradients_are_finite_down_to_nothing(attend, size, loud):
    q, k, v, d = draw()
    k = k.at[3].mul(loud)
    loss = lambda *x: jnp.sum(attend(*x) ** 2)  # noqa: E731
    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, d.at[3].set(size))
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_an_empty_row_spoils_nothing(attend):
    q, k, v, d = draw()
    d = d.at[:2].set(0.0)
    y, grads = (
        attend(q, k, v, d),
        jax.grad(lambda d: jnp.sum(attend(q, k, v, d) ** 2))(d),
    )
    np.testing.assert_array_equal(y[:2], 0.0)
    np.testing.assert_allclose(y[2:], reference(q[2:], k, v, d), atol=2e-6)
    assert jnp.isfinite(grads).all()


def test_low_precision_accumulates_in_float32(attend):
    """4096 equal keys: a bfloat16 sum would stop growing at 256."""
    n = 4096
    k = v = jnp.ones((n, 1, 2), jnp.bfloat16)
    y = attend(
        jnp.zeros((1, 1, 2), jnp.bfloat16), k, v.at[: n // 2].set(0), jnp.ones(n)
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, 0.5, atol=2e-3)


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
        attend(*map(jnp.zeros, shapes))
