"""Sound as frames, and back: synthesis, log-mel spectra, Griffin-Lim, WAV files. Numpy alone.

Sound is float64 [n], full scale from -1 to 1, of `rate` samples a second. Frames are [T, W], the
logarithms of a spectrum's power in W bands, one spectrum every `hop` samples; spectra have F bins.
"""

import dataclasses
import functools
import pathlib
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from continuous_lm.errors import InputError

ESPEAK = "espeak-ng"
BACKGROUND = 5e-4  # standard deviation of the noise in every recording, 66 dB below full scale
_LEVEL = 0.1  # root mean square of a sentence


@dataclasses.dataclass(frozen=True)
class Analysis:
    """How sound becomes frames.

    Attributes:
      rate: samples a second.
      window: samples that a spectrum sees.
      hop: samples from one frame to the next.
      bands: W.
      low: where the bands begin, in Hz; they end at half the rate.
      floor: power that is added to a band's, so that its logarithm is bounded below.
    """

    rate: int = 8000
    window: int = 400
    hop: int = 100
    bands: int = 40
    low: float = 50.0
    floor: float = 1e-8

    def __post_init__(self):
        for name in ("rate", "window", "hop", "bands"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a positive integer")
        if 2 * self.hop > self.window:
            raise InputError(
                f"hop is {self.hop}; it must be at most half the window, {self.window}, or sound"
                " is lost between frames"
            )
        if not 0.0 <= self.low < self.rate / 2:
            raise InputError(f"low is {self.low!r}; it must be from 0 to below {self.rate / 2:g}")
        if not self.floor > 0.0:
            raise InputError(f"floor is {self.floor!r}; it must be above 0")
        if not self.filters.any(axis=1).all():
            raise InputError(
                f"{self.bands} bands are too narrow for a window of {self.window} samples: some"
                " hold no bin of the spectrum; take fewer, or a longer window"
            )

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """`mel_filters` [W, F]."""
        return mel_filters(rate=self.rate, window=self.window, bands=self.bands, low=self.low)

    @property
    def seconds_per_frame(self) -> float:
        return self.hop / self.rate


# --- Spectra --------------------------------------------------------------------------------------


def hann(window: int) -> np.ndarray:
    """The Hann window [window], of which one shifted by half of it adds to 1."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


def stft(samples: np.ndarray, *, window: int, hop: int) -> np.ndarray:
    """Short-time Fourier transform: complex [T, F], F = window // 2 + 1, T = 1 + n // hop.

    Spectrum i sees the samples around number i * hop through a Hann window; there is silence before
    the first sample and after the last.

    Raises:
      InputError: if there are no samples.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or not len(samples):
        raise InputError(f"samples have shape {list(samples.shape)}; they must be [n], n >= 1")
    padded = np.pad(samples, (window // 2, window))
    count = 1 + len(samples) // hop
    cut = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][:count]
    return np.fft.rfft(cut * hann(window), axis=1)


def istft(spectra: np.ndarray, *, window: int, hop: int, length: int | None = None) -> np.ndarray:
    """The sound whose spectra come closest to `spectra`, in squares (Griffin and Lim, 1984, eq. 6).

    Args:
      spectra: [T, F].
      window: samples that a spectrum sees.
      hop: samples between spectra.
      length: n; all that the spectra tell of, (T - 1) hop + 1, if left out.

    Returns:
      samples [n]. Of what `stft` gave it is the sound itself, up to the last window's middle.
    """
    cut = np.fft.irfft(spectra, n=window, axis=1) * hann(window)
    total = _overlapped(cut, hop)
    weight = _overlapped(np.broadcast_to(hann(window) ** 2, cut.shape), hop)
    length = (len(cut) - 1) * hop + 1 if length is None else length
    begin = window // 2
    room = max(0, begin + length - len(total))
    total, weight = (np.pad(a, (0, room))[begin : begin + length] for a in (total, weight))
    return total / np.maximum(weight, 1e-3)  # it is less beyond the last window's middle alone


def _overlapped(cut: np.ndarray, hop: int) -> np.ndarray:
    """The sum [n] of pieces [T, window], each `hop` later than the one before."""
    count, window = cut.shape
    parts = -(-window // hop)
    cut = np.pad(cut, ((0, 0), (0, parts * hop - window))).reshape(count, parts, hop)
    total = np.zeros((count + parts, hop))
    for i in range(parts):
        total[i : i + count] += cut[:, i]
    return total.reshape(-1)


# --- Mel bands ------------------------------------------------------------------------------------


def mel(hertz: np.ndarray | float) -> np.ndarray:
    """Pitch in mel, 2595 log10(1 + f / 700) (O'Shaughnessy, "Speech Communication", 1987)."""
    return 2595.0 * np.log10(1.0 + np.asarray(hertz, np.float64) / 700.0)


def hertz(mel: np.ndarray | float) -> np.ndarray:
    """The inverse of `mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0)


def centres(*, rate: int, bands: int, low: float) -> np.ndarray:
    """Where the bands begin, culminate and end, in Hz, [W + 2]: evenly spaced in mel."""
    return hertz(np.linspace(mel(low), mel(rate / 2), bands + 2))


def mel_filters(*, rate: int, window: int, bands: int, low: float = 0.0) -> np.ndarray:
    """Weights [W, F] of the spectrum's bins in each band: triangles over frequency, of height 1.

    Each begins at its lower neighbour's peak and ends at its upper one's (Davis and Mermelstein,
    1980), so that between the first peak and the last they add to 1.
    """
    bins = np.fft.rfftfreq(window, 1 / rate)
    places = centres(rate=rate, bands=bands, low=low)
    width = np.diff(places)[:, None]
    rising = (bins - places[:-2, None]) / width[:-1]
    falling = (places[2:, None] - bins) / width[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def log_mel(samples: np.ndarray, analysis: Analysis) -> np.ndarray:
    """Frames of sound: log(power in each band + floor), in nats, [T, W].

    A sine of amplitude 1 has power 1 / 4 in its bin: spectra are divided by the window's sum.

    Raises:
      InputError: if the sound is shorter than a window, or not finite.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or len(samples) < analysis.window:
        raise InputError(
            f"sound of shape {list(samples.shape)} is too short: a window has {analysis.window}"
            " samples"
        )
    if not np.isfinite(samples).all():
        raise InputError("the sound is not finite")
    spectra = stft(samples, window=analysis.window, hop=analysis.hop) / hann(analysis.window).sum()
    return np.log(np.abs(spectra) ** 2 @ analysis.filters.T + analysis.floor)


def magnitudes(frames: np.ndarray, analysis: Analysis, *, steps: int = 100) -> np.ndarray:
    """Magnitudes [T, F] of spectra that have these frames [T, W], as `stft` scales them.

    Powers that are not negative and, in squares, nearly give the bands': multiplicative updates
    (Lee and Seung, 2001, eq. 4), which start from the bands' mean powers, spread over their bins.

    Args:
      frames: as of `log_mel`.
      analysis: that they were made with.
      steps: updates.
    """
    filters = analysis.filters
    wanted = np.maximum(np.exp(np.asarray(frames, np.float64)) - analysis.floor, analysis.floor)
    power = (wanted / filters.sum(axis=1)) @ filters
    numerator, gram = wanted @ filters, filters.T @ filters
    for _ in range(steps):
        power *= numerator / np.maximum(power @ gram, 1e-30)
    return np.sqrt(power) * hann(analysis.window).sum()


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
      magnitudes: [T, F].
      window: samples that a spectrum sees.
      hop: samples between spectra.
      length: n; see `istft`.
      iterations: how often.
      momentum: 0 for the original.
      seed: of the first phases.

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
    before = np.zeros_like(spectra)
    for _ in range(iterations):
        found = stft(istft(spectra, window=window, hop=hop), window=window, hop=hop)
        ahead = found + momentum * (found - before)
        spectra = magnitudes * ahead / np.maximum(np.abs(ahead), 1e-12)
        before = found
    return istft(spectra, window=window, hop=hop, length=length)


def spectral_convergence(
    samples: np.ndarray, magnitudes: np.ndarray, *, window: int, hop: int
) -> float:
    """How far a sound's magnitudes are from those wanted, ||  |S| - M || / || M ||; 0 is best."""
    found = np.abs(stft(samples, window=window, hop=hop))[: len(magnitudes)]
    return float(np.linalg.norm(found - magnitudes) / np.linalg.norm(magnitudes))


def heard(frames: np.ndarray, analysis: Analysis, **options) -> np.ndarray:
    """Sound [n] of log-mel frames [T, W]; options of `griffin_lim`."""
    wanted = magnitudes(frames, analysis)
    return griffin_lim(wanted, window=analysis.window, hop=analysis.hop, **options)


# --- Statistics -----------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Mean and standard deviation of each band, by which frames are standardised."""

    mean: np.ndarray  # [W]
    deviation: np.ndarray  # [W]

    def standardised(self, frames: np.ndarray) -> np.ndarray:
        """Frames [..., W] with mean 0 and deviation 1 in each band, where these are theirs."""
        return (frames - self.mean) / self.deviation

    def restored(self, frames: np.ndarray) -> np.ndarray:
        """The inverse of `standardised`."""
        return frames * self.deviation + self.mean


def statistics(frames: np.ndarray) -> Statistics:
    """Of frames [..., W].

    Raises:
      InputError: if a band is always the same.
    """
    frames = np.asarray(frames, np.float64).reshape(-1, np.shape(frames)[-1])
    deviation = frames.std(axis=0)
    if not (deviation > 1e-6).all():
        band = int(np.argmin(deviation))
        raise InputError(f"band {band} of the frames does not vary; is the sound silent?")
    return Statistics(frames.mean(axis=0), deviation)


# --- Speech-like sound ----------------------------------------------------------------------------


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


# --- Speech ---------------------------------------------------------------------------------------


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


def resampled(samples: np.ndarray, found: int, wanted: int) -> np.ndarray:
    """Sound at another rate, by its Fourier series: what half of either cannot hold is gone."""
    count = max(1, round(len(samples) * wanted / found))
    series = np.fft.rfft(samples)
    bins = count // 2 + 1
    series = np.pad(series, (0, max(0, bins - len(series))))[:bins]
    return np.fft.irfft(series, n=count) * (count / len(samples))


# --- Files ----------------------------------------------------------------------------------------


def write_wav(path: pathlib.Path, samples: np.ndarray, rate: int) -> None:
    """Writes sound [n] as 16-bit PCM, one channel; what is beyond full scale is clipped.

    Raises:
      InputError: if there is none, or it is not finite.
    """
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise InputError(f"sound of shape {list(samples.shape)} must be [n], n >= 1, and finite")
    whole = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.tobytes())


def read_wav(path: pathlib.Path) -> tuple[np.ndarray, int]:
    """Sound [n] and samples a second of a file of 16-bit PCM; channels are averaged.

    Raises:
      InputError: if it is not one.
    """
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise InputError(f"{path} has {8 * file.getsampwidth()} bits a sample, not 16")
            data, rate = file.readframes(file.getnframes()), file.getframerate()
            samples = np.frombuffer(data, "<i2").reshape(-1, file.getnchannels())
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise InputError(f"{path} cannot be read as a WAV file: {error}") from None
    if not len(samples):
        raise InputError(f"{path} holds no sound")
    return samples.mean(axis=1) / 32768.0, rate
