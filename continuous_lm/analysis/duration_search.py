"""The inverse problem: durations that make a model say a chosen answer, or still say its own.

`steer` looks for the smallest change of durations, total sum |d - d0|, after which an answer leads
by a margin; `prune` for the smallest total duration that keeps a value, the log probability of the
answer above all, within a tolerance. Both follow gradients through log durations, which keeps them
positive, and then `pull` every duration back (to d0, or to 0) as far as the answer still holds.
What must hold is a slack >= 0, a function of durations [T] to a scalar; see `Margin` and `Floor`.

`random_search` is what a search without gradients finds with as many evaluations of the model. One
evaluation is a forward pass; a gradient counts as three (one pass forward, two backward).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from continuous_lm.analysis import attribution
from continuous_lm.analysis.attribution import Logits, Value
from continuous_lm.arguments import as_float
from continuous_lm.durations import Span
from continuous_lm.durations import check as check_durations
from continuous_lm.errors import InputError

GRADIENT_COST = 3  # evaluations
WEIGHTS = (0.8, 0.3)
STARTS = 2  # probes that an ascent begins at
SCALES = (0.25, 0.5, 0.75, 1.5, 2.0)  # of stretches that are probed
FACTORS = (0.0, 0.25, 0.5, 0.75, 0.9)  # of a change, that `pull` tries to keep
BISECTIONS = 8
SAFETY = 1e-4  # slack that is kept, so that rounding elsewhere does not cross 0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("logits", "answer", "least"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class Margin:
    """Durations [T] -> by how much an answer leads, less the lead that it must have.

    The lead is the log-odds, in nats, of the answer (its tokens' probabilities summed) against the
    most probable other token.
    """

    logits: Logits
    answer: jax.Array  # token ids, int [C]
    least: float

    def __call__(self, durations: jax.Array) -> jax.Array:
        return lead(self.logits(durations), self.answer) - self.least


class Found(NamedTuple):
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


def lead(logits: jax.Array, answer: jax.Array) -> jax.Array:
    """Log-odds [...] of tokens `answer` (int [C]) against the best other; logits [..., V]."""
    logits = as_float(logits)
    best = jnp.max(logits.at[..., answer].set(-jnp.inf), axis=-1)
    return jax.nn.logsumexp(logits[..., answer], axis=-1) - best


def steer(
    slack: Value,
    durations: ArrayLike,
    *,
    span: Span | None = None,
    weights: Sequence[float] = WEIGHTS,
    learning_rate: float = 0.1,
    steps: int = 60,
    rounds: int = 4,
    batch_size: int = 16,
) -> Found:
    """Durations near the given ones, and equal to most of them, at which the slack is >= 0.

    Gradients are local, and an answer two answers away may lie beyond a stretch where they point
    elsewhere. So `probes`, stretches of tokens that last longer or shorter, are looked at first.
    Proximal gradient ascent then starts from d0 and from the best `STARTS` of them, under a penalty
    weight * |z| on the changes z of log durations: while the slack is below 0, `optax.sgd` takes a
    step along the gradient, scaled so that its largest entry is 1; and after every step, every z
    moves towards 0 by learning_rate * weight. So a token moves away from d0 only if its gradient is
    more than `weight` times the largest: near 1 this is steepest descent in the L1 norm, a token at
    a time, and at 0 all tokens move. Where the slack is reached, only the penalty is left, so that
    the ascent slides along the edge of what holds, with steps that fall to 0 (a cosine). The least
    change that held is kept, `pull` shrinks the best of each start, and the smallest wins.

    Args:
      slack: durations [T] -> a scalar, which must become >= 0; `Margin` for an answer.
      durations: d0, [T].
      span: (first, end) of the tokens that may change; all but the first if left out. What lasts 0
        keeps doing so.
      weights: of the penalty, in (0, 1); each is tried.
      learning_rate: first step of the fastest log duration.
      steps: of each ascent.
      rounds: of `pull`.
      batch_size: durations computed at once.

    Returns:
      what was found; if nothing held, the durations whose slack came closest.

    Raises:
      InputError: if arguments do not fit.
    """
    d0, free = _checked(durations, span)
    _check_positive(learning_rate=learning_rate, steps=steps, rounds=rounds, batch_size=batch_size)
    if not weights or not all(0 < w < 1 for w in weights):
        raise InputError(f"weights are {list(weights)}; they must be numbers between 0 and 1")
    slack = attribution.as_pytree(slack)
    rows = probes(d0, free)
    slacks = np.asarray(attribution.values(slack, rows, batch_size))
    totals = np.abs(np.asarray(rows) - np.asarray(d0)).sum(axis=1)
    best = np.lexsort((np.where(slacks >= SAFETY, totals, -slacks), slacks < SAFETY))[:STARTS]
    starts = jnp.concatenate([d0[None], rows[best]])
    pairs = (jnp.repeat(starts, len(weights), axis=0), jnp.tile(jnp.asarray(weights), len(starts)))
    ascended, lacking, changes = _ascend(slack, d0, free, *pairs, learning_rate, steps)
    spent = len(rows) + GRADIENT_COST * steps * len(lacking)
    score = np.where(np.isfinite(changes), changes, 1e9 + np.asarray(lacking))
    found = []
    for of_start in np.arange(len(lacking)).reshape(len(starts), -1):
        d, cost = _pull(slack, ascended[of_start[np.argmin(score[of_start])]], d0, rounds)
        found.append(d)
        spent += int(cost)
    results = [_found(slack, d, d0, spent) for d in found]
    return min(results, key=lambda r: (r.slack < 0, r.total if r.slack >= 0 else -r.slack))


def probes(durations: jax.Array, free: jax.Array) -> jax.Array:
    """Durations [P, T]: each of many stretches of tokens, shorter or longer by `SCALES`.

    Stretches have 1, 2, 4, ... tokens and begin at every half of their length; only those of their
    tokens that are `free` (bool [T]) change.
    """
    n, masks = len(durations), []
    length = 1
    while length < 2 * n:
        step = max(length // 2, 1)
        for first in range(0, max(n - length, 0) + step, step):
            masks.append((np.arange(n) >= first) & (np.arange(n) < first + length))
        length *= 2
    inside = np.stack(masks) & np.asarray(free)
    inside = np.unique(inside[inside.any(axis=1)], axis=0)
    factors = jnp.asarray(SCALES, durations.dtype)[:, None, None]
    return jnp.where(inside, factors * durations, durations).reshape(-1, n)


def random_search(
    slack: Value,
    durations: ArrayLike,
    *,
    evaluations: int,
    span: Span | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Found:
    """The same by chance: draws, and then random shrinking of the best.

    Half of the evaluations are independent draws: a random number of tokens, few or many, whose log
    durations change by a normal number of random scale, 0.05 to 2. In the other half, the smallest
    change that held so far is shrunk: each of its entries, with probability 0.3, by a factor drawn
    from [0, 1]. What still holds is kept.

    Args and errors as of `steer`.
    """
    d0, free = _checked(durations, span)
    _check_positive(evaluations=evaluations, batch_size=batch_size)
    slack = attribution.as_pytree(slack)
    d = _search(slack, d0, free, jax.random.key(seed), evaluations, batch_size)
    return _found(slack, d, d0, evaluations)


def pull(slack: Value, durations: ArrayLike, target: ArrayLike, *, rounds: int = 4) -> Found:
    """Moves durations towards a target as far as the slack stays >= 0.

    Token by token, those nearest to their target first: the least of `FACTORS` of a token's
    distance is kept at which the slack holds; `rounds` times over. At last all distances are scaled
    together, by bisection.

    Args:
      slack: durations [T] -> a scalar, >= 0 at `durations`.
      durations: where to begin, [T].
      target: where to go, [T].
      rounds: over all tokens.

    Returns:
      what was found; `durations` themselves if the slack is below 0 there.
    """
    d, goal = as_float(durations), as_float(target)
    check_durations(d, d.shape[-1])
    check_durations(goal, d.shape[-1], "target")
    _check_positive(rounds=rounds)
    slack = attribution.as_pytree(slack)
    d, cost = _pull(slack, d, goal, rounds)
    return _found(slack, d, goal, int(cost))


def _checked(durations: ArrayLike, span: Span | None) -> tuple[jax.Array, jax.Array]:
    """Durations, and which may change: [T] each."""
    d = as_float(durations)
    if d.ndim != 1 or not d.size:
        raise InputError(f"durations have shape {list(d.shape)}; a search needs [T], T >= 1")
    check_durations(d, len(d))
    first, end = (1, len(d)) if span is None else span
    if not 0 <= first < end <= len(d):
        raise InputError(
            f"span ({first}, {end}) is not inside the {len(d)} tokens;"
            f" it needs 0 <= first < end <= {len(d)}"
        )
    index = jnp.arange(len(d))
    return d, (index >= first) & (index < end)


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise InputError(f"{name} is {number}; it must be positive")


def _found(slack: Value, durations: jax.Array, target: jax.Array, evaluations: int) -> Found:
    d, goal = np.asarray(durations), np.asarray(target, np.float64)
    total = float(np.abs(d - goal).sum())
    return Found(d, float(jax.jit(lambda s, d: s(d))(slack, durations)), total, evaluations)


@functools.partial(jax.jit, static_argnames="steps")
def _ascend(
    slack: Value,
    d0: jax.Array,
    free: jax.Array,
    starts: jax.Array,
    weights: jax.Array,
    learning_rate: float,
    steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From each start [P, T], with each weight [P]: durations [P, T], lack and change of each.

    The durations are those of the least total change that held; the lack is then below 0. If none
    did, they are those that lacked least, and the change is infinite.
    """
    optimizer = optax.sgd(1.0)

    def loss(z):
        return -slack(d0 * jnp.exp(z))

    def ascend(start, weight):
        def step(carry, rate):
            z, state, best, lack, change = carry
            lost, gradient = jax.value_and_grad(loss)(z)
            holds = lost <= -SAFETY
            new = jnp.where(holds, jnp.sum(jnp.abs(d0 * jnp.expm1(z))), jnp.inf)
            better = jnp.where(holds, new < change, jnp.isinf(change) & (lost < lack))
            best, lack, change = (
                jnp.where(better, a, b) for a, b in ((z, best), (lost, lack), (new, change))
            )
            gradient = jnp.where(free & ~holds, gradient, 0.0)
            top = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.finfo(z.dtype).tiny)
            update, state = optimizer.update(rate * gradient / top, state, z)
            z = optax.apply_updates(z, update)
            z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - rate * weight, 0.0)
            return (z, state, best, lack, change), None

        z = jnp.where(d0 > 0, jnp.log(jnp.where(d0 > 0, start / d0, 1.0)), 0.0)
        infinite = jnp.asarray(jnp.inf, d0.dtype)
        carry = (z, optimizer.init(z), z, infinite, infinite)
        rates = optax.cosine_decay_schedule(learning_rate, steps)(jnp.arange(steps))
        (_, _, best, lack, change), _ = jax.lax.scan(step, carry, rates.astype(d0.dtype))
        return d0 * jnp.exp(best), lack, change

    return jax.vmap(ascend)(starts, weights.astype(d0.dtype))


@functools.partial(jax.jit, static_argnums=3)
def _pull(
    slack: Value,
    d: jax.Array,
    target: jax.Array,
    rounds: int,
    order: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Durations [T], and the evaluations that they cost; in the `order` of tokens if given."""
    factors = jnp.asarray(FACTORS, d.dtype)
    index = jnp.arange(len(d))

    def holds(d):
        return slack(d) >= SAFETY

    def tried(d, j):
        rows = jnp.where(index == j, target + factors[:, None] * (d - target), d)
        held = jax.vmap(holds)(rows)
        return jnp.where(held.any(), rows[jnp.argmax(held)], d), len(FACTORS)

    def token(carry, j):
        d, cost = carry
        d, more = jax.lax.cond(d[j] == target[j], lambda d, j: (d, 0), tried, d, j)
        return (d, cost + more), None

    def bisect(carry, _):
        low, high = carry
        middle = (low + high) / 2.0
        held = holds(target + middle * (d - target))
        return (jnp.where(held, low, middle), jnp.where(held, middle, high)), None

    possible = holds(d)
    if order is None:
        order = jnp.tile(jnp.argsort(jnp.abs(d - target)), rounds)
    (moved, cost), _ = jax.lax.scan(token, (d, jnp.asarray(0)), order)
    d = jnp.where(possible, moved, d)
    edge = (jnp.zeros((), d.dtype), jnp.ones((), d.dtype))
    (_, scale), _ = jax.lax.scan(bisect, edge, length=BISECTIONS)
    d = jnp.where(possible & (scale < 1.0), target + scale * (d - target), d)
    return d, cost + BISECTIONS + 1


@functools.partial(jax.jit, static_argnums=(4, 5))
def _search(
    slack: Value, d0: jax.Array, free: jax.Array, key: jax.Array, evaluations: int, batch_size: int
) -> jax.Array:
    """The smallest change that held, as durations [T]; d0 if none did."""
    number = max(evaluations // 2, 1)
    draws, shrinks = jax.random.split(key)

    def draw(key):
        few, which, size, normal = jax.random.split(key, 4)
        chance = jnp.sum(free) ** -jax.random.uniform(few, dtype=d0.dtype)
        chosen = free & jax.random.bernoulli(which, chance, d0.shape)
        scale = jnp.exp(
            jax.random.uniform(size, dtype=d0.dtype, minval=np.log(0.05), maxval=np.log(2.0))
        )
        return d0 * jnp.exp(jnp.where(chosen, scale * jax.random.normal(normal, d0.shape), 0.0))

    def judged(key):
        d = draw(key)
        return jnp.where(slack(d) >= SAFETY, jnp.sum(jnp.abs(d - d0)), jnp.inf)

    keys = jax.random.split(draws, number)
    totals = jax.lax.map(judged, keys, batch_size=min(batch_size, number))
    reached = jnp.isfinite(jnp.min(totals))
    best = jnp.where(reached, draw(keys[jnp.argmin(totals)]), d0)

    def shrink(d, key):
        which, by = jax.random.split(key)
        factor = jnp.where(
            jax.random.bernoulli(which, 0.3, d.shape), jax.random.uniform(by, d.shape), 1.0
        )
        less = jnp.where(factor < 1.0, d0 + factor * (d - d0), d)
        return jnp.where(slack(less) >= SAFETY, less, d), None

    best, _ = jax.lax.scan(shrink, best, jax.random.split(shrinks, max(evaluations - number, 1)))
    return best
