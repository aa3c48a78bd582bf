"""Rotary position embedding at real-valued times (Su et al., arXiv:2104.09864).

The angle of channel pair c at time t is t * f_c with f_c = theta^(-2c / H): nothing asks t to be an
integer. Channels are paired as two halves, (c, c + H/2), as in Hugging Face checkpoints.
"""

import dataclasses
import math

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
class Rope:
    """Base and scaling of the rotary frequencies."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | None = None


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Frequencies [H/2] in radians for each token of time, float64, computed on the host."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.scaling is None:
        return plain
    s = rope.scaling
    turns = s.original_length * plain / (2 * math.pi)  # full turns within the original context
    kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / s.factor)


def angles(times: jax.Array, rope: Rope, head_dim: int) -> jax.Array:
    """Angles [..., T, H/2] in radians at `times` [..., T], in the dtype of `times`."""
    return times[..., None] * jnp.asarray(frequencies(rope, head_dim), times.dtype)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns every channel pair of `x` [..., T, N, H] by `angles` [..., T, H/2]; keeps x's dtype."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
