"""Checks of arguments: axes that fit, floats of one dtype, values in range.

Each raises an `InputError` that names the argument. Values are looked at where they are known,
outside of jit; shapes and dtypes always.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError

__all__ = [
    "as_float",
    "as_indices",
    "check",
    "check_at_least",
    "check_count",
    "check_distribution",
    "check_integer_dtype",
    "check_integers",
    "check_labels",
    "check_numbers",
    "check_positive",
    "check_shapes",
    "is_concrete",
    "is_integer",
]


def check(**arrays_and_axes: tuple[ArrayLike, str]) -> list[jax.Array]:
    """Convert arrays to one dtype, at least float32, and check their axes; `...` broadcast.

    `check(x=(x, "... W"), factor=(factor, "... W R"))` requires x [..., W] and factor [..., W, R].
    A letter has the same size in all arrays.

    Raises:
      InputError: naming the array that does not fit, and its required axes.
    """
    arrays = {
        name: _as_real(name, array) for name, (array, _) in arrays_and_axes.items()
    }
    check_shapes(
        {name: (arrays[name], axes) for name, (_, axes) in arrays_and_axes.items()}
    )
    dtype = jnp.result_type(*arrays.values())
    return [array.astype(dtype) for array in arrays.values()]


def check_shapes(
    arrays_and_axes: Mapping[str, tuple[ArrayLike | None, str]],
    known_sizes: Mapping[str, tuple[int, str]] = MappingProxyType({}),
) -> tuple[int, ...]:
    """Raise InputError unless the axes of the arrays fit; only shapes are read.

    Args:
      arrays_and_axes: name -> an array and its axes, such as "... T N H"; without "..." it has no
        leading axes. None is an omitted argument.
      known_sizes: sizes of letters, with the name of their source: {"T": (3, "tokens")}.

    Returns:
      the shape to which the leading axes broadcast.

    Raises:
      InputError: naming the array, its required axes, and the source of the requirement.
    """
    sizes_and_owners = dict(known_sizes)
    leading_axes: dict[str, list[int]] = {}
    for name, (array, axes) in arrays_and_axes.items():
        if array is None:
            continue
        shape = np.shape(array)
        letters = axes_lib.letter_each_axis(axes, len(shape))
        message = (
            f"{name} has shape {list(shape)}; it must be [{', '.join(axes.split())}]"
        )
        if len(letters) != len(shape):
            raise InputError(message)
        leading_axes[name] = []
        for letter, size in zip(letters, shape, strict=True):
            if letter == axes_lib.LEADING:
                leading_axes[name].append(size)
                continue
            known_size, owner = sizes_and_owners.setdefault(letter, (size, name))
            if size != known_size:
                raise InputError(
                    f"{message} with {letter} = {known_size}, as in {owner}"
                )
    return axes_lib.broadcast_leading_axes(leading_axes)


def check_positive(name: str, values: jax.Array) -> None:
    """Raise InputError unless values are finite and above 0; traced values are not checked."""
    check_at_least(name, values, float(jnp.finfo(values.dtype).tiny))


def check_at_least(name: str, values: jax.Array, minimum: float) -> None:
    """Raise InputError unless values are finite and >= `minimum`; traced values are not checked."""
    if is_concrete(values):
        check_numbers(name, values, minimum)


def check_distribution(name: str, p: jax.Array, tolerance: float = 0.02) -> None:
    """Raise InputError unless an array is >= 0 and its last axis sums to 1; traced ones pass.

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
    check_integer_dtype(name, array)
    if is_concrete(array):
        check_integers(name, array, 0, num_classes)
    return as_indices(array)


def is_concrete(values: jax.Array) -> bool:
    """Return whether values can be read: not traced, and all on this host."""
    return not isinstance(values, jax.core.Tracer) and values.is_fully_addressable


def _as_real(name: str, values: ArrayLike) -> jax.Array:
    if not hasattr(values, "dtype"):
        values = jnp.asarray(values)
    _check_real(name, values.dtype)
    return as_float(values)


def as_float(values: ArrayLike) -> jax.Array:
    """`values` as an array of at least float32; float64 stays float64."""
    if isinstance(values, int | np.ndarray | np.generic):
        host_values = np.asarray(values)
        if host_values.dtype.kind in "iu":  # int32, as JAX reads them, would wrap
            values = host_values.astype(
                jnp.promote_types(host_values.dtype, jnp.float32)
            )
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def as_indices(values: ArrayLike) -> jax.Array:
    """Integer `values` as an array of at least 32 bits.

    JAX compares indices with the size of their axis in the dtype of the indices: sizes above 127
    overflow int8, and one_hot wraps.
    """
    indices = jnp.asarray(values)
    return indices if indices.dtype.itemsize >= 4 else indices.astype(jnp.int32)


def check_numbers(name: str, values: ArrayLike, minimum: float = -np.inf) -> None:
    """Raise InputError unless values are real, finite and >= `minimum`; traced ones pass."""
    _check_real(name, _dtype(values))
    bound_text = f" and >= {minimum:g}" if np.isfinite(minimum) else ""
    _check_values(
        name,
        values,
        lambda entries: np.isfinite(entries) & (entries >= minimum),
        f"finite{bound_text}",
    )


def check_integers(name: str, values: ArrayLike, low: int, high: int) -> None:
    """Raise InputError unless values are integers from low to high - 1; traced ones pass."""
    check_integer_dtype(name, values)
    _check_values(
        name,
        values,
        lambda entries: (entries >= low) & (entries < high),
        f"from {low} to {high - 1}",
    )


def check_integer_dtype(name: str, values: ArrayLike) -> None:
    """Raise InputError unless an array has an integer dtype."""
    dtype = _dtype(values)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"{name} has dtype {dtype}; it must hold integers")


def check_count(name: str, count: object, minimum: int = 1) -> None:
    """Raise InputError unless `count` is an integer of at least `minimum`."""
    if not is_integer(count) or count < minimum:
        kind = (
            "a positive integer" if minimum == 1 else f"an integer, at least {minimum}"
        )
        raise InputError(f"{name} is {count!r}; it must be {kind}")


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether the value is an integer of Python or NumPy, but not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _dtype(values: ArrayLike) -> np.dtype:
    """The dtype of an array; of Python's numbers, the one that they will have in JAX."""
    if hasattr(values, "dtype"):
        return values.dtype
    return jax.dtypes.canonicalize_dtype(np.asarray(values).dtype)


def _check_real(name: str, dtype: np.dtype) -> None:
    kinds = jnp.floating, jnp.integer
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise InputError(f"{name} has dtype {dtype}; it must hold real numbers")


def _check_values(
    name: str,
    values: ArrayLike,
    is_valid: Callable[[np.ndarray], np.ndarray],
    requirement: str,
) -> None:
    if isinstance(values, jax.core.Tracer):
        return
    entries = np.asarray(values)
    if not jnp.issubdtype(
        entries.dtype, jnp.integer
    ):  # int32 would wrap large integers
        used_dtype = jax.dtypes.canonicalize_dtype(entries.dtype)
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            entries = entries.astype(used_dtype)
    invalid_indices = np.argwhere(~is_valid(entries))
    if len(invalid_indices):
        index = tuple(invalid_indices[0].tolist())
        entry = f"{name}{list(index)}" if index else name
        raise InputError(
            f"{entry} is {entries[index]}; every entry must be {requirement}"
        )
