"""Sampling from P(x)^(1 / temperature), normalized, of a model that can only be sampled.

n independent draws of a model with probabilities P all equal x with probability P(x)^n. That is the
distribution at temperature 1/n, up to normalization (Shao et al., arXiv:2510.27688).
`rejection_sample` draws until n draws are equal. `repetition_sample` counts repetitions among Z
draws; it takes one step and is biased for finite Z.

An item is a chunk of C tokens. Two items are equal when all their tokens are equal.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_count, check_numbers
from continuous_lm.errors import InputError

__all__ = [
    "RejectionSamples",
    "inverse_temperature",
    "rejection_sample",
    "repetition_sample",
    "repetition_weights",
]

# 1 / temperature that is so near to an integer, relative to it, is meant to be that integer.
_INTEGER_TOLERANCE = 1e-5


class RejectionSamples(NamedTuple):
    """Results of `rejection_sample` for B rows."""

    items: jax.Array  # int [B, C]; the last draw where none was accepted
    accepted: jax.Array  # bool [B]
    num_rounds: jax.Array  # int32 [B], draws that the row has used


class _RejectionState(NamedTuple):
    """The state of B rows. Each round makes one draw for every row, at whatever stage it is."""

    first_draw: jax.Array  # int [B, C], the attempt's first draw, which must come again
    last_draw: jax.Array  # int [B, C]
    num_matches: jax.Array  # float [B], how often it has come; 0 before an attempt
    num_misses: (
        jax.Array
    )  # float [B], of the last stage, for an exponent with a fraction
    is_done: jax.Array  # bool [B]
    num_rounds: jax.Array  # int32 [B]


class _Exponent(NamedTuple):
    """1 / temperature = n + a with 0 <= a < 1, a scalar or [B] each."""

    n: jax.Array
    a: jax.Array


def rejection_sample(
    key: jax.Array,
    draw: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike,
    max_rounds: int,
    is_done: jax.Array | None = None,
) -> RejectionSamples:
    """Draw from P(x)^(1 / temperature), normalized, by rejection.

    Let 1 / temperature = n + a with 0 <= a < 1. An attempt fails unless its first n draws are
    equal. For a > 0 it then draws until the item is drawn again, and fails at the i-th miss with
    probability a / i. With p = P(x) the second part succeeds with probability

        sum_k (1 - p)^k p prod_{i <= k} (1 - a / i) = p (1 - (1 - p))^(a - 1) = p^a,

    by the binomial series (a Bernoulli factory). A failed attempt is followed by another with fresh
    draws. Restarting with the failed draw would bias the samples.

    An attempt at temperature 1/n succeeds with probability sum_x P(x)^n, so flat distributions take
    many rounds. Rows are independent: a finished row keeps its item while others continue.

    Args:
      key: PRNG key.
      draw: function of a key that returns items int [B, C], one independent draw for each of B
        rows. Rows may have different distributions. It is traced once.
      temperature: above 0 and at most 1, a scalar or [B].
      max_rounds: largest number of calls of `draw`.
      is_done: bool [B], rows that need no item; none if omitted. Their items are zeros.

    Returns:
      the items, whether each was accepted, and its number of draws.

    Raises:
      InputError: for a temperature or max_rounds out of range, or draws of another shape or dtype.
    """
    check_count("max_rounds", max_rounds)
    item_struct = jax.eval_shape(draw, key)
    if not jnp.issubdtype(item_struct.dtype, jnp.integer) or item_struct.ndim != 2:
        raise InputError(
            f"draws are {item_struct.dtype} {list(item_struct.shape)}; they must be int [B, C]"
        )
    num_rows = item_struct.shape[0]
    _check_temperature(temperature, num_rows)
    exponent = _split_exponent(1 / as_float(temperature))

    def is_unfinished(loop_state: tuple[jax.Array, _RejectionState]) -> jax.Array:
        round_index, state = loop_state
        return (round_index < max_rounds) & ~jnp.all(state.is_done)

    def run_round(
        loop_state: tuple[jax.Array, _RejectionState],
    ) -> tuple[jax.Array, _RejectionState]:
        round_index, state = loop_state
        draw_key, chance_key = jax.random.split(jax.random.fold_in(key, round_index))
        chance = jax.random.uniform(chance_key, (num_rows,), exponent.n.dtype)
        next_state = _add_draw(state, draw(draw_key), chance, exponent)
        return round_index + 1, _keep_done_rows(state, next_state)

    initial_state = _empty_state(item_struct, exponent.n.dtype, is_done)
    _, state = lax.while_loop(is_unfinished, run_round, (jnp.int32(0), initial_state))
    # The accepted item is always the last draw.
    return RejectionSamples(state.last_draw, state.is_done, state.num_rounds)


def _check_temperature(temperature: ArrayLike, num_rows: int) -> None:
    """Raise InputError for invalid temperatures; traced values are not checked."""
    check_numbers("temperature", temperature)
    if not isinstance(temperature, jax.core.Tracer):
        temperatures = np.asarray(temperature)
        if ((temperatures <= 0) | (temperatures > 1)).any():
            raise InputError(
                f"temperature is {temperature}; it must be above 0 and at most 1, as a model that"
                " can only be sampled cannot be made flatter"
            )
    if jnp.shape(temperature) not in ((), (num_rows,)):
        raise InputError(
            f"temperature has shape {list(jnp.shape(temperature))}; it must be a scalar or"
            f" [{num_rows}], one for each row"
        )


def _split_exponent(exponent: jax.Array) -> _Exponent:
    """Return the integer part and the fraction; values near an integer count as that integer."""
    nearest_integer = jnp.round(exponent)
    tolerance = _INTEGER_TOLERANCE * nearest_integer
    is_integer = jnp.abs(exponent - nearest_integer) <= tolerance
    n = jnp.where(is_integer, nearest_integer, jnp.floor(exponent))
    return _Exponent(n, jnp.where(is_integer, 0.0, exponent - n))


def _empty_state(
    item_struct: jax.ShapeDtypeStruct,
    count_dtype: jnp.dtype,
    is_done: jax.Array | None,
) -> _RejectionState:
    """The state of B rows before any draw."""
    num_rows = item_struct.shape[0]
    no_items = jnp.zeros(item_struct.shape, item_struct.dtype)
    zero_counts = jnp.zeros(num_rows, count_dtype)
    return _RejectionState(
        first_draw=no_items,
        last_draw=no_items,
        num_matches=zero_counts,
        num_misses=zero_counts,
        is_done=jnp.zeros(num_rows, bool) if is_done is None else jnp.asarray(is_done),
        num_rounds=jnp.zeros(num_rows, jnp.int32),
    )


def _add_draw(
    state: _RejectionState,
    new_items: jax.Array,
    chance: jax.Array,
    exponent: _Exponent,
) -> _RejectionState:
    """The state after one more draw of each row.

    Args:
      state: before.
      new_items: the draw, int [B, C].
      chance: uniform in [0, 1), [B], by which a miss of the last stage ends the attempt.
      exponent: how often the item must come.
    """
    n, a = exponent
    is_first = (state.num_matches == 0)[:, None]
    first_items = jnp.where(is_first, new_items, state.first_draw)
    is_match = jnp.all(new_items == first_items, axis=-1)
    num_matches = state.num_matches + is_match
    is_last_stage = state.num_matches >= n
    num_misses = state.num_misses + (is_last_stage & ~is_match)
    # A miss within the first n draws ends the attempt for certain.
    has_failed = ~is_match & (~is_last_stage | (chance * num_misses < a))
    return _RejectionState(
        first_draw=first_items,
        last_draw=new_items,
        num_matches=jnp.where(has_failed, 0.0, num_matches),
        num_misses=jnp.where(has_failed, 0.0, num_misses),
        is_done=num_matches >= n + (a > 0),
        num_rounds=state.num_rounds + 1,
    )


def _keep_done_rows(
    state: _RejectionState, next_state: _RejectionState
) -> _RejectionState:
    """The next state, but of rows that were done the state as it was."""

    def keep(previous: jax.Array, updated: jax.Array) -> jax.Array:
        is_done = jnp.expand_dims(state.is_done, range(1, updated.ndim))
        return jnp.where(is_done, previous, updated)

    return jax.tree.map(keep, state, next_state)


def repetition_sample(key: jax.Array, candidates: ArrayLike, *, n: int) -> jax.Array:
    """Draw from P(x)^n, normalized, approximately: by repetitions among Z candidates.

    An item with c copies is drawn in proportion to binomial(c, n), the number of ways to choose n
    copies; see `repetition_weights`. The expectation of binomial(c, n) is binomial(Z, n) P(x)^n.
    The expectation of the normalized weight is not the normalized P(x)^n: draws are too uniform,
    by an amount that falls as Z grows.

    Args:
      key: PRNG key.
      candidates: independent draws of the model, int [Z, ..., C].
      n: 1 / temperature; see `inverse_temperature`.

    Returns:
      items int [..., C].

    Raises:
      InputError: if candidates are not integers [Z, ..., C], or n is not a positive integer.
    """
    items, log_weights = repetition_weights(candidates, n=n)
    item_index = jax.random.categorical(key, log_weights, axis=0)
    return jnp.take_along_axis(items, item_index[None, ..., None], axis=0)[0]


def repetition_weights(candidates: ArrayLike, *, n: int) -> tuple[jax.Array, jax.Array]:
    """Return the sorted candidates and the log-weights that `repetition_sample` uses.

    An item with c copies has log-weight log binomial(c, m) at one copy and -inf at the others. Here
    m is n, or the row's largest count if no item has n copies. It is computed as the sum of
    log(c - j) over j < m, up to a constant of the row; log-gamma functions would lose digits.

    Candidates are sorted by their tokens, and copies are counted as lengths of runs. A row takes
    O(Z C) memory and O(Z C log Z) time. Comparing pairs would take O(Z^2 C) time, and hashes could
    collide.

    Args:
      candidates: int [Z, ..., C].
      n: the order, >= 1.

    Returns:
      items int [Z, ..., C], sorted along Z, and log-weights float32 [Z, ...].

    Raises:
      InputError: as in `repetition_sample`.
    """
    check_count("n", n)
    candidates = jnp.asarray(candidates)
    if not jnp.issubdtype(candidates.dtype, jnp.integer):
        raise InputError(
            f"candidates have dtype {candidates.dtype}; they must hold integers"
        )
    if candidates.ndim < 2 or 0 in (candidates.shape[0], candidates.shape[-1]):
        raise InputError(
            f"candidates have shape {list(candidates.shape)}; they must be [Z, ..., C], with Z and"
            " C at least 1"
        )
    return _repetition_weights(candidates, n)


@functools.partial(jax.jit, static_argnames="n")
def _repetition_weights(candidates: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    num_candidates, *_, chunk_size = candidates.shape
    columns = [candidates[..., i] for i in range(chunk_size)]
    sorted_columns = lax.sort(
        columns, dimension=0, num_keys=chunk_size, is_stable=False
    )
    items = jnp.stack(sorted_columns, axis=-1)
    differs_from_previous = jnp.any(items[1:] != items[:-1], axis=-1)
    true_row = jnp.ones((1, *differs_from_previous.shape[1:]), bool)
    is_run_start = jnp.concatenate([true_row, differs_from_previous])  # [Z, ...]
    is_run_end = jnp.concatenate([differs_from_previous, true_row])  # [Z, ...]
    indices = jnp.arange(num_candidates)
    indices = jnp.expand_dims(indices, range(1, is_run_start.ndim))
    run_ends = jnp.where(is_run_end, indices + 1, num_candidates)
    # Right where a run begins.
    run_lengths = lax.cummin(run_ends, axis=0, reverse=True) - indices
    largest_count = jnp.max(jnp.where(is_run_start, run_lengths, 0), axis=0)
    repeat_order = jnp.minimum(n, largest_count)
    j = jnp.expand_dims(jnp.arange(n), range(1, run_lengths.ndim + 1))
    # Where repeat_order < n, all that are kept have the same count, and so the same weight.
    log_weights = jnp.sum(
        jnp.log(jnp.maximum(run_lengths - j, 1).astype(jnp.float32)), axis=0
    )
    is_kept = is_run_start & (run_lengths >= repeat_order)
    return items, jnp.where(is_kept, log_weights, -jnp.inf)


def inverse_temperature(temperature: float) -> int:
    """The n of a temperature of 1/n.

    >>> inverse_temperature(0.5), inverse_temperature(1 / 3)
    (2, 3)

    Raises:
      InputError: if there is none.
    """
    check_numbers("temperature", temperature)
    if np.ndim(temperature) == 0 and 0 < temperature <= 1:
        n = round(1 / float(temperature))
        if abs(n * float(temperature) - 1) <= _INTEGER_TOLERANCE:
            return n
    raise InputError(
        f"temperature is {temperature}; the batch form counts repetitions, and needs"
        " 1, 1/2, 1/3 or another 1/n"
    )
