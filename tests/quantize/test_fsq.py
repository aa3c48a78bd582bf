"""Finite scalar quantization: every code once, and gradients of the bound."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm import quantize

LEVELS = [(2,), (3, 4), (8, 5, 5), (2, 2, 3, 7)]


def grid(levels):
    """All codes [E, W], the first dimension fastest."""
    values = [(np.arange(n) - n // 2) / (n // 2) for n in levels]
    rows = itertools.product(*reversed(values))
    return np.array([row[::-1] for row in rows], np.float32)


@pytest.mark.parametrize("levels", LEVELS)
def test_indices_and_codes_are_one_to_one(levels):
    codes = grid(levels)
    everything = np.arange(np.prod(levels))
    np.testing.assert_array_equal(quantize.finite_vectors(everything, levels), codes)
    np.testing.assert_array_equal(quantize.finite_indices(codes, levels), everything)
    assert len(np.unique(codes, axis=0)) == np.prod(levels)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_is_used(levels):
    rng = np.random.default_rng(0)
    x = rng.uniform(-6, 6, (200_000, len(levels))).astype(np.float32)
    quantized = quantize.quantize_finite(x, levels)
    assert len(np.unique(quantized.indices)) == np.prod(levels)
    some = slice(0, 1000)
    vectors = quantize.finite_vectors(quantized.indices[some], levels)
    np.testing.assert_array_equal(quantized.vectors[some], vectors)
    far = quantize.quantize_finite(
        [[-50.0] * len(levels), [50.0] * len(levels)], levels
    )
    np.testing.assert_array_equal(far.indices, [0, np.prod(levels) - 1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_vectors_are_the_rounded_bound_of_the_paper(seed):
    levels = (4, 5, 8)
    x = np.random.default_rng(seed).normal(scale=2.0, size=(50, 3))
    half = (np.array(levels) - 1) * 1.001 / 2
    offset = np.array([0.5, 0.0, 0.5])
    bounded = np.tanh(x + np.arctanh(offset / half)) * half - offset
    np.testing.assert_allclose(quantize.finite_bound(x, levels), bounded, atol=1e-5)
    quantized = quantize.quantize_finite(x, levels)
    clear = (np.abs(bounded - np.floor(bounded) - 0.5) > 1e-4).all(axis=1)
    expected = np.round(bounded) / np.array([2, 2, 4])
    np.testing.assert_array_equal(
        quantized.vectors[clear], expected[clear].astype(np.float32)
    )


def test_gradients_are_those_of_the_bound():
    levels, x = (4, 5), jnp.array([[0.3, -0.2], [2.0, -1.0]])
    gradient = jax.grad(lambda x: jnp.sum(quantize.quantize_finite(x, levels).vectors))(
        x
    )
    bound = jax.grad(
        lambda x: jnp.sum(quantize.finite_bound(x, levels) / jnp.array([2, 2]))
    )(x)
    np.testing.assert_allclose(gradient, bound, rtol=1e-6)
    assert (np.asarray(gradient) > 0).all()


def test_equals_vector_quantize_pytorch():
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("vector_quantize_pytorch")
    levels = (8, 5, 4)
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    vectors, indices = peer.FSQ(levels=list(levels))(torch.from_numpy(x)[None])
    quantized = quantize.quantize_finite(x, levels)
    np.testing.assert_allclose(quantized.vectors, vectors[0].numpy(), atol=1e-6)
    np.testing.assert_array_equal(quantized.indices, indices[0].numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize.quantize_finite(np.ones((2, 3)), (4, 4)),
            "levels has 2 entries for vectors of shape [2, 3]",
        ),
        (lambda: quantize.quantize_finite(np.ones(2), (4, 1)), "levels are (4, 1)"),
        (lambda: quantize.finite_vectors(0, ()), "levels are ()"),
        (lambda: quantize.finite_indices(np.ones(2), (4, 2.5)), "levels are (4, 2.5)"),
        (lambda: quantize.finite_bound(np.ones(11), (8,) * 11), "int32 cannot count"),
        (lambda: quantize.finite_vectors([3, 20], (4, 5)), "indices[1] is 20"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(clm.InputError) as refused:
        call()
    assert message in str(refused.value)
