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
is made here (see `sound.tones`); --sound=speech is read by espeak-ng, which must be installed, from
the documentation that this Python carries. Sampled frames get their phases by Griffin-Lim. It takes
about four minutes on two cores; a run that was stopped goes on when the command is given again.
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
from continuous_lm.experiments.audio.synthesis import espeak, speech, tones
from continuous_lm.experiments.audio.wav_files import write_wav
from continuous_lm.experiments.common import plots, program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import text, window_batches
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.models import density
from continuous_lm.models.density import heads
from continuous_lm.parallel import processes

_SOUND = flags.DEFINE_enum("sound", "tones", ["tones", "speech"], "Made here, or by espeak-ng.")
_VOICE = flags.DEFINE_string("voice", "en", "Of espeak-ng.")
_SECONDS = flags.DEFINE_float("seconds", 600.0, "Of sound to train on.", lower_bound=0.0)
_HELD_OUT = flags.DEFINE_float("held_out_seconds", 60.0, "Of other sound.", lower_bound=0.0)
_RATE = flags.DEFINE_integer("rate", 8000, "Samples a second.", lower_bound=1)
_BANDS = flags.DEFINE_integer("bands", 40, "Of a frame.", lower_bound=1)
_CODES = flags.DEFINE_integer("codes", 256, "Of the tokens' codebook.", lower_bound=2)
_COMPONENTS = flags.DEFINE_integer("components", 8, "Of the mixture.", lower_bound=1)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 96, "Of both trunks.", lower_bound=2)
_LAYERS = flags.DEFINE_integer("num_layers", 2, "Of both trunks.", lower_bound=1)
_HEADS = flags.DEFINE_integer("num_heads", 4, "Of both trunks.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 192, "Frames in a sequence.", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences in a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 600, "Optimiser steps of each model.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "At its peak.", lower_bound=0.0)
_PROMPT = flags.DEFINE_integer("prompt", 40, "Frames that samples go on from.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 16, "How many.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of samples.", lower_bound=0.0)
_ITERATIONS = flags.DEFINE_integer("iterations", 100, "Of Griffin-Lim.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of sound, parameters and samples.", lower_bound=0)


def recorded(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound to train on, and other sound, as the flags ask for."""
    lengths, seeds = (_SECONDS.value, _HELD_OUT.value), (2 * _SEED.value, 2 * _SEED.value + 1)
    if _SOUND.value == "tones":
        made = [tones(s, seed=k, rate=rate) for s, k in zip(lengths, seeds, strict=True)]
        return made[0], made[1]
    espeak()  # before the text is read, which takes seconds
    read = audio_models.sentences(text.default_text().documents)
    apart = max(1, len(read) // 10)
    parts = (read[apart:], read[:apart])
    made = [
        speech(part, seconds, seed=seed, rate=rate, voice=_VOICE.value)
        for part, seconds, seed in zip(parts, lengths, seeds, strict=True)
    ]
    return made[0], made[1]


def train(
    folder: pathlib.Path,
    data: audio_models.Recording,
    held_out: audio_models.Recording,
    settings: Mapping[str, Any],
) -> dict[str, audio_models.Listener]:
    """Both models."""
    key = jax.random.key(_SEED.value)
    width = data.frames.shape[1]
    trunk = functools.partial(
        density_training.trunk,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
    )
    head = heads.MixtureHead(width, components=_COMPONENTS.value, min_scale=audio_models.MIN_SCALE)
    # It reads no tokens: its embedding table has the one row that a trunk must have.
    mixture = density.create(key, trunk(vocab_size=1), head, reads="vectors")
    codes = audio_models.fit_codes(jax.random.fold_in(key, 1), data.frames, _CODES.value)
    tokens = density.create(
        key, trunk(vocab_size=_CODES.value), heads.TokenHead(width=_CODES.value)
    )
    listeners = {
        "mixture": audio_models.Listener(mixture),
        "tokens": audio_models.Listener(tokens, codes),
    }
    for name, listener in listeners.items():
        lm = density_training.train(
            density_training.on_mesh(listener.lm, program.mesh()),
            listener.heard(data.frames),
            listener.heard(held_out.frames),
            folder=folder / f"run_{name}",
            length=_LENGTH.value,
            batch_size=_BATCH_SIZE.value,
            steps=_STEPS.value,
            learning_rate=_LEARNING_RATE.value,
            seed=_SEED.value,
            settings={**settings, "head": heads.to_dict(listener.lm.model.head)},
            label=name,
        )
        density_training.save(density.save, folder / name, lm)
        listeners[name] = dataclasses.replace(listener, lm=lm)
    return listeners


def main() -> None:
    """Sound, training, measures, files."""
    folder = program.output_dir("frames")
    length, prompt = _LENGTH.value, _PROMPT.value
    if prompt >= length:
        raise InputError(f"--prompt={prompt} leaves nothing to sample in --length={length} frames")
    rate = _RATE.value
    window, hop = round(0.05 * rate), round(0.0125 * rate)
    analysis = sound.Analysis(rate=rate, window=window, hop=hop, bands=_BANDS.value)
    samples, others = recorded(rate)
    frames = sound.log_mel(samples, analysis)
    units = sound.statistics(frames)
    data = audio_models.Recording(samples, units.standardised(frames).astype(np.float32))
    unheard = units.standardised(sound.log_mel(others, analysis)).astype(np.float32)
    held_out = audio_models.Recording(others, unheard)
    window_batches.check_length(data.frames, length, "--seconds: the sound")
    window_batches.check_length(held_out.frames, length, "--held_out_seconds: the held-out sound")
    checksum = hashlib.sha256(data.frames.tobytes()).hexdigest()
    listeners = train(folder, data, held_out, {"sha256_of_frames": checksum})
    codes = cast(audio_models.Codes, listeners["tokens"].codes)
    deviation = units.deviation

    # Densities and means
    windows = window_batches.consecutive(held_out.frames, length=length)
    scores = {name: listener.score(windows) for name, listener in listeners.items()}
    scores["codes, no context"] = audio_models.without_context(codes, windows)
    scores["around the last frame"] = audio_models.around_the_last(data.frames, windows)
    gain = (scores["mixture"].log_prob - scores["tokens"].log_prob).mean(axis=1)
    as_codes = codes.vectors[listeners["tokens"].heard(windows)]
    read = {"mixture": windows, "tokens": as_codes}
    results: dict[str, Any] = {
        "models": {
            name: {
                "likelihood": audio_models.likelihood(found, deviation),
                "prediction_error": audio_models.errors(found.mean, windows[:, 1:], deviation),
            }
            for name, found in scores.items()
        },
        "gain_of_mixture": {
            "nats_per_frame": float(gain.mean()),
            "interval": audio_models.interval(gain),
        },
        "sound": {
            "kind": _SOUND.value,
            "sha256_of_frames": checksum,
            "frames": len(data.frames),
            "held_out_frames": len(held_out.frames),
            "held_out_windows": len(windows),
            "milliseconds_per_frame": 1000 * analysis.seconds_per_frame,
        },
    }

    # Samples
    chosen = np.arange(min(_SAMPLES.value, len(windows))) * len(windows)
    chosen = chosen // min(_SAMPLES.value, len(windows))
    key = jax.random.key(_SEED.value + 1)
    drawn = {
        name: listener.sample(key, windows[chosen, :prompt], length - prompt, _TEMPERATURE.value)
        for name, listener in listeners.items()
    }
    sampled = {
        name: np.concatenate([read[name][chosen, :prompt], new], axis=1)
        for name, new in drawn.items()
    }
    for name, listener in listeners.items():
        results["models"][name] |= {
            "parameters": listener.size,
            "reading_error": audio_models.errors(read[name], windows, deviation),
            "samples": audio_models.movement(drawn[name]),
        }
    # As its density says: not only at the codes, but around them.
    indices = np.asarray(quantize.nearest(drawn["tokens"], codes.vectors).indices)
    rng = np.random.default_rng(_SEED.value)
    around = drawn["tokens"] + codes.scales[indices] * rng.standard_normal(drawn["tokens"].shape)
    results["models"]["tokens"]["samples_around_codes"] = audio_models.movement(around)
    counts = np.bincount(listeners["tokens"].heard(windows).reshape(-1), minlength=_CODES.value)
    shares = counts[counts > 0] / counts.sum()
    results["models"]["tokens"]["code_perplexity"] = float(np.exp(-(shares * np.log(shares)).sum()))
    results["real"] = audio_models.movement(windows[chosen, prompt:length])
    results["real_as_codes"] = audio_models.movement(as_codes[chosen, prompt:length])

    # Durations
    heard = {}
    for speed in audio_models.SPEEDS:
        other = dataclasses.replace(analysis, hop=round(speed * hop))
        found = units.standardised(sound.log_mel(held_out.samples, other)).astype(np.float32)
        heard[other.hop / hop] = window_batches.consecutive(
            found, length=length, limit=audio_models.SWEPT
        )
    results["durations"] = audio_models.sweep(listeners, heard, np.linspace(0.5, 1.5, 21).round(2))

    # Sound and figures
    real = windows[chosen, :length]
    rows = {
        "real sound": real,
        "the same as codes": as_codes[chosen, :length],
        "mixture": sampled["mixture"],
        "tokens": sampled["tokens"],
    }
    rows = {name: units.restored(frames[: audio_models.HEARD]) for name, frames in rows.items()}
    waves = {"real": [held_out.samples[i * length * hop :][: length * hop] for i in chosen]}
    for name, excerpts in zip(audio_models.WAVES, rows.values(), strict=True):
        waves[name] = [
            sound.heard(excerpt, analysis, iterations=_ITERATIONS.value) for excerpt in excerpts
        ]
    wanted = [sound.magnitudes(excerpt, analysis) for excerpt in rows["real sound"]]
    results["griffin_lim_convergence"] = float(
        np.mean(
            [
                sound.spectral_convergence(w, m, window=window, hop=hop)
                for w, m in zip(waves["real_resynthesised"], wanted, strict=True)
            ]
        )
    )
    figures = {
        "frames_spectrograms": audio_models.spectrograms(
            {name: excerpts[:2] for name, excerpts in rows.items()},
            analysis,
            prompt=prompt,
            sampled=("mixture", "tokens"),
        ),
        "frames_comparison": audio_models.comparison(
            {n: results["models"][n]["likelihood"] for n in reversed(list(scores))},
            {
                "real sound": audio_models.steps_of(windows[chosen, prompt:length]),
                "mixture": audio_models.steps_of(drawn["mixture"]),
                "tokens": audio_models.steps_of(drawn["tokens"]),
            },
        ),
        "frames_durations": audio_models.duration_curves(
            results["durations"], 1000 * analysis.seconds_per_frame
        ),
    }
    if not processes.is_first():
        return
    pause = np.zeros(round(0.3 * rate))
    with written_aside(folder) as aside:
        for name, figure in figures.items():
            plots.save(figure, aside, name)
        for name, excerpts in waves.items():
            parts = [
                part for excerpt in excerpts[: audio_models.HEARD] for part in (excerpt, pause)
            ]
            write_wav(aside / f"{name}.wav", np.concatenate(parts[:-1]), rate)
        np.savez(aside / "codes.npz", **codes._asdict(), **units._asdict())
        write_json(aside / "frames.json", {**results, "run": program.record()})
    print(audio_models.table(results).as_text())
    low, high = results["gain_of_mixture"]["interval"]
    print(f"\nThe mixture gains {gain.mean():.2f} nats a frame [{low:.2f}, {high:.2f}]")
    print(f"{folder}: frames.json, 3 figures, {len(waves)} .wav files, both models")


if __name__ == "__main__":
    program.run(main, meshes=True)
