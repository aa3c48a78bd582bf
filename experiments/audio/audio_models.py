"""The two audio models of `audio.frames`: densities of frames, samples, statistics, figures.

`audio.frames` describes the comparison.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.experiments.densities import density_training
from continuous_lm.models import density
from continuous_lm.models.density.distributions import (
    Categorical,
    Density,
    Gaussian,
    Mixture,
)
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params
from continuous_lm.models.samplers import Temperature

MIN_SCALE = 0.05  # of all densities here, in deviations of a band
HOP_FACTORS = (0.8, 1.0, 1.25)  # hops of the sweep, in those of training
DECIBELS_PER_NAT = 10.0 / np.log(10.0)  # in a nat of power
_SHRINKAGE_FRAMES = 10.0  # frames of average deviation that every code is given
NUM_SWEEP_WINDOWS = 6  # windows in the sweep of durations
NUM_WAV_EXCERPTS = 4  # excerpts in a .wav file
NUM_RESAMPLES = 2000  # of bootstrap intervals
WAV_NAMES = ("real_resynthesised", "real_as_codes", "mixture_sample", "tokens_sample")


# --- Sound ----------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """Sound [n] and its frames float32 [T, W], standardised by the training sound's statistics."""

    samples: np.ndarray
    frames: np.ndarray


def extract_sentences(documents: Sequence[str]) -> list[str]:
    """Plain sentences in a text, each once, in an order of chance that is always the same."""
    joined_text = "\n\n".join(
        " ".join(paragraph.split())
        for document in documents
        for paragraph in document.split("\n\n")
    )
    matches = re.findall(
        r"(?:(?<=\. )|^)[A-Z][a-z]+(?:,? [a-z]+){5,20}\.", joined_text, re.MULTILINE
    )
    unique_sentences = sorted(set(matches))
    return [
        unique_sentences[i]
        for i in np.random.default_rng(0).permutation(len(unique_sentences))
    ]


# --- Densities ------------------------------------------------------------------------------------


class CodeDensities(NamedTuple):
    """Normal density of each code."""

    vectors: np.ndarray  # [V, W]
    scales: np.ndarray  # [V, W], standard deviations
    log_shares: np.ndarray  # [V], of the frames that they were found in


def fit_codes(key: jax.Array, frames: np.ndarray, num_codes: int) -> CodeDensities:
    """Codes of frames [T, W] by k-means, with the deviations of the frames of each.

    A code's variances are averaged with those of all codes, as if it had ten more frames of these;
    no deviation is below `MIN_SCALE`, which is the mixture's bound too.
    """
    vectors = np.asarray(quantize.kmeans(key, frames, num_codes, steps=20).centres)
    indices = np.asarray(quantize.nearest(frames, vectors).indices)
    squared_errors = (frames - vectors[indices]) ** 2
    counts = np.bincount(indices, minlength=num_codes)
    squared_error_sums = np.zeros_like(vectors)
    np.add.at(squared_error_sums, indices, squared_errors)
    mean_variance = squared_errors.mean(axis=0)
    variances = (squared_error_sums + _SHRINKAGE_FRAMES * mean_variance) / (
        counts + _SHRINKAGE_FRAMES
    )[:, None]
    shares = (counts + 1.0) / (counts + 1.0).sum()
    scales = np.maximum(np.sqrt(variances), MIN_SCALE)
    return CodeDensities(
        vectors, scales.astype(np.float32), np.log(shares).astype(np.float32)
    )


class FrameScores(NamedTuple):
    """Scores of each frame after the first, of windows [B, T + 1, W]."""

    log_prob: np.ndarray  # [B, T], nats
    mean: np.ndarray  # [B, T, W], expectation of the frame


@dataclasses.dataclass(frozen=True)
class AudioModel:
    """A trained model of frames; with codes, it hears and says those."""

    lm: LanguageModel[DensityModel]
    codes: CodeDensities | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters, codes and their deviations among them."""
        arrays = [*jax.tree.leaves(self.lm.params), *(self.codes or ())[:2]]
        return sum(array.size for array in arrays)

    def model_inputs(self, frames: np.ndarray) -> np.ndarray:
        """Convert frames [..., W] to the model's inputs: the frames, or codes [...]."""
        if self.codes is None:
            return frames
        return np.asarray(quantize.nearest(frames, self.codes.vectors).indices)

    def score(self, windows: np.ndarray, duration: float = 1.0) -> FrameScores:
        """Densities of frames after those before, where each lasts `duration`.

        Window by window: with many codes, the densities of one take megabytes.
        """
        durations = np.full(windows.shape[1], duration, np.float32)
        window_scores = [
            _score_window(
                self.lm.model, self.lm.params, self.codes, inputs, window, durations
            )
            for inputs, window in zip(self.model_inputs(windows), windows, strict=True)
        ]
        return FrameScores(
            *(
                np.stack([np.asarray(x) for x in field_values])
                for field_values in zip(*window_scores, strict=True)
            )
        )

    def sample(
        self, key: jax.Array, prompts: np.ndarray, num_frames: int, temperature: float
    ) -> np.ndarray:
        """Frames [B, new, W] after prompts [B, T, W]: of the mixture, or the codes' vectors."""
        if self.codes is None:
            generated = generate(
                self.lm,
                prompts,
                sampler=density.NextVector(temperature=temperature),
                max_new_tokens=num_frames,
                key=key,
            )
            return generated.vectors
        generated = generate(
            self.lm,
            self.model_inputs(prompts),
            sampler=Temperature(temperature),
            max_new_tokens=num_frames,
            key=key,
            stop=(),
        )
        return self.codes.vectors[generated.tokens]


@functools.partial(jax.jit, static_argnums=0)
def _score_window(
    model: DensityModel,
    params: Params,
    codes: CodeDensities | None,
    items: jax.Array,
    window: jax.Array,
    durations: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`FrameScores` of one window, [T] and [T, W]."""
    inputs = density_training.make_inputs(model, items, durations)
    hidden = model.context_states(params, inputs)
    frame_density = _frame_density(model.distribution(params, hidden), codes)
    return frame_density.log_prob(window[1:]), frame_density.mean


def _frame_density(
    distribution: Density | Categorical, codes: CodeDensities | None
) -> Density:
    """The density of frames that a model's distribution is; of codes, the mixture of theirs."""
    if not isinstance(distribution, Categorical):
        return distribution
    assert codes is not None
    vectors = jnp.asarray(codes.vectors)
    return Mixture(distribution.logits, vectors, jnp.asarray(codes.scales))


def unigram_baseline(codes: CodeDensities, windows: np.ndarray) -> FrameScores:
    """Every code as probable as it is frequent."""
    mixture = Mixture(
        *map(jnp.asarray, (codes.log_shares, codes.vectors, codes.scales))
    )
    log_prob = jax.lax.map(mixture.log_prob, jnp.asarray(windows[:, 1:]))
    mean = np.broadcast_to(np.asarray(mixture.mean), windows[:, 1:].shape)
    return FrameScores(np.asarray(log_prob), mean)


def previous_frame_baseline(frames: np.ndarray, windows: np.ndarray) -> FrameScores:
    """A Gaussian around the frame before, as wide as the training frames' steps [T, W] are."""
    frame_steps = np.diff(frames, axis=0)
    scale = np.maximum(np.sqrt((frame_steps**2).mean(axis=0)), MIN_SCALE)
    previous_frames = jnp.asarray(windows[:, :-1])
    log_prob = Gaussian(previous_frames, jnp.asarray(scale)).log_prob(windows[:, 1:])
    return FrameScores(np.asarray(log_prob), windows[:, :-1])


# --- Numbers --------------------------------------------------------------------------------------


def squared_steps(frames: np.ndarray) -> np.ndarray:
    """Squared differences of neighbours among frames [B, T, W], means over bands: [B, T - 1]."""
    return np.asarray((np.diff(frames, axis=1) ** 2).mean(axis=-1), np.float64)


def movement_statistics(frames: np.ndarray) -> dict[str, float]:
    """Compute mean squared step, variance and share of still steps of frames [B, T, W]."""
    step_sizes = squared_steps(frames)
    return {
        "squared_step": float(step_sizes.mean()),
        "variance": float(frames.reshape(-1, frames.shape[-1]).var(axis=0).mean()),
        "unmoved": float((step_sizes == 0.0).mean()),
    }


def prediction_errors(
    predicted: np.ndarray, target: np.ndarray, deviation: np.ndarray
) -> dict[str, float]:
    """Mean squared error of frames [..., W] in standard units, and its root in decibels."""
    squared_errors = np.asarray(predicted - target, np.float64) ** 2
    decibels = DECIBELS_PER_NAT * np.sqrt((squared_errors * deviation**2).mean())
    return {"squared": float(squared_errors.mean()), "decibels": float(decibels)}


def summarize_likelihood(scores: FrameScores, deviation: np.ndarray) -> dict[str, Any]:
    """Nats a frame with an interval over windows, in standard units and those of log-mel power."""
    window_means = np.asarray(scores.log_prob, np.float64).mean(axis=1)
    mean = float(window_means.mean())
    return {
        "nats_per_frame": mean,
        "interval": bootstrap_interval(
            window_means, seed=0, num_resamples=NUM_RESAMPLES
        ),
        "nats_per_frame_log_mel": mean - float(np.log(deviation).sum()),
    }


def sweep_durations(
    audio_models: Mapping[str, AudioModel],
    windows_by_hop: Mapping[float, np.ndarray],
    durations: np.ndarray,
) -> dict[str, Any]:
    """Nats a frame where each lasts as long as `durations` say, for sound analysed at other hops.

    Args:
      audio_models: by name.
      windows_by_hop: hop, in hops of training -> windows [B, T + 1, W]. A frame of these lasts that
        long.
      durations: durations.
    """
    nats_by_hop = {
        name: {
            f"{hop:g}": [
                float(audio_model.score(windows, duration).log_prob.mean())
                for duration in durations
            ]
            for hop, windows in windows_by_hop.items()
        }
        for name, audio_model in audio_models.items()
    }
    best_durations = {
        name: {
            hop: float(durations[int(np.argmax(curve))])
            for hop, curve in curve_by_hop.items()
        }
        for name, curve_by_hop in nats_by_hop.items()
    }
    return {
        "durations": durations.tolist(),
        "nats_per_frame": nats_by_hop,
        "best_duration": best_durations,
    }
