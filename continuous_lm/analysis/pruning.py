"""Pruning: the least total duration at which an answer holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from continuous_lm.analysis import attribution
from continuous_lm.analysis.attribution import Objective
from continuous_lm.analysis.duration_search import (
    EVALUATIONS_PER_GRADIENT,
    MIN_SLACK,
    SearchResult,
    _check_positive,
    _make_result,
    _shrink_towards,
    _validate_durations,
)
from continuous_lm.durations import Span


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
    """The smallest total duration at which a value is at most `tolerance` below what it was.

    Adam on log durations, from the given ones, which are never exceeded, minimises their sum under
    a penalty for what the value lacks, whose weight grows while the value lacks something and falls
    while it does not. The shortest durations at which nothing was lacking are kept, and
    `shrink_towards` then takes them to 0 as far as the value allows, the shortest first: most to
    exactly 0, where a token is absent. The same without the first stage is greedy pruning; so it is
    from those first whose duration the value depends on least, which is best where it is linear.
    The shortest wins.

    Args:
      objective: durations [T] -> a scalar; the log probability of an answer, say.
      durations: of the whole prompt [T].
      tolerance: in the unit of the value.
      span: (first, end) of the tokens that may go; all but the first if left out. The first one
        stays in any case: without it there may be nothing to attend to.
      learning_rate: of Adam, in log durations.
      steps: of Adam.
      rounds: of `shrink_towards`.

    Returns:
      what was found, with the total over the tokens that may go.

    Raises:
      InputError: if arguments do not fit.
    """
    d0, is_free = _validate_durations(durations, span)
    is_free = is_free.at[0].set(False)
    _check_positive(
        tolerance=tolerance, learning_rate=learning_rate, steps=steps, rounds=rounds
    )
    objective = attribution.as_jit_argument(objective)
    constraint = Floor(objective, float(objective(d0)) - tolerance)
    target, num_evaluations = (
        jnp.where(is_free, 0.0, d0),
        EVALUATIONS_PER_GRADIENT * steps + 1,
    )
    adam_durations = _shrink_with_adam(constraint, d0, is_free, learning_rate, steps)
    candidates = []
    sensitivity = jax.jit(jax.grad(objective))(d0)
    num_evaluations += EVALUATIONS_PER_GRADIENT
    for d, order in (
        (adam_durations, None),
        (d0, None),
        (d0, jnp.repeat(jnp.argsort(sensitivity), rounds)),
    ):
        d, cost = _shrink_towards(constraint, d, target, rounds, order)
        candidates.append(d)
        num_evaluations += int(cost)
    return min(
        (_make_result(constraint, d, target, num_evaluations) for d in candidates),
        key=lambda r: r.total,
    )


@functools.partial(jax.jit, static_argnums=4)
def _shrink_with_adam(
    constraint: Objective, d0: jax.Array, is_free: jax.Array, learning_rate, steps: int
) -> jax.Array:
    """The shortest durations [T] that Adam met on its way with slack."""
    optimizer = optax.adam(learning_rate)

    def to_durations(z):
        return jnp.where(is_free, d0 * jnp.exp(z), d0)

    def loss(z, penalty):
        slack_value = constraint(to_durations(z))
        return jnp.sum(to_durations(z)) + penalty * jnp.maximum(
            2.0 * MIN_SLACK - slack_value, 0.0
        ), slack_value

    def step(carry, _):
        z, optimizer_state, penalty, best, min_total = carry
        (_, slack_value), gradient = jax.value_and_grad(loss, has_aux=True)(z, penalty)
        d = to_durations(z)
        is_better = (slack_value >= MIN_SLACK) & (jnp.sum(d) < min_total)
        best, min_total = (
            jnp.where(is_better, d, best),
            jnp.where(is_better, jnp.sum(d), min_total),
        )
        penalty = jnp.clip(
            penalty * jnp.where(slack_value < MIN_SLACK, 1.2, 0.95), 1e-2, 1e4
        )
        update, optimizer_state = optimizer.update(gradient, optimizer_state, z)
        return (
            jnp.clip(optax.apply_updates(z, update), -12.0, 0.0),
            optimizer_state,
            penalty,
            best,
            min_total,
        ), None

    z = jnp.zeros_like(d0)
    initial_carry = (z, optimizer.init(z), jnp.asarray(10.0, d0.dtype), d0, jnp.sum(d0))
    (*_, best, _), _ = jax.lax.scan(step, initial_carry, length=steps)
    return best
