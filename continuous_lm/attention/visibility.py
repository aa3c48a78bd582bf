"""Visibility of keys: none after the query's own, and none before the window in time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float


class WindowTimes(NamedTuple):
    """Exact end times: ticks * tick_size + remainders, counted from the first token's beginning.

    Differences of cumulative sums in float32 lose digits: 5e-4 near t = 4096. So durations are cut
    into ticks, integers whose sums are exact, and remainders below a tick, whose sums are small.
    """

    ticks: jax.Array  # int [..., T]
    remainders: jax.Array  # [..., T]
    tick_size: jax.Array  # [..., 1], a power of two


def exact_end_times(durations: jax.Array) -> WindowTimes:
    """The end times of tokens [..., T] of any durations, negative ones too, as `WindowTimes`.

    A tick is no smaller than the least normal number, so that float32 durations below about 1e-31
    lose digits.
    """
    durations = as_float(durations)
    is_single = durations.dtype.itemsize == 4
    num_bits = 30 if is_single else 62
    integer_dtype = jnp.int32 if is_single else jnp.int64
    # A power of two so large that no sum of ticks overflows, and so small that it is a number.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(durations), axis=-1, keepdims=True))
    exponent = exponent + (durations.shape[-1] - 1).bit_length()
    exponent = jnp.maximum(exponent, jnp.finfo(durations.dtype).minexp + num_bits)
    tick_size = jnp.ldexp(jnp.ones_like(exponent, durations.dtype), exponent - num_bits)
    tick_counts = jnp.round(durations / tick_size)  # exact: the tick is a power of two
    remainders = durations - tick_counts * tick_size
    return WindowTimes(
        jnp.cumsum(tick_counts.astype(integer_dtype), axis=-1),
        jnp.cumsum(remainders, axis=-1),
        tick_size,
    )


def elapsed_times(
    window_times: WindowTimes,
    later: jax.Array,
    earlier: jax.Array,
) -> jax.Array:
    """Time [..., T, S] from the ends of tokens `earlier` (int [S]) to ends of `later` (int [T])."""
    ticks = (
        window_times.ticks[..., later, None] - window_times.ticks[..., None, earlier]
    )
    remainders = (
        window_times.remainders[..., later, None]
        - window_times.remainders[..., None, earlier]
    )
    return (
        ticks.astype(remainders.dtype) * window_times.tick_size[..., None] + remainders
    )


def visibility_mask(
    query_indices: jax.Array | np.ndarray,
    key_indices: jax.Array | np.ndarray,
    window_times: WindowTimes | None = None,
    window: ArrayLike | None = None,
) -> jax.Array:
    """Return whether each query sees each key.

    Args:
      query_indices: indices of their own keys, int [T].
      key_indices: indices, int [S].
      window_times: end times of all keys, for the window.
      window: a key is visible while the time since its end is below this, in tokens.

    Returns:
      bool [T, S], or [..., T, S] with a window.
    """
    query_indices = jnp.asarray(query_indices)
    key_indices = jnp.asarray(key_indices)
    is_causal = key_indices <= query_indices[:, None]
    if window is None or window_times is None:
        return is_causal
    elapsed = elapsed_times(window_times, query_indices, key_indices)
    return is_causal & (elapsed < window_limit(window_times, window))


def window_limit(window_times: WindowTimes, window: ArrayLike) -> jax.Array:
    """The time below which a key is visible.

    A few ulp inside the edge, so that a distance that should equal the window never falls inside.
    """
    return jnp.asarray(
        window * (1.0 - 4.0 * jnp.finfo(window_times.remainders.dtype).eps)
    )
