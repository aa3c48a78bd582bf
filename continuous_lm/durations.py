"""Durations and end times of tokens.

Token j lasts d_j >= 0 and ends at t_j = start + d_1 + ... + d_j (Marro et al., arXiv:2504.03933,
section 3). An ordinary sentence has d = 1 and start = 0. Durations and times are arrays [..., T],
in units of one token, with any leading axes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_numbers, check_shapes
from continuous_lm.errors import InputError

__all__ = [
    "Span",
    "check_durations",
    "durations_from_times",
    "end_times",
    "scale",
    "translate",
]

Span = tuple[int, int]  # the first token of a span, and the one after its last


def end_times(durations: ArrayLike, start: ArrayLike = 0.0) -> jax.Array:
    """Return the end time of each token.

    Args:
      durations: [..., T].
      start: the time at which the first token begins; a scalar or [...].

    Returns:
      times [..., T], at least float32.

    Examples:
      >>> from continuous_lm import durations
      >>> print(durations.end_times([1.0, 0.5, 2.0], start=10.0))
      [11.  11.5 13.5]
    """
    return as_float(start)[..., None] + jnp.cumsum(as_float(durations), axis=-1)


def durations_from_times(times: ArrayLike, start: ArrayLike = 0.0) -> jax.Array:
    """Return the durations of tokens from their end times, the inverse of `end_times`.

    Args:
      times: end time of each token, [..., T].
      start: start time of the first token; a scalar or [...].

    Returns:
      durations [..., T], at least float32.

    Examples:
      >>> from continuous_lm import durations
      >>> print(durations.durations_from_times([11.0, 11.5, 13.5], start=10.0))
      [1.  0.5 2. ]
    """
    times = as_float(times)
    start_times = as_float(start)[..., None].astype(times.dtype)
    start_times = jnp.broadcast_to(start_times, (*times.shape[:-1], 1))
    return jnp.diff(times, prepend=start_times, axis=-1)


def scale(
    durations: ArrayLike, factor: ArrayLike, span: Span | None = None
) -> jax.Array:
    """Multiply the durations of a span, or of all tokens, by a factor.

    Args:
      durations: [T].
      factor: a scalar, or [...] for a whole sweep at once.
      span: (first, end): tokens first, ..., end - 1.

    Returns:
      durations [..., T], with the axes of `factor` in front.

    Raises:
      InputError: if the span is empty or reaches outside the tokens.

    Examples:
      >>> from continuous_lm import durations
      >>> print(durations.scale([1.0, 1.0, 1.0], [1.0, 0.5], span=(1, 3)))
      [[1.  1.  1. ]
       [1.  0.5 0.5]]
    """
    durations = as_float(durations)
    num_tokens = durations.shape[-1]
    first, end = (0, num_tokens) if span is None else span
    if not 0 <= first < end <= num_tokens:
        raise InputError(
            f"span ({first}, {end}) is not inside the {num_tokens} tokens; it needs 0 <= first"
            f" < end <= {num_tokens}"
        )
    is_inside = (jnp.arange(num_tokens) >= first) & (jnp.arange(num_tokens) < end)
    scaled_durations = durations * as_float(factor)[..., None]
    return jnp.where(is_inside, scaled_durations, durations)


def translate(times: ArrayLike, shift: ArrayLike) -> jax.Array:
    """Shift times.

    Args:
      times: end times of tokens, [T].
      shift: a scalar or [...], in units of an ordinary token.

    Returns:
      times [..., T], with the axes of `shift` in front.

    Examples:
      >>> from continuous_lm import durations
      >>> print(durations.translate([1.0, 2.0], [0.0, 0.5]))
      [[1.  2. ]
       [1.5 2.5]]
    """
    return as_float(times) + as_float(shift)[..., None]


def check_durations(
    durations: ArrayLike, num_tokens: int, name: str = "durations", minimum: float = 0.0
) -> None:
    """Raise InputError unless `durations` [..., num_tokens] are finite and >= `minimum`.

    The shape is always checked; values are checked only outside jit.

    Args:
      durations: durations of tokens, [..., num_tokens].
      num_tokens: number of tokens, T.
      name: name of the argument in errors.
      minimum: smallest valid duration.

    Raises:
      InputError: naming the invalid entry.
    """
    check_shapes(
        {name: (durations, "... T")}, known_sizes={"T": (num_tokens, "tokens")}
    )
    check_numbers(name, durations, minimum)
    if not isinstance(durations, jax.core.Tracer):
        totals = np.abs(np.asarray(durations, np.float64)).sum(axis=-1)
        if (totals > float(jnp.finfo(jnp.float32).max)).any():
            raise InputError(
                f"{name} add up to {totals.max():.3g}, more than float32 can hold"
            )
