"""Our own kernel, interpreted, against the dense form; and compiled for TPUs and NVIDIA GPUs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import attention
from continuous_lm.attention import pallas
from tests.continuous_lm.attention.test_blocked import (
    CASES,
    assert_close,
    draw,
    values_and_gradients,
)

FAST = "window, capped, grouped, batched"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pallas, "BLOCK_SIZE", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "case", [c if c == FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_equals_the_dense_form(case):
    *shape, _, options = CASES[case]
    arguments = draw(0, *shape)
    dense = values_and_gradients(*arguments, implementation="dense", **options)
    actual = values_and_gradients(*arguments, implementation="pallas", **options)
    assert_close(actual, dense, 2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float64, 1e-13)]
)
def test_keeps_its_precision(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        arguments = draw(1, (), 40, 40, 2, 1, dtype=dtype)
        options = {"window": 11.0, "softcap": 3.0}
        dense = values_and_gradients(*arguments, implementation="dense", **options)
        actual = values_and_gradients(*arguments, implementation="pallas", **options)
        assert_close(actual, dense, tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_weights_of_zero_and_almost_zero():
    """Gradients are finite for a query without keys, and a key of large scores and weight 0."""
    q, k, v, d, steps, y = draw(0, (), 20, 20, 2, 1)
    k[9] *= 60.0
    d[0] = d[9] = 0.0
    d[12] = 1e-38
    arguments = q, k, v, d, steps, y
    dense = values_and_gradients(*arguments, implementation="dense")
    actual = values_and_gradients(*arguments, implementation="pallas")
    assert all(np.isfinite(x).all() for x in actual)
    np.testing.assert_array_equal(actual[0][0], 0.0)
    # For small weights, the gradients of their logarithms.
    unit = np.where(np.arange(20) == 9, np.float32(1), d)
    assert_close(
        [*actual[:-1], unit * actual[-1]], [*dense[:-1], unit * dense[-1]], 1e-5
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_invisible_blocks_are_not_computed():
    """NaN in them would spread as 0 * NaN."""
    q, k, v, _, _, _ = draw(0, (), 64, 64, 1, 1)
    k[:16] = v[:16] = np.nan
    y = attention.attend(q[32:], k, v, window=8.0, implementation="pallas")
    assert np.isfinite(y).all()


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_vmap_over_durations():
    q, k, v, d, _, _ = draw(0, (), 20, 20, 2, 1)
    d = d * jnp.array([0.5, 1.0, 2.0])[:, None] ** jnp.arange(20)

    def loss(d, implementation):
        return jnp.sum(attention.attend(q, k, v, d, implementation=implementation) ** 2)

    actual, dense = (
        jax.jit(jax.vmap(jax.grad(functools.partial(loss, implementation=name))))(d)
        for name in ("pallas", "dense")
    )
    assert_close([actual * d], [dense * d], 1e-5)


def gpu():
    """From jax 0.11 on, compiling for a GPU that is not there takes being told which."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(jnp.bfloat16, {"softcap": 30.0, "window": 50.0}), (jnp.float32, {})],
)
@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "triton")]
)
def test_compiles_for_tpus_and_gpus(platform, call, dtype, options):
    q, k, v, d, steps, _ = draw(0, (2,), 300, 300, 4, 2, 80, dtype)

    def loss(*arrays):
        y = attention.attend(
            *arrays, intervals=steps, implementation="pallas", **options
        )
        return jnp.sum(y.astype(jnp.float32))

    with gpu() if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, v, d)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [
        line
        for line in program.splitlines()
        if "custom_call @" in line and call in line
    ]
    assert len(calls) == 3  # forward, gradients for queries, those for keys


def test_unsupported_problems_are_named():
    q, k, v, d, _, _ = draw(0, (), 8, 8, 2, 1)
    with pytest.raises(
        clm.InputError, match="'pallas' is not possible: softcap is an array"
    ):
        jax.jit(
            lambda c: attention.attend(q, k, v, d, softcap=c, implementation="pallas")
        )(1.0)
