"""Synthetic recordings: sentences of tones, and speech by espeak-ng."""

import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from continuous_lm.errors import InputError
from continuous_lm.experiments.audio.sound import hann_window
from continuous_lm.experiments.audio.wav_files import read_wav, resample

ESPEAK_COMMAND = "espeak-ng"


BACKGROUND_NOISE = (
    5e-4  # standard deviation of the noise in every recording, 66 dB below full scale
)


_SENTENCE_RMS = 0.1  # root mean square of a sentence


class SoundSegment(NamedTuple):
    """A stretch of a speech sound."""

    seconds: float
    voice_level: float = 0.0  # level of the harmonics
    formants: tuple[float, float, float] | None = (
        None  # in Hz; None: on the way to the next
    )
    noise_level: float = 0.0  # level of the noise
    noise_center: float = 0.0  # of the noise, in Hz
    noise_width: float = 1.0  # of the noise, in Hz


# Vowels: means of 33 men (Peterson and Barney, 1952, table II). Consonants are rough.
SPEECH_SOUNDS: dict[str, tuple[SoundSegment, ...]] = {
    "a": (SoundSegment(0.12, 1.0, (730.0, 1090.0, 2440.0)),),
    "e": (SoundSegment(0.10, 1.0, (530.0, 1840.0, 2480.0)),),
    "i": (SoundSegment(0.10, 0.8, (270.0, 2290.0, 3010.0)),),
    "o": (SoundSegment(0.12, 1.0, (570.0, 840.0, 2410.0)),),
    "u": (SoundSegment(0.10, 0.8, (300.0, 870.0, 2240.0)),),
    "m": (SoundSegment(0.07, 0.3, (250.0, 1000.0, 2200.0)),),
    "n": (SoundSegment(0.07, 0.3, (250.0, 1500.0, 2500.0)),),
    "l": (SoundSegment(0.06, 0.5, (360.0, 1300.0, 2700.0)),),
    "s": (
        SoundSegment(0.10, noise_level=0.20, noise_center=3500.0, noise_width=400.0),
    ),
    "x": (
        SoundSegment(0.10, noise_level=0.25, noise_center=2400.0, noise_width=400.0),
    ),
    "f": (
        SoundSegment(0.09, noise_level=0.06, noise_center=1800.0, noise_width=1500.0),
    ),
    "p": (
        SoundSegment(0.06),
        SoundSegment(0.02, noise_level=0.20, noise_center=700.0, noise_width=300.0),
    ),
    "t": (
        SoundSegment(0.06),
        SoundSegment(0.02, noise_level=0.30, noise_center=3200.0, noise_width=600.0),
    ),
    "k": (
        SoundSegment(0.06),
        SoundSegment(0.03, noise_level=0.30, noise_center=1700.0, noise_width=300.0),
    ),
}


MADE_UP_WORDS = (
    "sami tunola kexi lopa fimu nake tosu pila moxa eketi usano limafo".split()
)


_NUM_FOLLOWERS = 3  # words that can come after a word


_FORMANT_BANDWIDTHS = (70.0, 100.0, 160.0)


_CONTROL_RATE = 1000  # values a second of the control tracks


def synthesize_tones(seconds: float, *, seed: int, rate: int) -> np.ndarray:
    """Speech-like sound: sentences of made-up words, with pauses.

    The sound has structure at three lengths. A sound has harmonics of a gliding pitch under three
    moving resonances, or noise. A dozen words have a few sounds each. Each word is followed by one
    of three others. Each sentence has its own speaker: pitch, length of the vocal tract and speed.
    Other seeds give other sentences of the same words.

    Args:
      seconds: length of the sound.
      seed: seed of the sentences.
      rate: samples a second.

    Returns:
      samples [seconds * rate], with `BACKGROUND_NOISE` noise.
    """
    num_wanted = num_samples(seconds, rate)
    rng = np.random.default_rng([seed, 1])
    pieces: list[np.ndarray] = []
    num_generated = 0
    while num_generated < num_wanted:
        pieces.append(_synthesize_sentence(rng, rate))
        num_generated += len(pieces[-1])
    return np.concatenate(pieces)[:num_wanted] + BACKGROUND_NOISE * rng.standard_normal(
        num_wanted
    )


def num_samples(seconds: float, rate: int) -> int:
    """Return the number of samples in `seconds`.

    Raises:
      InputError: if it is 0.
    """
    if not (np.isfinite(seconds) and seconds * rate >= 1.0):
        raise InputError(f"{seconds!r} seconds of sound are too short; give more")
    return round(seconds * rate)


def following_words(word: int) -> list[int]:
    """The words, by their numbers, that can come after a word."""
    return [(word * 5 + step) % len(MADE_UP_WORDS) for step in (1, 4, 9)][
        :_NUM_FOLLOWERS
    ]


def _synthesize_sentence(rng: np.random.Generator, rate: int) -> np.ndarray:
    """A sentence of a new speaker and the pause after it."""
    word = int(rng.integers(len(MADE_UP_WORDS)))
    spoken_segments = [SoundSegment(0.03)]
    for _ in range(int(rng.integers(3, 6))):
        spoken_segments += [
            segment
            for letter in MADE_UP_WORDS[word]
            for segment in SPEECH_SOUNDS[letter]
        ]
        spoken_segments.append(SoundSegment(0.04))
        word = following_words(word)[rng.integers(_NUM_FOLLOWERS)]
    speed = rng.uniform(0.85, 1.2)
    pause = SoundSegment(speed * rng.uniform(0.15, 0.35))
    segments = [
        spoken_segment._replace(seconds=spoken_segment.seconds / speed)
        for spoken_segment in (*spoken_segments, pause)
    ]
    pitch = np.exp(rng.uniform(np.log(95.0), np.log(165.0)))
    return synthesize_segments(
        segments, rate=rate, pitch=pitch, formant_factor=rng.uniform(0.92, 1.1), rng=rng
    )


def synthesize_segments(
    segments: Sequence[SoundSegment],
    *,
    rate: int,
    pitch: float,
    formant_factor: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sound of segments: harmonics weighted by three resonances, and noise around a frequency.

    Args:
      segments: one after another.
      rate: samples a second.
      pitch: pitch of the voice in Hz, which falls and wavers.
      formant_factor: multiplies the resonances' frequencies.
      rng: random generator of the noise and the wavering.
    """
    end_times = np.cumsum([segment.seconds for segment in segments])
    length = round(end_times[-1] * rate)
    control_times = np.arange(0.0, length / rate + 1 / _CONTROL_RATE, 1 / _CONTROL_RATE)
    segment_indices = np.minimum(
        np.searchsorted(end_times, control_times, side="right"), len(segments) - 1
    )
    times = np.arange(length) / rate
    formants = [
        _smooth_track(frequencies, segment_indices, 0.09) * formant_factor
        for frequencies in np.array(_target_formants(segments)).T
    ]
    voice_levels = _smooth_track(
        [segment.voice_level for segment in segments], segment_indices, 0.03
    )
    frequency = _intonation(pitch, control_times, rng)
    samples = _synthesize_voice(
        frequency, formants, voice_levels, control_times, times, rate
    )
    noises = {
        (segment.noise_center, segment.noise_width)
        for segment in segments
        if segment.noise_level
    }
    for noise_center, noise_width in sorted(noises):
        levels = [
            segment.noise_level
            if (segment.noise_center, segment.noise_width)
            == (noise_center, noise_width)
            else 0.0
            for segment in segments
        ]
        level_track = _smooth_track(levels, segment_indices, 0.012)
        noise = _shaped_noise(
            length, rate, noise_center * formant_factor, noise_width, rng
        )
        scale = max(float(noise.std()), 1e-12)
        samples += np.interp(times, control_times, level_track) * noise / scale
    return _SENTENCE_RMS * samples / max(float(np.sqrt(np.mean(samples**2))), 1e-12)


def _smooth_track(
    values: Sequence[float] | np.ndarray, segment_indices: np.ndarray, seconds: float
) -> np.ndarray:
    """Move from one segment's value to the next one's within so many seconds."""
    kernel_size = max(3, round(seconds * _CONTROL_RATE)) | 1
    kernel = hann_window(kernel_size + 1)[1:]
    padded = np.pad(
        np.asarray(values, np.float64)[segment_indices], kernel_size // 2, mode="edge"
    )
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")


def _intonation(
    pitch: float, control_times: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The pitch at `control_times`, in Hz: it falls, and wavers."""
    num_controls = len(control_times)
    waver = np.cumsum(rng.standard_normal(num_controls // 100 + 2)) * 0.02
    waver_times = np.arange(len(waver)) / 10
    smooth_waver = np.interp(control_times, waver_times, waver - waver.mean())
    fall = np.linspace(1.1, 0.85, num_controls)
    return pitch * fall * np.exp(np.clip(smooth_waver, -0.2, 0.2))


def _shaped_noise(
    length: int, rate: int, center: float, width: float, rng: np.random.Generator
) -> np.ndarray:
    """Noise [length] around a frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    distance = (np.fft.rfftfreq(length, 1 / rate) - center) / width
    return np.fft.irfft(spectrum * np.exp(-0.5 * distance**2), n=length)


def _target_formants(
    segments: Sequence[SoundSegment],
) -> list[tuple[float, float, float]]:
    """The formants of each segment; those of the next that has some where one has none."""
    next_formants = (500.0, 1500.0, 2500.0)
    formant_targets = []
    for segment in reversed(segments):
        next_formants = segment.formants or next_formants
        formant_targets.append(next_formants)
    return formant_targets[::-1]


def _synthesize_voice(
    frequency: np.ndarray,
    formants: Sequence[np.ndarray],
    voice_levels: np.ndarray,
    control_times: np.ndarray,
    times: np.ndarray,
    rate: float,
) -> np.ndarray:
    """Harmonics h of a pitch, 1 / h strong, through resonances; values at `control_times`."""
    phase = 2 * np.pi * np.cumsum(np.interp(times, control_times, frequency)) / rate
    twice_cosine = 2 * np.cos(phase)
    previous_harmonic = np.zeros_like(phase)  # sine of (h - 1) times the phase
    current_harmonic = np.sin(phase)  # of h times it
    samples = np.zeros_like(phase)
    for h in range(1, int(rate / 2 / frequency.min()) + 1):
        partial_frequency = h * frequency
        gain = voice_levels / h * (partial_frequency < 0.95 * rate / 2)
        for formant, bandwidth in zip(formants, _FORMANT_BANDWIDTHS, strict=True):
            gain = (
                gain
                * formant**2
                / np.hypot(
                    formant**2 - partial_frequency**2, bandwidth * partial_frequency
                )
            )
        samples += np.interp(times, control_times, gain) * current_harmonic
        previous_harmonic, current_harmonic = (
            current_harmonic,
            twice_cosine * current_harmonic - previous_harmonic,
        )
    return samples


def find_espeak() -> str:
    """Return the path of espeak-ng.

    Raises:
      InputError: if it is not installed.
    """
    command = shutil.which(ESPEAK_COMMAND)
    if command is None:
        raise InputError(
            f"{ESPEAK_COMMAND} is not installed; on Debian and Ubuntu `apt install"
            f" {ESPEAK_COMMAND}` brings it, or"
            " take synthesised tones instead of speech"
        )
    return command


def synthesize_speech(
    sentences: Sequence[str], seconds: float, *, seed: int, rate: int, voice: str = "en"
) -> np.ndarray:
    """Speech by espeak-ng, each sentence at a speed and pitch of its own.

    Args:
      sentences: read in this order, from the beginning again if they do not last.
      seconds: how long.
      seed: seed of speeds, pitches and noise.
      rate: samples a second.
      voice: one of those of `espeak-ng --voices`.

    Returns:
      samples [seconds * rate], with `BACKGROUND_NOISE` noise.

    Raises:
      InputError: if espeak-ng is not installed or fails, or there is nothing to read.
    """
    num_wanted = num_samples(seconds, rate)
    command = find_espeak()
    if not sentences:
        raise InputError("there are no sentences to read")
    rng = np.random.default_rng([seed, 2])
    pieces: list[np.ndarray] = []
    num_generated = 0
    while num_generated < num_wanted:
        sentence = sentences[len(pieces) // 2 % len(sentences)]
        options = [
            "-v",
            voice,
            "-s",
            str(rng.integers(150, 200)),
            "-p",
            str(rng.integers(20, 70)),
        ]
        samples = _run_espeak(command, options, sentence, rate)
        if not samples.any():
            raise InputError(f"{ESPEAK_COMMAND} reads {sentence!r:.60} as silence")
        pause = np.zeros(num_samples(rng.uniform(0.15, 0.35), rate))
        pieces += [_SENTENCE_RMS * samples / np.sqrt(np.mean(samples**2)), pause]
        num_generated += len(samples) + len(pause)
    return np.concatenate(pieces)[:num_wanted] + BACKGROUND_NOISE * rng.standard_normal(
        num_wanted
    )


def _run_espeak(command: str, options: list[str], text: str, rate: int) -> np.ndarray:
    """Read a text with espeak-ng and resample it to `rate`."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "speech.wav")
        try:
            process = subprocess.run(
                [command, *options, "-w", str(path), "--stdin"],
                input=text.encode(),
                capture_output=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"{command} does not run: {error}") from None
        if process.returncode or not path.exists():
            message = (
                " ".join(process.stderr.decode(errors="replace").split())
                or "it said nothing"
            )
            raise InputError(
                f"{command} failed with status {process.returncode}: {message:.200}"
            )
        samples, wav_rate = read_wav(path)
    return resample(samples, wav_rate, rate)
