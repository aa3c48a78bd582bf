"""Frames: each model's score is its density, and the program writes the scores."""

import json
import re

import jax
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.audio import audio_models, frames, sound
from continuous_lm.experiments.audio.synthesis import synthesize_tones
from continuous_lm.experiments.audio.wav_files import read_wav
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_training
from continuous_lm.models import density
from continuous_lm.models.density import heads

scipy_stats = pytest.importorskip("scipy.stats")
WIDTH, CODES = 3, 5
TINY = {
    "seconds": 8.0,
    "held_out_seconds": 4.0,
    "steps": 2,
    "batch_size": 2,
    "length": 24,
    "prompt": 6,
    "codes": 8,
    "components": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "num_layers": 1,
    "bands": 12,
    "samples": 2,
    "iterations": 3,
}


def some_frames(count, seed=0):
    return (
        np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    )


@pytest.fixture(scope="module")
def codes():
    return audio_models.fit_codes(jax.random.key(0), some_frames(400), CODES)


def trunk(vocab_size):
    return density_training.trunk_config(
        vocab_size=vocab_size, hidden_size=8, num_layers=1, num_heads=2
    )


def created(head, vocab_size, **settings):
    """A model with random weights: initialising one takes seconds of compiling."""
    shapes = jax.eval_shape(
        lambda key: density.create(key, trunk(vocab_size), head, **settings).params,
        jax.random.key(0),
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda s: (
            rng.normal(0.0, 0.4, s.shape).astype(np.float32) + (len(s.shape) == 1)
        ),
        shapes,
    )
    return clm.LanguageModel(
        density.DensityModel(trunk(vocab_size), head, **settings), params
    )


@pytest.fixture(scope="module")
def listeners(codes):
    head = heads.MixtureHead(WIDTH, components=2, min_scale=audio_models.MIN_SCALE)
    return {
        "mixture": audio_models.AudioModel(created(head, 1, input_kind="vectors")),
        "tokens": audio_models.AudioModel(
            created(heads.TokenHead(width=CODES), CODES), codes
        ),
    }


def code_densities(codes, x):
    """log N(x; code_e, scale_e) of frames [T, W], by scipy: [T, E]."""
    each = scipy_stats.norm(codes.vectors, codes.scales).logpdf(np.asarray(x)[:, None])
    return each.sum(axis=-1)


# --- Codes ------------------------------------------------------------------------------------


def test_codes_have_the_deviations_of_their_frames(codes):
    data = some_frames(400)
    distances = ((data[:, None] - codes.vectors) ** 2).sum(axis=-1)
    nearest = distances.argmin(axis=1)
    squares = (data - codes.vectors[nearest]) ** 2
    for e in range(CODES):
        single = squares[nearest == e]
        assert len(single) > 10
        variance = (single.sum(axis=0) + 10 * squares.mean(axis=0)) / (len(single) + 10)
        np.testing.assert_allclose(codes.scales[e], np.sqrt(variance), rtol=1e-4)
    shares = (np.bincount(nearest, minlength=CODES) + 1) / (400 + CODES)
    np.testing.assert_allclose(np.exp(codes.log_shares), shares, rtol=1e-5)


def test_deviations_of_codes_are_bounded_as_the_mixtures_are():
    actual = audio_models.fit_codes(
        jax.random.key(0), np.repeat(some_frames(CODES), 80, axis=0), CODES
    )
    np.testing.assert_array_equal(actual.scales, np.float32(audio_models.MIN_SCALE))


# --- Densities --------------------------------------------------------------------------------


def test_the_mixtures_score_is_its_log_prob_and_mean(listeners):
    windows = some_frames(30).reshape(2, 15, WIDTH)
    for duration in (1.0, 0.7):
        actual = listeners["mixture"].score(windows, duration)
        lm = listeners["mixture"].lm
        durations = np.full((2, 15), duration, np.float32)
        expected = density.log_prob(lm, vectors=windows, durations=durations)
        np.testing.assert_allclose(actual.log_prob, expected, rtol=0, atol=1e-4)
    assert actual.mean.shape == (2, 14, WIDTH)
    assert (
        np.abs(actual.log_prob - listeners["mixture"].score(windows).log_prob).max()
        > 1e-6
    )


def test_the_tokens_score_is_the_sum_over_codes(listeners, codes):
    """log sum_e p(e | codes before) N(frame; code_e, scale_e), put together by hand."""
    listener, window = listeners["tokens"], some_frames(15)
    inputs = listener.model_inputs(window)
    assert inputs.shape == (15,)
    logits = np.asarray(density.token_logits(listener.lm, inputs[None]))[0]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.log(np.exp(log_p + code_densities(codes, window[1:])).sum(axis=-1))
    actual = listener.score(window[None])
    np.testing.assert_allclose(actual.log_prob[0], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(actual.mean[0], np.exp(log_p) @ codes.vectors, atol=1e-5)


def test_both_densities_integrate_to_one(listeners):
    """Integrals by importance sampling, over a frame after the same past: scores are comparable."""
    rng = np.random.default_rng(0)
    past, count = some_frames(3), 20_000
    last = 3.0 * rng.standard_normal((count, WIDTH))
    proposal = scipy_stats.norm(0, 3).logpdf(last).sum(axis=-1)
    windows = np.concatenate(
        [np.broadcast_to(past, (count, 3, WIDTH)), last[:, None]], axis=1
    )
    for listener in listeners.values():
        read = listener.model_inputs(windows.astype(np.float32))
        score = jax.vmap(
            lambda r, w, listener=listener: audio_models._score_window(
                listener.lm.model,
                listener.lm.params,
                listener.codes,
                r,
                w,
                np.ones(4, np.float32),
            )[0][-1]
        )
        nats = np.asarray(score(read, windows.astype(np.float32)))
        assert np.exp(nats - proposal).mean() == pytest.approx(1.0, abs=0.04)


def test_references_are_their_formulas(codes):
    data, windows = (
        some_frames(200, seed=2),
        some_frames(30, seed=3).reshape(2, 15, WIDTH),
    )
    actual = audio_models.unigram_baseline(codes, windows)
    expected = np.log(
        np.exp(codes.log_shares + code_densities(codes, windows[0, 1:])).sum(axis=-1)
    )
    np.testing.assert_allclose(actual.log_prob[0], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        actual.mean[1, 5], np.exp(codes.log_shares) @ codes.vectors, 1e-4
    )
    actual = audio_models.previous_frame_baseline(data, windows)
    scale = np.sqrt((np.diff(data, axis=0) ** 2).mean(axis=0))
    expected = (
        scipy_stats.norm(windows[:, :-1], scale).logpdf(windows[:, 1:]).sum(axis=-1)
    )
    np.testing.assert_allclose(actual.log_prob, expected, rtol=1e-4)
    np.testing.assert_array_equal(actual.mean, windows[:, :-1])


def test_size_counts_codes_and_their_deviations(listeners):
    trained = sum(x.size for x in jax.tree.leaves(listeners["tokens"].lm.params))
    assert listeners["tokens"].num_parameters == trained + 2 * CODES * WIDTH


def test_the_programs_models_are_of_equal_size():
    """With the default flags, within a few percent."""
    width, codes = 40, 256

    def size(head, vocab_size, **settings):
        sizes = density_training.trunk_config(
            vocab_size=vocab_size, hidden_size=96, num_layers=2, num_heads=4
        )
        shapes = jax.eval_shape(
            lambda key: density.create(key, sizes, head, **settings).params,
            jax.random.key(0),
        )
        return sum(s.size for s in jax.tree.leaves(shapes))

    mixture = size(heads.MixtureHead(width, components=8), 1, input_kind="vectors")
    tokens = size(heads.TokenHead(width=codes), codes) + 2 * codes * width
    assert tokens == pytest.approx(mixture, rel=0.03)
    assert (mixture, tokens) == (288_456, 291_552)


# --- Samples and numbers ----------------------------------------------------------------------


@pytest.mark.slow
def test_samples_are_the_same_for_a_key_and_of_the_codes(listeners, codes):
    prompts = some_frames(8, seed=5).reshape(2, 4, WIDTH)
    for name, listener in listeners.items():
        first, again = (
            listener.sample(jax.random.key(2), prompts, 6, 1.0) for _ in range(2)
        )
        other = listener.sample(jax.random.key(3), prompts, 6, 1.0)
        assert first.shape == (2, 6, WIDTH)
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 0
        if name == "tokens":
            rows = {tuple(row) for row in codes.vectors.tolist()}
            assert {tuple(row) for row in first.reshape(-1, WIDTH).tolist()} <= rows


def test_movement_is_of_steps():
    still = np.zeros((1, 5, 2))
    still[0, 3:] = [1.0, 3.0]
    actual = audio_models.movement_statistics(still)
    assert actual["squared_step"] == pytest.approx((1 + 9) / 2 / 4)
    assert actual["unmoved"] == 0.75
    assert actual["variance"] == pytest.approx((0.24 + 9 * 0.24) / 2)


def test_errors_are_in_units_and_decibels():
    actual = audio_models.prediction_errors(
        np.full((2, 3), 2.0), np.zeros((2, 3)), np.array([1.0, 1.0, 1.0])
    )
    assert actual["squared"] == 4.0
    assert actual["decibels"] == pytest.approx(10 * np.log10(np.exp(2.0)))


def test_a_change_of_units_is_the_densitys_own():
    """Nats of log-mel frames are those of standardised ones less the log of the volume."""
    scores = audio_models.FrameScores(np.full((3, 4), 2.0), np.zeros((3, 4, 2)))
    actual = audio_models.summarize_likelihood(scores, np.array([2.0, 5.0]))
    assert actual["nats_per_frame_log_mel"] == pytest.approx(2.0 - np.log(10.0))


def test_sweeps_find_the_duration_that_was_asked(listeners):
    windows = {0.8: some_frames(15)[None], 1.0: some_frames(15)[None] * 0.5}
    points = np.array([0.5, 1.0, 2.0])
    actual = audio_models.sweep_durations(listeners, windows, points)
    for name, listener in listeners.items():
        for hop, window in windows.items():
            expected = [listener.score(window, d).log_prob.mean() for d in points]
            np.testing.assert_allclose(
                actual["nats_per_frame"][name][f"{hop:g}"], expected, 1e-5
            )
            assert (
                actual["best_duration"][name][f"{hop:g}"] == points[np.argmax(expected)]
            )


def test_sentences_are_plain_and_shuffled():
    documents = [
        "The first one is a plain sentence here. It calls foo(x) and is left out of it.\n\nShort.",
        "The first one is a plain\nsentence here. Another one, which has a comma, is kept too.",
    ]
    assert sorted(audio_models.extract_sentences(documents)) == [
        "Another one, which has a comma, is kept too.",
        "The first one is a plain sentence here.",
    ]


# --- The program ------------------------------------------------------------------------------


def tiny_config(folder, **values):
    return frames.Config(**{**TINY, "output_dir": folder, **values})


@pytest.mark.slow
def test_the_program_writes_what_it_says(tmp_path):
    folder = tmp_path / "out"
    result = frames.run(tiny_config(folder))
    values = json.loads((folder / "frames.json").read_text())
    record = values.pop("run")
    assert values == json.loads(json.dumps(result.values))
    summary = result.summary()
    for name in ("mixture", "tokens", "codes, no context", "around the last frame"):
        nats = values["models"][name]["likelihood"]
        low, high = nats["interval"]
        assert low <= nats["nats_per_frame"] <= high
        assert f"{nats['nats_per_frame']:.2f}" in summary
    assert values["models"]["mixture"]["reading_error"]["squared"] == 0.0
    assert values["models"]["tokens"]["reading_error"]["squared"] > 0.0
    assert record["flags"]["codes"] == 8
    curves = values["durations"]["nats_per_frame"]
    assert set(curves["mixture"]) == {"0.8", "1", "1.25"}
    for name in ("spectrograms", "comparison", "durations"):
        for ending in ("png", "pdf"):
            assert (folder / f"frames_{name}.{ending}").stat().st_size > 5000
    for name in ("real", *audio_models.WAV_NAMES):
        samples, rate = read_wav(folder / f"{name}.wav")
        assert rate == 8000
        assert 0.001 < np.abs(samples).max() <= 1.0
        assert len(samples) > 2 * 23 * 100
    # The saved model is the evaluated one.
    arrays = np.load(folder / "codes.npz")
    codes = audio_models.CodeDensities(
        arrays["vectors"], arrays["scales"], arrays["log_shares"]
    )
    units = sound.BandStatistics(arrays["mean"], arrays["deviation"])
    analysis = sound.MelConfig(bands=12)
    inputs = sound.log_mel(synthesize_tones(4.0, seed=1, rate=8000), analysis)
    inputs = units.standardize(inputs).astype(np.float32)
    windows = np.stack(
        [inputs[i : i + 25] for i in range(0, 24 * ((len(inputs) - 1) // 24), 24)]
    )
    for name, book in (("mixture", None), ("tokens", codes)):
        actual = audio_models.AudioModel(density.load(folder / name), book).score(
            windows
        )
        message = values["models"][name]["likelihood"]["nats_per_frame"]
        assert actual.log_prob.mean() == pytest.approx(message, abs=1e-3)

    # The same Config again finds both runs done, and says the same.
    assert frames.run(tiny_config(folder)).summary() == summary
    # Other sound is another run.
    with pytest.raises(clm.InputError, match="choose another folder"):
        frames.run(tiny_config(folder, seed=1))


@pytest.mark.slow
def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = frames.run(tiny_config(None, steps=1))
    assert set(result.values["models"]) >= {"mixture", "tokens"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sound": "speech"}, "apt install espeak-ng"),
        ({"seconds": 0.2}, "--seconds: the sound is too short"),
        ({"held_out_seconds": 0.2}, "--held_out_seconds: the held-out sound is too"),
        ({"held_out_seconds": 0.34}, "sound, a frame every 125 samples, is too short"),
        ({"seconds": 0.01}, "too short: a window has 400 samples"),
        ({"seconds": 0.0}, "seconds of sound are too short"),
        ({"prompt": 24}, "--prompt=24 leaves nothing"),
        ({"bands": 300}, "300 bands are too narrow"),
        ({"rate": 100}, "low is 50"),
    ],
)
def test_the_program_says_what_is_wrong(tmp_path, monkeypatch, values, message):
    monkeypatch.setenv("PATH", str(tmp_path))  # without espeak-ng
    with pytest.raises(clm.InputError, match=re.escape(message)):
        frames.run(tiny_config(tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_flags_are_those_of_the_config():
    config = program.parse(frames.Config, "frames", ["--sound=speech", "--prompt=6"])
    assert (config.sound, config.prompt, config.steps) == ("speech", 6, 600)
    assert config.output_dir == "results/frames"
    with pytest.raises(clm.InputError, match="--samples"):
        program.parse(frames.Config, "frames", ["--samples=0"])
