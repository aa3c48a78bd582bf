"""Which keys a query sees: none after its own, and none whose time is too long ago."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import durations as time


def visible(
    queries: jax.Array | np.ndarray,
    keys: jax.Array | np.ndarray,
    clock: time.Clock | None = None,
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
    return causal & (time.elapsed(clock, queries, keys) < reach(clock, window))


def reach(clock: time.Clock, window: ArrayLike) -> jax.Array:
    """The time below which a key is visible.

    A few ulp inside the edge, so that a distance that should equal the window never falls inside.
    """
    return jnp.asarray(window * (1.0 - 4.0 * jnp.finfo(clock.rest.dtype).eps))
