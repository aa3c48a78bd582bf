"""Rotary position embedding at real-valued times (Su et al., arXiv:2104.09864).

The angle of channel pair c at time t is t * f_c with f_c = theta^(-2c / R), R the channels that
turn: nothing asks t to be an integer. They are paired as two halves, (c, c + R/2), as in Hugging
Face checkpoints.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """The "llama3" stretching of long wavelengths, for contexts beyond the original one.

    Wavelengths above `original_length / low_freq_factor` are stretched by `factor`, those below
    `original_length / high_freq_factor` are kept, and between them the two are blended. Lengths
    are in tokens. Source: Llama 3.1's published configuration.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All wavelengths stretched by `factor` (Chen et al., arXiv:2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """Each wavelength stretched by a factor of its own (Ding et al., arXiv:2402.13753).

    Sequences of more than `original_length` tokens take the `long` factors, others the `short`
    ones. The choice goes by the number of tokens, never by their times, so that sweeps and
    gradients have no jump; `use` makes it once and for all. Rotated vectors are multiplied by
    `amplitude`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    amplitude: float
    use: Literal["auto", "short", "long"] = "auto"

    @property
    def factors(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.short, self.long

    def factors_at(self, num_tokens: int) -> tuple[float, ...]:
        """The factors that a sequence of so many tokens takes."""
        long = self.use == "long" or (self.use == "auto" and num_tokens > self.original_length)
        return self.long if long else self.short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Base and scaling of the rotary frequencies, and the share of a head's channels that turn."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | LongRope | None = None
    fraction: float = 1.0

    @property
    def amplitude(self) -> float:
        """What rotated vectors are multiplied by."""
        return self.scaling.amplitude if isinstance(self.scaling, LongRope) else 1.0

    def at_length(self, num_tokens: int) -> "Rope":
        """The same, with the choice that goes by the number of tokens made."""
        s = self.scaling
        if not isinstance(s, LongRope):
            return self
        scaling = dataclasses.replace(
            s, use="long" if s.factors_at(num_tokens) is s.long else "short"
        )
        return dataclasses.replace(self, scaling=scaling)


def frequencies(rope: Rope, head_dim: int, num_tokens: int = 0) -> np.ndarray:
    """Frequencies [R/2] in radians for each token of time, float64, computed on the host.

    R is the number of channels that turn, H times the rope's fraction.
    """
    width = int(head_dim * rope.fraction)
    plain = rope.theta ** (-np.arange(0, width, 2) / width)
    s = rope.scaling
    if s is None:
        return plain
    if isinstance(s, LinearScaling):
        return plain / s.factor
    if isinstance(s, LongRope):
        return plain / np.asarray(s.factors_at(num_tokens))
    turns = s.original_length * plain / (2 * math.pi)  # full turns within the original context
    kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / s.factor)


def angles(times: jax.Array, rope: Rope, head_dim: int, num_tokens: int | None = None) -> jax.Array:
    """Angles [..., T, R/2] in radians at `times` [..., T], in the dtype of `times`.

    `num_tokens` is the length of the whole sequence, by which LongRoPE chooses its factors; T if
    left out.
    """
    turning = frequencies(rope, head_dim, num_tokens or times.shape[-1])
    return times[..., None] * jnp.asarray(turning, times.dtype)


def turns(angles: jax.Array, amplitude: float = 1.0) -> jax.Array:
    """Cosines and sines [..., T, R] of `angles` [..., T, R/2], times the amplitude.

    Made once they serve every head and layer.
    """
    return amplitude * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def turn(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns channel pairs of `x` [..., T, N, H] by `turns` [..., T, R]; keeps x's dtype.

    The first R channels turn, paired as two halves; the others pass.
    """
    cos, sin = jnp.split(turns[..., None, :], 2, axis=-1)
    first, second, rest = jnp.split(x, (cos.shape[-1], turns.shape[-1]), axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rest = jnp.broadcast_to(rest, (*turned[0].shape[:-1], rest.shape[-1]))
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)


def rotate(x: jax.Array, angles: jax.Array, amplitude: float = 1.0) -> jax.Array:
    """Turns channel pairs of `x` [..., T, N, H] by `angles` [..., T, R/2]: `turn` and `turns`."""
    return turn(x, turns(angles, amplitude))
