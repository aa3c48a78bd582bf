"""Sound: transforms against their definitions and closed forms, and files against their bytes."""

import itertools
import shutil
import stat
import sys
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from continuous_lm.errors import InputError
from continuous_lm.experiments.audio import sound
from continuous_lm.experiments.audio.synthesis import (
    BACKGROUND_NOISE,
    ESPEAK_COMMAND,
    MADE_UP_WORDS,
    SPEECH_SOUNDS,
    SoundSegment,
    following_words,
    synthesize_segments,
    synthesize_speech,
    synthesize_tones,
)
from continuous_lm.experiments.audio.wav_files import read_wav, resample, write_wav

RATE = 8000
ANALYSIS = sound.MelConfig()
WINDOWS = {"window": ANALYSIS.window, "hop": ANALYSIS.hop}


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count)


def sine(frequency, seconds=0.5, amplitude=1.0):
    return amplitude * np.sin(
        2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE
    )


@pytest.fixture(scope="module")
def speechlike():
    return synthesize_tones(3.0, seed=1, rate=RATE)


# --- Spectra ----------------------------------------------------------------------------------


def test_hann_windows_half_apart_add_to_one():
    window = sound.hann_window(400)
    np.testing.assert_allclose(window[:200] + window[200:], 1.0, rtol=0, atol=1e-12)


def test_stft_is_the_transform_of_each_windowed_piece():
    samples, (window, hop) = noise(1000), (64, 20)
    actual = sound.stft(samples, window=window, hop=hop)
    padded = np.concatenate([np.zeros(32), samples, np.zeros(64)])
    assert actual.shape == (51, 33)
    turns = np.exp(-2j * np.pi * np.outer(np.arange(33), np.arange(64)) / 64)
    for i in (0, 1, 25, 50):
        piece = padded[i * hop : i * hop + window] * sound.hann_window(window)
        np.testing.assert_allclose(actual[i], turns @ piece, rtol=0, atol=1e-10)


def test_stft_agrees_with_scipy():
    signal = pytest.importorskip("scipy.signal")
    samples = noise(2000)
    actual = sound.stft(samples, window=400, hop=100)
    other = signal.ShortTimeFFT(sound.hann_window(400), hop=100, fs=1, phase_shift=None)
    np.testing.assert_allclose(
        actual, other.stft(samples, p0=0, p1=21).T, rtol=0, atol=1e-9
    )


@given(st.integers(400, 3000), st.sampled_from([100, 80, 133]), st.integers(0, 5))
def test_energy_of_spectra_is_that_of_sound(count, hop, seed):
    """Parseval: the squares of all windows at a sample add to a constant, where hops divide."""
    samples = noise(count, seed)
    spectra = sound.stft(samples, window=400, hop=hop)
    twice = np.full(201, 2.0)
    twice[[0, -1]] = 1.0
    energy = (twice * np.abs(spectra) ** 2).sum() / 400
    weight = np.zeros(count + 800)
    for i in range(len(spectra)):
        weight[i * hop : i * hop + 400] += sound.hann_window(400) ** 2
    expected = (samples**2 * weight[200 : 200 + count]).sum()
    assert energy == pytest.approx(expected, rel=1e-9)
    if hop == 100:
        np.testing.assert_allclose(weight[500:count], 1.5, atol=1e-9)


@given(st.integers(1, 3000), st.sampled_from([(400, 100), (400, 133), (64, 32)]))
def test_istft_undoes_stft(count, sizes):
    window, hop = sizes
    samples = noise(count)
    spectra = sound.stft(samples, window=window, hop=hop)
    actual = sound.istft(spectra, window=window, hop=hop, length=count)
    covered = (
        len(spectra) - 1
    ) * hop + 1  # what follows lies where the last window fades
    np.testing.assert_allclose(actual[:covered], samples[:covered], rtol=0, atol=1e-9)


def test_istft_is_nearest_in_squares():
    """For spectra that no sound has, every other sound's spectra are farther."""
    rng = np.random.default_rng(0)
    spectra = rng.standard_normal((9, 33)) + 1j * rng.standard_normal((9, 33))
    spectra[:, [0, -1]] = spectra[:, [0, -1]].real
    twice = np.full(33, 2.0)
    twice[[0, -1]] = 1.0

    def distance(samples):
        other = sound.stft(samples, window=64, hop=16)[:9]
        return (twice * np.abs(other - spectra) ** 2).sum()

    best = sound.istft(spectra, window=64, hop=16, length=129)
    for _ in range(20):
        assert distance(best + 1e-3 * rng.standard_normal(129)) > distance(best)


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros((3, 2))])
def test_stft_refuses_what_is_no_sound(samples):
    with pytest.raises(InputError, match="samples"):
        sound.stft(samples, window=4, hop=2)


# --- Mel bands --------------------------------------------------------------------------------


def test_mel_is_the_scale_of_its_formula():
    assert sound.hertz_to_mel(0.0) == 0.0
    assert float(sound.hertz_to_mel(1000.0)) == pytest.approx(
        1000.0, abs=0.02
    )  # as the scale is meant
    hertz = np.linspace(0.0, 8000.0, 50)
    np.testing.assert_allclose(
        sound.mel_to_hertz(sound.hertz_to_mel(hertz)), hertz, atol=1e-8
    )


def test_filters_are_triangles_that_share_every_bin():
    filters = sound.mel_filters(rate=RATE, window=400, bands=40, low=50.0)
    places = sound.band_frequencies(rate=RATE, bands=40, low=50.0)
    bins = np.arange(201) * 20.0
    between = (bins >= places[1]) & (bins <= places[-2])
    np.testing.assert_allclose(filters.sum(axis=0)[between], 1.0, atol=1e-12)
    assert (filters >= 0).all()
    assert filters.max() <= 1.0
    assert (filters.sum(axis=1) > 0).all()
    for band, row in enumerate(filters):
        inside = (bins > places[band]) & (bins < places[band + 2])
        np.testing.assert_array_equal(row > 0, inside)
        knots = places[band : band + 3]
        np.testing.assert_allclose(row, np.interp(bins, knots, [0, 1, 0]), atol=1e-12)


def test_a_sine_sounds_in_its_band_with_its_power():
    places = sound.band_frequencies(rate=RATE, bands=40, low=50.0)
    for frequency in (300.0, 1000.0, 2500.0):
        frames = sound.log_mel(sine(frequency, amplitude=0.5), ANALYSIS)[5:-5]
        assert abs(places[1:-1][frames.mean(axis=0).argmax()] - frequency) < 100.0
        # Over all bands: 0.5^2 / 4 in its bin and a quarter of that in each neighbour's.
        total = np.exp(frames).sum(axis=1)
        np.testing.assert_allclose(total, 0.0625 * 1.5, rtol=0.02)


def test_twice_as_loud_is_log_four_higher():
    samples = noise(4000)
    low, high = (sound.log_mel(a * samples, ANALYSIS) for a in (1.0, 2.0))
    np.testing.assert_allclose(high - low, np.log(4.0), rtol=0, atol=1e-3)


def test_silence_is_the_floor():
    np.testing.assert_allclose(sound.log_mel(np.zeros(800), ANALYSIS), np.log(1e-8))


def test_magnitudes_give_their_frames_back_where_spectra_are_smooth():
    """Power that is linear within bands: nothing is lost, so that it is found again nearly."""
    bins = np.arange(201) / 200
    power = np.stack([1.0 + bins, 2.0 - bins, 0.5 + bins * (1 - bins)]) * 1e-2
    frames = np.log(power @ ANALYSIS.filters.T + ANALYSIS.floor)
    scale = sound.hann_window(400).sum()
    actual = (sound.magnitudes_from_log_mel(frames, ANALYSIS) / scale) ** 2
    inside = slice(6, 160)
    np.testing.assert_allclose(actual[:, inside], power[:, inside], rtol=0.08)
    np.testing.assert_allclose(actual @ ANALYSIS.filters.T, np.exp(frames), rtol=0.01)


def test_magnitudes_of_sound_have_nearly_its_frames(speechlike):
    frames = sound.log_mel(speechlike, ANALYSIS)
    power = (
        sound.magnitudes_from_log_mel(frames, ANALYSIS) / sound.hann_window(400).sum()
    ) ** 2
    assert (power >= 0).all()
    again = np.log(power @ ANALYSIS.filters.T + ANALYSIS.floor)
    assert np.sqrt(np.mean((again - frames) ** 2)) < 0.6
    loud = frames > frames.max() - 7.0  # 30 dB
    assert np.sqrt(np.mean((again - frames)[loud] ** 2)) < 0.15


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"hop": 201}, "hop is 201"),
        ({"rate": 0}, "rate is 0"),
        ({"bands": 4.5}, "bands is 4.5"),
        ({"bands": 250}, "250 bands are too narrow"),
        ({"low": 4000.0}, "low is 4000"),
        ({"floor": 0.0}, "floor is 0"),
    ],
)
def test_analysis_refuses_what_cannot_be(settings, culprit):
    with pytest.raises(InputError, match=culprit):
        sound.MelConfig(**settings)


def test_log_mel_refuses_sound_that_is_too_short_or_broken():
    with pytest.raises(InputError, match="too short"):
        sound.log_mel(np.zeros(399), ANALYSIS)
    with pytest.raises(InputError, match="not finite"):
        sound.log_mel(np.full(500, np.nan), ANALYSIS)


# --- Griffin-Lim ------------------------------------------------------------------------------


def test_griffin_lim_rebuilds_a_tone():
    samples = sine(440.0)
    expected = np.abs(sound.stft(samples, **WINDOWS))
    actual = sound.griffin_lim(expected, **WINDOWS, length=len(samples), iterations=100)
    assert sound.spectral_convergence(actual, expected, **WINDOWS) < 0.04
    middle = np.abs(np.fft.rfft(actual[1000:3000] * np.hanning(2000)))
    assert np.argmax(middle) * RATE / 2000 == pytest.approx(440.0, abs=4.0)
    assert sound.spectral_convergence(samples, expected, **WINDOWS) < 1e-12


def test_griffin_lim_never_gets_worse_and_momentum_gets_closer(speechlike):
    """Griffin and Lim's own result is that each of their iterations decreases the error."""
    expected = np.abs(sound.stft(speechlike[:8000], **WINDOWS))

    def error(iterations, momentum):
        actual = sound.griffin_lim(
            expected, **WINDOWS, iterations=iterations, momentum=momentum
        )
        return sound.spectral_convergence(actual, expected, **WINDOWS)

    plain = [error(i, 0.0) for i in (0, 1, 4, 16, 40)]
    assert all(b < a for a, b in itertools.pairwise(plain))
    assert error(40, 0.99) < plain[-1]


def test_griffin_lim_is_the_same_for_the_same_seed():
    expected = np.abs(sound.stft(noise(2000), **WINDOWS))
    first, again = (
        sound.griffin_lim(expected, **WINDOWS, iterations=3) for _ in range(2)
    )
    other = sound.griffin_lim(expected, **WINDOWS, iterations=3, seed=1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert (
        len(sound.griffin_lim(expected, **WINDOWS, iterations=1, length=1234)) == 1234
    )


def test_griffin_lim_refuses_another_windows_magnitudes():
    with pytest.raises(InputError, match="a window of 400 gives"):
        sound.griffin_lim(np.ones((3, 100)), **WINDOWS)


def test_what_is_heard_of_frames_has_them_nearly(speechlike):
    frames = sound.log_mel(speechlike, ANALYSIS)
    again = sound.log_mel(sound.reconstruct(frames, ANALYSIS, iterations=40), ANALYSIS)
    loud = frames > frames.max() - 7.0
    assert np.sqrt(np.mean((again - frames)[loud] ** 2)) < 0.5  # 2 dB


# --- Statistics -------------------------------------------------------------------------------


def test_statistics_standardise_and_restore():
    frames = 3.0 * noise(500).reshape(100, 5) + np.arange(5)
    actual = sound.compute_band_statistics(frames)
    units = actual.standardize(frames)
    np.testing.assert_allclose(units.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(units.std(axis=0), 1.0, atol=1e-12)
    np.testing.assert_allclose(actual.restore(units), frames, atol=1e-12)


def test_statistics_refuse_a_band_that_never_changes():
    frames = noise(20).reshape(10, 2)
    frames[:, 1] = 7.0
    with pytest.raises(InputError, match="band 1 of the frames does not vary"):
        sound.compute_band_statistics(frames)


# --- Speech-like sound ------------------------------------------------------------------------


def test_tones_are_the_same_for_the_same_seed():
    first, again, other = (synthesize_tones(1.5, seed=s, rate=RATE) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert first.shape == other.shape == (12000,)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first).max() < 1.0


def test_tones_have_pauses_and_sound(speechlike):
    level = np.sqrt(
        np.mean(speechlike[: len(speechlike) // 100 * 100].reshape(-1, 100) ** 2, 1)
    )
    assert (level < 3 * BACKGROUND_NOISE).mean() > 0.05
    assert (level > 0.03).mean() > 0.4
    assert (
        level.min() > 0.5 * BACKGROUND_NOISE
    )  # noise, and not a silence that is the same


def test_a_vowel_has_its_pitch_and_its_formants():
    segments = [SoundSegment(1.0, 1.0, (730.0, 1090.0, 2440.0))]
    rng = np.random.default_rng(0)
    samples = synthesize_segments(
        segments, rate=RATE, pitch=100.0, formant_factor=1.0, rng=rng
    )[2000:6000]
    power = np.abs(np.fft.rfft(samples * np.hanning(4000))) ** 2
    bins = np.fft.rfftfreq(4000, 1 / RATE)

    def at(low, high):
        return power[(bins >= low) & (bins < high)].sum()

    assert at(600, 900) > 5 * at(200, 500)
    assert at(900, 1250) > 20 * at(1500, 1850)
    assert at(2350, 2550) > 1.5 * at(2000, 2200)
    # The pitch falls from 1.1 to 0.85 of itself, and wavers by a tenth: its period repeats.
    correlation = np.correlate(samples, samples, "full")[4000:]
    lag = 50 + np.argmax(correlation[50:120])
    assert 80.0 < RATE / (lag + 1) < 125.0


def test_noise_lies_where_it_was_put():
    segments = [
        SoundSegment(0.5, noise_level=0.3, noise_center=2400.0, noise_width=200.0)
    ]
    rng = np.random.default_rng(0)
    samples = synthesize_segments(
        segments, rate=RATE, pitch=100.0, formant_factor=1.0, rng=rng
    )
    power = np.abs(np.fft.rfft(samples)) ** 2
    bins = np.fft.rfftfreq(len(samples), 1 / RATE)
    assert (bins * power).sum() / power.sum() == pytest.approx(2400.0, abs=60.0)


def test_words_are_spelt_in_sounds_and_follow_some_others():
    assert set("".join(MADE_UP_WORDS)) <= set(SPEECH_SOUNDS)
    reached = {0}
    for _ in MADE_UP_WORDS:
        reached |= {w for word in reached for w in following_words(word)}
    assert len(reached) > len(MADE_UP_WORDS) // 2
    assert all(len(set(following_words(w))) == 3 for w in range(len(MADE_UP_WORDS)))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 1e-6])
def test_no_time_is_too_short(seconds):
    with pytest.raises(InputError, match="too short"):
        synthesize_tones(seconds, seed=0, rate=RATE)


# --- Speech -----------------------------------------------------------------------------------

STAND_IN = """#!{python}
import sys, wave
import numpy as np
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
text = sys.stdin.read()
{body}
"""
SPEAKS = """
with wave.open(sys.argv[sys.argv.index("-w") + 1], "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(22050)
    t = np.arange(22050 * len(text) // 20) / 22050
    file.writeframes((8000 * np.sin(2 * np.pi * 1000 * t)).astype("<i2").tobytes())
"""


def stand_in(monkeypatch, folder, body):
    """A program of espeak-ng's name, alone on the path."""
    path = folder / ESPEAK_COMMAND
    path.write_text(STAND_IN.format(python=sys.executable, body=body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_speech_reads_sentences_at_our_rate(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, SPEAKS)
    actual = synthesize_speech(["x" * 20], 0.9, seed=0, rate=RATE)
    assert actual.shape == (7200,)
    assert np.argmax(np.abs(np.fft.rfft(actual[:4000]))) * RATE / 4000 == 1000.0
    assert actual.std() == pytest.approx(0.1, rel=0.01)
    again = synthesize_speech(["x" * 20], 0.9, seed=0, rate=RATE)
    np.testing.assert_array_equal(actual, again)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no such voice: xx')", "no such voice: xx"),
        ("", "it said nothing"),
        ("open(sys.argv[-2], 'w').write('no sound')", "cannot be read as a WAV file"),
        (SPEAKS.replace("8000 *", "0 *"), "as silence"),
    ],
)
def test_speech_says_why_it_fails(monkeypatch, tmp_path, body, message):
    stand_in(monkeypatch, tmp_path, body)
    with pytest.raises(InputError, match=message):
        synthesize_speech(["a sentence to read"], 1.0, seed=0, rate=RATE)


def test_speech_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt install espeak-ng"):
        synthesize_speech(["a"], 1.0, seed=0, rate=RATE)


@pytest.mark.skipif(
    shutil.which(ESPEAK_COMMAND) is None, reason="espeak-ng is not installed"
)
def test_espeak_speaks():
    actual = synthesize_speech(
        ["The wind and the sun were talking.", "A cat."], 3.0, seed=0, rate=RATE
    )
    frames = sound.log_mel(actual, ANALYSIS)
    assert frames.shape == (241, 40)
    assert frames.std() > 1.0
    np.testing.assert_array_equal(
        actual,
        synthesize_speech(
            ["The wind and the sun were talking.", "A cat."], 3.0, seed=0, rate=RATE
        ),
    )


@pytest.mark.parametrize("expected", [8000, 16000, 11025])
def test_resampling_keeps_a_sine(expected):
    t = np.arange(22050) / 22050
    actual = resample(np.sin(2 * np.pi * 700 * t), 22050, expected)
    np.testing.assert_allclose(
        actual,
        np.sin(2 * np.pi * 700 * np.arange(expected) / expected),
        rtol=0,
        atol=1e-9,
    )
    assert np.abs(resample(np.sin(2 * np.pi * 9000 * t), 22050, expected)).max() < 1e-9


# --- Files ------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1.0, 0.9999), min_size=1, max_size=50),
    st.sampled_from([8000, 22050]),
)
def test_wav_files_keep_sound_to_half_a_step(tmp_path_factory, values, rate):
    path = tmp_path_factory.mktemp("wav") / "a.wav"
    write_wav(path, np.array(values), rate)
    actual, read = read_wav(path)
    assert read == rate
    np.testing.assert_allclose(actual, values, rtol=0, atol=0.5 / 32768 + 1e-12)


def test_wav_bytes_are_pcm_and_clipped(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, np.array([0.0, 0.5, -0.5, 2.0, -2.0]), RATE)
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (1, 2, RATE, 5)
        written = np.frombuffer(file.readframes(5), "<i2")
    assert written.tolist() == [0, 16384, -16384, 32767, -32768]
    assert path.read_bytes()[:4] == b"RIFF"


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "two.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.array([[16384, 0], [0, -16384]], "<i2").tobytes())
    assert read_wav(path)[0].tolist() == [0.25, -0.25]


def test_wav_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "a.wav"
    with pytest.raises(InputError, match="cannot be read"):
        read_wav(path)
    path.write_bytes(b"RIFF")
    with pytest.raises(InputError, match="cannot be read"):
        read_wav(path)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(RATE)
        file.writeframes(b"\x80\x90")
    with pytest.raises(InputError, match="8 bits a sample"):
        read_wav(path)
    write_wav(path, np.zeros(1), RATE)
    path.write_bytes(path.read_bytes()[:40] + bytes(4))  # the header alone
    with pytest.raises(InputError, match="no sound"):
        read_wav(path)


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros((2, 2)), np.array([np.inf])])
def test_what_is_no_sound_is_not_written(tmp_path, samples):
    with pytest.raises(InputError, match="must be"):
        write_wav(tmp_path / "a.wav", samples, RATE)
    assert not (tmp_path / "a.wav").exists()
