"""Gradients through a quantizer, whose own derivative is zero almost everywhere."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError

GRADIENTS = ("straight_through", "rotation")


def straight_through(x: ArrayLike, quantized: ArrayLike) -> jax.Array:
    """The quantized vectors, with the gradient of the identity in x (Bengio et al., 1308.3432).

    Args:
      x: [..., W].
      quantized: [..., W]; it gets no gradient.

    Returns:
      [..., W], bit for bit `quantized` where x is finite.

    Raises:
      InputError: if the shapes differ.

    >>> jax.value_and_grad(lambda x: 3 * straight_through(x, jnp.array([1.0]))[0])(
    ...     jnp.array([0.7])
    ... )
    (Array(3., dtype=float32), Array([3.], dtype=float32))
    """
    x, quantized = _check_pair(x, quantized)
    return lax.stop_gradient(quantized) + (x - lax.stop_gradient(x))


def rotation_trick(x: ArrayLike, quantized: ArrayLike) -> jax.Array:
    """The quantized vectors, with the gradient of the rotation and scaling that takes x to them.

    Fifty et al. (arXiv:2410.06424, section 4.2): with e = x / |x|, q = quantized / |quantized| and
    r = (e + q) / |e + q|,

        quantized = |quantized| / |x| (I - 2 r r' + 2 q e') x,

    and all but the last x is held constant. So a gradient keeps its angle to the code, where
    straight-through gradients are the same all over a cell.

    Args:
      x: [..., W].
      quantized: [..., W]; it gets no gradient. Where it or x is zero there is no rotation, and the
        gradient is the straight-through one.

    Returns:
      [..., W], bit for bit `quantized` where x is finite.

    Raises:
      InputError: if the shapes differ.

    >>> x, code = (
    ...     jnp.array([1.0, 0.0]),
    ...     jnp.array([0.0, 2.0]),
    ... )  # a quarter turn, twice as long
    >>> print(jax.jacobian(rotation_trick)(x, code).round(3) + 0.0)
    [[ 0. -2.]
     [ 2.  0.]]
    """
    x, quantized = _check_pair(x, quantized)
    quantized = lax.stop_gradient(quantized)
    constant_x = lax.stop_gradient(x)
    e, x_length = _unit_and_length(constant_x)
    q, quantized_length = _unit_and_length(quantized)
    # Where q = -e this is 0, and the rotation a reflection.
    r, _ = _unit_and_length(e + q)
    rotated = x - 2 * r * jnp.sum(r * x, axis=-1, keepdims=True)
    rotated = rotated + 2 * q * jnp.sum(e * x, axis=-1, keepdims=True)
    has_rotation = (x_length > 0) & (quantized_length > 0)
    stretching = quantized_length / jnp.where(has_rotation, x_length, 1.0)
    transformed = jnp.where(has_rotation, stretching * rotated, x)
    return quantized + (transformed - lax.stop_gradient(transformed))


def with_gradient(
    x: ArrayLike,
    quantized: ArrayLike,
    gradient: str,
) -> jax.Array:
    """`straight_through` or `rotation_trick`, by its name: one of `GRADIENTS`."""
    if gradient not in GRADIENTS:
        raise InputError(
            f"gradient is {gradient!r}; it must be one of {', '.join(GRADIENTS)}"
        )
    if gradient == "rotation":
        return rotation_trick(x, quantized)
    return straight_through(x, quantized)


def _unit_and_length(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x / |x|, or 0 where x is 0, and |x| [..., 1]."""
    # Scaled so that no square over- or underflows.
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    length = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=-1, keepdims=True))
    return scaled / jnp.where(length > 0, length, 1.0), length * largest


def _check_pair(x: ArrayLike, quantized: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x = as_float(x)
    quantized = as_float(quantized)
    if x.shape != quantized.shape or x.ndim < 1:
        raise InputError(
            f"x {list(x.shape)} and quantized {list(quantized.shape)} must be of one shape [..., W]"
        )
    return x, quantized
