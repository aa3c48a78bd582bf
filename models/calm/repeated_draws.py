"""Draws from P(x)^(1 / temperature), normalized, of a model that can only be sampled.

A draw x of a model with probabilities P, and n - 1 more that all equal it, come with probability
P(x)^n, which is what a temperature of 1/n wants (Shao et al., arXiv:2510.27688).
`rejection_sample` draws until that happens; `repetition_sample` counts repetitions among Z draws,
which takes one step and is biased for finite Z.

An item is a chunk of C tokens, and two are equal when all of these are.
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

# 1 / temperature that is so near to an integer, relative to it, is meant to be that integer.
_INTEGER_TOLERANCE = 1e-5


class RejectionSamples(NamedTuple):
    """What `rejection_sample` found for B rows."""

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
    )  # float [B], of the last stage, where 1 / temperature is no integer
    is_done: jax.Array  # bool [B]
    num_rounds: jax.Array  # int32 [B]


def rejection_sample(
    key: jax.Array,
    draw: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike,
    max_rounds: int,
    is_done: jax.Array | None = None,
) -> RejectionSamples:
    """Draws from P(x)^(1 / temperature), normalized, by rejection.

    Let 1 / temperature = n + a with 0 <= a < 1. An attempt fails unless its first n draws are
    equal. For a > 0 it then goes on until the item comes again, and fails at the i-th miss with
    probability a / i. With p = P(x) it ends well with probability

        sum_k (1 - p)^k p prod_{i <= k} (1 - a / i) = p (1 - (1 - p))^(a - 1) = p^a,

    by the binomial series: a Bernoulli factory. An attempt that fails is followed by another with
    fresh draws; to begin it with the draw that failed would favour items that follow others.

    An attempt at temperature 1/n succeeds with probability sum_x P(x)^n, so that flat distributions
    take long. Rows are independent, and one that is done keeps its item while others go on.

    Args:
      key: PRNG key.
      draw: from a key to items int [B, C], one independent draw for each of B rows, which may have
        distributions of their own. It is traced, once.
      temperature: above 0 and at most 1, a scalar or [B].
      max_rounds: how often `draw` is called at most.
      is_done: bool [B], rows for which nobody waits; none if left out. Their items are zeros.

    Returns:
      items, which of them are drawn as they should be, and at what cost.

    Raises:
      InputError: for a temperature or max_rounds out of range, or draws of another shape or dtype.
    """
    check_count("max_rounds", max_rounds)
    check_numbers("temperature", temperature)
    if not isinstance(temperature, jax.core.Tracer):
        temperatures = np.asarray(temperature)
        if ((temperatures <= 0) | (temperatures > 1)).any():
            raise InputError(
                f"temperature is {temperature}; it must be above 0 and at most 1, as a model that"
                " can only be sampled cannot be made flatter"
            )
    item_struct = jax.eval_shape(draw, key)
    if not jnp.issubdtype(item_struct.dtype, jnp.integer) or item_struct.ndim != 2:
        raise InputError(
            f"draws are {item_struct.dtype} {list(item_struct.shape)}; they must be int [B, C]"
        )
    num_rows = item_struct.shape[0]
    if jnp.shape(temperature) not in ((), (num_rows,)):
        raise InputError(
            f"temperature has shape {list(jnp.shape(temperature))}; it must be a scalar or"
            f" [{num_rows}], one for each row"
        )
    exponent = 1 / as_float(temperature)
    nearest_integer = jnp.round(exponent)
    is_integer = (
        jnp.abs(exponent - nearest_integer) <= _INTEGER_TOLERANCE * nearest_integer
    )
    n = jnp.where(is_integer, nearest_integer, jnp.floor(exponent))
    a = jnp.where(is_integer, 0.0, exponent - n)
    num_required = n + (a > 0)

    def is_unfinished(state: tuple[jax.Array, _RejectionState]) -> jax.Array:
        i, row_state = state
        return (i < max_rounds) & ~jnp.all(row_state.is_done)

    def draw_round(
        state: tuple[jax.Array, _RejectionState],
    ) -> tuple[jax.Array, _RejectionState]:
        i, row_state = state
        draw_key, chance_key = jax.random.split(jax.random.fold_in(key, i))
        new_items = draw(draw_key)
        first_items = jnp.where(
            (row_state.num_matches == 0)[:, None], new_items, row_state.first_draw
        )
        is_match = jnp.all(new_items == first_items, axis=-1)
        num_matches = row_state.num_matches + is_match
        is_last_stage = row_state.num_matches >= n
        num_misses = row_state.num_misses + (is_last_stage & ~is_match)
        chance = jax.random.uniform(chance_key, (num_rows,), exponent.dtype)
        # A miss within the first n draws ends the attempt for certain.
        has_failed = ~is_match & (~is_last_stage | (chance * num_misses < a))
        next_state = _RejectionState(
            first_draw=first_items,
            last_draw=new_items,
            num_matches=jnp.where(has_failed, 0.0, num_matches),
            num_misses=jnp.where(has_failed, 0.0, num_misses),
            is_done=num_matches >= num_required,
            num_rounds=row_state.num_rounds + 1,
        )

        def keep_done_rows(previous, updated):
            return jnp.where(
                row_state.is_done.reshape(-1, *[1] * (updated.ndim - 1)),
                previous,
                updated,
            )

        return i + 1, jax.tree.map(keep_done_rows, row_state, next_state)

    no_items = jnp.zeros(item_struct.shape, item_struct.dtype)
    zeros = jnp.zeros(num_rows, exponent.dtype)
    initially_done = (
        jnp.zeros(num_rows, bool) if is_done is None else jnp.asarray(is_done)
    )
    initial_state = _RejectionState(
        no_items, no_items, zeros, zeros, initially_done, jnp.zeros(num_rows, jnp.int32)
    )
    _, row_state = lax.while_loop(
        is_unfinished, draw_round, (jnp.int32(0), initial_state)
    )
    return RejectionSamples(
        row_state.last_draw, row_state.is_done, row_state.num_rounds
    )  # what is accepted is the last draw, always


def repetition_sample(key: jax.Array, candidates: ArrayLike, *, n: int) -> jax.Array:
    """Draws from P(x)^n, normalized, approximately: by what repeats among Z candidates.

    An item that came c times is drawn in proportion to binomial(c, n), the number of ways to choose
    n of its copies; see `repetition_weights`. The expectation of binomial(c, n) is
    binomial(Z, n) P(x)^n, but that of the ratio is not P(x)^n, normalized: what is drawn is too
    flat, by an amount that falls as Z grows.

    Args:
      key: PRNG key.
      candidates: independent draws of the model, int [Z, ..., C].
      n: 1 / temperature; see `inverse_temperature`.

    Returns:
      items int [..., C].

    Raises:
      InputError: if candidates are no such integers, or n is no positive integer.
    """
    items, log_weights = repetition_weights(candidates, n=n)
    item_index = jax.random.categorical(key, log_weights, axis=0)
    return jnp.take_along_axis(items, item_index[None, ..., None], axis=0)[0]


def repetition_weights(candidates: ArrayLike, *, n: int) -> tuple[jax.Array, jax.Array]:
    """The candidates in order, and the log-weights that `repetition_sample` draws them with.

    Log binomial(c, m) at one copy of each item that came c times, -inf at its other copies; m is n,
    or the largest count of the row where none came n times. It is the sum of log(c - j) over j < m,
    up to a constant of the row: that loses no digits at any c, as log-gamma functions would.

    Equal items are brought together by a sort over tokens, and counted as the lengths of runs:
    O(Z C) memory for a row and O(Z C log Z) time, where comparing pairs takes O(Z^2 C) time, and
    hashes could collide.

    Args:
      candidates: int [Z, ..., C].
      n: the order, >= 1.

    Returns:
      items int [Z, ..., C], sorted along Z, and log-weights float32 [Z, ...].

    Raises:
      InputError: as of `repetition_sample`.
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
    num_candidates, chunk_size = candidates.shape[0], candidates.shape[-1]
    token_columns = [candidates[..., i] for i in range(chunk_size)]
    items = jnp.stack(
        lax.sort(token_columns, dimension=0, num_keys=chunk_size, is_stable=False),
        axis=-1,
    )
    differs_from_previous = jnp.any(items[1:] != items[:-1], axis=-1)
    true_row = jnp.ones((1, *differs_from_previous.shape[1:]), bool)
    is_run_start = jnp.concatenate(
        [true_row, differs_from_previous]
    )  # bool [Z, ...]: the first of a run
    # A run ends where the next begins.
    indices = jnp.arange(num_candidates).reshape(-1, *[1] * (is_run_start.ndim - 1))
    run_ends = jnp.where(
        jnp.concatenate([differs_from_previous, true_row]), indices + 1, num_candidates
    )
    run_lengths = (
        lax.cummin(run_ends, axis=0, reverse=True) - indices
    )  # right where a run begins
    repeat_order = jnp.minimum(
        n, jnp.max(jnp.where(is_run_start, run_lengths, 0), axis=0)
    )
    j = jnp.arange(n).reshape(-1, *[1] * run_lengths.ndim)
    # Where repeat_order < n, all that are kept have the same count, and so the same weight.
    log_weights = jnp.sum(
        jnp.log(jnp.maximum(run_lengths - j, 1).astype(jnp.float32)), axis=0
    )
    return items, jnp.where(
        is_run_start & (run_lengths >= repeat_order), log_weights, -jnp.inf
    )


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
