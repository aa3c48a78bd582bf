"""JAX's TPU kernel with weights: interpreted against the dense form, and compiled for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import continuous_lm as clm
from continuous_lm import attention
from continuous_lm.attention import splash


def draw(
    num_queries, num_keys, num_heads=2, num_kv_heads=1, width=8, dtype=jnp.float32
):
    """q, k, v, weights from 1e-4 to 1e3, one of them 0, and a cotangent."""
    rng = np.random.default_rng(0)
    q, y = rng.normal(size=(2, num_queries, num_heads, width))
    k, v = rng.normal(size=(2, num_keys, num_kv_heads, width))
    d = jnp.asarray(10 ** rng.uniform(-4, 3, num_keys), jnp.float32)
    q, k, v, y = (jnp.asarray(x, dtype) for x in (q, k, v, y))
    return q, k, v, d.at[num_keys // 2].set(0.0), y


def values_and_gradients(arrays, **options):
    *arrays, dy = arrays

    @jax.jit
    def both(*arrays):
        y, pull = jax.vjp(functools.partial(attention.attend, **options), *arrays)
        return y, *pull(dy.astype(y.dtype))

    return both(*arrays)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_the_dense_form(softcap, monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK_SIZE", 128)
    arrays = draw(100, 200)
    options = {"softcap": softcap, "scale": 0.3}
    with pltpu.force_tpu_interpret_mode():
        actual = values_and_gradients(arrays, implementation="splash", **options)
    expected = values_and_gradients(arrays, implementation="dense", **options)
    for x, reference in zip(actual, expected, strict=True):
        size = np.abs(reference).max()
        np.testing.assert_allclose(x, reference, rtol=0.0, atol=2e-6 * size)
    np.testing.assert_allclose(actual[-1][100], expected[-1][100], rtol=1e-4)


def lowered(platform, implementation="auto", dtype=jnp.bfloat16, **options):
    """The program with gradients, of more scores than the dense form is chosen for."""
    *arrays, _ = draw(300, 300, 4, 2, 64, dtype)

    def loss(*arrays):
        y = attention.attend(*arrays, implementation=implementation, **options)
        return jnp.sum(y.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("dtype", "softcap"), [(jnp.bfloat16, None), (jnp.float32, 30.0)]
)
def test_compiles_for_tpus(dtype, softcap):
    program = lowered("tpu", "splash", dtype, softcap=softcap)
    assert program.count("@tpu_custom_call(") == 3  # forward, dq, dk with dv


@pytest.fixture
def on_one_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("on_one_tpu")
def test_programs_for_one_tpu_call_the_kernel():
    assert "@tpu_custom_call(" in lowered("tpu")
    assert "@tpu_custom_call(" not in lowered("cpu")
    assert "@tpu_custom_call(" not in lowered("tpu", window=9.0)


@pytest.mark.usefixtures("on_one_tpu")
def test_programs_for_several_tpus_do_not_call_the_kernel(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert "@tpu_custom_call(" not in lowered("tpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 9.0}, "count tokens, not time"),
        ({"query_offset": jnp.array(0)}, "query_offset is an array"),
        ({"softcap": jnp.array(1.0)}, "softcap is an array"),
    ],
)
def test_unsupported_problems_are_named(options, message):
    *arrays, _ = draw(4, 4)
    with pytest.raises(clm.InputError, match=f"'splash' is not possible: .*{message}"):
        attention.attend(*arrays, implementation="splash", **options)
