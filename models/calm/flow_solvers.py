"""Solvers of flow and diffusion heads: from noise to a vector, step by step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError

SOLVERS = ("euler", "midpoint")


LEAST_SIGNAL = 1e-3  # of the variance that is left of the target where diffusion begins


def integrate(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    x: ArrayLike,
    *,
    steps: int,
    solver: str = "midpoint",
) -> jax.Array:
    """The solution at time 1 of dx/dt = velocity(x, t), from x at time 0.

    Args:
      velocity: of x [..., W] at a scalar time, [..., W].
      x: [..., W], with all leading axes that velocities have.
      steps: equal ones, one after the other; the error falls with their number (euler) or its
        square (midpoint).
      solver: one of SOLVERS.

    Raises:
      InputError: for another solver, or no step.
    """
    _check_solver(solver)
    _check_steps(steps)
    x = as_float(x)
    step = 1.0 / steps

    def advance(x, time):
        slope = velocity(x, time)
        if solver == "midpoint":
            slope = velocity(x + 0.5 * step * slope, time + 0.5 * step)
        return (x + step * slope).astype(x.dtype), None

    return jax.lax.scan(advance, x, jnp.arange(steps, dtype=x.dtype) / steps)[0]


def signal(time: ArrayLike) -> jax.Array:
    """Part of the target's variance that is left at a time from 0 to 1, from 1 to `LEAST_SIGNAL`.

    The cosine schedule of Nichol and Dhariwal (arXiv:2102.09672), with their offset of 0.008. They
    bound each step's noise for the same reason for which the least is bounded here: the first step
    divides by its root, and would magnify what the network gets wrong.
    """
    angle = (as_float(time) + 0.008) / 1.008 * (0.5 * math.pi)
    left = jnp.square(jnp.cos(angle) / math.cos(0.004 * math.pi / 1.008))
    return jnp.clip(left, LEAST_SIGNAL, 1.0)


def denoise(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x: ArrayLike,
    noise: ArrayLike | None = None,
    *,
    steps: int,
) -> jax.Array:
    """A sample from noise x, in equal steps from time 1 to time 0 of `signal`.

    Args:
      predict: the noise in x [..., W] at a scalar time, [..., W].
      x: normal noise [..., W], with all leading axes that predictions have.
      noise: what comes in at each step, [steps, ..., W], normal; the last is multiplied by 0.
        Without it steps are deterministic.
      steps: how many.
    """
    _check_steps(steps)
    noisy = as_float(x)
    times = jnp.arange(steps, -1, -1, dtype=noisy.dtype) / steps

    def step(x, inputs):
        time, after, new = inputs
        now, then = signal(time), signal(after)
        found = predict(x, time)
        clean = (x - jnp.sqrt(1 - now) * found) / jnp.sqrt(now)
        # The variance of x at `after`, given the target and x at `time`.
        fresh = 0.0 if new is None else (1 - then) / (1 - now) * (1 - now / then)
        x = jnp.sqrt(then) * clean + jnp.sqrt(jnp.maximum(1 - then - fresh, 0.0)) * found
        return (x if new is None else x + jnp.sqrt(fresh) * new).astype(noisy.dtype), None

    return jax.lax.scan(step, noisy, (times[:-1], times[1:], noise))[0]


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise InputError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"steps is {steps}; there must be at least 1")
