"""Pruning: the least total duration at which an answer holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from continuous_lm.analysis import attribution
from continuous_lm.analysis.attribution import Value
from continuous_lm.analysis.duration_search import (
    GRADIENT_COST,
    SAFETY,
    Found,
    _check_positive,
    _checked,
    _found,
    _pull,
)
from continuous_lm.durations import Span


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value", "least"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class Floor:
    """Durations [T] -> a value less the least that it may be."""

    value: Value
    least: float

    def __call__(self, durations: jax.Array) -> jax.Array:
        return self.value(durations) - self.least


def prune(
    value: Value,
    durations: ArrayLike,
    *,
    tolerance: float = 0.1,
    span: Span | None = None,
    learning_rate: float = 0.1,
    steps: int = 200,
    rounds: int = 4,
) -> Found:
    """The smallest total duration at which a value is at most `tolerance` below what it was.

    Adam on log durations, from the given ones, which are never exceeded, minimises their sum under
    a penalty for what the value lacks, whose weight grows while the value lacks something and falls
    while it does not. The shortest durations at which nothing was lacking are kept, and `pull` then
    takes them to 0 as far as the value allows, the shortest first: most to exactly 0, where a token
    is absent. The same without the first stage is greedy pruning; so it is from those first whose
    duration the value depends on least, which is best where it is linear. The shortest wins.

    Args:
      value: durations [T] -> a scalar; the log probability of an answer, say.
      durations: of the whole prompt [T].
      tolerance: in the unit of the value.
      span: (first, end) of the tokens that may go; all but the first if left out. The first one
        stays in any case: without it there may be nothing to attend to.
      learning_rate: of Adam, in log durations.
      steps: of Adam.
      rounds: of `pull`.

    Returns:
      what was found, with the total over the tokens that may go.

    Raises:
      InputError: if arguments do not fit.
    """
    d0, free = _checked(durations, span)
    free = free.at[0].set(False)
    _check_positive(tolerance=tolerance, learning_rate=learning_rate, steps=steps, rounds=rounds)
    value = attribution.as_pytree(value)
    slack = Floor(value, float(value(d0)) - tolerance)
    target, spent = jnp.where(free, 0.0, d0), GRADIENT_COST * steps + 1
    shrunk = _shrink(slack, d0, free, learning_rate, steps)
    found = []
    worth = jax.jit(jax.grad(value))(d0)
    spent += GRADIENT_COST
    for d, order in ((shrunk, None), (d0, None), (d0, jnp.repeat(jnp.argsort(worth), rounds))):
        d, cost = _pull(slack, d, target, rounds, order)
        found.append(d)
        spent += int(cost)
    return min((_found(slack, d, target, spent) for d in found), key=lambda r: r.total)


@functools.partial(jax.jit, static_argnums=4)
def _shrink(slack: Value, d0: jax.Array, free: jax.Array, learning_rate, steps: int) -> jax.Array:
    """The shortest durations [T] that Adam met on its way with slack."""
    optimizer = optax.adam(learning_rate)

    def durations(z):
        return jnp.where(free, d0 * jnp.exp(z), d0)

    def loss(z, penalty):
        spare = slack(durations(z))
        return jnp.sum(durations(z)) + penalty * jnp.maximum(2.0 * SAFETY - spare, 0.0), spare

    def step(carry, _):
        z, state, penalty, best, least = carry
        (_, spare), gradient = jax.value_and_grad(loss, has_aux=True)(z, penalty)
        d = durations(z)
        better = (spare >= SAFETY) & (jnp.sum(d) < least)
        best, least = jnp.where(better, d, best), jnp.where(better, jnp.sum(d), least)
        penalty = jnp.clip(penalty * jnp.where(spare < SAFETY, 1.2, 0.95), 1e-2, 1e4)
        update, state = optimizer.update(gradient, state, z)
        return (
            jnp.clip(optax.apply_updates(z, update), -12.0, 0.0),
            state,
            penalty,
            best,
            least,
        ), None

    z = jnp.zeros_like(d0)
    start = (z, optimizer.init(z), jnp.asarray(10.0, d0.dtype), d0, jnp.sum(d0))
    (*_, best, _), _ = jax.lax.scan(step, start, length=steps)
    return best
