"""What every loss asks of its arguments: floats of one dtype, axes that fit, values in range."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError


def check_floats(**arrays_and_axes: tuple[ArrayLike, str]) -> list[jax.Array]:
    """Arrays of one dtype, at least float32, whose axes fit and whose `...` broadcast.

    `check_floats(x=(x, "... W"), factor=(factor, "... W R"))` wants x [..., W] and factor [..., W,
    R]; a letter is of one size throughout.

    Raises:
      InputError: which array does not fit, and what it must be.
    """
    arrays = [_as_real(name, array) for name, (array, _) in arrays_and_axes.items()]
    letter_sizes: dict[
        str, tuple[int, str]
    ] = {}  # of each letter, and the array that has it
    leading_shapes = {}
    for array, (name, (_, axes)) in zip(arrays, arrays_and_axes.items(), strict=True):
        letters_before, letters_after = (
            axes_lib.split(part) for part in axes.split("...")
        )
        message = f"{name} has shape {list(array.shape)}; it must be [{', '.join(axes.split())}]"
        if array.ndim < len(letters_before) + len(letters_after):
            raise InputError(message)
        num_before_last = array.ndim - len(letters_after)
        for letter, size in zip(
            letters_before + letters_after,
            array.shape[: len(letters_before)] + array.shape[num_before_last:],
            strict=True,
        ):
            known_size, owner = letter_sizes.setdefault(letter, (size, name))
            if size != known_size:
                raise InputError(
                    f"{message} with {letter} = {known_size}, as in {owner}"
                )
        leading_shapes[name] = array.shape[len(letters_before) : num_before_last]
    try:
        np.broadcast_shapes(*leading_shapes.values())
    except ValueError:
        shapes = ", ".join(
            f"{list(shape)} of {name}" for name, shape in leading_shapes.items()
        )
        raise InputError(f"leading axes do not broadcast together: {shapes}") from None
    dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def check_positive(name: str, values: jax.Array) -> None:
    """Refuses values that are not finite and above 0; traced ones are not looked at."""
    check_at_least(name, values, float(jnp.finfo(values.dtype).tiny))


def check_at_least(name: str, values: jax.Array, minimum: float) -> None:
    """Refuses values that are not finite and >= `minimum`; traced ones are not looked at."""
    if is_concrete(values):
        check_numbers(name, values, minimum)


def check_distribution(name: str, p: jax.Array, tolerance: float = 0.02) -> None:
    """Refuses arrays that are not >= 0 or whose last axis does not add up to 1; traced ones pass.

    The slack of 0.02 is for bfloat16, which keeps three digits.
    """
    if not is_concrete(p):
        return
    check_numbers(name, p, 0.0)
    errors = np.abs(np.asarray(p, np.float64).sum(axis=-1) - 1)
    if (errors > tolerance).any():
        raise InputError(
            f"{name} are {errors.max():.3g} off adding up to 1 along the last axis"
        )


def check_labels(
    name: str, values: ArrayLike, shape: tuple[int, ...], num_classes: int
) -> jax.Array:
    """Integers 0, ..., num_classes - 1 of this shape; traced values are not looked at."""
    array = jnp.asarray(values)
    if array.shape != shape:
        raise InputError(
            f"{name} has shape {list(array.shape)}; it must be {list(shape)}"
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name} has dtype {array.dtype}; it must hold integers")
    if is_concrete(array):
        check_integers(name, array, 0, num_classes)
    return array


def is_concrete(values: jax.Array) -> bool:
    """Whether the values can be looked at: not traced, and all of them on this host."""
    return not isinstance(values, jax.core.Tracer) and values.is_fully_addressable


def _as_real(name: str, values: ArrayLike) -> jax.Array:
    array = jnp.asarray(values)
    kinds = (jnp.floating, jnp.integer)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise InputError(f"{name} has dtype {array.dtype}; it must hold real numbers")
    return as_float(array)


def as_float(values: ArrayLike) -> jax.Array:
    """`values` as an array of at least float32; float64 stays float64."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def check_numbers(name: str, values: ArrayLike, minimum: float = -np.inf) -> None:
    """Refuses values that are not real, finite and >= `minimum`; traced ones are not looked at."""
    dtype = _dtype(values)
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(
        dtype, jnp.integer
    ):
        raise InputError(f"{name} has dtype {dtype}; it must hold real numbers")
    bound_text = f" and >= {minimum:g}" if np.isfinite(minimum) else ""
    _check_values(
        name, values, lambda v: np.isfinite(v) & (v >= minimum), f"finite{bound_text}"
    )


def check_integers(name: str, values: ArrayLike, low: int, high: int) -> None:
    """Refuses values that are not integers low, ..., high - 1; traced ones are not looked at."""
    dtype = _dtype(values)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"{name} has dtype {dtype}; it must hold integers")
    _check_values(
        name, values, lambda v: (v >= low) & (v < high), f"from {low} to {high - 1}"
    )


def _dtype(values: ArrayLike) -> np.dtype:
    return values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype


def _check_values(name, values, is_valid, requirement) -> None:
    if isinstance(values, jax.core.Tracer):
        return
    values = np.asarray(values)
    if not jnp.issubdtype(
        values.dtype, jnp.integer
    ):  # integers as they are: int32 would wrap them
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            values = values.astype(
                jax.dtypes.canonicalize_dtype(values.dtype)
            )  # as it will be used
    invalid_indices = np.argwhere(~is_valid(values))
    if len(invalid_indices):
        index = tuple(int(i) for i in invalid_indices[0])
        entry = f"{name}{list(index)}" if index else name
        raise InputError(
            f"{entry} is {values[index]}; every entry must be {requirement}"
        )


def check_positive_integer(name: str, value: Any) -> None:
    """Refuses what is no positive integer."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise InputError(f"{name} is {value!r}; it must be a positive integer")
