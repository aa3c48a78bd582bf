"""Durations of tokens, and the times at which they end.

Token j lasts d_j >= 0 and ends at t_j = start + d_1 + ... + d_j (Marro et al., arXiv:2504.03933,
section 3). An ordinary sentence has d = 1 and start = 0. Durations and times are arrays [..., T],
in units of one token, with any leading axes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.errors import InputError

Span = tuple[int, int]  # the first token of a span, and the one after its last


def as_float(values: ArrayLike) -> jax.Array:
    """`values` as an array of at least float32; float64 stays float64."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def end_times(durations: ArrayLike, start: ArrayLike = 0.0) -> jax.Array:
    """The time at which each token ends.

    Args:
      durations: [..., T].
      start: the time at which the first token begins; a scalar or [...].

    Returns:
      times [..., T], at least float32.
    """
    return as_float(start)[..., None] + jnp.cumsum(as_float(durations), axis=-1)


def from_times(times: ArrayLike, start: ArrayLike = 0.0) -> jax.Array:
    """The durations [..., T] of tokens that end at `times` [..., T]; the inverse of `end_times`."""
    times = as_float(times)
    first = jnp.broadcast_to(as_float(start)[..., None], (*times.shape[:-1], 1)).astype(times.dtype)
    return jnp.diff(times, prepend=first, axis=-1)


def scale(durations: ArrayLike, factor: ArrayLike, span: Span | None = None) -> jax.Array:
    """Multiplies the durations of a span (all of them without one) by a factor.

    Args:
      durations: [T].
      factor: a scalar, or [...] for a whole sweep at once.
      span: (first, end): tokens first, ..., end - 1.

    Returns:
      durations [..., T], with the axes of `factor` in front.

    Raises:
      InputError: if the span is empty or reaches outside of the tokens.
    """
    durations = as_float(durations)
    n = durations.shape[-1]
    first, end = (0, n) if span is None else span
    if not 0 <= first < end <= n:
        raise InputError(
            f"span ({first}, {end}) is not inside the {n} tokens; it needs 0 <= first < end <= {n}"
        )
    inside = (jnp.arange(n) >= first) & (jnp.arange(n) < end)
    return jnp.where(inside, durations * as_float(factor)[..., None], durations)


def translate(times: ArrayLike, shift: ArrayLike) -> jax.Array:
    """Moves `times` [T] by `shift` [...] (units of a token): [..., T]."""
    return as_float(times) + as_float(shift)[..., None]


def check(durations: ArrayLike, n: int, name: str = "durations", minimum: float = 0.0) -> None:
    """Refuses `durations` that are not finite numbers >= `minimum` of shape [..., n].

    The shape is checked always; the values only outside of jit, where they are known.

    Raises:
      InputError: which entry is wrong, and how.
    """
    shape = jnp.shape(durations)
    if not shape or shape[-1] != n:
        raise InputError(
            f"{name} has shape {list(shape)}, but there are {n} tokens: it must be [..., {n}]"
        )
    check_numbers(name, durations, minimum)
    if not isinstance(durations, jax.core.Tracer):
        total = np.abs(np.asarray(durations, np.float64)).sum(axis=-1)
        if (total > float(jnp.finfo(jnp.float32).max)).any():
            raise InputError(f"{name} add up to {total.max():.3g}, more than float32 can hold")


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


class Clock(NamedTuple):
    """End times on an exact clock: ticks * tick + rest, counted from the first token's beginning.

    A distance in time is a difference of two end times. Of plain sums it would lose digits as time
    goes on: near t = 4096 float32 resolves 5e-4. Ticks are integers, so that theirs is exact, and
    what the tick does not resolve is so small that its sums are.
    """

    ticks: jax.Array  # int [..., T]
    rest: jax.Array  # [..., T]
    tick: jax.Array  # [..., 1], a power of two


def clock(durations: jax.Array) -> Clock:
    """The end times of tokens [..., T] of any durations, negative ones too, as a `Clock`.

    A tick is no smaller than the least normal number, so that float32 durations below about 1e-31
    lose digits.
    """
    durations = as_float(durations)
    bits, integer = (30, jnp.int32) if durations.dtype.itemsize == 4 else (62, jnp.int64)
    # A power of two so large that no sum of ticks overflows, and so small that it is a number.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(durations), axis=-1, keepdims=True))
    exponent = exponent + (durations.shape[-1] - 1).bit_length()
    exponent = jnp.maximum(exponent, jnp.finfo(durations.dtype).minexp + bits)
    tick = jnp.ldexp(jnp.ones_like(exponent, durations.dtype), exponent - bits)
    whole = jnp.round(durations / tick)  # exact: the tick is a power of two
    rest = durations - whole * tick
    return Clock(jnp.cumsum(whole.astype(integer), axis=-1), jnp.cumsum(rest, axis=-1), tick)


def elapsed(clock: Clock, later: jax.Array, earlier: jax.Array) -> jax.Array:
    """Time [..., Q, E] from the ends of tokens `earlier` (int [E]) to ends of `later` (int [Q])."""
    ticks = clock.ticks[..., later, None] - clock.ticks[..., None, earlier]
    rest = clock.rest[..., later, None] - clock.rest[..., None, earlier]
    return ticks.astype(rest.dtype) * clock.tick[..., None] + rest


def check_count(name: str, count: Any) -> None:
    """Refuses what is no positive integer."""
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not whole or count < 1:
        raise InputError(f"{name} is {count!r}; it must be a positive integer")
