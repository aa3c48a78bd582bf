r"""Compare two models of audio frames: a density over frames, and a softmax over codes.

    python -m continuous_lm frames [--sound=speech] [--steps=600] [--output_dir=FOLDER]

Both models share a trunk and are trained on the same 80 log-mel frames a second. Each gives a
density for the next frame. The score is nats for each held-out frame; bands are standardised to
mean 0 and standard deviation 1.

mixture    reads frames. Its head is a mixture of Gaussians, whose weights, means and deviations
           depend on the earlier frames.
tokens     reads codes. Each frame is replaced by the nearest of E codes of k-means, and a softmax
           predicts the next code. A code has a normal density with the deviations of its frames.
           The density of a frame is the sum over codes e of p(e | earlier codes)
           N(frame; code_e, deviation_e). This is also a mixture, with predicted weights and fixed
           components. It integrates to 1 over frames, so both scores are comparable.

Two baselines need no training: the same codes weighted by their frequencies, and a Gaussian around
the previous frame.

The output folder has frames.json with every number, three figures, .wav files and the models. The
.wav files are the sound, its reconstructions from frames and from codes, and samples of both
models.

--sound=tones, the default, is synthesised (see `synthesis.synthesize_tones`). --sound=speech is
espeak-ng reading the documentation of this Python's library; espeak-ng must be installed. Sampled
frames get their phases by Griffin-Lim. It takes about four minutes on two cores. The same command
resumes a stopped run.
"""

import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from continuous_lm import quantize
from continuous_lm.errors import InputError
from continuous_lm.experiments.audio import audio_models, frame_figures, sound
from continuous_lm.experiments.audio.synthesis import (
    find_espeak,
    synthesize_speech,
    synthesize_tones,
)
from continuous_lm.experiments.audio.wav_files import write_wav
from continuous_lm.experiments.common import plots, program, tables
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import fit, text, train_program, window_batches
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import density
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.parallel import processes

WINDOW_SECONDS = 0.05
HOP_SECONDS = 0.0125
PAUSE_SECONDS = 0.3  # silence between the excerpts of a .wav file
SWEEP_DURATIONS = np.linspace(0.5, 1.5, 21).round(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.DeviceConfig):
    """Flags of frames."""

    sound: Literal["tones", "speech"] = program.flag(
        "tones", help="Sound made here (tones), or read by espeak-ng (speech)."
    )
    voice: str = program.flag("en", help="Voice of espeak-ng.")
    seconds: float = program.flag(
        600.0, help="Seconds of sound to train on.", lower_bound=0.0
    )
    held_out_seconds: float = program.flag(
        60.0, help="Seconds of other sound, to evaluate on.", lower_bound=0.0
    )
    rate: int = program.flag(8000, help="Samples a second.", lower_bound=1)
    bands: int = program.flag(40, help="Mel bands of a frame.", lower_bound=1)
    codes: int = program.flag(256, help="Codes of the tokens' codebook.", lower_bound=2)
    components: int = program.flag(8, help="Components of the mixture.", lower_bound=1)
    hidden_size: int = program.flag(96, help="Width of both trunks.", lower_bound=2)
    num_layers: int = program.flag(2, help="Layers of both trunks.", lower_bound=1)
    num_heads: int = program.flag(
        4, help="Attention heads of both trunks.", lower_bound=1
    )
    length: int = program.flag(192, help="Frames in a sequence.", lower_bound=2)
    batch_size: int = program.flag(8, help="Sequences in a step.", lower_bound=1)
    steps: int = program.flag(600, help="Optimiser steps of each model.", lower_bound=1)
    learning_rate: float = program.flag(
        3e-3, help="Peak learning rate.", lower_bound=0.0
    )
    prompt: int = program.flag(
        40, help="Number of prompt frames of a sample.", lower_bound=1
    )
    samples: int = program.flag(16, help="Number of samples.", lower_bound=1)
    temperature: float = program.flag(
        1.0, help="Temperature of samples.", lower_bound=0.0
    )
    iterations: int = program.flag(
        100, help="Iterations of Griffin-Lim.", lower_bound=1
    )
    seed: int = program.flag(
        0, help="Seed of sound, parameters and samples.", lower_bound=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt >= self.length:
            raise InputError(
                f"--prompt={self.prompt} leaves nothing to sample in --length={self.length} frames"
            )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The numbers of both models.

    Attributes:
      values: what frames.json holds, beside the record of the run.
    """

    values: Mapping[str, Any]

    def summary(self) -> str:
        gain = self.values["gain_of_mixture"]
        low, high = gain["interval"]
        text = f"The mixture gains {gain['nats_per_frame']:.2f} nats a frame"
        return f"{make_table(self.values).as_text()}\n\n{text} [{low:.2f}, {high:.2f}]"


# --- Sound --------------------------------------------------------------------------------------


class Sounds(NamedTuple):
    """The sound to train on, and other sound."""

    mel_config: sound.MelConfig
    band_statistics: sound.BandStatistics  # of the sound to train on
    train: audio_models.Recording
    held_out: audio_models.Recording

    @property
    def checksum(self) -> str:
        """SHA-256 of the frames to train on."""
        return hashlib.sha256(self.train.frames.tobytes()).hexdigest()

    def held_out_at_hop(self, hop: int) -> np.ndarray:
        """Standardised frames [T, W] of the held-out sound, every `hop` samples."""
        mel_config = dataclasses.replace(self.mel_config, hop=hop)
        return _standardized_frames(
            self.held_out.samples, mel_config, self.band_statistics
        )


def prepare_sounds(config: Config) -> Sounds:
    """Make both sounds and their frames.

    Raises:
      InputError: if one is too short for a sequence.
    """
    mel_config = sound.MelConfig(
        rate=config.rate,
        window=round(WINDOW_SECONDS * config.rate),
        hop=round(HOP_SECONDS * config.rate),
        bands=config.bands,
    )
    train_samples, held_out_samples = synthesize_sounds(config)
    train_frames = sound.log_mel(train_samples, mel_config)
    band_statistics = sound.compute_band_statistics(train_frames)
    recordings = [
        audio_models.Recording(
            samples, _standardized_frames(samples, mel_config, band_statistics)
        )
        for samples in (train_samples, held_out_samples)
    ]
    sounds = Sounds(mel_config, band_statistics, *recordings)
    window_batches.check_length(
        sounds.train.frames, config.length, "--seconds: the sound"
    )
    window_batches.check_length(
        sounds.held_out.frames,
        config.length,
        "--held_out_seconds: the held-out sound",
    )
    longest_hop = round(max(audio_models.HOP_FACTORS) * mel_config.hop)
    window_batches.check_length(
        sounds.held_out_at_hop(longest_hop),
        config.length,
        f"--held_out_seconds: the held-out sound, a frame every {longest_hop} samples,",
    )
    return sounds


def synthesize_sounds(config: Config) -> list[np.ndarray]:
    """Samples [n] of the sound to train on, and of other sound."""
    lengths = (config.seconds, config.held_out_seconds)
    seeds = (2 * config.seed, 2 * config.seed + 1)
    if config.sound == "tones":
        return [
            synthesize_tones(seconds, seed=seed, rate=config.rate)
            for seconds, seed in zip(lengths, seeds, strict=True)
        ]
    find_espeak()  # before the text is read, which takes seconds
    sentences = audio_models.extract_sentences(text.default_text().documents)
    num_held_out = max(1, len(sentences) // 10)
    sentence_parts = (sentences[num_held_out:], sentences[:num_held_out])
    return [
        synthesize_speech(
            part, seconds, seed=seed, rate=config.rate, voice=config.voice
        )
        for part, seconds, seed in zip(sentence_parts, lengths, seeds, strict=True)
    ]


def _standardized_frames(
    samples: np.ndarray,
    mel_config: sound.MelConfig,
    band_statistics: sound.BandStatistics,
) -> np.ndarray:
    frames = sound.log_mel(samples, mel_config)
    return band_statistics.standardize(frames).astype(np.float32)


# --- Models -------------------------------------------------------------------------------------


class FrameModels(NamedTuple):
    """Both models."""

    mixture: audio_models.AudioModel
    tokens: audio_models.AudioModel
    codes: audio_models.CodeDensities  # of the tokens

    def by_name(self) -> dict[str, audio_models.AudioModel]:
        return {"mixture": self.mixture, "tokens": self.tokens}


def create_models(config: Config, train_frames: np.ndarray) -> FrameModels:
    """Both models with their first parameters, and the codes of the frames [T, W]."""
    key = jax.random.key(config.seed)
    width = train_frames.shape[1]
    head = heads.MixtureHead(
        width, components=config.components, min_scale=audio_models.MIN_SCALE
    )
    # It reads no tokens: its embedding table has the one row that a trunk must have.
    mixture_lm = density.create(
        key, _trunk_config(config, vocab_size=1), head, input_kind="vectors"
    )
    codes = audio_models.fit_codes(
        jax.random.fold_in(key, 1), train_frames, config.codes
    )
    token_lm = density.create(
        key,
        _trunk_config(config, vocab_size=config.codes),
        heads.TokenHead(width=config.codes),
    )
    return FrameModels(
        audio_models.AudioModel(mixture_lm),
        audio_models.AudioModel(token_lm, codes),
        codes,
    )


def _trunk_config(config: Config, *, vocab_size: int) -> TransformerConfig:
    return density_training.trunk_config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )


def train_models(config: Config, sounds: Sounds, folder: pathlib.Path) -> FrameModels:
    """Both models, trained or read from runs in `folder` that are done."""
    models = create_models(config, sounds.train.frames)
    mesh = program.make_mesh(config)
    trained_models = {}
    for name, model in models.by_name().items():
        lm = density_training.train(
            density_training.place_on_mesh(model.lm, mesh),
            model.model_inputs(sounds.train.frames),
            model.model_inputs(sounds.held_out.frames),
            folder=folder / f"run_{name}",
            config=fit.FitConfig(
                steps=config.steps,
                learning_rate=config.learning_rate,
                batch_size=config.batch_size,
                seed=config.seed,
            ),
            length=config.length,
            settings={
                "sha256_of_frames": sounds.checksum,
                "head": model.lm.model.head.to_dict(),
            },
            label=name,
        )
        train_program.save_on_first_process(density.save, folder / name, lm)
        trained_models[name] = dataclasses.replace(model, lm=lm)
    return FrameModels(**trained_models, codes=models.codes)


# --- Samples ------------------------------------------------------------------------------------


class Excerpts(NamedTuple):
    """Windows of held-out sound, and the models' continuations of their prompts."""

    window_indices: np.ndarray  # [B], of the held-out windows
    real: np.ndarray  # [B, T, W]
    as_codes: np.ndarray  # [B, T, W], each frame replaced by its code
    mixture: np.ndarray  # [B, T, W], the prompt of real frames
    tokens: np.ndarray  # [B, T, W], the prompt of codes

    def by_title(self) -> dict[str, np.ndarray]:
        """Return title in figures -> excerpts."""
        return {
            "real sound": self.real,
            "the same as codes": self.as_codes,
            "mixture": self.mixture,
            "tokens": self.tokens,
        }


def draw_excerpts(config: Config, models: FrameModels, windows: np.ndarray) -> Excerpts:
    """Samples of both models after prompts from windows [num_windows, T + 1, W]."""
    num_samples = min(config.samples, len(windows))
    window_indices = np.arange(num_samples) * len(windows) // num_samples
    real = windows[window_indices, : config.length]
    as_codes = models.codes.vectors[models.tokens.model_inputs(real)]
    key = jax.random.key(config.seed + 1)
    continued = {}
    for name, inputs in {"mixture": real, "tokens": as_codes}.items():
        new_frames = models.by_name()[name].sample(
            key,
            real[:, : config.prompt],
            config.length - config.prompt,
            config.temperature,
        )
        continued[name] = np.concatenate(
            [inputs[:, : config.prompt], new_frames], axis=1
        )
    return Excerpts(window_indices, real, as_codes, **continued)


# --- Numbers ------------------------------------------------------------------------------------


def score_models(
    models: FrameModels, train_frames: np.ndarray, windows: np.ndarray
) -> dict[str, audio_models.FrameScores]:
    """The densities of windows by both models and by two that need no training."""
    return {
        "mixture": models.mixture.score(windows),
        "tokens": models.tokens.score(windows),
        "codes, no context": audio_models.unigram_baseline(models.codes, windows),
        "around the last frame": audio_models.previous_frame_baseline(
            train_frames, windows
        ),
    }


def measure_models(
    config: Config,
    models: FrameModels,
    scores: Mapping[str, audio_models.FrameScores],
    excerpts: Excerpts,
    windows: np.ndarray,
    deviation: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """Model -> its likelihood, errors, and how its samples move.

    Args:
      config: config of the run.
      models: the models.
      scores: model -> its scores of the windows.
      excerpts: with the samples.
      windows: held-out frames [num_windows, T + 1, W].
      deviation: standard deviation of each band [W], the divisor of frames.
    """
    results: dict[str, dict[str, Any]] = {
        name: {
            "likelihood": audio_models.summarize_likelihood(model_scores, deviation),
            "prediction_error": audio_models.prediction_errors(
                model_scores.mean, windows[:, 1:], deviation
            ),
        }
        for name, model_scores in scores.items()
    }
    code_indices = models.tokens.model_inputs(windows)
    input_frames = {"mixture": windows, "tokens": models.codes.vectors[code_indices]}
    sampled_frames = {
        "mixture": excerpts.mixture[:, config.prompt :],
        "tokens": excerpts.tokens[:, config.prompt :],
    }
    for name, model in models.by_name().items():
        results[name] |= {
            "parameters": model.num_parameters,
            "reading_error": audio_models.prediction_errors(
                input_frames[name], windows, deviation
            ),
            "samples": audio_models.movement_statistics(sampled_frames[name]),
        }
    frames_around_codes = draw_around_codes(
        models.codes, sampled_frames["tokens"], config.seed
    )
    results["tokens"] |= {
        "samples_around_codes": audio_models.movement_statistics(frames_around_codes),
        "code_perplexity": float(
            quantize.code_use(code_indices.reshape(-1), config.codes).perplexity
        ),
    }
    return results


def draw_around_codes(
    codes: audio_models.CodeDensities, code_frames: np.ndarray, seed: int
) -> np.ndarray:
    """Frames [..., W] as the density of the tokens has them: around the codes, not at them."""
    indices = np.asarray(quantize.nearest(code_frames, codes.vectors).indices)
    noise = np.random.default_rng(seed).standard_normal(code_frames.shape)
    return code_frames + codes.scales[indices] * noise


def measure_gain(scores: Mapping[str, audio_models.FrameScores]) -> dict[str, Any]:
    """Nats a frame that the mixture gains on the tokens, with an interval over windows."""
    gain = scores["mixture"].log_prob - scores["tokens"].log_prob
    window_gains = gain.mean(axis=1)
    return {
        "nats_per_frame": float(window_gains.mean()),
        "interval": bootstrap_interval(
            window_gains, seed=0, num_resamples=audio_models.NUM_RESAMPLES
        ),
    }


def describe_sounds(config: Config, sounds: Sounds, num_windows: int) -> dict[str, Any]:
    """Describe the sound and its length, for results files."""
    return {
        "kind": config.sound,
        "sha256_of_frames": sounds.checksum,
        "frames": len(sounds.train.frames),
        "held_out_frames": len(sounds.held_out.frames),
        "held_out_windows": num_windows,
        "milliseconds_per_frame": 1000 * sounds.mel_config.seconds_per_frame,
    }


def sweep_hops(config: Config, sounds: Sounds, models: FrameModels) -> dict[str, Any]:
    """Nats a frame against durations, for the held-out sound analysed at several hops."""
    train_hop = sounds.mel_config.hop
    windows_by_hop = {}
    for hop_factor in audio_models.HOP_FACTORS:
        hop = round(hop_factor * train_hop)
        windows_by_hop[hop / train_hop] = window_batches.consecutive_windows(
            sounds.held_out_at_hop(hop),
            length=config.length,
            max_windows=audio_models.NUM_SWEEP_WINDOWS,
        )
    return audio_models.sweep_durations(
        models.by_name(), windows_by_hop, SWEEP_DURATIONS
    )


# --- Waves --------------------------------------------------------------------------------------


def reconstruct_waves(
    config: Config, sounds: Sounds, excerpts: Excerpts
) -> dict[str, list[np.ndarray]]:
    """Name of a .wav file -> its excerpts' samples."""
    num_samples = config.length * sounds.mel_config.hop
    waves = {
        "real": [
            sounds.held_out.samples[window_index * num_samples :][:num_samples]
            for window_index in excerpts.window_indices
        ]
    }
    for name, frames in zip(
        audio_models.WAV_NAMES, excerpts.by_title().values(), strict=True
    ):
        waves[name] = [
            sound.reconstruct(
                log_mel_frames, sounds.mel_config, iterations=config.iterations
            )
            for log_mel_frames in _restore(sounds, frames)
        ]
    return waves


def _restore(sounds: Sounds, frames: np.ndarray) -> np.ndarray:
    """The first excerpts' log-mel frames, of standardised ones [B, T, W]."""
    return sounds.band_statistics.restore(frames[: audio_models.NUM_WAV_EXCERPTS])


def mean_convergence(
    sounds: Sounds, real_frames: np.ndarray, waves: list[np.ndarray]
) -> float:
    """The spectral convergence of Griffin-Lim on the real sound."""
    mel_config = sounds.mel_config
    convergences = [
        sound.spectral_convergence(
            wave,
            sound.magnitudes_from_log_mel(log_mel_frames, mel_config),
            window=mel_config.window,
            hop=mel_config.hop,
        )
        for wave, log_mel_frames in zip(
            waves, _restore(sounds, real_frames), strict=True
        )
    ]
    return float(np.mean(convergences))


# --- The program --------------------------------------------------------------------------------


def run(config: Config) -> Result:
    """Make the sound, train both models, measure and sample them, and write all of it."""
    folder = program.output_folder(config)
    sounds = prepare_sounds(config)
    with tempfile.TemporaryDirectory() as temporary_folder:
        run_folder = pathlib.Path(temporary_folder) if folder is None else folder
        models = train_models(config, sounds, run_folder)
    windows = window_batches.consecutive_windows(
        sounds.held_out.frames, length=config.length
    )
    scores = score_models(models, sounds.train.frames, windows)
    excerpts = draw_excerpts(config, models, windows)
    waves = reconstruct_waves(config, sounds, excerpts)
    deviation = sounds.band_statistics.deviation
    values = {
        "models": measure_models(config, models, scores, excerpts, windows, deviation),
        "gain_of_mixture": measure_gain(scores),
        "sound": describe_sounds(config, sounds, len(windows)),
        "real": audio_models.movement_statistics(excerpts.real[:, config.prompt :]),
        "real_as_codes": audio_models.movement_statistics(
            excerpts.as_codes[:, config.prompt :]
        ),
        "durations": sweep_hops(config, sounds, models),
        "griffin_lim_convergence": mean_convergence(
            sounds, excerpts.real, waves["real_resynthesised"]
        ),
    }
    if folder is not None and processes.is_first_process():
        figures = make_figures(config, sounds, excerpts, values)
        with write_atomically(folder) as staging_folder:
            for name, figure in figures.items():
                plots.save(figure, staging_folder, name)
            write_waves(staging_folder, waves, config.rate)
            np.savez(
                staging_folder / "codes.npz",
                **models.codes._asdict(),
                **sounds.band_statistics._asdict(),
            )
            values_with_record = {**values, "run": program.record(config)}
            write_json(staging_folder / "frames.json", values_with_record)
    return Result(values)


def make_figures(
    config: Config, sounds: Sounds, excerpts: Excerpts, values: Mapping[str, Any]
) -> dict[str, Any]:
    """File name -> figure."""
    shown_excerpts = {
        title: _restore(sounds, frames)[:2]
        for title, frames in excerpts.by_title().items()
    }
    likelihoods = {
        name: model_values["likelihood"]
        for name, model_values in reversed(values["models"].items())
    }
    sampled_steps = {
        title: audio_models.squared_steps(
            excerpts.by_title()[title][:, config.prompt :]
        )
        for title in ("real sound", "mixture", "tokens")
    }
    return {
        "frames_spectrograms": frame_figures.plot_spectrograms(
            shown_excerpts,
            sounds.mel_config,
            prompt_length=config.prompt,
            sampled_rows=("mixture", "tokens"),
        ),
        "frames_comparison": frame_figures.plot_comparison(likelihoods, sampled_steps),
        "frames_durations": frame_figures.plot_duration_curves(
            values["durations"], values["sound"]["milliseconds_per_frame"]
        ),
    }


def write_waves(
    folder: pathlib.Path, waves: Mapping[str, list[np.ndarray]], rate: int
) -> None:
    """Write a .wav file of each name's first excerpts, with silence between them."""
    silence = np.zeros(round(PAUSE_SECONDS * rate))
    for name, excerpts in waves.items():
        pieces = []
        for excerpt in excerpts[: audio_models.NUM_WAV_EXCERPTS]:
            pieces += [excerpt, silence]
        write_wav(folder / f"{name}.wav", np.concatenate(pieces[:-1]), rate)


def make_table(values: Mapping[str, Any]) -> tables.Table:
    """The results, for the terminal."""
    columns = [
        tables.Column("model"),
        tables.Column("parameters", format=",d"),
        tables.Column("nats a frame", format=".2f"),
        tables.Column("expected (dB)", format=".2f"),
        tables.Column("read (dB)", format=".2f"),
        tables.Column("squared step", format=".3f"),
        tables.Column("variance", format=".2f"),
    ]
    rows: list[list[tables.Cell]] = []
    for name, model_values in values["models"].items():
        sample_movement = model_values.get("samples", {})
        rows.append(
            [
                name,
                model_values.get("parameters"),
                model_values["likelihood"]["nats_per_frame"],
                model_values["prediction_error"]["decibels"],
                model_values.get("reading_error", {}).get("decibels"),
                sample_movement.get("squared_step"),
                sample_movement.get("variance"),
            ]
        )
    real = values["real"]
    no_numbers: list[tables.Cell] = [None] * 4
    rows.append(["real sound", *no_numbers, real["squared_step"], real["variance"]])
    caption = (
        "Held-out frames: log-density, root mean square error of the expected frame and of frames"
        " as they are read; steps and variance of sampled frames"
    )
    return tables.Table("frames", caption, columns, rows, has_summary_row=True)


if __name__ == "__main__":
    program.main(Config, run)
