"""What every loss asks of its arguments: floats of one dtype, axes that fit, values in range."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError


def floats(**given: tuple[ArrayLike, str]) -> list[jax.Array]:
    """Arrays of one dtype, at least float32, whose axes fit and whose `...` broadcast.

    `floats(x=(x, "... W"), factor=(factor, "... W R"))` wants x [..., W] and factor [..., W, R]; a
    letter is of one size throughout.

    Raises:
      InputError: which array does not fit, and what it must be.
    """
    arrays = [_real(name, array) for name, (array, _) in given.items()]
    sizes: dict[str, tuple[int, str]] = {}  # of each letter, and the array that has it
    free = {}
    for array, (name, (_, axes)) in zip(arrays, given.items(), strict=True):
        first, last = (axes_lib.split(part) for part in axes.split("..."))
        wanted = f"{name} has shape {list(array.shape)}; it must be [{', '.join(axes.split())}]"
        if array.ndim < len(first) + len(last):
            raise InputError(wanted)
        cut = array.ndim - len(last)
        for letter, size in zip(
            first + last, array.shape[: len(first)] + array.shape[cut:], strict=True
        ):
            known, owner = sizes.setdefault(letter, (size, name))
            if size != known:
                raise InputError(f"{wanted} with {letter} = {known}, as in {owner}")
        free[name] = array.shape[len(first) : cut]
    try:
        np.broadcast_shapes(*free.values())
    except ValueError:
        shapes = ", ".join(f"{list(shape)} of {name}" for name, shape in free.items())
        raise InputError(f"leading axes do not broadcast together: {shapes}") from None
    dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def positive(name: str, values: jax.Array) -> None:
    """Refuses values that are not finite and above 0; traced ones are not looked at."""
    at_least(name, values, float(jnp.finfo(values.dtype).tiny))


def at_least(name: str, values: jax.Array, minimum: float) -> None:
    """Refuses values that are not finite and >= `minimum`; traced ones are not looked at."""
    if is_known(values):
        check_numbers(name, values, minimum)


def distribution(name: str, p: jax.Array, slack: float = 0.02) -> None:
    """Refuses [..., E] that are not >= 0 or do not add up to 1; traced ones are not looked at.

    The slack of 0.02 is for bfloat16, which keeps three digits.
    """
    if not is_known(p):
        return
    check_numbers(name, p, 0.0)
    off = np.abs(np.asarray(p, np.float64).sum(axis=-1) - 1)
    if (off > slack).any():
        raise InputError(f"{name} are {off.max():.3g} off adding up to 1 along the last axis")


def labels(name: str, values: ArrayLike, shape: tuple[int, ...], num: int) -> jax.Array:
    """Integers 0, ..., num - 1 of this shape; the values of traced ones are not looked at."""
    array = jnp.asarray(values)
    if array.shape != shape:
        raise InputError(f"{name} has shape {list(array.shape)}; it must be {list(shape)}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name} has dtype {array.dtype}; it must hold integers")
    if is_known(array):
        check_integers(name, array, 0, num)
    return array


def is_known(values: jax.Array) -> bool:
    """Whether the values can be looked at: not traced, and all of them on this host."""
    return not isinstance(values, jax.core.Tracer) and values.is_fully_addressable


def _real(name: str, values: ArrayLike) -> jax.Array:
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
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"{name} has dtype {dtype}; it must hold real numbers")
    bound = f" and >= {minimum:g}" if np.isfinite(minimum) else ""
    _check_values(name, values, lambda v: np.isfinite(v) & (v >= minimum), f"finite{bound}")


def check_integers(name: str, values: ArrayLike, low: int, high: int) -> None:
    """Refuses values that are not integers low, ..., high - 1; traced ones are not looked at."""
    dtype = _dtype(values)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(f"{name} has dtype {dtype}; it must hold integers")
    _check_values(name, values, lambda v: (v >= low) & (v < high), f"from {low} to {high - 1}")


def _dtype(values: ArrayLike) -> np.dtype:
    return values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype


def _check_values(name, values, holds, what) -> None:
    if isinstance(values, jax.core.Tracer):
        return
    values = np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):  # integers as they are: int32 would wrap them
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            values = values.astype(
                jax.dtypes.canonicalize_dtype(values.dtype)
            )  # as it will be used
    wrong = np.argwhere(~holds(values))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        place = f"{name}{list(index)}" if index else name
        raise InputError(f"{place} is {values[index]}; every entry must be {what}")


def check_count(name: str, count: Any) -> None:
    """Refuses what is no positive integer."""
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not whole or count < 1:
        raise InputError(f"{name} is {count!r}; it must be a positive integer")
