"""The inverse problem: find durations for which a model gives a chosen answer.

`find_durations` searches for the smallest change of durations, sum |d - d0|, for which an answer
leads by a margin. `pruning.prune` searches for the smallest total duration that keeps a value, such
as the answer's log probability, within a tolerance. Both follow gradients in log durations, which
keeps durations positive. Then `shrinking.shrink_towards` moves every duration back (to d0, or to 0)
as far as the constraint holds. The constraint is slack >= 0, with the slack a function from
durations [T] to a scalar; see `Margin` and `pruning.Floor`.

`random_search` is a baseline without gradients, with the same number of model evaluations. A
forward pass is one evaluation; a gradient counts as three (one pass forward, two backward).
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
from continuous_lm.arguments import as_float
from continuous_lm.durations import Span
from continuous_lm.errors import InputError

__all__ = [
    "NUM_PROBE_STARTS",
    "PENALTY_WEIGHTS",
    "PROBE_FACTORS",
    "Margin",
    "answer_lead",
    "find_durations",
    "probe_durations",
    "random_search",
]

PENALTY_WEIGHTS = (0.8, 0.3)
NUM_PROBE_STARTS = 2  # probes that an ascent begins at
PROBE_FACTORS = (0.25, 0.5, 0.75, 1.5, 2.0)  # of stretches that are probed


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
    """Find durations with slack >= 0 near the given ones, with few changed tokens.

    Gradients are local, and between d0 and the target they may point away from the target. So
    `probe_durations`, in which spans of tokens last longer or shorter, are evaluated first.
    Proximal gradient ascent then starts from d0 and from the best `NUM_PROBE_STARTS` probes. Its
    penalty is weight * |z|, with z the changes of log durations. While the slack is below 0,
    `optax.sgd` takes a step along the gradient, scaled to a largest entry of 1. After every step,
    every z moves towards 0 by learning_rate * weight. So a token moves away from d0 only if its
    gradient exceeds `weight` times the largest. With a weight near 1 this is steepest descent in
    the L1 norm, one token at a time; with 0 all tokens move. Where the slack is >= 0, only the
    penalty acts, so the ascent follows the edge of the feasible set. Step sizes fall to 0 (a
    cosine). Each start keeps its smallest feasible change, which `shrink_towards` shrinks. The
    smallest of all is returned.

    Args:
      constraint: slack, durations [T] -> a scalar, to become >= 0; `Margin` for an answer.
      durations: d0, [T].
      span: (first, end) of the tokens that may change; all but the first if omitted. Durations of
        0 do not change.
      penalty_weights: weights of the penalty, in (0, 1); each is tried.
      learning_rate: first step of the fastest log duration.
      steps: steps of each ascent.
      rounds: rounds of `shrink_towards`.
      batch_size: durations in one batch.

    Returns:
      the search result; if no durations are feasible, those with the largest slack.

    Raises:
      InputError: if arguments do not fit.
    """
    initial_durations, is_free = validate_durations(durations, span)
    check_positive_numbers({"learning_rate": learning_rate})
    check_counts({"steps": steps, "rounds": rounds, "batch_size": batch_size})
    if not penalty_weights or not all(0 < weight < 1 for weight in penalty_weights):
        raise InputError(
            f"penalty_weights are {list(penalty_weights)}; they must be numbers between 0 and 1"
        )
    constraint = attribution.as_jit_argument(constraint)
    starts, num_probes = _choose_starts(
        constraint, initial_durations, is_free, batch_size
    )
    num_weights = len(penalty_weights)
    ascents = _ascend(
        constraint,
        initial_durations,
        is_free,
        jnp.repeat(starts, num_weights, axis=0),
        jnp.tile(jnp.asarray(penalty_weights), len(starts)),
        learning_rate,
        steps,
    )
    num_ascents = len(starts) * num_weights
    num_evaluations = num_probes + EVALUATIONS_PER_GRADIENT * steps * num_ascents
    candidates = []
    for ascent_index in _best_of_each_start(ascents, len(starts)):
        shrunk, cost = shrink_where_satisfied(
            constraint, ascents.durations[ascent_index], initial_durations, rounds
        )
        candidates.append(shrunk)
        num_evaluations += int(cost)
    results = [
        make_result(constraint, shrunk, initial_durations, num_evaluations)
        for shrunk in candidates
    ]
    return min(results, key=_rank)


def _rank(result: SearchResult) -> tuple[bool, float]:
    """Results that hold come first, the smallest change before; then those that lack least."""
    is_failure = result.slack < 0
    return is_failure, -result.slack if is_failure else result.total


def _choose_starts(
    constraint: Objective,
    initial_durations: jax.Array,
    is_free: jax.Array,
    batch_size: int,
) -> tuple[jax.Array, int]:
    """Durations [P, T] where ascents begin, d0 and the best probes, and how many were probed."""
    probe_rows = probe_durations(initial_durations, is_free)
    slacks = np.asarray(attribution.evaluate(constraint, probe_rows, batch_size))
    changes = np.asarray(probe_rows) - np.asarray(initial_durations)
    total_changes = np.abs(changes).sum(axis=1)
    is_failure = slacks < MIN_SLACK
    scores = np.where(is_failure, -slacks, total_changes)
    best_probes = np.lexsort((scores, is_failure))[:NUM_PROBE_STARTS]
    starts = jnp.concatenate([initial_durations[None], probe_rows[best_probes]])
    return starts, len(probe_rows)


def probe_durations(durations: jax.Array, is_free: jax.Array) -> jax.Array:
    """Durations [P, T]: each of many stretches of tokens, shorter or longer by `PROBE_FACTORS`.

    Stretches have 1, 2, 4, ... tokens and begin at every half of their length; only those of their
    tokens that are `is_free` (bool [T]) change.
    """
    num_tokens = len(durations)
    indices = np.arange(num_tokens)
    masks = []
    length = 1
    while length < 2 * num_tokens:
        stride = max(length // 2, 1)
        for begin in range(0, max(num_tokens - length, 0) + stride, stride):
            masks.append((indices >= begin) & (indices < begin + length))
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
    """Search the same durations without gradients: random changes, then random shrinking.

    Half of the evaluations are independent draws. A draw changes a random number of tokens by
    normal changes of log duration, with a random scale from 0.05 to 2. The other half shrinks the
    smallest feasible change so far: each entry, with probability 0.3, is multiplied by a uniform
    factor from [0, 1]. Feasible results replace it.

    Args and errors as in `find_durations`.
    """
    initial_durations, is_free = validate_durations(durations, span)
    check_counts({"evaluations": evaluations, "batch_size": batch_size})
    constraint = attribution.as_jit_argument(constraint)
    key = jax.random.key(seed)
    smallest_change = _random_search(
        constraint, initial_durations, is_free, key, evaluations, batch_size
    )
    return make_result(constraint, smallest_change, initial_durations, evaluations)


class _Ascents(NamedTuple):
    """Best durations of each ascent.

    Attributes:
      durations: [P, T], with the smallest feasible change; if none is feasible, with the smallest
        shortfall.
      shortfalls: [P], minus the slack; at most 0 if feasible.
      changes: [P], total changes; infinite if infeasible.
    """

    durations: jax.Array
    shortfalls: jax.Array
    changes: jax.Array


class _Ascent(NamedTuple):
    """The carry of one ascent, in changes z [T] of log durations."""

    z: jax.Array
    optimizer_state: optax.OptState
    best_z: jax.Array
    shortfall: jax.Array
    change: jax.Array


def _best_of_each_start(ascents: _Ascents, num_starts: int) -> list[int]:
    """Indices of ascents, whose starts are equal in blocks."""
    changes = np.asarray(ascents.changes)
    is_success = np.isfinite(changes)
    scores = np.where(is_success, changes, 1e9 + np.asarray(ascents.shortfalls))
    blocks = np.arange(len(scores)).reshape(num_starts, -1)
    return [int(block[np.argmin(scores[block])]) for block in blocks]


@functools.partial(jax.jit, static_argnames="steps")
def _ascend(
    constraint: Objective,
    initial_durations: jax.Array,
    is_free: jax.Array,
    starts: jax.Array,
    penalty_weights: jax.Array,
    learning_rate: float,
    steps: int,
) -> _Ascents:
    """An ascent from each start [P, T], with each weight [P]."""
    dtype = initial_durations.dtype
    optimizer = optax.sgd(1.0)

    def loss(z):
        return -constraint(initial_durations * jnp.exp(z))

    def step(ascent, rate, weight):
        loss_value, gradient = jax.value_and_grad(loss)(ascent.z)
        is_satisfied = loss_value <= -MIN_SLACK
        ascent = _keep_best(ascent, loss_value, is_satisfied, initial_durations)
        gradient = jnp.where(is_free & ~is_satisfied, gradient, 0.0)
        max_gradient = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.finfo(dtype).tiny)
        scaled_gradient = rate * gradient / max_gradient
        update, optimizer_state = optimizer.update(
            scaled_gradient, ascent.optimizer_state, ascent.z
        )
        z = optax.apply_updates(ascent.z, update)
        z = jnp.sign(z) * jnp.maximum(jnp.abs(z) - rate * weight, 0.0)
        return ascent._replace(z=z, optimizer_state=optimizer_state)

    def ascend(start, weight):
        is_present = initial_durations > 0
        ratio = jnp.where(is_present, start / initial_durations, 1.0)
        z = jnp.where(is_present, jnp.log(ratio), 0.0)
        infinite = jnp.asarray(jnp.inf, dtype)
        initial_ascent = _Ascent(z, optimizer.init(z), z, infinite, infinite)
        rates = optax.cosine_decay_schedule(learning_rate, steps)(jnp.arange(steps))
        last_ascent, _ = jax.lax.scan(
            lambda ascent, rate: (step(ascent, rate, weight), None),
            initial_ascent,
            rates.astype(dtype),
        )
        durations = initial_durations * jnp.exp(last_ascent.best_z)
        return _Ascents(durations, last_ascent.shortfall, last_ascent.change)

    return jax.vmap(ascend)(starts, penalty_weights.astype(dtype))


def _keep_best(
    ascent: _Ascent,
    loss_value: jax.Array,
    is_satisfied: jax.Array,
    initial_durations: jax.Array,
) -> _Ascent:
    """Return the ascent with its current durations as the best, if they are better."""
    total_change = jnp.sum(jnp.abs(initial_durations * jnp.expm1(ascent.z)))
    change = jnp.where(is_satisfied, total_change, jnp.inf)
    is_smaller = change < ascent.change
    lacks_less = jnp.isinf(ascent.change) & (loss_value < ascent.shortfall)
    is_better = jnp.where(is_satisfied, is_smaller, lacks_less)
    return ascent._replace(
        best_z=jnp.where(is_better, ascent.z, ascent.best_z),
        shortfall=jnp.where(is_better, loss_value, ascent.shortfall),
        change=jnp.where(is_better, change, ascent.change),
    )


@functools.partial(jax.jit, static_argnums=(4, 5))
def _random_search(
    constraint: Objective,
    initial_durations: jax.Array,
    is_free: jax.Array,
    key: jax.Array,
    evaluations: int,
    batch_size: int,
) -> jax.Array:
    """The smallest change that held, as durations [T]; d0 if none did."""
    num_draws = max(evaluations // 2, 1)
    draw_key, shrink_key = jax.random.split(key)

    def measure_draw(key):
        d = _draw_durations(initial_durations, is_free, key)
        change = jnp.sum(jnp.abs(d - initial_durations))
        return jnp.where(constraint(d) >= MIN_SLACK, change, jnp.inf)

    draw_keys = jax.random.split(draw_key, num_draws)
    total_changes = jax.lax.map(
        measure_draw, draw_keys, batch_size=min(batch_size, num_draws)
    )
    best_key = draw_keys[jnp.argmin(total_changes)]
    best_draw = _draw_durations(initial_durations, is_free, best_key)
    is_any_satisfied = jnp.isfinite(jnp.min(total_changes))
    best = jnp.where(is_any_satisfied, best_draw, initial_durations)

    def shrink_step(d, key):
        factors = _draw_shrink_factors(key, d.shape)
        scaled = initial_durations + factors * (d - initial_durations)
        shrunk = jnp.where(factors < 1.0, scaled, d)
        return jnp.where(constraint(shrunk) >= MIN_SLACK, shrunk, d), None

    num_shrink_steps = max(evaluations - num_draws, 1)
    shrink_keys = jax.random.split(shrink_key, num_shrink_steps)
    best, _ = jax.lax.scan(shrink_step, best, shrink_keys)
    return best


def _draw_durations(
    initial_durations: jax.Array, is_free: jax.Array, key: jax.Array
) -> jax.Array:
    """Durations [T]: few or many of the free ones times exp of normal numbers."""
    shape = initial_durations.shape
    dtype = initial_durations.dtype
    share_key, choice_key, scale_key, noise_key = jax.random.split(key, 4)
    exponent = jax.random.uniform(share_key, dtype=dtype)
    probability = jnp.sum(is_free) ** -exponent
    is_changed = is_free & jax.random.bernoulli(choice_key, probability, shape)
    log_scale = jax.random.uniform(
        scale_key, dtype=dtype, minval=np.log(0.05), maxval=np.log(2.0)
    )
    noise = jnp.exp(log_scale) * jax.random.normal(noise_key, shape)
    return initial_durations * jnp.exp(jnp.where(is_changed, noise, 0.0))


def _draw_shrink_factors(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Factors [T]: uniform in [0, 1] with probability 0.3, and else 1."""
    choice_key, factor_key = jax.random.split(key)
    is_chosen = jax.random.bernoulli(choice_key, 0.3, shape)
    return jnp.where(is_chosen, jax.random.uniform(factor_key, shape), 1.0)
