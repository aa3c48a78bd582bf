"""The blocked form against the dense one: values, gradients, memory and skipped blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm import attention

STATIC = ("scale", "softcap", "implementation", "block_size")


def draw(seed, batch, queries, keys, heads, kv_heads, width=8, dtype=jnp.float32):
    """q, k, v, durations (one of them 0), steps that go back in time too, and a cotangent."""
    rng = np.random.default_rng(seed)
    q, y = rng.normal(size=(2, *batch, queries, heads, width))
    k, v = rng.normal(size=(2, *batch, keys, kv_heads, width))
    d = rng.uniform(0.05, 3.0, (*batch, keys))
    d[..., keys // 2] = 0.0
    steps = d + rng.normal(0.0, 0.3, d.shape)
    return tuple(np.asarray(x, dtype) for x in (q, k, v, d, steps, y))


@functools.partial(jax.jit, static_argnames=STATIC)
def attend(*arrays, **options):
    return attention.attend(*arrays, **options)


@functools.partial(jax.jit, static_argnames=STATIC)
def values_and_gradients(q, k, v, d, steps, dy, **options):
    def attend(q, k, v, d):
        return attention.attend(q, k, v, d, intervals=steps, **options)

    y, vjp = jax.vjp(attend, q, k, v, d)
    return y, *vjp(dy.astype(y.dtype))


def assert_close(blocked, dense, tolerance):
    for x, reference in zip(blocked, dense, strict=True):
        assert x.dtype == reference.dtype
        x, reference = (np.asarray(a, np.float64) for a in (x, reference))
        # A gradient that cancels to 0 has rounding errors.
        size = max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(x, reference, rtol=0.0, atol=tolerance * size)


CASES = {  # batch, queries, keys, heads, kv_heads, block, options
    "plain": ((), 64, 64, 2, 2, 16, {}),
    "odd length, grouped": ((2,), 53, 53, 4, 2, 16, {}),
    "multi-query, capped": ((), 37, 37, 3, 1, 8, {"softcap": 1.5}),
    "window": ((), 70, 70, 2, 1, 16, {"window": 9.5}),
    "window, capped, grouped, batched": (
        (3,),
        41,
        41,
        4,
        2,
        12,
        {"window": 7.0, "softcap": 2.0},
    ),
    "last queries": ((), 5, 60, 2, 2, 16, {"window": 20.0}),
    "queries amid the keys": (
        (2,),
        21,
        60,
        2,
        1,
        16,
        {"query_offset": 17, "scale": 0.2},
    ),
    "one query": ((), 1, 33, 2, 2, 16, {}),
    "one block": ((), 9, 9, 2, 2, 64, {}),
}


QUICK = (
    "multi-query, capped",
    "window, capped, grouped, batched",
    "last queries",
    "queries amid the keys",
    "one query",
)


@pytest.mark.parametrize(
    "case",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
def test_equals_the_dense_form(case):
    *shape, block, options = CASES[case]
    arguments = draw(0, *shape)
    dense = values_and_gradients(*arguments, implementation="dense", **options)
    blocked = values_and_gradients(
        *arguments, implementation="blocked", block_size=block, **options
    )
    assert_close(blocked, dense, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float64, 1e-13)]
)
def test_keeps_its_precision(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        arguments = draw(1, (), 40, 40, 2, 1, dtype=dtype)
        options = {"window": 11.0, "softcap": 3.0}
        dense = values_and_gradients(*arguments, implementation="dense", **options)
        blocked = values_and_gradients(
            *arguments, implementation="blocked", block_size=16, **options
        )
        assert_close(blocked, dense, tolerance)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.0, 1e-310, 1e-38, 1e-6, 1e4, 1e30]),
    loud=st.sampled_from([0.1, 1.0, 30.0]),
    window=st.sampled_from([0.5, 5.0, 50.0, float("inf")]),
)
def test_equals_the_dense_form_at_extremes(seed, size, loud, window):
    """Durations from 0 to most of the time, large scores, any window.

    In float64: in float32 both forms are off by 1e-5 where scores of 100 cancel. The gradient of
    the logarithm of a duration is compared, if the duration is not 0: among durations of 1e-38 that
    of the duration is a difference of numbers of 1e38.
    """
    with jax.enable_x64(True):
        q, k, v, d, steps, y = draw(seed, (), 30, 30, 2, 1, dtype=jnp.float64)
        d[7:15] = size
        arguments = (loud * q, k, v, d, np.maximum(steps, 0.0), y)
        dense = values_and_gradients(*arguments, implementation="dense", window=window)
        blocked = values_and_gradients(
            *arguments, implementation="blocked", block_size=8, window=window
        )
    assert all(np.isfinite(x).all() for x in blocked)
    unit = np.where(d > 0, d, 1.0)
    blocked, dense = (
        (*arrays[:-1], unit * np.asarray(arrays[-1])) for arrays in (blocked, dense)
    )
    assert_close(blocked, dense, 1e-11)


def test_leading_axes_broadcast():
    """Three sets of durations for one sentence: only the weights have the axis."""
    q, k, v, d, _, _ = draw(0, (), 20, 20, 2, 1)
    d = d * np.array([0.5, 1.0, 2.0], np.float32)[:, None]

    def loss(d, form):
        y = attention.attend(q, k, v, d, implementation=form, block_size=8)
        return jnp.sum(y**2)

    grads = [
        jax.jit(jax.grad(functools.partial(loss, form=form)))(d)
        for form in ("blocked", "dense")
    ]
    assert_close(grads[:1], grads[1:], 1e-5)


def test_vmap_and_scan():
    arrays = draw(0, (3,), 20, 20, 2, 1)[:4]
    form = {"implementation": "blocked", "block_size": 8}
    batched = attend(*arrays, window=4.0, **form)
    windows = np.array([4.0, 4.0], np.float32)

    @jax.jit
    def run(*arrays):
        def step(carry, window):
            return carry, attention.attend(*arrays, window=window, **form)

        mapped = jax.vmap(lambda *x: attention.attend(*x, window=4.0, **form))(*arrays)
        return mapped, jax.lax.scan(step, 0, windows)[1][1]

    mapped, scanned = run(*arrays)
    np.testing.assert_allclose(mapped, batched, atol=1e-6)
    np.testing.assert_allclose(scanned, batched, atol=1e-6)


def test_invisible_blocks_are_not_computed():
    """NaN in them would spread as 0 * NaN, in values and gradients."""
    q, k, v, _, _, y = draw(0, (), 128, 128, 2, 1)
    d = np.ones(128, np.float32)
    k[:32] = v[:32] = np.nan  # before the windows of the last 64 queries
    arrays, options = (q[64:], k, v, d, d, y[64:]), {"window": 16.0}
    blocked = values_and_gradients(
        *arrays, implementation="blocked", block_size=16, **options
    )
    assert all(np.isfinite(x).all() for x in blocked)
    # The dense form computes every block.
    dense = attend(*arrays[:4], implementation="dense", **options)
    assert not np.isfinite(dense).all()


def test_memory_does_not_grow_with_the_square_of_the_length():
    """8 heads of 64 at n = 4096, with the gradients for everything: at most 1/30 of the dense."""

    def gradients(form):
        def loss(q, k, v, d):
            return jnp.sum(attention.attend(q, k, v, d, implementation=form) ** 2)

        shapes = [jax.ShapeDtypeStruct((4096, 8, 64), jnp.float32)] * 3
        shapes.append(jax.ShapeDtypeStruct((4096,), jnp.float32))
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*shapes)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert gradients("blocked") <= min(gradients("dense") / 30, 64 * 2**20)


def test_long_sequences_are_blocked_and_short_ones_dense():
    def memory(n):
        q = jax.ShapeDtypeStruct((n, 1, 4), jnp.float32)
        compiled = jax.jit(attention.attend).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = 64, 8192
    assert memory(long) < long**2  # a byte for each score; the dense form has four
    # Only the dense form has second derivatives.
    ones = np.ones((short, 1, 4), np.float32)
    hessian = jax.hessian(lambda d: attention.attend(ones, ones, ones, d).sum())
    jax.eval_shape(hessian, np.ones(short, np.float32))


def test_wrong_options_are_named():
    q, k, v, d, _, _ = draw(0, (), 8, 8, 2, 1)
    with pytest.raises(clm.InputError, match="implementation is 'flash'"):
        attention.attend(q, k, v, d, implementation="flash")
    with pytest.raises(clm.InputError, match="block_size is 0"):
        attention.attend(q, k, v, d, implementation="blocked", block_size=0)
    with pytest.raises(clm.InputError, match="softcap is traced"):
        jax.jit(
            lambda c: attention.attend(q, k, v, d, softcap=c, implementation="blocked")
        )(1.0)
