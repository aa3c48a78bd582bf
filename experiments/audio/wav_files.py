"""WAV files."""

import pathlib
import wave

import numpy as np

from continuous_lm.errors import InputError


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Sound at another rate, by its Fourier series: what half of either cannot hold is gone."""
    length = max(1, round(len(samples) * new_rate / rate))
    spectrum = np.fft.rfft(samples)
    num_bins = length // 2 + 1
    spectrum = np.pad(spectrum, (0, max(0, num_bins - len(spectrum))))[:num_bins]
    return np.fft.irfft(spectrum, n=length) * (length / len(samples))


def write_wav(path: pathlib.Path, samples: np.ndarray, rate: int) -> None:
    """Write sound [n] as 16-bit PCM, one channel; samples beyond full scale are clipped.

    Raises:
      InputError: if there is none, or it is not finite.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise InputError(
            f"sound of shape {list(samples.shape)} must be [n], n >= 1, and finite"
        )
    pcm_samples = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm_samples.tobytes())


def read_wav(path: pathlib.Path) -> tuple[np.ndarray, int]:
    """Sound [n] and samples a second of a file of 16-bit PCM; channels are averaged.

    Raises:
      InputError: if it is not one.
    """
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise InputError(
                    f"{path} has {8 * file.getsampwidth()} bits a sample, not 16"
                )
            rate = file.getframerate()
            frame_bytes = file.readframes(file.getnframes())
            samples = np.frombuffer(frame_bytes, "<i2").reshape(-1, file.getnchannels())
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise InputError(f"{path} cannot be read as a WAV file: {error}") from None
    if not len(samples):
        raise InputError(f"{path} holds no sound")
    return samples.mean(axis=1) / 32768.0, rate
