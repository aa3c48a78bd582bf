"""Sound as frames, and back: log-mel spectra, Griffin-Lim. Numpy alone.

Sound is float64 [n], full scale from -1 to 1, of `rate` samples a second. Frames are [T, W], the
logarithms of a spectrum's power in W bands, one spectrum every `hop` samples; spectra, [T, bins].
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from continuous_lm.arguments import check_count
from continuous_lm.errors import InputError


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """Settings of log-mel frames.

    Attributes:
      rate: samples a second.
      window: samples in the window of a spectrum.
      hop: samples from one frame to the next.
      bands: number of bands, W.
      low: lower end of the bands, in Hz; their upper end is half the rate.
      floor: power added to each band, which bounds its logarithm below.
    """

    rate: int = 8000
    window: int = 400
    hop: int = 100
    bands: int = 40
    low: float = 50.0
    floor: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("rate", "window", "hop", "bands"):
            check_count(name, getattr(self, name))
        if 2 * self.hop > self.window:
            raise InputError(
                f"hop is {self.hop}; it must be at most half the window, {self.window}, or sound"
                " is lost between frames"
            )
        if not 0.0 <= self.low < self.rate / 2:
            raise InputError(
                f"low is {self.low!r}; it must be from 0 to below {self.rate / 2:g}"
            )
        if not self.floor > 0.0:
            raise InputError(f"floor is {self.floor!r}; it must be above 0")
        if not self.filters.any(axis=1).all():
            raise InputError(
                f"{self.bands} bands are too narrow for a window of {self.window} samples: some"
                " hold no bin of the spectrum; take fewer, or a longer window"
            )

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """`mel_filters` [W, bins]."""
        return mel_filters(
            rate=self.rate, window=self.window, bands=self.bands, low=self.low
        )

    @property
    def seconds_per_frame(self) -> float:
        return self.hop / self.rate


# --- Spectra --------------------------------------------------------------------------------------


def hann_window(window: int) -> np.ndarray:
    """The Hann window [window], of which one shifted by half of it adds to 1."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


def stft(samples: np.ndarray, *, window: int, hop: int) -> np.ndarray:
    """Short-time Fourier transform: complex [T, bins], bins = window // 2 + 1, T = 1 + n // hop.

    Spectrum i sees the samples around number i * hop through a Hann window; there is silence before
    the first sample and after the last.

    Raises:
      InputError: if there are no samples.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or not len(samples):
        raise InputError(
            f"samples have shape {list(samples.shape)}; they must be [n], n >= 1"
        )
    padded = np.pad(samples, (window // 2, window))
    num_frames = 1 + len(samples) // hop
    windowed = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][
        :num_frames
    ]
    return np.fft.rfft(windowed * hann_window(window), axis=1)


def istft(
    spectra: np.ndarray, *, window: int, hop: int, length: int | None = None
) -> np.ndarray:
    """The sound whose spectra come closest to `spectra`, in squares (Griffin and Lim, 1984, eq. 6).

    Args:
      spectra: [T, bins].
      window: samples in the window of a spectrum.
      hop: samples between spectra.
      length: number of samples n; (T - 1) hop + 1 if omitted.

    Returns:
      samples [n]. The inverse of `stft`, up to the middle of the last window.
    """
    windowed = np.fft.irfft(spectra, n=window, axis=1) * hann_window(window)
    overlapped = _overlap_add(windowed, hop)
    window_weight = _overlap_add(
        np.broadcast_to(hann_window(window) ** 2, windowed.shape), hop
    )
    length = (len(windowed) - 1) * hop + 1 if length is None else length
    first_sample = window // 2
    missing_samples = max(0, first_sample + length - len(overlapped))
    kept_samples = slice(first_sample, first_sample + length)
    samples = np.pad(overlapped, (0, missing_samples))[kept_samples]
    weight = np.pad(window_weight, (0, missing_samples))[kept_samples]
    # It is less beyond the last window's middle alone.
    return samples / np.maximum(weight, 1e-3)


def _overlap_add(pieces: np.ndarray, hop: int) -> np.ndarray:
    """The sum [n] of pieces [T, window], each `hop` later than the one before."""
    num_pieces, window = pieces.shape
    hops_per_window = -(-window // hop)
    pieces = np.pad(pieces, ((0, 0), (0, hops_per_window * hop - window))).reshape(
        num_pieces, hops_per_window, hop
    )
    overlapped = np.zeros((num_pieces + hops_per_window, hop))
    for i in range(hops_per_window):
        overlapped[i : i + num_pieces] += pieces[:, i]
    return overlapped.reshape(-1)


# --- Mel bands ------------------------------------------------------------------------------------


def hertz_to_mel(hertz: np.ndarray | float) -> np.ndarray:
    """Pitch in mel, 2595 log10(1 + f / 700) (O'Shaughnessy, "Speech Communication", 1987)."""
    return 2595.0 * np.log10(1.0 + np.asarray(hertz, np.float64) / 700.0)


def mel_to_hertz(mel: np.ndarray | float) -> np.ndarray:
    """The inverse of `hertz_to_mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0)


def band_frequencies(*, rate: int, bands: int, low: float) -> np.ndarray:
    """Return the edges and centres of the bands in Hz, [W + 2], evenly spaced in mel."""
    return mel_to_hertz(
        np.linspace(hertz_to_mel(low), hertz_to_mel(rate / 2), bands + 2)
    )


def mel_filters(*, rate: int, window: int, bands: int, low: float = 0.0) -> np.ndarray:
    """Weights [W, bins] of the spectrum's bins in each band: triangles over frequency, of height 1.

    Each begins at its lower neighbour's peak and ends at its upper one's (Davis and Mermelstein,
    1980), so that between the first peak and the last they add to 1.
    """
    bins = np.fft.rfftfreq(window, 1 / rate)
    frequencies = band_frequencies(rate=rate, bands=bands, low=low)
    spacings = np.diff(frequencies)[:, None]
    rising = (bins - frequencies[:-2, None]) / spacings[:-1]
    falling = (frequencies[2:, None] - bins) / spacings[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def log_mel(samples: np.ndarray, mel_config: MelConfig) -> np.ndarray:
    """Frames of sound: log(power in each band + floor), in nats, [T, W].

    A sine of amplitude 1 has power 1 / 4 in its bin: spectra are divided by the window's sum.

    Raises:
      InputError: if the sound is shorter than a window, or not finite.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or len(samples) < mel_config.window:
        raise InputError(
            f"sound of shape {list(samples.shape)} is too short: a window has {mel_config.window}"
            " samples"
        )
    if not np.isfinite(samples).all():
        raise InputError("the sound is not finite")
    spectra = (
        stft(samples, window=mel_config.window, hop=mel_config.hop)
        / hann_window(mel_config.window).sum()
    )
    return np.log(np.abs(spectra) ** 2 @ mel_config.filters.T + mel_config.floor)


def magnitudes_from_log_mel(
    frames: np.ndarray, mel_config: MelConfig, *, num_updates: int = 100
) -> np.ndarray:
    """Magnitudes [T, bins] of spectra that have these frames [T, W], as `stft` scales them.

    Powers that are not negative and, in squares, nearly give the bands': multiplicative updates
    (Lee and Seung, 2001, eq. 4), which start from the bands' mean powers, spread over their bins.

    Args:
      frames: as in `log_mel`.
      mel_config: that they were made with.
      num_updates: updates.
    """
    filters = mel_config.filters
    target_power = np.maximum(
        np.exp(np.asarray(frames, np.float64)) - mel_config.floor, mel_config.floor
    )
    power = (target_power / filters.sum(axis=1)) @ filters
    numerator = target_power @ filters
    gram = filters.T @ filters
    for _ in range(num_updates):
        power *= numerator / np.maximum(power @ gram, 1e-30)
    return np.sqrt(power) * hann_window(mel_config.window).sum()


# --- Phases ---------------------------------------------------------------------------------------


def griffin_lim(
    magnitudes: np.ndarray,
    *,
    window: int,
    hop: int,
    length: int | None = None,
    iterations: int = 60,
    momentum: float = 0.99,
    seed: int = 0,
) -> np.ndarray:
    """Sound of which `stft` has these magnitudes, as nearly as can be found: phases are made up.

    From random phases, sound and spectra are made of each other in turn, and the magnitudes
    restored each time (Griffin and Lim, 1984). With momentum it is the fast variant (Perraudin,
    Balazs and Sondergaard, 2013), which gets closer.

    Args:
      magnitudes: [T, bins].
      window: samples that a spectrum sees.
      hop: samples between spectra.
      length: n; see `istft`.
      iterations: how often.
      momentum: 0 for the original.
      seed: seed of the first phases.

    Returns:
      samples [n].
    """
    if window // 2 + 1 != np.shape(magnitudes)[-1]:
        raise InputError(
            f"magnitudes have shape {list(np.shape(magnitudes))}; a window of {window} gives"
            f" [T, {window // 2 + 1}]"
        )
    phases = np.random.default_rng(seed).uniform(-np.pi, np.pi, magnitudes.shape)
    spectra = magnitudes * np.exp(1j * phases)
    previous_spectra = np.zeros_like(spectra)
    for _ in range(iterations):
        rebuilt_spectra = stft(
            istft(spectra, window=window, hop=hop), window=window, hop=hop
        )
        accelerated_spectra = rebuilt_spectra + momentum * (
            rebuilt_spectra - previous_spectra
        )
        spectra = (
            magnitudes
            * accelerated_spectra
            / np.maximum(np.abs(accelerated_spectra), 1e-12)
        )
        previous_spectra = rebuilt_spectra
    return istft(spectra, window=window, hop=hop, length=length)


def spectral_convergence(
    samples: np.ndarray, magnitudes: np.ndarray, *, window: int, hop: int
) -> float:
    """Return the relative error of a sound's magnitudes, || |s| - m || / || m ||."""
    sound_magnitudes = np.abs(stft(samples, window=window, hop=hop))[: len(magnitudes)]
    return float(
        np.linalg.norm(sound_magnitudes - magnitudes) / np.linalg.norm(magnitudes)
    )


def reconstruct(
    frames: np.ndarray, mel_config: MelConfig, *, iterations: int = 60
) -> np.ndarray:
    """Sound [n] of log-mel frames [T, W], with phases by `griffin_lim`."""
    return griffin_lim(
        magnitudes_from_log_mel(frames, mel_config),
        window=mel_config.window,
        hop=mel_config.hop,
        iterations=iterations,
    )


# --- Statistics -----------------------------------------------------------------------------------


class BandStatistics(NamedTuple):
    """Mean and standard deviation of each band, by which frames are standardised."""

    mean: np.ndarray  # [W]
    deviation: np.ndarray  # [W]

    def standardize(self, frames: np.ndarray) -> np.ndarray:
        """Frames [..., W] with mean 0 and deviation 1 in each band, where these are theirs."""
        return (frames - self.mean) / self.deviation

    def restore(self, frames: np.ndarray) -> np.ndarray:
        """The inverse of `standardize`."""
        return frames * self.deviation + self.mean


def compute_band_statistics(frames: np.ndarray) -> BandStatistics:
    """Compute the mean and standard deviation of each band of frames [..., W].

    Raises:
      InputError: if a band is constant.
    """
    frames = np.asarray(frames, np.float64).reshape(-1, np.shape(frames)[-1])
    deviation = frames.std(axis=0)
    if not (deviation > 1e-6).all():
        band = int(np.argmin(deviation))
        raise InputError(
            f"band {band} of the frames does not vary; is the sound silent?"
        )
    return BandStatistics(frames.mean(axis=0), deviation)
