"""The inverse problem: durations that make a model say a chosen answer, or still say its own.

`find_durations` looks for the smallest change of durations, total sum |d - d0|, after which an
answer leads by a margin; `pruning.prune` for the smallest total duration that keeps a value, the
log probability of the answer above all, within a tolerance. Both follow gradients through log
durations, which keeps them positive, and then `shrink_towards` every duration back (to d0, or to 0)
as far as the answer still holds. What must hold is a slack >= 0, a function of durations [T] to a
scalar; see `Margin` and `pruning.Floor`.

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
from continuous_lm.analysis.attribution import Objective, PromptLogits
from continuous_lm.arguments import as_float
from continuous_lm.durations import Span
from continuous_lm.durations import check_durations as check_durations
from continuous_lm.errors import InputError

EVALUATIONS_PER_GRADIENT = 3  # evaluations
PENALTY_WEIGHTS = (0.8, 0.3)
NUM_PROBE_STARTS = 2  # probes that an ascent begins at
PROBE_FACTORS = (0.25, 0.5, 0.75, 1.5, 2.0)  # of stretches that are probed
SHRINK_FACTORS = (
    0.0,
    0.25,
    0.5,
    0.75,
    0.9,
)  # of a change, that `shrink_towards` tries to keep
NUM_BISECTIONS = 8
MIN_SLACK = 1e-4  # slack that is kept, so that rounding elsewhere does not cross 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits", "answer", "min_lead"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class Margin:
    """Durations [T] -> by how much an answer leads, less the lead that it must have.

    The lead is the log-odds, in nats, of the answer (its tokens' probabilities summed) against the
    most probable other token.
    """

    logits: PromptLogits
    answer: jax.Array  # token ids, int [num_answer_tokens]
    min_lead: float

    def __call__(self, durations: jax.Array) -> jax.Array:
        return answer_lead(self.logits(durations), self.answer) - self.min_lead


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


def answer_lead(logits: jax.Array, answer: jax.Array) -> jax.Array:
    """Log-odds [...] of tokens `answer` (int [num_answer_tokens]) against the best other token.

    The logits are [..., V].
    """
    logits = as_float(logits)
    best_other = jnp.max(logits.at[..., answer].set(-jnp.inf), axis=-1)
    return jax.nn.logsumexp(logits[..., answer], axis=-1) - best_other


def find_durations(
    constraint: Objective,
    durations: ArrayLike,
    *,
    span: Span | None = None,
    penalty_weights: Sequence[float] = PENALTY_WEIGHTS,
    learning_rate: float = 0.1,
    steps: int = 60,
    rounds: int = 4,
    batch_size: int = 16,
) -> SearchResult:
    """Durations near the given ones, and equal to most of them, at which the slack is >= 0.

    Gradients are local, and an answer two answers away may lie beyond a stretch where they point
    elsewhere. So `probe_durations`, stretches of tokens that last longer or shorter, are looked at
    first. Proximal gradient ascent then starts from d0 and from the best `NUM_PROBE_STARTS` of
    them, under a penalty weight * |z| on the changes z of log durations: while the slack is below
    0, `optax.sgd` takes a step along the gradient, scaled so that its largest entry is 1; and after
    every step, every z moves towards 0 by learning_rate * weight. So a token moves away from d0
    only if its gradient is more than `weight` times the largest: near 1 this is steepest descent in
    the L1 norm, a token at a time, and at 0 all tokens move. Where the slack is reached, only the
    penalty is left, so that the ascent slides along the edge of what holds, with steps that fall to
    0 (a cosine). The least change that held is kept, `shrink_towards` shrinks the best of each
    start, and the smallest wins.

    Args:
      constraint: durations [T] -> a scalar, which must become >= 0; `Margin` for an answer.
      durations: d0, [T].
      span: (first, end) of the tokens that may change; all but the first if left out. What lasts 0
        keeps doing so.
      penalty_weights: of the penalty, in (0, 1); each is tried.
      learning_rate: first step of the fastest log duration.
      steps: of each ascent.
      rounds: of `shrink_towards`.
      batch_size: durations computed at once.

    Returns:
      what was found; if nothing held, the durations whose slack came closest.

    Raises:
      InputError: if arguments do not fit.
    """
    d0, is_free = _validate_durations(durations, span)
    _check_positive(
        learning_rate=learning_rate, steps=steps, rounds=rounds, batch_size=batch_size
    )
    if not penalty_weights or not all(0 < w < 1 for w in penalty_weights):
        raise InputError(
            f"penalty_weights are {list(penalty_weights)}; they must be numbers between 0 and 1"
        )
    constraint = attribution.as_jit_argument(constraint)
    probe_rows = probe_durations(d0, is_free)
    slacks = np.asarray(attribution.evaluate(constraint, probe_rows, batch_size))
    total_changes = np.abs(np.asarray(probe_rows) - np.asarray(d0)).sum(axis=1)
    best_probes = np.lexsort(
        (np.where(slacks >= MIN_SLACK, total_changes, -slacks), slacks < MIN_SLACK)
    )[:NUM_PROBE_STARTS]
    starts = jnp.concatenate([d0[None], probe_rows[best_probes]])
    starts_and_weights = (
        jnp.repeat(starts, len(penalty_weights), axis=0),
        jnp.tile(jnp.asarray(penalty_weights), len(starts)),
    )
    ascent_durations, shortfalls, changes = _ascend(
        constraint, d0, is_free, *starts_and_weights, learning_rate, steps
    )
    num_evaluations = len(probe_rows) + EVALUATIONS_PER_GRADIENT * steps * len(
        shortfalls
    )
    scores = np.where(np.isfinite(changes), changes, 1e9 + np.asarray(shortfalls))
    candidates = []
    for start_indices in np.arange(len(shortfalls)).reshape(len(starts), -1):
        d, cost = _shrink_towards(
            constraint,
            ascent_durations[start_indices[np.argmin(scores[start_indices])]],
            d0,
            rounds,
        )
        candidates.append(d)
        num_evaluations += int(cost)
    results = [_make_result(constraint, d, d0, num_evaluations) for d in candidates]
    return min(
        results, key=lambda r: (r.slack < 0, r.total if r.slack >= 0 else -r.slack)
    )


def probe_durations(durations: jax.Array, is_free: jax.Array) -> jax.Array:
    """Durations [P, T]: each of many stretches of tokens, shorter or longer by `PROBE_FACTORS`.

    Stretches have 1, 2, 4, ... tokens and begin at every half of their length; only those of their
    tokens that are `is_free` (bool [T]) change.
    """
    num_tokens, masks = len(durations), []
    length = 1
    while length < 2 * num_tokens:
        stride = max(length // 2, 1)
        for begin in range(0, max(num_tokens - length, 0) + stride, stride):
            masks.append(
                (np.arange(num_tokens) >= begin)
                & (np.arange(num_tokens) < begin + length)
            )
        length *= 2
    is_inside = np.stack(masks) & np.asarray(is_free)
    is_inside = np.unique(is_inside[is_inside.any(axis=1)], axis=0)
    factors = jnp.asarray(PROBE_FACTORS, durations.dtype)[:, None, None]
    return jnp.where(is_inside, factors * durations, durations).reshape(-1, num_tokens)


def random_search(
    constraint: Objective,
    durations: ArrayLike,
    *,
    evaluations: int,
    span: Span | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> SearchResult:
    """The same by chance: draws, and then random shrinking of the best.

    Half of the evaluations are independent draws: a random number of tokens, few or many, whose log
    durations change by a normal number of random scale, 0.05 to 2. In the other half, the smallest
    change that held so far is shrunk: each of its entries, with probability 0.3, by a factor drawn
    from [0, 1]. What still holds is kept.

    Args and errors as of `find_durations`.
    """
    d0, is_free = _validate_durations(durations, span)
    _check_positive(evaluations=evaluations, batch_size=batch_size)
    constraint = attribution.as_jit_argument(constraint)
    d = _random_search(
        constraint, d0, is_free, jax.random.key(seed), evaluations, batch_size
    )
    return _make_result(constraint, d, d0, evaluations)


def shrink_towards(
    constraint: Objective, durations: ArrayLike, target: ArrayLike, *, rounds: int = 4
) -> SearchResult:
    """Moves durations towards a target as far as the slack stays >= 0.

    Token by token, those nearest to their target first: the least of `SHRINK_FACTORS` of a token's
    distance is kept at which the slack holds; `rounds` times over. At last all distances are scaled
    together, by bisection.

    Args:
      constraint: durations [T] -> a scalar, >= 0 at `durations`.
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
    constraint = attribution.as_jit_argument(constraint)
    d, cost = _shrink_towards(constraint, d, goal, rounds)
    return _make_result(constraint, d, goal, int(cost))


def _validate_durations(
    durations: ArrayLike, span: Span | None
) -> tuple[jax.Array, jax.Array]:
    """Durations, and which may change: [T] each."""
    d = as_float(durations)
    if d.ndim != 1 or not d.size:
        raise InputError(
            f"durations have shape {list(d.shape)}; a search needs [T], T >= 1"
        )
    check_durations(d, len(d))
    first, end = (1, len(d)) if span is None else span
    if not 0 <= first < end <= len(d):
        raise InputError(
            f"span ({first}, {end}) is not inside the {len(d)} tokens;"
            f" it needs 0 <= first < end <= {len(d)}"
        )
    indices = jnp.arange(len(d))
    return d, (indices >= first) & (indices < end)


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise InputError(f"{name} is {number}; it must be positive")


def _make_result(
    constraint: Objective, durations: jax.Array, target: jax.Array, evaluations: int
) -> SearchResult:
    d, goal = np.asarray(durations), np.asarray(target, np.float64)
    total = float(np.abs(d - goal).sum())
    return SearchResult(
        d, float(jax.jit(lambda s, d: s(d))(constraint, durations)), total, evaluations
    )


@functools.partial(jax.jit, static_argnames="steps")
def _ascend(
    constraint: Objective,
    d0: jax.Array,
    is_free: jax.Array,
    starts: jax.Array,
    penalty_weights: jax.Array,
    learning_rate: float,
    steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From each start [P, T], with each weight [P]: durations [P, T], lack and change of each.

    The durations are those of the least total change that held; the lack is then below 0. If none
    did, they are those that lacked least, and the change is infinite.
    """
    optimizer = optax.sgd(1.0)

    def loss(z):
        return -constraint(d0 * jnp.exp(z))

    def ascend(start, weight):
        def step(carry, rate):
            z, optimizer_state, best_z, shortfall, best_change = carry
            loss_value, gradient = jax.value_and_grad(loss)(z)
            is_satisfied = loss_value <= -MIN_SLACK
            new_change = jnp.where(
                is_satisfied, jnp.sum(jnp.abs(d0 * jnp.expm1(z))), jnp.inf
            )
            is_better = jnp.where(
                is_satisfied,
                new_change < best_change,
                jnp.isinf(best_change) & (loss_value < shortfall),
            )
            best_z, shortfall, best_change = (
                jnp.where(is_better, new_value, old_value)
                for new_value, old_value in (
                    (z, best_z),
                    (loss_value, shortfall),
                    (new_change, best_change),
                )
            )
            gradient = jnp.where(is_free & ~is_satisfied, gradient, 0.0)
            max_gradient = jnp.maximum(
                jnp.max(jnp.abs(gradient)), jnp.finfo(z.dtype).tiny
            )
            update, optimizer_state = optimizer.update(
                rate * gradient / max_gradient, optimizer_state, z
            )
            z = optax.apply_updates(z, update)
            z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - rate * weight, 0.0)
            return (z, optimizer_state, best_z, shortfall, best_change), None

        z = jnp.where(d0 > 0, jnp.log(jnp.where(d0 > 0, start / d0, 1.0)), 0.0)
        infinite = jnp.asarray(jnp.inf, d0.dtype)
        carry = (z, optimizer.init(z), z, infinite, infinite)
        rates = optax.cosine_decay_schedule(learning_rate, steps)(jnp.arange(steps))
        (_, _, best_z, shortfall, best_change), _ = jax.lax.scan(
            step, carry, rates.astype(d0.dtype)
        )
        return d0 * jnp.exp(best_z), shortfall, best_change

    return jax.vmap(ascend)(starts, penalty_weights.astype(d0.dtype))


@functools.partial(jax.jit, static_argnums=3)
def _shrink_towards(
    constraint: Objective,
    d: jax.Array,
    target: jax.Array,
    rounds: int,
    order: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Durations [T], and the evaluations that they cost; in the `order` of tokens if given."""
    factors = jnp.asarray(SHRINK_FACTORS, d.dtype)
    indices = jnp.arange(len(d))

    def is_satisfied(d):
        return constraint(d) >= MIN_SLACK

    def try_factors(d, j):
        rows = jnp.where(indices == j, target + factors[:, None] * (d - target), d)
        satisfied = jax.vmap(is_satisfied)(rows)
        return jnp.where(satisfied.any(), rows[jnp.argmax(satisfied)], d), len(
            SHRINK_FACTORS
        )

    def shrink_token(carry, j):
        d, cost = carry
        d, extra_cost = jax.lax.cond(
            d[j] == target[j], lambda d, j: (d, 0), try_factors, d, j
        )
        return (d, cost + extra_cost), None

    def bisect(carry, _):
        low, high = carry
        midpoint = (low + high) / 2.0
        satisfied = is_satisfied(target + midpoint * (d - target))
        return (
            jnp.where(satisfied, low, midpoint),
            jnp.where(satisfied, midpoint, high),
        ), None

    is_feasible = is_satisfied(d)
    if order is None:
        order = jnp.tile(jnp.argsort(jnp.abs(d - target)), rounds)
    (shrunk, cost), _ = jax.lax.scan(shrink_token, (d, jnp.asarray(0)), order)
    d = jnp.where(is_feasible, shrunk, d)
    interval = (jnp.zeros((), d.dtype), jnp.ones((), d.dtype))
    (_, share), _ = jax.lax.scan(bisect, interval, length=NUM_BISECTIONS)
    d = jnp.where(is_feasible & (share < 1.0), target + share * (d - target), d)
    return d, cost + NUM_BISECTIONS + 1


@functools.partial(jax.jit, static_argnums=(4, 5))
def _random_search(
    constraint: Objective,
    d0: jax.Array,
    is_free: jax.Array,
    key: jax.Array,
    evaluations: int,
    batch_size: int,
) -> jax.Array:
    """The smallest change that held, as durations [T]; d0 if none did."""
    num_draws = max(evaluations // 2, 1)
    draw_key, shrink_key = jax.random.split(key)

    def draw_durations(key):
        share_key, choice_key, scale_key, noise_key = jax.random.split(key, 4)
        probability = jnp.sum(is_free) ** -jax.random.uniform(share_key, dtype=d0.dtype)
        is_changed = is_free & jax.random.bernoulli(choice_key, probability, d0.shape)
        noise_scale = jnp.exp(
            jax.random.uniform(
                scale_key, dtype=d0.dtype, minval=np.log(0.05), maxval=np.log(2.0)
            )
        )
        return d0 * jnp.exp(
            jnp.where(
                is_changed, noise_scale * jax.random.normal(noise_key, d0.shape), 0.0
            )
        )

    def draw_change(key):
        d = draw_durations(key)
        return jnp.where(constraint(d) >= MIN_SLACK, jnp.sum(jnp.abs(d - d0)), jnp.inf)

    draw_keys = jax.random.split(draw_key, num_draws)
    total_changes = jax.lax.map(
        draw_change, draw_keys, batch_size=min(batch_size, num_draws)
    )
    is_any_satisfied = jnp.isfinite(jnp.min(total_changes))
    best = jnp.where(
        is_any_satisfied, draw_durations(draw_keys[jnp.argmin(total_changes)]), d0
    )

    def shrink_step(d, key):
        choice_key, factor_key = jax.random.split(key)
        factor = jnp.where(
            jax.random.bernoulli(choice_key, 0.3, d.shape),
            jax.random.uniform(factor_key, d.shape),
            1.0,
        )
        shrunk = jnp.where(factor < 1.0, d0 + factor * (d - d0), d)
        return jnp.where(constraint(shrunk) >= MIN_SLACK, shrunk, d), None

    best, _ = jax.lax.scan(
        shrink_step, best, jax.random.split(shrink_key, max(evaluations - num_draws, 1))
    )
    return best
