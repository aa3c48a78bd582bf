"""Shrinking: durations moved towards a target as far as a constraint holds.

What must hold is a slack >= 0, a function of durations [T] to a scalar. The searches of
`duration_search` and `pruning` end with it.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.analysis.attribution import Objective, as_jit_argument
from continuous_lm.arguments import as_float, check_count
from continuous_lm.durations import Span, check_durations
from continuous_lm.errors import InputError

__all__ = [
    "EVALUATIONS_PER_GRADIENT",
    "MIN_SLACK",
    "NUM_BISECTIONS",
    "SHRINK_FACTORS",
    "SearchResult",
    "check_counts",
    "check_positive_numbers",
    "make_result",
    "shrink_towards",
    "shrink_where_satisfied",
    "validate_durations",
]

EVALUATIONS_PER_GRADIENT = 3  # evaluations
# Of a token's distance to its target, that are tried.
SHRINK_FACTORS = (0.0, 0.25, 0.5, 0.75, 0.9)
NUM_BISECTIONS = 8
MIN_SLACK = 1e-4  # slack that is kept, so that rounding elsewhere does not cross 0


class SearchResult(NamedTuple):
    """Durations that a search ended with.

    Attributes:
      durations: [T], float32 or wider.
      slack: there; below 0 if the search failed.
      total: sum |d - target|: the total change, or, of a pruned prompt, the duration left.
      evaluations: how many forward passes the search cost.
    """

    durations: np.ndarray
    slack: float
    total: float
    evaluations: int


def shrink_towards(
    constraint: Objective, durations: ArrayLike, target: ArrayLike, *, rounds: int = 4
) -> SearchResult:
    """Move durations towards a target as far as the slack stays >= 0.

    A round visits the tokens in order of their distance to the target. It multiplies a token's
    distance by the smallest of `SHRINK_FACTORS` for which the slack stays >= 0. After all rounds,
    all distances are scaled together, by bisection.

    Args:
      constraint: slack, durations [T] -> a scalar, >= 0 at `durations`.
      durations: initial durations, [T].
      target: target durations, [T].
      rounds: rounds over all tokens.

    Returns:
      the final durations; `durations` themselves if their slack is below 0.
    """
    initial_durations = as_float(durations)
    goal = as_float(target)
    num_tokens = initial_durations.shape[-1]
    check_durations(initial_durations, num_tokens)
    check_durations(goal, num_tokens, "target")
    check_counts({"rounds": rounds})
    constraint = as_jit_argument(constraint)
    shrunk, cost = shrink_where_satisfied(constraint, initial_durations, goal, rounds)
    return make_result(constraint, shrunk, goal, int(cost))


def validate_durations(
    durations: ArrayLike, span: Span | None
) -> tuple[jax.Array, jax.Array]:
    """Durations, and which may change: [T] each.

    Raises:
      InputError: if they do not fit.
    """
    initial_durations = as_float(durations)
    if initial_durations.ndim != 1 or not initial_durations.size:
        raise InputError(
            f"durations have shape {list(initial_durations.shape)}; a search needs [T], T >= 1"
        )
    num_tokens = len(initial_durations)
    check_durations(initial_durations, num_tokens)
    if span is None and num_tokens == 1:
        raise InputError(
            "durations have one token, the first, which may not change without a span; give more"
        )
    first, end = (1, num_tokens) if span is None else span
    if not 0 <= first < end <= num_tokens:
        raise InputError(
            f"span ({first}, {end}) is not inside the {num_tokens} tokens;"
            f" it needs 0 <= first < end <= {num_tokens}"
        )
    indices = jnp.arange(num_tokens)
    return initial_durations, (indices >= first) & (indices < end)


def check_counts(counts: Mapping[str, object]) -> None:
    """Raise InputError unless all settings, by their names, are positive integers."""
    for name, count in counts.items():
        check_count(name, count)


def check_positive_numbers(numbers: Mapping[str, float]) -> None:
    """Raise InputError, naming the setting, unless settings are above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise InputError(f"{name} is {number}; it must be positive")


def make_result(
    constraint: Objective, durations: jax.Array, target: jax.Array, evaluations: int
) -> SearchResult:
    """The durations [T] with their slack and their distance from the target."""
    distances = np.abs(np.asarray(durations) - np.asarray(target, np.float64))
    slack = float(_call(constraint, durations))
    return SearchResult(
        np.asarray(durations), slack, float(distances.sum()), evaluations
    )


@jax.jit
def _call(constraint: Objective, durations: jax.Array) -> jax.Array:
    return constraint(durations)


@functools.partial(jax.jit, static_argnums=3)
def shrink_where_satisfied(
    constraint: Objective,
    durations: jax.Array,
    target: jax.Array,
    rounds: int,
    order: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`shrink_towards`, of a constraint that is an argument of jitted functions.

    Returns:
      durations [T], and the evaluations that they cost; in the `order` of tokens if given.
    """
    factors = jnp.asarray(SHRINK_FACTORS, durations.dtype)
    indices = jnp.arange(len(durations))

    def is_satisfied(d):
        return constraint(d) >= MIN_SLACK

    def try_factors(d, token):
        scaled = target + factors[:, None] * (d - target)
        rows = jnp.where(indices == token, scaled, d)
        satisfied = jax.vmap(is_satisfied)(rows)
        best = jnp.where(satisfied.any(), rows[jnp.argmax(satisfied)], d)
        return best, len(SHRINK_FACTORS)

    def leave(d, token):
        return d, 0

    def shrink_token(carry, token):
        d, cost = carry
        is_there = d[token] == target[token]
        d, extra_cost = jax.lax.cond(is_there, leave, try_factors, d, token)
        return (d, cost + extra_cost), None

    def bisect(interval, _):
        low, high = interval
        midpoint = (low + high) / 2.0
        satisfied = is_satisfied(target + midpoint * (shrunk - target))
        low = jnp.where(satisfied, low, midpoint)
        high = jnp.where(satisfied, midpoint, high)
        return (low, high), None

    is_feasible = is_satisfied(durations)
    if order is None:
        order = jnp.tile(jnp.argsort(jnp.abs(durations - target)), rounds)
    initial_carry = (durations, jnp.asarray(0))
    (shrunk, cost), _ = jax.lax.scan(shrink_token, initial_carry, order)
    shrunk = jnp.where(is_feasible, shrunk, durations)
    interval = (jnp.zeros((), shrunk.dtype), jnp.ones((), shrunk.dtype))
    (_, share), _ = jax.lax.scan(bisect, interval, length=NUM_BISECTIONS)
    is_shorter = is_feasible & (share < 1.0)
    shrunk = jnp.where(is_shorter, target + share * (shrunk - target), shrunk)
    return shrunk, cost + NUM_BISECTIONS + 1
