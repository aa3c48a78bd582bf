"""Straight-through gradients and the rotation trick, against the matrix written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import quantize
from continuous_lm.quantize.straight_through import with_gradient


def draw(seed=0, shape=(5, 6), dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, *shape)).astype(dtype)


@pytest.mark.parametrize("trick", [quantize.straight_through, quantize.rotation_trick])
def test_values_are_the_codes_bit_for_bit(trick):
    x, codes, _ = draw()
    for factor in (1.0, 1e8, 1e-8):
        np.testing.assert_array_equal(trick(factor * x, codes), codes)


@pytest.mark.parametrize("trick", [quantize.straight_through, quantize.rotation_trick])
def test_codes_have_no_gradient(trick):
    x, codes, g = draw()
    gradient = jax.grad(lambda codes: jnp.sum(g * trick(x, codes)))(codes)
    np.testing.assert_array_equal(gradient, 0.0)


def rotation(x, code):
    """The matrix that turns x's direction into the code's in their plane, and leaves the rest."""
    e, q = x / np.linalg.norm(x), code / np.linalg.norm(code)
    cosine = e @ q
    across = (q - cosine * e) / np.sqrt(1 - cosine**2)  # at right angles to e
    sine = np.sqrt(1 - cosine**2)
    plane = np.stack([e, across], axis=1)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return np.eye(len(x)) + plane @ (turn - np.eye(2)) @ plane.T


def test_gradient_is_the_transposed_rotation():
    with jax.enable_x64(True):
        x, codes, g = draw(dtype=np.float64)
        _, back = jax.vjp(lambda x: quantize.rotation_trick(x, codes), x)
        (gradient,) = back(g)
        for i in range(len(x)):
            r = rotation(x[i], codes[i])
            np.testing.assert_allclose(r @ r.T, np.eye(6), atol=1e-12)
            scale = np.linalg.norm(codes[i]) / np.linalg.norm(x[i])
            np.testing.assert_allclose(scale * r @ x[i], codes[i], atol=1e-12)
            np.testing.assert_allclose(gradient[i], scale * r.T @ g[i], atol=1e-12)


def test_straight_through_is_the_identity():
    x, codes, g = draw()
    gradient = jax.grad(lambda x: jnp.sum(g * quantize.straight_through(x, codes)))(x)
    np.testing.assert_array_equal(gradient, g)


def test_gradients_without_a_rotation_are_finite():
    """Zero vectors, a code on its vector, and one opposite to it."""
    x = np.array([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], np.float32)
    codes = np.array([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]], np.float32)
    g = np.ones_like(x)
    y, back = jax.vjp(lambda x: quantize.rotation_trick(x, codes), x)
    np.testing.assert_array_equal(y, codes)
    (gradient,) = back(g)
    np.testing.assert_allclose(gradient[:3], g[:3], rtol=1e-6)  # straight through
    np.testing.assert_allclose(
        np.linalg.norm(gradient[3]), np.linalg.norm(g[3]), rtol=1e-6
    )


def test_wrong_arguments_are_refused():
    for trick in (quantize.straight_through, quantize.rotation_trick):
        with pytest.raises(
            clm.InputError, match=r"x has shape \[2, 3\] and quantized \[3\]"
        ):
            trick(np.ones((2, 3)), np.ones(3))
    with pytest.raises(clm.InputError, match="gradient is 'gumbel'"):
        with_gradient(np.ones(3), np.ones(3), "gumbel")
