"""The arguments of cuDNN's kernel, passed to XLA's softmax attention, against the dense form.

The kernel needs an NVIDIA GPU. Any machine can test that JAX accepts the calls, and that only
programs for such GPUs contain them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import attention
from continuous_lm.attention import AttentionProblem, cudnn


def draw(shape=(24, 4, 2, 16), batch=(), dtype=jnp.float32, seed=0):
    """q, k, v, weights from 1e-4 to 1e3, and a cotangent."""
    num_tokens, num_heads, num_kv_heads, width = shape
    rng = np.random.default_rng(seed)
    q, y = rng.normal(size=(2, *batch, num_tokens, num_heads, width))
    k, v = rng.normal(size=(2, *batch, num_tokens, num_kv_heads, width))
    d = jnp.asarray(10 ** rng.uniform(-4, 3, (*batch, num_tokens)), jnp.float32)
    q, k, v, y = (jnp.asarray(x, dtype) for x in (q, k, v, y))
    return q, k, v, d, y


def values_and_gradients(attend, q, k, v, d, dy):
    """y and the gradients for q, k, v, d and log d.

    For log d, since rounding grows by 1 / d in those for d.
    """

    @jax.jit
    def both(q, k, v, d):
        y, pull = jax.vjp(attend, q, k, v, d)
        *grads, dd = pull(dy.astype(y.dtype))
        return y, *grads, dd, d * dd

    return both(q, k, v, d)


def by_kernel(q, k, v, d, scale=0.3):
    """The arithmetic in any dtype, past the checks."""
    groups = q.shape[-2] // k.shape[-2]
    grouped = q.reshape(*q.shape[:-2], k.shape[-2], groups, q.shape[-1])
    problem = AttentionProblem(grouped, k, v, d, scale=scale)
    return cudnn.attend(problem).reshape(q.shape)


dense = functools.partial(attention.attend, implementation="dense")


@pytest.fixture
def through_xla(monkeypatch):
    def attend(*arrays, implementation, **options):
        assert implementation == "cudnn"
        assert arrays[0].shape[-1] % 8 == 0
        return kernel(*arrays, implementation="xla", **options)

    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that cuDNN is installed: then JAX writes its calls into programs."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.usefixtures("through_xla")
@pytest.mark.parametrize(
    ("shape", "batch"), [((24, 4, 2, 16), ()), ((9, 3, 1, 13), (2, 3))]
)
def test_equals_the_dense_form(shape, batch):
    q, k, v, d, dy = draw(shape, batch)
    d = d.at[..., 4].set(0.0).at[..., 7].set(1e-38)
    actual = values_and_gradients(by_kernel, q, k, v, d, dy)
    expected = values_and_gradients(functools.partial(dense, scale=0.3), q, k, v, d, dy)
    for i in (0, 1, 2, 3, 5):
        size = np.abs(expected[i]).max()
        np.testing.assert_allclose(actual[i], expected[i], rtol=0.0, atol=2e-6 * size)
    np.testing.assert_allclose(
        actual[4][..., [4, 7]], expected[4][..., [4, 7]], rtol=1e-4
    )


@pytest.mark.usefixtures("through_xla")
def test_bfloat16_error_is_at_most_that_of_an_exact_bias():
    """Relative error 2.3e-3 with log d added in float32, too."""
    *arrays, dy = draw((256, 4, 4, 64), dtype=jnp.bfloat16)
    by_cudnn = functools.partial(attention.attend, implementation="cudnn")
    by_kernel = values_and_gradients(by_cudnn, *arrays, dy)
    exact = values_and_gradients(dense, *(x.astype(jnp.float32) for x in (*arrays, dy)))
    assert by_kernel[0].dtype == by_kernel[1].dtype == jnp.bfloat16
    assert by_kernel[4].dtype == jnp.float32
    for i, bound in enumerate([2.6e-3, 4e-3, 4e-3, 4e-3, 1e-2, 5e-3]):
        x, reference = (np.asarray(a[i], np.float64) for a in (by_kernel, exact))
        assert np.linalg.norm(x - reference) <= bound * np.linalg.norm(reference), i


@pytest.mark.usefixtures("through_xla")
def test_queries_without_any_weight_give_zeros_and_finite_gradients():
    q, k, v, d, dy = draw()
    d = d.at[:3].set(0.0)
    y, *grads = values_and_gradients(by_kernel, q, k, v, d, dy)
    np.testing.assert_array_equal(y[:3], 0.0)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_allclose(y, dense(q, k, v, d, scale=0.3), atol=2e-6)


def lowered(platform, dtype=jnp.bfloat16, num_tokens=320, **options):
    """The program with gradients, of more scores than the dense form is chosen for."""
    q, k, v, d, _ = draw((num_tokens, 4, 2, 64), (2,), dtype)

    def loss(*arrays):
        return jnp.sum(attention.attend(*arrays, **options).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, v, d)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("installed")
def test_only_programs_for_nvidia_gpus_call_the_kernel():
    program = lowered("cuda")
    assert "@__cudnn$fmhaSoftmax(" in program
    assert "@__cudnn$fmhaSoftmaxBackward(" in program
    assert "cudnn" not in lowered("cpu")
    assert "cudnn" not in lowered("tpu")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.float32},
        {"softcap": 30.0},
        {"window": 9.0},
        {"query_offset": jnp.array(0)},
        {"num_tokens": 64},
    ],
)
def test_unsupported_problems_use_another_form(options):
    assert "cudnn" not in lowered("cuda", **options)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"dtype": jnp.float32}, {}, "q, k and v are float32.*bfloat16"),
        ({}, {"softcap": 30.0}, "soft-capping"),
        ({}, {"window": 9.0}, "count tokens, not time"),
        ({}, {"query_offset": jnp.array(0)}, "a query for every key"),
        ({}, {"scale": jnp.array(0.1)}, "scale is an array"),
        ({"shape": (24, 4, 2, 256)}, {}, "head dim must be <="),
    ],
)
def test_unsupported_problems_are_named(arguments, options, message):
    q, k, v, d, _ = draw(**{"dtype": jnp.bfloat16} | arguments)
    with pytest.raises(clm.InputError, match=f"'cudnn' is not possible: .*{message}"):
        attention.attend(q, k, v, d, implementation="cudnn", **options)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it may be there")
def test_a_missing_installation_is_named():
    q, k, v, d, _ = draw(dtype=jnp.bfloat16)
    with pytest.raises(clm.InputError, match=r"cuDNN is not detected.*take 'blocked'"):
        attention.attend(q, k, v, d, implementation="cudnn")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("batched", [(3,), (0,), (1, 2), (0, 1, 2, 3)])
def test_vmap_over_some_arguments(batched):
    *arrays, _ = draw(dtype=jnp.bfloat16)
    axes = [0 if i in batched else None for i in range(4)]
    arrays = [
        x if axis is None else jnp.stack([x] * 3)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    attend = functools.partial(attention.attend, implementation="cudnn")
    loss = lambda *x: jnp.sum(attend(*x).astype(jnp.float32))  # noqa: E731
    apart = jax.vmap(jax.grad(loss, argnums=(0, 3)), in_axes=axes)
    shapes = jax.eval_shape(apart, *arrays)
    assert shapes[0].shape == (3, 24, 4, 16)
    assert shapes[1].shape == (3, 24)
