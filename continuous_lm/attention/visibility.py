"""Which keys a query sees: none after its own, and none whose time is too long ago."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float


class WindowTimes(NamedTuple):
    """End times on an exact clock: ticks * tick + rest, counted from the first token's beginning.

    A distance in time is a difference of two end times. Of plain sums it would lose digits as time
    goes on: near t = 4096 float32 resolves 5e-4. Ticks are integers, so that theirs is exact, and
    what the tick does not resolve is so small that its sums are.
    """

    ticks: jax.Array  # int [..., T]
    rest: jax.Array  # [..., T]
    tick: jax.Array  # [..., 1], a power of two


def window_times(durations: jax.Array) -> WindowTimes:
    """The end times of tokens [..., T] of any durations, negative ones too, as a `Clock`.

    A tick is no smaller than the least normal number, so that float32 durations below about 1e-31
    lose digits.
    """
    durations = as_float(durations)
    bits, integer = (30, jnp.int32) if durations.dtype.itemsize == 4 else (62, jnp.int64)
    # A power of two so large that no sum of ticks overflows, and so small that it is a number.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(durations), axis=-1, keepdims=True))
    exponent = exponent + (durations.shape[-1] - 1).bit_length()
    exponent = jnp.maximum(exponent, jnp.finfo(durations.dtype).minexp + bits)
    tick = jnp.ldexp(jnp.ones_like(exponent, durations.dtype), exponent - bits)
    whole = jnp.round(durations / tick)  # exact: the tick is a power of two
    rest = durations - whole * tick
    return WindowTimes(jnp.cumsum(whole.astype(integer), axis=-1), jnp.cumsum(rest, axis=-1), tick)


def elapsed(clock: WindowTimes, later: jax.Array, earlier: jax.Array) -> jax.Array:
    """Time [..., Q, E] from the ends of tokens `earlier` (int [E]) to ends of `later` (int [Q])."""
    ticks = clock.ticks[..., later, None] - clock.ticks[..., None, earlier]
    rest = clock.rest[..., later, None] - clock.rest[..., None, earlier]
    return ticks.astype(rest.dtype) * clock.tick[..., None] + rest


def visible(
    queries: jax.Array | np.ndarray,
    keys: jax.Array | np.ndarray,
    clock: WindowTimes | None = None,
    window: ArrayLike | None = None,
) -> jax.Array:
    """Whether each query sees each key.

    Args:
      queries: indices of their own keys, int [T].
      keys: indices, int [S].
      clock: end times of all keys, for the window.
      window: a key is visible while the time since its end is below this, in tokens.

    Returns:
      bool [T, S], or [..., T, S] with a window.
    """
    queries, keys = jnp.asarray(queries), jnp.asarray(keys)
    causal = keys <= queries[:, None]
    if window is None or clock is None:
        return causal
    return causal & (elapsed(clock, queries, keys) < reach(clock, window))


def reach(clock: WindowTimes, window: ArrayLike) -> jax.Array:
    """The time below which a key is visible.

    A few ulp inside the edge, so that a distance that should equal the window never falls inside.
    """
    return jnp.asarray(window * (1.0 - 4.0 * jnp.finfo(clock.rest.dtype).eps))
