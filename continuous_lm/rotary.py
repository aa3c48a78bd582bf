"""Rotary position embedding at real-valued times (Su et al., arXiv:2104.09864).

The angle of channel pair c at time t is t * f_c with f_c = theta^(-2c / rotary_channels), where
rotary_channels is the number of channels that turn: t need not be an integer. They are paired as
two halves, (c, c + rotary_channels / 2), as in Hugging Face checkpoints.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "Rope",
    "angles",
    "apply_rotary",
    "cos_sin",
    "frequencies",
]


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
    gradients have no jump; `which` makes it once and for all. Rotated vectors are multiplied by
    `attention_factor`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float
    which: Literal["auto", "short", "long"] = "auto"

    @property
    def factors(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.short, self.long

    def is_long_at(self, num_tokens: int) -> bool:
        """Return whether a sequence of `num_tokens` uses the long factors."""
        if self.which == "auto":
            return num_tokens > self.original_length
        return self.which == "long"

    def factors_at(self, num_tokens: int) -> tuple[float, ...]:
        """The factors that a sequence of so many tokens takes."""
        return self.long if self.is_long_at(num_tokens) else self.short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Base and scaling of the rotary frequencies, and the share of a head's channels that turn."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | LongRope | None = None
    fraction: float = 1.0

    @property
    def attention_factor(self) -> float:
        """Factor of rotated vectors."""
        return (
            self.scaling.attention_factor if isinstance(self.scaling, LongRope) else 1.0
        )

    def at_length(self, num_tokens: int) -> "Rope":
        """The same, with the choice that goes by the number of tokens made."""
        if not isinstance(self.scaling, LongRope):
            return self
        is_long = self.scaling.is_long_at(num_tokens)
        which: Literal["long", "short"] = "long" if is_long else "short"
        scaling = dataclasses.replace(self.scaling, which=which)
        return dataclasses.replace(self, scaling=scaling)


def frequencies(rope: Rope, head_dim: int, num_tokens: int = 0) -> np.ndarray:
    """Frequencies [rotary_channels / 2] in radians for each token of time, float64, on the host.

    rotary_channels is the number of channels that turn, H times the rope's fraction.
    """
    rotary_channels = int(head_dim * rope.fraction)
    exponents = -np.arange(0, rotary_channels, 2) / rotary_channels
    base_frequencies = rope.theta**exponents
    scaling = rope.scaling
    if scaling is None:
        return base_frequencies
    if isinstance(scaling, LinearScaling):
        return base_frequencies / scaling.factor
    if isinstance(scaling, LongRope):
        return base_frequencies / np.asarray(scaling.factors_at(num_tokens))
    # Full turns within the original context.
    full_turns = scaling.original_length * base_frequencies / (2 * math.pi)
    blended_range = scaling.high_freq_factor - scaling.low_freq_factor
    kept_share = (full_turns - scaling.low_freq_factor) / blended_range
    kept_share = np.clip(kept_share, 0.0, 1.0)
    return base_frequencies * (kept_share + (1.0 - kept_share) / scaling.factor)


def angles(
    times: jax.Array, rope: Rope, head_dim: int, num_tokens: int | None = None
) -> jax.Array:
    """Angles [..., T, rotary_channels / 2] in radians at `times` [..., T], in the dtype of `times`.

    `num_tokens` is the length of the whole sequence, by which LongRoPE chooses its factors; T if
    left out.
    """
    channel_frequencies = frequencies(rope, head_dim, num_tokens or times.shape[-1])
    return times[..., None] * jnp.asarray(channel_frequencies, times.dtype)


def cos_sin(angles: jax.Array, attention_factor: float = 1.0) -> jax.Array:
    """Cosines and sines [..., T, rotary_channels] of `angles`, times the attention factor.

    Made once they serve every head and layer.
    """
    pair = [jnp.cos(angles), jnp.sin(angles)]
    return attention_factor * jnp.concatenate(pair, axis=-1)


def apply_rotary(x: jax.Array, cos_sin: jax.Array) -> jax.Array:
    """Turn channel pairs of `x` [..., T, N, H] by `cos_sin` [..., T, rotary_channels].

    The first rotary_channels of the H channels turn, paired as two halves; the others pass. The
    dtype is that of x.
    """
    cos, sin = jnp.split(cos_sin[..., None, :], 2, axis=-1)
    first_half, second_half, unrotated = jnp.split(
        x, (cos.shape[-1], cos_sin.shape[-1]), axis=-1
    )
    rotated = (
        first_half * cos - second_half * sin,
        second_half * cos + first_half * sin,
    )
    leading_shape = rotated[0].shape[:-1]
    unrotated = jnp.broadcast_to(unrotated, (*leading_shape, unrotated.shape[-1]))
    rotated_halves = [half.astype(x.dtype) for half in rotated]
    return jnp.concatenate([*rotated_halves, unrotated], axis=-1)
