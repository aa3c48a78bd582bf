r"""Frames of sound: a mixture of Gaussians over the next one, against tokens of equal size.

    python -m continuous_lm frames [--sound=speech] [--steps=600] [--output_dir=FOLDER]

Two models with the same trunk hear the same sound, 80 log-mel frames a second, and are asked for
the density of the next frame of sound that they have not heard, in nats, in units in which each
band has mean 0 and deviation 1:

mixture    reads frames; its head is a mixture of Gaussians whose weights, means and deviations it
           makes anew for every frame
tokens     reads codes: each frame is replaced by the nearest of E codes that k-means found, and a
           softmax predicts the next code. A code stands for frames around it, here with a normal
           density whose deviations are those of the frames that it stands for; so its density of a
           frame is the sum over codes e of p(e | codes before) N(frame; code_e, deviation_e), a
           mixture too, of which the model chooses the weights alone. It is no bound: it integrates
           to 1 over frames, and can be compared with the other.

Two that need no training say what these numbers are worth: the same codes with the weights of their
frequencies, and a Gaussian around the frame before.

The folder gets frames.json with every number, three figures, .wav files (sound, what is left of it
after frames, after codes, and samples of both models), and the models. --sound=tones, the default,
is made here (see `synthesis.synthesize_tones`); --sound=speech is read by espeak-ng, which must be
installed, from the documentation that this Python carries. Sampled frames get their phases by
Griffin-Lim. It takes about four minutes on two cores; a run that was stopped goes on when the
command is given again.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from continuous_lm import quantize
from continuous_lm.errors import InputError
from continuous_lm.experiments.audio import audio_models, sound
from continuous_lm.experiments.audio.synthesis import (
    find_espeak,
    synthesize_speech,
    synthesize_tones,
)
from continuous_lm.experiments.audio.wav_files import write_wav
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.experiments.common import plots
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import fit, text, window_batches
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import density
from continuous_lm.models.density import heads
from continuous_lm.parallel import processes

_SOUND = flags.DEFINE_enum(
    "sound", "tones", ["tones", "speech"], "Made here, or by espeak-ng."
)
_VOICE = flags.DEFINE_string("voice", "en", "Of espeak-ng.")
_SECONDS = flags.DEFINE_float(
    "seconds", 600.0, "Of sound to train on.", lower_bound=0.0
)
_HELD_OUT_SECONDS = flags.DEFINE_float(
    "held_out_seconds", 60.0, "Of other sound.", lower_bound=0.0
)
_SAMPLE_RATE = flags.DEFINE_integer("rate", 8000, "Samples a second.", lower_bound=1)
_BANDS = flags.DEFINE_integer("bands", 40, "Of a frame.", lower_bound=1)
_CODES = flags.DEFINE_integer("codes", 256, "Of the tokens' codebook.", lower_bound=2)
_COMPONENTS = flags.DEFINE_integer("components", 8, "Of the mixture.", lower_bound=1)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 96, "Of both trunks.", lower_bound=2)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 2, "Of both trunks.", lower_bound=1)
_NUM_HEADS = flags.DEFINE_integer("num_heads", 4, "Of both trunks.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 192, "Frames in a sequence.", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Sequences in a step.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "steps", 600, "Optimiser steps of each model.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 3e-3, "At its peak.", lower_bound=0.0
)
_PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt", 40, "Frames that samples go on from.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer("samples", 16, "How many.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of samples.", lower_bound=0.0)
_ITERATIONS = flags.DEFINE_integer("iterations", 100, "Of Griffin-Lim.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of sound, parameters and samples.", lower_bound=0
)


def synthesize_sounds(sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound to train on, and other sound, as the flags ask for."""
    lengths, seeds = (
        (_SECONDS.value, _HELD_OUT_SECONDS.value),
        (2 * _SEED.value, 2 * _SEED.value + 1),
    )
    if _SOUND.value == "tones":
        sounds = [
            synthesize_tones(length, seed=k, rate=sample_rate)
            for length, k in zip(lengths, seeds, strict=True)
        ]
        return sounds[0], sounds[1]
    find_espeak()  # before the text is read, which takes seconds
    all_sentences = audio_models.extract_sentences(text.default_text().documents)
    num_held_out = max(1, len(all_sentences) // 10)
    sentence_parts = (all_sentences[num_held_out:], all_sentences[:num_held_out])
    sounds = [
        synthesize_speech(
            part_sentences, seconds, seed=seed, rate=sample_rate, voice=_VOICE.value
        )
        for part_sentences, seconds, seed in zip(
            sentence_parts, lengths, seeds, strict=True
        )
    ]
    return sounds[0], sounds[1]


def train_models(
    folder: pathlib.Path,
    train_recording: audio_models.Recording,
    held_out_recording: audio_models.Recording,
    settings: Mapping[str, Any],
) -> dict[str, audio_models.AudioModel]:
    """Both models."""
    key = jax.random.key(_SEED.value)
    width = train_recording.frames.shape[1]
    make_trunk_config = functools.partial(
        density_training.trunk_config,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_NUM_LAYERS.value,
        num_heads=_NUM_HEADS.value,
    )
    head = heads.MixtureHead(
        width, components=_COMPONENTS.value, min_scale=audio_models.MIN_SCALE
    )
    # It reads no tokens: its embedding table has the one row that a trunk must have.
    mixture_lm = density.create(
        key, make_trunk_config(vocab_size=1), head, input_kind="vectors"
    )
    codes = audio_models.fit_codes(
        jax.random.fold_in(key, 1), train_recording.frames, _CODES.value
    )
    token_lm = density.create(
        key,
        make_trunk_config(vocab_size=_CODES.value),
        heads.TokenHead(width=_CODES.value),
    )
    trained_models = {
        "mixture": audio_models.AudioModel(mixture_lm),
        "tokens": audio_models.AudioModel(token_lm, codes),
    }
    for name, audio_model in trained_models.items():
        lm = density_training.train(
            density_training.place_on_mesh(audio_model.lm, program.mesh()),
            audio_model.model_inputs(train_recording.frames),
            audio_model.model_inputs(held_out_recording.frames),
            folder=folder / f"run_{name}",
            config=fit.FitConfig(
                steps=_STEPS.value,
                learning_rate=_LEARNING_RATE.value,
                batch_size=_BATCH_SIZE.value,
                seed=_SEED.value,
            ),
            length=_LENGTH.value,
            settings={**settings, "head": heads.to_dict(audio_model.lm.model.head)},
            label=name,
        )
        density_training.save_on_first_process(density.save, folder / name, lm)
        trained_models[name] = dataclasses.replace(audio_model, lm=lm)
    return trained_models


def main() -> None:
    """Sound, training, measures, files."""
    folder = program.output_dir("frames")
    length, prompt_length = _LENGTH.value, _PROMPT_LENGTH.value
    if prompt_length >= length:
        raise InputError(
            f"--prompt={prompt_length} leaves nothing to sample in --length={length} frames"
        )
    sample_rate = _SAMPLE_RATE.value
    window, hop = round(0.05 * sample_rate), round(0.0125 * sample_rate)
    mel_config = sound.MelConfig(
        rate=sample_rate, window=window, hop=hop, bands=_BANDS.value
    )
    train_samples, held_out_samples = synthesize_sounds(sample_rate)
    frames = sound.log_mel(train_samples, mel_config)
    band_statistics = sound.compute_band_statistics(frames)
    train_recording = audio_models.Recording(
        train_samples, band_statistics.standardize(frames).astype(np.float32)
    )
    held_out_frames = band_statistics.standardize(
        sound.log_mel(held_out_samples, mel_config)
    ).astype(np.float32)
    held_out_recording = audio_models.Recording(held_out_samples, held_out_frames)
    window_batches.check_length(train_recording.frames, length, "--seconds: the sound")
    window_batches.check_length(
        held_out_recording.frames, length, "--held_out_seconds: the held-out sound"
    )
    checksum = hashlib.sha256(train_recording.frames.tobytes()).hexdigest()
    trained_models = train_models(
        folder, train_recording, held_out_recording, {"sha256_of_frames": checksum}
    )
    codes = cast(audio_models.CodeDensities, trained_models["tokens"].codes)
    deviation = band_statistics.deviation

    # Densities and means
    windows = window_batches.consecutive_windows(
        held_out_recording.frames, length=length
    )
    scores = {
        name: audio_model.score(windows) for name, audio_model in trained_models.items()
    }
    scores["codes, no context"] = audio_models.unigram_baseline(codes, windows)
    scores["around the last frame"] = audio_models.previous_frame_baseline(
        train_recording.frames, windows
    )
    mixture_gain = (scores["mixture"].log_prob - scores["tokens"].log_prob).mean(axis=1)
    code_frames = codes.vectors[trained_models["tokens"].model_inputs(windows)]
    input_frames = {"mixture": windows, "tokens": code_frames}
    results: dict[str, Any] = {
        "models": {
            name: {
                "likelihood": audio_models.summarize_likelihood(
                    model_scores, deviation
                ),
                "prediction_error": audio_models.prediction_errors(
                    model_scores.mean, windows[:, 1:], deviation
                ),
            }
            for name, model_scores in scores.items()
        },
        "gain_of_mixture": {
            "nats_per_frame": float(mixture_gain.mean()),
            "interval": bootstrap_interval(
                mixture_gain, seed=0, num_resamples=audio_models.NUM_RESAMPLES
            ),
        },
        "sound": {
            "kind": _SOUND.value,
            "sha256_of_frames": checksum,
            "frames": len(train_recording.frames),
            "held_out_frames": len(held_out_recording.frames),
            "held_out_windows": len(windows),
            "milliseconds_per_frame": 1000 * mel_config.seconds_per_frame,
        },
    }

    # Samples
    window_indices = np.arange(min(_SAMPLES.value, len(windows))) * len(windows)
    window_indices = window_indices // min(_SAMPLES.value, len(windows))
    key = jax.random.key(_SEED.value + 1)
    sampled_frames = {
        name: audio_model.sample(
            key,
            windows[window_indices, :prompt_length],
            length - prompt_length,
            _TEMPERATURE.value,
        )
        for name, audio_model in trained_models.items()
    }
    frames_with_prompt = {
        name: np.concatenate(
            [input_frames[name][window_indices, :prompt_length], new_frames], axis=1
        )
        for name, new_frames in sampled_frames.items()
    }
    for name, audio_model in trained_models.items():
        results["models"][name] |= {
            "parameters": audio_model.num_parameters,
            "reading_error": audio_models.prediction_errors(
                input_frames[name], windows, deviation
            ),
            "samples": audio_models.movement_statistics(sampled_frames[name]),
        }
    # As its density says: not only at the codes, but around them.
    indices = np.asarray(
        quantize.nearest(sampled_frames["tokens"], codes.vectors).indices
    )
    rng = np.random.default_rng(_SEED.value)
    frames_around_codes = sampled_frames["tokens"] + codes.scales[
        indices
    ] * rng.standard_normal(sampled_frames["tokens"].shape)
    results["models"]["tokens"]["samples_around_codes"] = (
        audio_models.movement_statistics(frames_around_codes)
    )
    code_counts = np.bincount(
        trained_models["tokens"].model_inputs(windows).reshape(-1),
        minlength=_CODES.value,
    )
    code_shares = code_counts[code_counts > 0] / code_counts.sum()
    results["models"]["tokens"]["code_perplexity"] = float(
        np.exp(-(code_shares * np.log(code_shares)).sum())
    )
    results["real"] = audio_models.movement_statistics(
        windows[window_indices, prompt_length:length]
    )
    results["real_as_codes"] = audio_models.movement_statistics(
        code_frames[window_indices, prompt_length:length]
    )

    # Durations
    windows_by_hop = {}
    for hop_factor in audio_models.HOP_FACTORS:
        hop_config = dataclasses.replace(mel_config, hop=round(hop_factor * hop))
        hop_frames = band_statistics.standardize(
            sound.log_mel(held_out_recording.samples, hop_config)
        ).astype(np.float32)
        windows_by_hop[hop_config.hop / hop] = window_batches.consecutive_windows(
            hop_frames, length=length, max_windows=audio_models.NUM_SWEEP_WINDOWS
        )
    results["durations"] = audio_models.sweep_durations(
        trained_models, windows_by_hop, np.linspace(0.5, 1.5, 21).round(2)
    )

    # Sound and figures
    real_frames = windows[window_indices, :length]
    excerpts_by_kind = {
        "real sound": real_frames,
        "the same as codes": code_frames[window_indices, :length],
        "mixture": frames_with_prompt["mixture"],
        "tokens": frames_with_prompt["tokens"],
    }
    excerpts_by_kind = {
        name: band_statistics.restore(frames[: audio_models.NUM_WAV_EXCERPTS])
        for name, frames in excerpts_by_kind.items()
    }
    samples_by_kind = {
        "real": [
            held_out_recording.samples[i * length * hop :][: length * hop]
            for i in window_indices
        ]
    }
    for name, excerpts in zip(
        audio_models.WAV_NAMES, excerpts_by_kind.values(), strict=True
    ):
        samples_by_kind[name] = [
            sound.reconstruct(excerpt, mel_config, iterations=_ITERATIONS.value)
            for excerpt in excerpts
        ]
    target_magnitudes = [
        sound.magnitudes_from_log_mel(excerpt, mel_config)
        for excerpt in excerpts_by_kind["real sound"]
    ]
    results["griffin_lim_convergence"] = float(
        np.mean(
            [
                sound.spectral_convergence(wave, magnitudes, window=window, hop=hop)
                for wave, magnitudes in zip(
                    samples_by_kind["real_resynthesised"],
                    target_magnitudes,
                    strict=True,
                )
            ]
        )
    )
    figures = {
        "frames_spectrograms": audio_models.plot_spectrograms(
            {name: excerpts[:2] for name, excerpts in excerpts_by_kind.items()},
            mel_config,
            prompt_length=prompt_length,
            sampled_rows=("mixture", "tokens"),
        ),
        "frames_comparison": audio_models.plot_comparison(
            {
                model_name: results["models"][model_name]["likelihood"]
                for model_name in reversed(list(scores))
            },
            {
                "real sound": audio_models.squared_steps(
                    windows[window_indices, prompt_length:length]
                ),
                "mixture": audio_models.squared_steps(sampled_frames["mixture"]),
                "tokens": audio_models.squared_steps(sampled_frames["tokens"]),
            },
        ),
        "frames_durations": audio_models.plot_duration_curves(
            results["durations"], 1000 * mel_config.seconds_per_frame
        ),
    }
    if not processes.is_first_process():
        return
    silence = np.zeros(round(0.3 * sample_rate))
    with write_atomically(folder) as staging_folder:
        for name, figure in figures.items():
            plots.save(figure, staging_folder, name)
        for name, excerpts in samples_by_kind.items():
            pieces = [
                piece
                for excerpt in excerpts[: audio_models.NUM_WAV_EXCERPTS]
                for piece in (excerpt, silence)
            ]
            write_wav(
                staging_folder / f"{name}.wav", np.concatenate(pieces[:-1]), sample_rate
            )
        np.savez(
            staging_folder / "codes.npz", **codes._asdict(), **band_statistics._asdict()
        )
        write_json(staging_folder / "frames.json", {**results, "run": program.record()})
    print(audio_models.make_table(results).as_text())
    low, high = results["gain_of_mixture"]["interval"]
    print(
        f"\nThe mixture gains {mixture_gain.mean():.2f} nats a frame [{low:.2f}, {high:.2f}]"
    )
    print(
        f"{folder}: frames.json, 3 figures, {len(samples_by_kind)} .wav files, both models"
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
