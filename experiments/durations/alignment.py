"""Two phrases of different numbers of tokens, aligned in time, and vectors between two others."""

import dataclasses

import numpy as np
from jax.typing import ArrayLike

import continuous_lm as clm


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Two phrases in one span, sampled where a token of either ends.

    Attributes:
      end_shares: when, as shares of the span, ascending [num_samples].
      token_indices: which token of each phrase holds that moment, int [num_samples] each.
      sample_durations: durations of the samples in each phrase, in its own tokens, [num_samples]
        each; 0 where none of its ends.
    """

    end_shares: np.ndarray
    token_indices: tuple[np.ndarray, np.ndarray]
    sample_durations: tuple[np.ndarray, np.ndarray]

    def durations_and_times(
        self, points: np.ndarray, num_before: int, num_after: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Durations and times [P, T] of the whole prompt: tokens before, samples, tokens after."""
        fraction = np.asarray(points, np.float64)[:, None]
        first, second = self.sample_durations
        sample_durations = (1 - fraction) * first + fraction * second
        span_length = sample_durations.sum(axis=1, keepdims=True)
        ones = np.ones((len(points), 1))
        durations = np.concatenate(
            [ones * np.ones(num_before), sample_durations, ones * np.ones(num_after)],
            axis=1,
        )
        times = np.concatenate(
            [
                ones * np.arange(1, num_before + 1),
                num_before + span_length * self.end_shares,
                num_before + span_length + np.arange(1, num_after + 1),
            ],
            axis=1,
        )
        return durations.astype(np.float32), times.astype(np.float32)

    def sample_names(
        self, first_tokens: np.ndarray, second_tokens: np.ndarray
    ) -> list[str]:
        """The samples, named by the tokens of both phrases."""
        pairs = zip(
            first_tokens[self.token_indices[0]],
            second_tokens[self.token_indices[1]],
            strict=True,
        )
        return [f"{a}|{b}" for a, b in pairs]


def align_phrases(num_first: int, num_second: int) -> Alignment:
    """The alignment of phrases of so many tokens."""
    # In parts of the span, of which there are num_first times num_second.
    ticks = np.union1d(
        num_second * np.arange(1, num_first + 1),
        num_first * np.arange(1, num_second + 1),
    )
    token_indices = (-(-ticks // num_second) - 1, -(-ticks // num_first) - 1)
    sample_durations = ((ticks % num_second == 0) * 1.0, (ticks % num_first == 0) * 1.0)
    return Alignment(ticks / (num_first * num_second), token_indices, sample_durations)


def interpolate_vectors(
    first: np.ndarray, second: np.ndarray, points: ArrayLike, path: str
) -> np.ndarray:
    """Vectors [P, num_samples, D] between `first` and `second` [num_samples, D].

    "linear": along the straight line. "spherical": at constant angular speed in the plane of the
    two (Shoemake, SIGGRAPH 1985), the straight line where they are parallel.
    """
    fraction = np.asarray(points, np.float32)[:, None, None]
    if path == "linear":
        return (1 - fraction) * first + fraction * second
    if path != "spherical":
        raise clm.InputError(
            f"interpolation is {path!r}; it must be 'linear' or 'spherical'"
        )
    norm_products = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = np.clip(
        np.sum(first * second, axis=-1) / np.maximum(norm_products, 1e-30), -1, 1
    )
    angle = np.arccos(cosine)[:, None]
    sine = np.sin(angle)
    is_parallel = sine < 1e-4
    safe_sine = np.where(is_parallel, 1.0, sine)
    first_weight = np.where(
        is_parallel, 1 - fraction, np.sin((1 - fraction) * angle) / safe_sine
    )
    second_weight = np.where(
        is_parallel, fraction, np.sin(fraction * angle) / safe_sine
    )
    return (first_weight * first + second_weight * second).astype(np.float32)
