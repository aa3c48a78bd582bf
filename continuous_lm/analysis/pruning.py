"""Pruning: the least total duration at which an answer holds."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from continuous_lm.analysis import attribution
from continuous_lm.analysis.attribution import Objective
from continuous_lm.analysis.shrinking import (
    EVALUATIONS_PER_GRADIENT,
    MIN_SLACK,
    SearchResult,
    check_counts,
    check_positive_numbers,
    make_result,
    shrink_where_satisfied,
    validate_durations,
)
from continuous_lm.durations import Span

__all__ = ["Floor", "prune"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("objective", "min_value"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class Floor:
    """Durations [T] -> a value less the least that it may be."""

    objective: Objective
    min_value: float

    def __call__(self, durations: jax.Array) -> jax.Array:
        return self.objective(durations) - self.min_value


def prune(
    objective: Objective,
    durations: ArrayLike,
    *,
    tolerance: float = 0.1,
    span: Span | None = None,
    learning_rate: float = 0.1,
    steps: int = 200,
    rounds: int = 4,
) -> SearchResult:
    """Find the smallest total duration with a value at most `tolerance` below the original one.

    The first stage is Adam on log durations, bounded above by the given durations. It minimises
    their sum plus a penalty on the shortfall of the value. The penalty's weight grows while there
    is a shortfall and falls otherwise. The shortest durations without shortfall are kept. The
    second stage, `shrink_towards`, moves them towards 0, the shortest first; most become exactly
    0, an absent token. Two searches use only the second stage: greedy pruning, and pruning in the
    order of the gradient, which is best where the value is linear. The shortest result is returned.

    Args:
      objective: durations [T] -> a scalar, such as the log probability of an answer.
      durations: durations of the whole prompt, [T].
      tolerance: largest shortfall, in the unit of the value.
      span: (first, end) of the tokens that may be removed; all but the first if omitted. The first
        token always stays, so that there is a key to attend to.
      learning_rate: learning rate of Adam, in log durations.
      steps: steps of Adam.
      rounds: rounds of `shrink_towards`.

    Returns:
      the shortest durations, with the total over the tokens of the span.

    Raises:
      InputError: if arguments do not fit.
    """
    initial_durations, is_free = validate_durations(durations, span)
    is_free = is_free.at[0].set(False)
    check_positive_numbers({"tolerance": tolerance, "learning_rate": learning_rate})
    check_counts({"steps": steps, "rounds": rounds})
    objective = attribution.as_jit_argument(objective)
    min_value = float(objective(initial_durations)) - tolerance
    constraint = Floor(objective, min_value)
    target = jnp.where(is_free, 0.0, initial_durations)
    adam_durations = _shrink_with_adam(
        constraint, initial_durations, is_free, learning_rate, steps
    )
    sensitivity = jax.jit(jax.grad(objective))(initial_durations)
    num_evaluations = 1 + EVALUATIONS_PER_GRADIENT * (steps + 1)
    least_sensitive_first = jnp.repeat(jnp.argsort(sensitivity), rounds)
    starts_and_orders = (
        (adam_durations, None),
        (initial_durations, None),
        (initial_durations, least_sensitive_first),
    )
    candidates = []
    for start, order in starts_and_orders:
        shrunk, cost = shrink_where_satisfied(constraint, start, target, rounds, order)
        candidates.append(shrunk)
        num_evaluations += int(cost)
    results = [
        make_result(constraint, shrunk, target, num_evaluations)
        for shrunk in candidates
    ]
    return min(results, key=lambda result: result.total)


class _Descent(NamedTuple):
    """The carry of Adam, in log durations z [T] relative to the first ones."""

    z: jax.Array
    optimizer_state: optax.OptState
    penalty: jax.Array
    shortest: jax.Array  # durations [T]
    min_total: jax.Array


@functools.partial(jax.jit, static_argnums=4)
def _shrink_with_adam(
    constraint: Objective,
    initial_durations: jax.Array,
    is_free: jax.Array,
    learning_rate: float,
    steps: int,
) -> jax.Array:
    """The shortest durations [T] that Adam met on its way with slack."""
    optimizer = optax.adam(learning_rate)

    def to_durations(z):
        return jnp.where(is_free, initial_durations * jnp.exp(z), initial_durations)

    def loss(z, penalty):
        d = to_durations(z)
        slack = constraint(d)
        shortfall = jnp.maximum(2.0 * MIN_SLACK - slack, 0.0)
        return jnp.sum(d) + penalty * shortfall, slack

    def step(descent, _):
        z, optimizer_state, penalty, shortest, min_total = descent
        value_and_gradient = jax.value_and_grad(loss, has_aux=True)
        (_, slack), gradient = value_and_gradient(z, penalty)
        d = to_durations(z)
        is_better = (slack >= MIN_SLACK) & (jnp.sum(d) < min_total)
        shortest = jnp.where(is_better, d, shortest)
        min_total = jnp.where(is_better, jnp.sum(d), min_total)
        factor = jnp.where(slack < MIN_SLACK, 1.2, 0.95)
        penalty = jnp.clip(penalty * factor, 1e-2, 1e4)
        update, optimizer_state = optimizer.update(gradient, optimizer_state, z)
        z = jnp.clip(optax.apply_updates(z, update), -12.0, 0.0)
        return _Descent(z, optimizer_state, penalty, shortest, min_total), None

    z = jnp.zeros_like(initial_durations)
    initial_descent = _Descent(
        z,
        optimizer.init(z),
        jnp.asarray(10.0, initial_durations.dtype),
        initial_durations,
        jnp.sum(initial_durations),
    )
    last_descent, _ = jax.lax.scan(step, initial_descent, length=steps)
    return last_descent.shortest
