"""Draws at a temperature from a model that can only be sampled: P(x)^(1/T) / Z without P.

A draw x of a model with probabilities P, and n - 1 more that all equal it, come with probability
P(x)^n, which is what T = 1/n wants (Shao et al., arXiv:2510.27688). `exact` draws until that
happens; `batch` counts repetitions among N draws, which takes one step and is biased for finite N.

An item is a chunk of O tokens, and two are equal when all of these are.
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

_WHOLE = 1e-5  # 1/T that is so near to an integer, relative to it, is meant to be that integer


class Exact(NamedTuple):
    """What `exact` found for B rows."""

    items: jax.Array  # int [B, O]; the last draw where none was accepted
    accepted: jax.Array  # bool [B]
    rounds: jax.Array  # int32 [B], draws that the row has used


class _Rows(NamedTuple):
    """The state of B rows. Each round makes one draw for every row, at whatever stage it is."""

    first: jax.Array  # int [B, O], the attempt's first draw, which must come again
    last: jax.Array  # int [B, O]
    matched: jax.Array  # float [B], how often it has come; 0 before an attempt
    misses: jax.Array  # float [B], of the last stage, where 1/T is no integer
    done: jax.Array  # bool [B]
    rounds: jax.Array  # int32 [B]


def exact(
    key: jax.Array,
    draw: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike,
    max_rounds: int,
    done: jax.Array | None = None,
) -> Exact:
    """Draws from P(x)^(1/T) / Z by rejection.

    Let 1/T = n + a with 0 <= a < 1. An attempt fails unless its first n draws are equal. For a > 0
    it then goes on until the item comes again, and fails at the i-th miss with probability a / i.
    With p = P(x) it ends well with probability

        sum_k (1 - p)^k p prod_{i <= k} (1 - a / i) = p (1 - (1 - p))^(a - 1) = p^a,

    by the binomial series: a Bernoulli factory. An attempt that fails is followed by another with
    fresh draws; to begin it with the draw that failed would favour items that follow others.

    An attempt of T = 1/n succeeds with probability sum_x P(x)^n, so that flat distributions
    take long. Rows are independent, and one that is done keeps its item while others go on.

    Args:
      key: PRNG key.
      draw: from a key to items int [B, O], one independent draw for each of B rows, which may have
        distributions of their own. It is traced, once.
      temperature: above 0 and at most 1, a scalar or [B].
      max_rounds: how often `draw` is called at most.
      done: bool [B], rows for which nobody waits; none if left out. Their items are zeros.

    Returns:
      items, which of them are drawn as they should be, and at what cost.

    Raises:
      InputError: for a temperature or max_rounds out of range, or draws of another shape or dtype.
    """
    check_count("max_rounds", max_rounds)
    check_numbers("temperature", temperature)
    if not isinstance(temperature, jax.core.Tracer):
        values = np.asarray(temperature)
        if ((values <= 0) | (values > 1)).any():
            raise InputError(
                f"temperature is {temperature}; it must be above 0 and at most 1, as a model that"
                " can only be sampled cannot be made flatter"
            )
    item = jax.eval_shape(draw, key)
    if not jnp.issubdtype(item.dtype, jnp.integer) or item.ndim != 2:
        raise InputError(f"draws are {item.dtype} {list(item.shape)}; they must be int [B, O]")
    num_rows = item.shape[0]
    if jnp.shape(temperature) not in ((), (num_rows,)):
        raise InputError(
            f"temperature has shape {list(jnp.shape(temperature))}; it must be a scalar or"
            f" [{num_rows}], one for each row"
        )
    inverse = 1 / as_float(temperature)
    near = jnp.round(inverse)
    whole = jnp.abs(inverse - near) <= _WHOLE * near
    n = jnp.where(whole, near, jnp.floor(inverse))
    a = jnp.where(whole, 0.0, inverse - n)
    goal = n + (a > 0)

    def going_on(state: tuple[jax.Array, _Rows]) -> jax.Array:
        i, rows = state
        return (i < max_rounds) & ~jnp.all(rows.done)

    def step(state: tuple[jax.Array, _Rows]) -> tuple[jax.Array, _Rows]:
        i, rows = state
        for_draw, for_chance = jax.random.split(jax.random.fold_in(key, i))
        new = draw(for_draw)
        first = jnp.where((rows.matched == 0)[:, None], new, rows.first)
        same = jnp.all(new == first, axis=-1)
        matched = rows.matched + same
        last_stage = rows.matched >= n
        misses = rows.misses + (last_stage & ~same)
        chance = jax.random.uniform(for_chance, (num_rows,), inverse.dtype)
        # A miss within the first n draws ends the attempt for certain.
        failed = ~same & (~last_stage | (chance * misses < a))
        after = _Rows(
            first=first,
            last=new,
            matched=jnp.where(failed, 0.0, matched),
            misses=jnp.where(failed, 0.0, misses),
            done=matched >= goal,
            rounds=rows.rounds + 1,
        )

        def kept(old, new):
            return jnp.where(rows.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

        return i + 1, jax.tree.map(kept, rows, after)

    nothing = jnp.zeros(item.shape, item.dtype)
    zeros = jnp.zeros(num_rows, inverse.dtype)
    before = jnp.zeros(num_rows, bool) if done is None else jnp.asarray(done)
    start = _Rows(nothing, nothing, zeros, zeros, before, jnp.zeros(num_rows, jnp.int32))
    _, rows = lax.while_loop(going_on, step, (jnp.int32(0), start))
    return Exact(rows.last, rows.done, rows.rounds)  # what is accepted is the last draw, always


def batch(key: jax.Array, candidates: ArrayLike, *, n: int) -> jax.Array:
    """Draws from P(x)^n / Z approximately, by what repeats among N candidates.

    An item that came c times is drawn in proportion to C(c, n), the number of ways to choose n of
    its copies; see `weights`. The expectation of C(c, n) is C(N, n) P(x)^n, but that of the ratio
    is not P(x)^n / Z: what is drawn is too flat, by an amount that falls as N grows.

    Args:
      key: PRNG key.
      candidates: independent draws of the model, int [N, ..., O].
      n: 1/T; see `order`.

    Returns:
      items int [..., O].

    Raises:
      InputError: if candidates are no such integers, or n is no positive integer.
    """
    items, logs = weights(candidates, n=n)
    chosen = jax.random.categorical(key, logs, axis=0)
    return jnp.take_along_axis(items, chosen[None, ..., None], axis=0)[0]


def weights(candidates: ArrayLike, *, n: int) -> tuple[jax.Array, jax.Array]:
    """The candidates in order, and the log-weights that `batch` draws them with.

    Log C(c, m) at one copy of each item that came c times, -inf at its other copies; m is n, or the
    largest count of the row where none came n times. It is the sum of log(c - j) over j < m, up to
    a constant of the row: that loses no digits at any c, as log-gamma functions would.

    Equal items are brought together by a sort over tokens, and counted as the lengths of runs:
    O(N O) memory for a row and O(N O log N) time, where comparing pairs takes O(N^2 O) time, and
    hashes could collide.

    Args:
      candidates: int [N, ..., O].
      n: the order, >= 1.

    Returns:
      items int [N, ..., O], sorted along N, and log-weights float32 [N, ...].

    Raises:
      InputError: as of `batch`.
    """
    check_count("n", n)
    candidates = jnp.asarray(candidates)
    if not jnp.issubdtype(candidates.dtype, jnp.integer):
        raise InputError(f"candidates have dtype {candidates.dtype}; they must hold integers")
    if candidates.ndim < 2 or 0 in (candidates.shape[0], candidates.shape[-1]):
        raise InputError(
            f"candidates have shape {list(candidates.shape)}; they must be [N, ..., O], with N and"
            " O at least 1"
        )
    return _weights(candidates, n)


@functools.partial(jax.jit, static_argnames="n")
def _weights(candidates: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    num, length = candidates.shape[0], candidates.shape[-1]
    tokens = [candidates[..., o] for o in range(length)]
    items = jnp.stack(lax.sort(tokens, dimension=0, num_keys=length, is_stable=False), axis=-1)
    changes = jnp.any(items[1:] != items[:-1], axis=-1)
    edge = jnp.ones((1, *changes.shape[1:]), bool)
    begins = jnp.concatenate([edge, changes])  # bool [N, ...]: the first of a run
    # A run ends where the next begins.
    index = jnp.arange(num).reshape(-1, *[1] * (begins.ndim - 1))
    ends = jnp.where(jnp.concatenate([changes, edge]), index + 1, num)
    counts = lax.cummin(ends, axis=0, reverse=True) - index  # right where a run begins
    order = jnp.minimum(n, jnp.max(jnp.where(begins, counts, 0), axis=0))
    j = jnp.arange(n).reshape(-1, *[1] * counts.ndim)
    # Where order < n, all that are kept have the same count, and so the same weight.
    logs = jnp.sum(jnp.log(jnp.maximum(counts - j, 1).astype(jnp.float32)), axis=0)
    return items, jnp.where(begins & (counts >= order), logs, -jnp.inf)


def order(temperature: float) -> int:
    """The n of T = 1/n.

    >>> order(0.5), order(1 / 3)
    (2, 3)

    Raises:
      InputError: if there is none.
    """
    check_numbers("temperature", temperature)
    if np.ndim(temperature) == 0 and 0 < temperature <= 1:
        n = round(1 / float(temperature))
        if abs(n * float(temperature) - 1) <= _WHOLE:
            return n
    raise InputError(
        f"temperature is {temperature}; the batch form counts repetitions, and needs"
        " 1, 1/2, 1/3 or another 1/n"
    )
