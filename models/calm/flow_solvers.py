"""Solvers of flow and diffusion heads: from noise to a vector, step by step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError

__all__ = [
    "MIN_SIGNAL_VARIANCE",
    "SOLVERS",
    "check_solver",
    "denoise",
    "integrate",
    "signal_variance",
]

SOLVERS = ("euler", "midpoint")

# Of the variance that is left of the target where diffusion begins.
MIN_SIGNAL_VARIANCE = 1e-3


def integrate(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    x: ArrayLike,
    *,
    steps: int,
    solver: str = "midpoint",
) -> jax.Array:
    """The solution at time 1 of dx/dt = velocity(x, t), from x at time 0.

    Args:
      velocity: function of x [..., W] and a scalar time, with result [..., W].
      x: [..., W], with all leading axes that velocities have.
      steps: number of equal steps. The error is proportional to 1 / steps (euler) or
        1 / steps^2 (midpoint).
      solver: one of SOLVERS.

    Raises:
      InputError: for another solver, or no step.
    """
    check_solver(solver)
    _check_steps(steps)
    x = as_float(x)
    step_size = 1.0 / steps

    def advance(x, time):
        slope = velocity(x, time)
        if solver == "midpoint":
            slope = velocity(x + 0.5 * step_size * slope, time + 0.5 * step_size)
        return (x + step_size * slope).astype(x.dtype), None

    return jax.lax.scan(advance, x, jnp.arange(steps, dtype=x.dtype) / steps)[0]


def signal_variance(time: ArrayLike) -> jax.Array:
    """Share of the target's variance at a time in [0, 1], from 1 to `MIN_SIGNAL_VARIANCE`.

    The cosine schedule of Nichol and Dhariwal (arXiv:2102.09672), with their offset of 0.008. The
    first step divides by the root of the variance, so a small variance would magnify the network's
    errors. The lower bound prevents that; the paper bounds each step's noise for the same reason.
    """
    angle = (as_float(time) + 0.008) / 1.008 * (0.5 * math.pi)
    variance = jnp.square(jnp.cos(angle) / math.cos(0.004 * math.pi / 1.008))
    return jnp.clip(variance, MIN_SIGNAL_VARIANCE, 1.0)


def denoise(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x: ArrayLike,
    step_noise: ArrayLike | None = None,
    *,
    steps: int,
) -> jax.Array:
    """A sample from noise x, in equal steps from time 1 to time 0 of `signal_variance`.

    Args:
      predict: the noise in x [..., W] at a scalar time, [..., W].
      x: normal noise [..., W], with all leading axes that predictions have.
      step_noise: what comes in at each step, [steps, ..., W], normal; the last is multiplied by 0.
        Without it steps are deterministic.
      steps: how many.
    """
    _check_steps(steps)
    initial_noise = as_float(x)
    times = jnp.arange(steps, -1, -1, dtype=initial_noise.dtype) / steps

    def denoise_step(x, inputs):
        time, next_time, fresh_noise = inputs
        variance = signal_variance(time)
        next_variance = signal_variance(next_time)
        predicted_noise = predict(x, time)
        noise_part = jnp.sqrt(1 - variance) * predicted_noise
        predicted_target = (x - noise_part) / jnp.sqrt(variance)
        # The variance of x at `next_time`, given the target and x at `time`.
        fresh_variance = (
            0.0
            if fresh_noise is None
            else (1 - next_variance) / (1 - variance) * (1 - variance / next_variance)
        )
        mean_noise_scale = jnp.sqrt(
            jnp.maximum(1 - next_variance - fresh_variance, 0.0)
        )
        x = (
            jnp.sqrt(next_variance) * predicted_target
            + mean_noise_scale * predicted_noise
        )
        if fresh_noise is not None:
            x = x + jnp.sqrt(fresh_variance) * fresh_noise
        return x.astype(initial_noise.dtype), None

    scanned = (times[:-1], times[1:], step_noise)
    return jax.lax.scan(denoise_step, initial_noise, scanned)[0]


def check_solver(solver: str) -> None:
    """Raise InputError unless `solver` is one of SOLVERS."""
    if solver not in SOLVERS:
        raise InputError(
            f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}"
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"steps is {steps}; there must be at least 1")
