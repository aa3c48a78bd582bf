"""Synthetic recordings: sentences of tones, and speech by espeak-ng."""

import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from continuous_lm.errors import InputError
from continuous_lm.experiments.audio.sound import hann
from continuous_lm.experiments.audio.wav_files import read_wav, resampled

ESPEAK = "espeak-ng"


BACKGROUND = 5e-4  # standard deviation of the noise in every recording, 66 dB below full scale


_LEVEL = 0.1  # root mean square of a sentence


class Segment(NamedTuple):
    """A stretch of a speech sound."""

    seconds: float
    voice: float = 0.0  # level of the harmonics
    formants: tuple[float, float, float] | None = None  # in Hz; None: on the way to the next
    noise: float = 0.0  # level of the noise
    centre: float = 0.0  # of the noise, in Hz
    width: float = 1.0  # of the noise, in Hz


# Vowels: means of 33 men (Peterson and Barney, 1952, table II). Consonants are rough.
SOUNDS: dict[str, tuple[Segment, ...]] = {
    "a": (Segment(0.12, 1.0, (730.0, 1090.0, 2440.0)),),
    "e": (Segment(0.10, 1.0, (530.0, 1840.0, 2480.0)),),
    "i": (Segment(0.10, 0.8, (270.0, 2290.0, 3010.0)),),
    "o": (Segment(0.12, 1.0, (570.0, 840.0, 2410.0)),),
    "u": (Segment(0.10, 0.8, (300.0, 870.0, 2240.0)),),
    "m": (Segment(0.07, 0.3, (250.0, 1000.0, 2200.0)),),
    "n": (Segment(0.07, 0.3, (250.0, 1500.0, 2500.0)),),
    "l": (Segment(0.06, 0.5, (360.0, 1300.0, 2700.0)),),
    "s": (Segment(0.10, noise=0.20, centre=3500.0, width=400.0),),
    "x": (Segment(0.10, noise=0.25, centre=2400.0, width=400.0),),
    "f": (Segment(0.09, noise=0.06, centre=1800.0, width=1500.0),),
    "p": (Segment(0.06), Segment(0.02, noise=0.20, centre=700.0, width=300.0)),
    "t": (Segment(0.06), Segment(0.02, noise=0.30, centre=3200.0, width=600.0)),
    "k": (Segment(0.06), Segment(0.03, noise=0.30, centre=1700.0, width=300.0)),
}


WORDS = "sami tunola kexi lopa fimu nake tosu pila moxa eketi usano limafo".split()


_FOLLOWERS = 3  # words that can come after a word


_BANDWIDTHS = (70.0, 100.0, 160.0)


_CONTROL = 1000  # values a second of what moves


def tones(seconds: float, *, seed: int, rate: int) -> np.ndarray:
    """Speech-like sound: sentences of made-up words, with pauses.

    There is structure to learn at three lengths: harmonics of a gliding pitch under three moving
    resonances, and noise, within a sound; a dozen words of a few sounds each; and after a word one
    of three others. Each sentence has a speaker of its own: pitch, length of the vocal tract and
    speed. Other seeds give other sentences of the same words.

    Args:
      seconds: how long.
      seed: of the sentences.
      rate: samples a second.

    Returns:
      samples [seconds * rate], with `BACKGROUND` noise.
    """
    count = samples_in(seconds, rate)
    rng = np.random.default_rng([seed, 1])
    pieces, total = [], 0
    while total < count:
        pieces.append(_sentence(rng, rate))
        total += len(pieces[-1])
    return np.concatenate(pieces)[:count] + BACKGROUND * rng.standard_normal(count)


def samples_in(seconds: float, rate: int) -> int:
    """How many samples so many seconds have.

    Raises:
      InputError: if that is none.
    """
    if not (np.isfinite(seconds) and seconds * rate >= 1.0):
        raise InputError(f"{seconds!r} seconds of sound are too short; give more")
    return round(seconds * rate)


def followers(word: int) -> list[int]:
    """The words, by their numbers, that can come after a word."""
    return [(word * 5 + step) % len(WORDS) for step in (1, 4, 9)][:_FOLLOWERS]


def _sentence(rng: np.random.Generator, rate: int) -> np.ndarray:
    """A sentence of a new speaker and the pause after it."""
    word = int(rng.integers(len(WORDS)))
    spoken = [Segment(0.03)]
    for _ in range(int(rng.integers(3, 6))):
        spoken += [segment for letter in WORDS[word] for segment in SOUNDS[letter]]
        spoken.append(Segment(0.04))
        word = followers(word)[rng.integers(_FOLLOWERS)]
    speed = rng.uniform(0.85, 1.2)
    pause = Segment(speed * rng.uniform(0.15, 0.35))
    segments = [s._replace(seconds=s.seconds / speed) for s in (*spoken, pause)]
    pitch = np.exp(rng.uniform(np.log(95.0), np.log(165.0)))
    return spoken_by(segments, rate=rate, pitch=pitch, tract=rng.uniform(0.92, 1.1), rng=rng)


def spoken_by(
    segments: Sequence[Segment],
    *,
    rate: int,
    pitch: float,
    tract: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sound of segments: harmonics weighted by three resonances, and noise around a frequency.

    Args:
      segments: one after another.
      rate: samples a second.
      pitch: of the voice, in Hz; it falls, and wavers.
      tract: multiplies the resonances' frequencies.
      rng: of the noise and the wavering.
    """
    ends = np.cumsum([s.seconds for s in segments])
    count = round(ends[-1] * rate)
    moments = np.arange(0.0, count / rate + 1 / _CONTROL, 1 / _CONTROL)
    place = np.minimum(np.searchsorted(ends, moments, side="right"), len(segments) - 1)

    def track(values: Sequence[float], seconds: float) -> np.ndarray:
        """What moves from one segment's value to the next one's within so many seconds."""
        size = max(3, round(seconds * _CONTROL)) | 1
        kernel = hann(size + 1)[1:]
        padded = np.pad(np.asarray(values, np.float64)[place], size // 2, mode="edge")
        return np.convolve(padded, kernel / kernel.sum(), mode="valid")

    times = np.arange(count) / rate
    formants = [track(row, 0.09) * tract for row in np.array(_aimed(segments)).T]
    waver = np.cumsum(rng.standard_normal(len(moments) // 100 + 2)) * 0.02
    fall = np.linspace(1.1, 0.85, len(moments))
    waver = np.interp(moments, np.arange(len(waver)) / 10, waver - waver.mean())
    frequency = pitch * fall * np.exp(np.clip(waver, -0.2, 0.2))
    voice = track([s.voice for s in segments], 0.03)
    sound = _voiced(frequency, formants, voice, moments, times, rate)
    for centre, width in sorted({(s.centre, s.width) for s in segments if s.noise}):
        levels = [s.noise * ((s.centre, s.width) == (centre, width)) for s in segments]
        noise = np.fft.rfft(rng.standard_normal(count))
        noise *= np.exp(-0.5 * ((np.fft.rfftfreq(count, 1 / rate) - centre * tract) / width) ** 2)
        coloured = np.fft.irfft(noise, n=count)
        scale = max(float(coloured.std()), 1e-12)
        sound += np.interp(times, moments, track(levels, 0.012)) * coloured / scale
    return _LEVEL * sound / max(float(np.sqrt(np.mean(sound**2))), 1e-12)


def _aimed(segments: Sequence[Segment]) -> list[tuple[float, float, float]]:
    """The formants of each segment; those of the next that has some where one has none."""
    aim, found = (500.0, 1500.0, 2500.0), []
    for segment in reversed(segments):
        aim = segment.formants or aim
        found.append(aim)
    return found[::-1]


def _voiced(frequency, formants, level, moments, times, rate) -> np.ndarray:
    """Harmonics h of a pitch, 1 / h strong, through resonances in a row; values at `moments`."""
    phase = 2 * np.pi * np.cumsum(np.interp(times, moments, frequency)) / rate
    twice = 2 * np.cos(phase)
    before, now = np.zeros_like(phase), np.sin(phase)  # of (h - 1) and h times the phase
    sound = np.zeros_like(phase)
    for h in range(1, int(rate / 2 / frequency.min()) + 1):
        partial = h * frequency
        gain = level / h * (partial < 0.95 * rate / 2)
        for formant, width in zip(formants, _BANDWIDTHS, strict=True):
            gain = gain * formant**2 / np.hypot(formant**2 - partial**2, width * partial)
        sound += np.interp(times, moments, gain) * now
        before, now = now, twice * now - before
    return sound


def espeak() -> str:
    """Where espeak-ng is.

    Raises:
      InputError: if it is not installed.
    """
    command = shutil.which(ESPEAK)
    if command is None:
        raise InputError(
            f"{ESPEAK} is not installed; on Debian and Ubuntu `apt install {ESPEAK}` brings it, or"
            " take synthesised tones instead of speech"
        )
    return command


def speech(
    sentences: Sequence[str], seconds: float, *, seed: int, rate: int, voice: str = "en"
) -> np.ndarray:
    """Speech by espeak-ng, each sentence at a speed and pitch of its own.

    Args:
      sentences: read in this order, from the beginning again if they do not last.
      seconds: how long.
      seed: of speeds, pitches and noise.
      rate: samples a second.
      voice: one of those of `espeak-ng --voices`.

    Returns:
      samples [seconds * rate], with `BACKGROUND` noise.

    Raises:
      InputError: if espeak-ng is not installed or fails, or there is nothing to read.
    """
    count = samples_in(seconds, rate)
    command = espeak()
    if not sentences:
        raise InputError("there are no sentences to read")
    rng = np.random.default_rng([seed, 2])
    pieces: list[np.ndarray] = []
    total = 0
    while total < count:
        sentence = sentences[len(pieces) // 2 % len(sentences)]
        options = ["-v", voice, "-s", str(rng.integers(150, 200)), "-p", str(rng.integers(20, 70))]
        samples = _spoken(command, options, sentence, rate)
        if not samples.any():
            raise InputError(f"{ESPEAK} reads {sentence!r:.60} as silence")
        pause = np.zeros(samples_in(rng.uniform(0.15, 0.35), rate))
        pieces += [_LEVEL * samples / np.sqrt(np.mean(samples**2)), pause]
        total += len(samples) + len(pause)
    return np.concatenate(pieces)[:count] + BACKGROUND * rng.standard_normal(count)


def _spoken(command: str, options: list[str], text: str, rate: int) -> np.ndarray:
    """What espeak-ng makes of a text, at our rate."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "speech.wav")
        try:
            done = subprocess.run(
                [command, *options, "-w", str(path), "--stdin"],
                input=text.encode(),
                capture_output=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"{command} does not run: {error}") from None
        if done.returncode or not path.exists():
            said = " ".join(done.stderr.decode(errors="replace").split()) or "it said nothing"
            raise InputError(f"{command} failed with status {done.returncode}: {said:.200}")
        samples, found = read_wav(path)
    return resampled(samples, found, rate)
