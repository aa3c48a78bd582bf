"""Gradients through a quantizer, whose true derivative is zero almost everywhere."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError

GRADIENTS = ("straight_through", "rotation")


def straight_through(x: ArrayLike, quantized: ArrayLike) -> jax.Array:
    """Return the quantized vectors with the gradient of the identity in x.

    Source: Bengio et al., arXiv:1308.3432.

    Args:
      x: Vectors before quantization, [..., W].
      quantized: Quantized vectors [..., W]; their gradient is 0.

    Returns:
      Vectors [..., W], bitwise equal to `quantized` where x is finite, at least float32.

    Raises:
      InputError: The shapes differ.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> code = jnp.array([1.0])
      >>> value = lambda x: 3 * quantize.straight_through(x, code)[0]
      >>> jax.value_and_grad(value)(jnp.array([0.7]))
      (Array(3., dtype=float32), Array([3.], dtype=float32))
    """
    x, quantized = _check_pair(x, quantized)
    return lax.stop_gradient(quantized) + (x - lax.stop_gradient(x))


def rotation_trick(x: ArrayLike, quantized: ArrayLike) -> jax.Array:
    """Return the quantized vectors with the gradient of the rotation and scaling from x to them.

    Source: Fifty et al., arXiv:2410.06424, section 4.2. With e = x / |x|, q = quantized /
    |quantized| and r = (e + q) / |e + q|,

        quantized = |quantized| / |x| (I - 2 r r^T + 2 q e^T) x,

    where all factors except the last x are constants for differentiation. A gradient thus keeps its
    angle to the code. Straight-through gradients are equal everywhere in the cell of a code.

    Args:
      x: Vectors before quantization, [..., W].
      quantized: Quantized vectors [..., W]; their gradient is 0. If a vector or its code is zero,
        there is no rotation and the gradient is the straight-through one.

    Returns:
      Vectors [..., W], bitwise equal to `quantized` where x is finite, at least float32.

    Raises:
      InputError: The shapes differ.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> x = jnp.array([1.0, 0.0])
      >>> code = jnp.array([0.0, 2.0])  # x turned by 90 degrees and doubled
      >>> print(jax.jacobian(quantize.rotation_trick)(x, code).round(3) + 0.0)
      [[ 0. -2.]
       [ 2.  0.]]
    """
    x, quantized = _check_pair(x, quantized)
    quantized = lax.stop_gradient(quantized)
    constant_x = lax.stop_gradient(x)
    e, x_length = _unit_and_length(constant_x)
    q, quantized_length = _unit_and_length(quantized)
    # At q = -e, r is 0 and the map is a reflection instead of a rotation.
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
    """Return the quantized vectors with the gradient named `gradient`, one of `GRADIENTS`."""
    if gradient not in GRADIENTS:
        raise InputError(
            f"gradient is {gradient!r}; it must be one of {', '.join(GRADIENTS)}"
        )
    if gradient == "rotation":
        return rotation_trick(x, quantized)
    return straight_through(x, quantized)


def _unit_and_length(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x / |x| (0 where x is 0) and |x| [..., 1]."""
    # Divide by the largest entry first, so that no square overflows or underflows.
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    length = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=-1, keepdims=True))
    return scaled / jnp.where(length > 0, length, 1.0), length * largest


def _check_pair(x: ArrayLike, quantized: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x = as_float(x)
    quantized = as_float(quantized)
    if x.shape != quantized.shape or x.ndim < 1:
        raise InputError(
            f"x has shape {list(x.shape)} and quantized {list(quantized.shape)};"
            " both must have the same shape [..., W]"
        )
    return x, quantized
