r"""Frames of sound: a mixture of Gaussians over the next one, against tokens of equal size.

    python -m continuous_lm.experiments.frames [--sound=speech] [--steps=600] [--output_dir=FOLDER]

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
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from continuous_lm import quantize
from continuous_lm.errors import InputError
from continuous_lm.experiments import batches, calm, plots, program, sound, tables, text
from continuous_lm.files import write_json, written_aside
from continuous_lm.models import density, heads, sampling
from continuous_lm.models.densities import Gaussian, Mixture
from continuous_lm.models.density import DensityLM, DensityModel

MIN_SCALE = 0.05  # of all densities here, in deviations of a band
SPEEDS = (0.8, 1.0, 1.25)  # hops of the sweep, in those of training
DECIBELS = 10.0 / np.log(10.0)  # in a nat of power
_SHRINKAGE = 10.0  # frames of average deviation that every code is given
_SWEPT = 6  # windows in the sweep of durations
_HEARD = 4  # excerpts in a .wav file

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


# --- Sound ----------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """Sound [n] and its frames float32 [T, W], standardised by the training sound's statistics."""

    samples: np.ndarray
    frames: np.ndarray


def sentences(documents: Sequence[str]) -> list[str]:
    """Plain sentences in a text, each once, in an order of chance that is always the same."""
    joined = "\n\n".join(" ".join(part.split()) for d in documents for part in d.split("\n\n"))
    found = re.findall(r"(?:(?<=\. )|^)[A-Z][a-z]+(?:,? [a-z]+){5,20}\.", joined, re.MULTILINE)
    unique = sorted(set(found))
    return [unique[i] for i in np.random.default_rng(0).permutation(len(unique))]


def recorded(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound to train on, and other sound, as the flags ask for."""
    lengths, seeds = (_SECONDS.value, _HELD_OUT.value), (2 * _SEED.value, 2 * _SEED.value + 1)
    if _SOUND.value == "tones":
        made = [sound.tones(s, seed=k, rate=rate) for s, k in zip(lengths, seeds, strict=True)]
        return made[0], made[1]
    sound.espeak()  # before the text is read, which takes seconds
    read = sentences(text.default_text().documents)
    apart = max(1, len(read) // 10)
    parts = (read[apart:], read[:apart])
    made = [
        sound.speech(part, seconds, seed=seed, rate=rate, voice=_VOICE.value)
        for part, seconds, seed in zip(parts, lengths, seeds, strict=True)
    ]
    return made[0], made[1]


# --- Densities ------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """What tokens stand for: a normal density each."""

    vectors: np.ndarray  # [E, W]
    scales: np.ndarray  # [E, W], standard deviations
    log_shares: np.ndarray  # [E], of the frames that they were found in


def fit_codes(key: jax.Array, frames: np.ndarray, num_codes: int) -> Codes:
    """Codes of frames [T, W] by k-means, with the deviations of the frames of each.

    A code's variances are averaged with those of all codes, as if it had ten more frames of these;
    no deviation is below `MIN_SCALE`, which is the mixture's bound too.
    """
    vectors = np.asarray(quantize.kmeans(key, frames, num_codes, steps=20).centres)
    indices = np.asarray(quantize.nearest(frames, vectors).indices)
    squares = (frames - vectors[indices]) ** 2
    counts = np.bincount(indices, minlength=num_codes)
    sums = np.zeros_like(vectors)
    np.add.at(sums, indices, squares)
    average = squares.mean(axis=0)
    variances = (sums + _SHRINKAGE * average) / (counts + _SHRINKAGE)[:, None]
    shares = (counts + 1.0) / (counts + 1.0).sum()
    scales = np.maximum(np.sqrt(variances), MIN_SCALE)
    return Codes(vectors, scales.astype(np.float32), np.log(shares).astype(np.float32))


class Scores(NamedTuple):
    """Of each frame of windows [N, T + 1, W] after the first."""

    log_prob: np.ndarray  # [N, T], nats
    mean: np.ndarray  # [N, T, W], what is expected


@dataclasses.dataclass(frozen=True)
class Listener:
    """A trained model of frames; with codes, it hears and says those."""

    lm: DensityLM
    codes: Codes | None = None

    @property
    def size(self) -> int:
        """Parameters, codes and their deviations among them."""
        arrays = [*jax.tree.leaves(self.lm.params), *(self.codes or ())[:2]]
        return sum(array.size for array in arrays)

    def heard(self, frames: np.ndarray) -> np.ndarray:
        """What it reads of frames [..., W]: these, or codes [...]."""
        if self.codes is None:
            return frames
        return np.asarray(quantize.nearest(frames, self.codes.vectors).indices)

    def score(self, windows: np.ndarray, duration: float = 1.0) -> Scores:
        """Densities of frames after those before, where each lasts `duration`.

        Window by window: with many codes, the densities of one take megabytes.
        """
        durations = np.full(windows.shape[1], duration, np.float32)
        found = [
            _score(self.lm.model, self.lm.params, self.codes, read, window, durations)
            for read, window in zip(self.heard(windows), windows, strict=True)
        ]
        return Scores(
            *(np.stack([np.asarray(x) for x in part]) for part in zip(*found, strict=True))
        )

    def sample(self, key: jax.Array, prompts: np.ndarray, count: int, temperature: float) -> Any:
        """Frames [N, count, W] after prompts [N, T, W]: of the mixture, or the codes' vectors."""
        options: dict[str, Any] = {"max_new": count, "temperature": temperature, "key": key}
        if self.codes is None:
            return np.asarray(sampling.sample(self.lm, vectors=prompts, **options))
        drawn: Any = sampling.sample(self.lm, self.heard(prompts), stop=(), **options)
        return self.codes.vectors[np.asarray(drawn.tokens)]


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: DensityModel,
    params: Any,
    codes: Codes | None,
    heard: jax.Array,
    window: jax.Array,
    durations: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`Scores` of one window, [T] and [T, W]."""
    variables: Any = {"params": params}
    given: Any = {model.reads: heard, "durations": durations}
    hidden = model.apply(variables, **given, method="predictions")
    found: Any = model.apply(variables, hidden, method="distribution")
    if codes is not None:
        found = Mixture(found.logits, jnp.asarray(codes.vectors), jnp.asarray(codes.scales))
    return found.log_prob(window[1:]), found.mean


def without_context(codes: Codes, windows: np.ndarray) -> Scores:
    """Every code as probable as it is frequent."""
    mixture = Mixture(*map(jnp.asarray, (codes.log_shares, codes.vectors, codes.scales)))
    nats = jax.lax.map(mixture.log_prob, jnp.asarray(windows[:, 1:]))
    mean = np.broadcast_to(np.asarray(mixture.mean), windows[:, 1:].shape)
    return Scores(np.asarray(nats), mean)


def around_the_last(frames: np.ndarray, windows: np.ndarray) -> Scores:
    """A Gaussian around the frame before, as wide as the training frames' steps [T, W] are."""
    steps = np.diff(frames, axis=0)
    scale = np.maximum(np.sqrt((steps**2).mean(axis=0)), MIN_SCALE)
    before = jnp.asarray(windows[:, :-1])
    nats = Gaussian(before, jnp.asarray(scale)).log_prob(windows[:, 1:])
    return Scores(np.asarray(nats), windows[:, :-1])


# --- Numbers --------------------------------------------------------------------------------------


def interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> list[float]:
    """A 95 % interval of the mean of values [N], by bootstrap over them."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def steps_of(frames: np.ndarray) -> np.ndarray:
    """Squared differences of neighbours among frames [N, T, W], means over bands: [N, T - 1]."""
    return np.asarray((np.diff(frames, axis=1) ** 2).mean(axis=-1), np.float64)


def movement(frames: np.ndarray) -> dict[str, float]:
    """How frames [N, T, W] move: mean squared step; their variance; shares that stand still."""
    steps = steps_of(frames)
    return {
        "squared_step": float(steps.mean()),
        "variance": float(frames.reshape(-1, frames.shape[-1]).var(axis=0).mean()),
        "unmoved": float((steps == 0.0).mean()),
    }


def errors(found: np.ndarray, wanted: np.ndarray, deviation: np.ndarray) -> dict[str, float]:
    """Mean squared error of frames [..., W] in standard units, and its root in decibels."""
    squares = np.asarray(found - wanted, np.float64) ** 2
    decibels = DECIBELS * np.sqrt((squares * deviation**2).mean())
    return {"squared": float(squares.mean()), "decibels": float(decibels)}


def likelihood(scores: Scores, deviation: np.ndarray) -> dict[str, Any]:
    """Nats a frame with an interval over windows, in standard units and those of log-mel power."""
    by_window = np.asarray(scores.log_prob, np.float64).mean(axis=1)
    mean = float(by_window.mean())
    return {
        "nats_per_frame": mean,
        "interval": interval(by_window),
        "nats_per_frame_log_mel": mean - float(np.log(deviation).sum()),
    }


def sweep(
    listeners: Mapping[str, Listener], heard: Mapping[float, np.ndarray], points: np.ndarray
) -> dict[str, Any]:
    """Nats a frame where each lasts as long as `points` say, for sound analysed at other hops.

    Args:
      listeners: by name.
      heard: hop, in hops of training -> windows [N, T + 1, W]. A frame of these lasts that long.
      points: durations.
    """
    curves = {
        name: {
            f"{hop:g}": [float(listener.score(windows, d).log_prob.mean()) for d in points]
            for hop, windows in heard.items()
        }
        for name, listener in listeners.items()
    }
    best = {
        name: {hop: float(points[int(np.argmax(c))]) for hop, c in by_hop.items()}
        for name, by_hop in curves.items()
    }
    return {"durations": points.tolist(), "nats_per_frame": curves, "best_duration": best}


# --- Figures --------------------------------------------------------------------------------------


def spectrograms(
    rows: Mapping[str, np.ndarray], analysis: sound.Analysis, *, prompt: int, sampled: Sequence[str]
) -> Figure:
    """Excerpts of frames beside each other, in decibels below the loudest band.

    Args:
      rows: name -> log-mel frames [N, T, W], N excerpts.
      analysis: of the frames.
      prompt: after how many frames a sample begins.
      sampled: the rows in which it does.
    """
    first = next(iter(rows.values()))
    count, length = first.shape[:2]
    peak = max(float(first.max()), -100.0)
    bands = np.arange(-1, analysis.bands + 1)
    places = sound.centres(rate=analysis.rate, bands=analysis.bands, low=analysis.low)
    ticks = [f for f in (250, 500, 1000, 2000, 4000, 8000) if f < 0.99 * analysis.rate / 2]
    end = length * analysis.seconds_per_frame
    with plt.rc_context(plots.STYLE):
        figure, grid = plt.subplots(
            len(rows),
            count,
            figsize=(3.3 * count, 1.12 * len(rows) + 0.5),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for line, (name, excerpts) in zip(grid, rows.items(), strict=True):
            for ax, frames in zip(line, excerpts, strict=True):
                image = ax.imshow(
                    DECIBELS * (frames.T - peak),
                    origin="lower",
                    aspect="auto",
                    extent=(0.0, end, -0.5, analysis.bands - 0.5),
                    vmin=-65.0,
                    vmax=0.0,
                    cmap="magma",
                    interpolation="nearest",
                )
                ax.spines[:].set_visible(False)
                if name in sampled:
                    begin = prompt * analysis.seconds_per_frame
                    ax.axvline(begin, color="white", lw=0.9, ls=(0, (3, 2)))
            if name in sampled:
                note: dict[str, Any] = {"color": "white", "fontsize": 7, "va": "top"}
                line[0].text(begin - 0.02, analysis.bands - 2, "given", ha="right", **note)
                line[0].text(begin + 0.02, analysis.bands - 2, "sampled", **note)
            line[0].set_title(name, fontsize=8, loc="left", pad=2.5)
        for ax in grid[:, 0]:
            ax.set_yticks(np.interp(ticks, places, bands), [f"{f / 1000:g}" for f in ticks])
        figure.supylabel("frequency (kHz, in mel bands)", fontsize=9)
        figure.supxlabel("time (s)", fontsize=9)
        bar = figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.015)
        bar.set_label("power (dB)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    return figure


def comparison(nats: Mapping[str, Mapping[str, Any]], steps: Mapping[str, np.ndarray]) -> Figure:
    """What the models give held-out frames, and how their samples move.

    Args:
      nats: name -> `likelihood`, the best last.
      steps: name -> `steps_of` frames.
    """
    with plt.rc_context(plots.STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(7.0, 2.6), layout="constrained", width_ratios=(1.0, 1.15)
        )
        for i, (name, found) in enumerate(nats.items()):
            colour, (low, high) = _colour(name), found["interval"]
            left.plot([low, high], [i, i], color=colour, lw=1.2, marker="|", ms=7)
            left.plot(found["nats_per_frame"], i, "o", color=colour, ms=3)
            left.annotate(
                f"{found['nats_per_frame']:.1f}".replace("-", "\N{MINUS SIGN}"),
                (found["nats_per_frame"], i),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=8,
                color=colour,
            )
        left.set_yticks(range(len(nats)), list(nats))
        left.set(ylim=(-0.5, len(nats) - 0.3), xlabel="log-density of a held-out frame (nats)")
        left.margins(x=0.12)
        for name, values in steps.items():
            ordered = np.sort(np.maximum(values.reshape(-1), 1e-4))
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            style = {"ls": (0, (4, 2)), "lw": 1.3} if name == "real sound" else {}
            right.step(
                ordered, share, where="post", color=_colour(name), label=name, **cast(Any, style)
            )
        right.set(xscale="log", ylim=(0, 1.02), xlim=(1e-3, None))
        right.set(xlabel="squared step from frame to frame", ylabel="share of steps below")
        right.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def duration_curves(found: Mapping[str, Any], milliseconds: float) -> Figure:
    """The log-density of sound at several hops, against how long its frames are said to last.

    Args:
      found: of `sweep`.
      milliseconds: the hop in training.
    """
    curves = found["nats_per_frame"]
    with plt.rc_context(plots.STYLE):
        figure, grid = plt.subplots(
            1, len(curves), figsize=(3.4 * len(curves), 2.7), layout="constrained", squeeze=False
        )
        for ax, (name, by_hop) in zip(grid[0], curves.items(), strict=True):
            for (hop, values), colour in zip(by_hop.items(), _HOPS, strict=True):
                label = f"{float(hop) * milliseconds:.3g} ms"
                ax.plot(found["durations"], values, color=colour, label=label)
                ax.axvline(float(hop), color=colour, lw=0.7, ls=(0, (4, 3)), zorder=0)
                best = int(np.argmax(values))
                ax.plot(found["durations"][best], values[best], "o", color=colour, ms=4)
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("duration given to each frame")
        grid[0, 0].set_ylabel("nats a frame")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            title="a frame every",
            title_fontsize=8,
            loc="outside right center",
            frameon=False,
            fontsize=8,
        )
    return figure


_HOPS = (plots.COLOURS[1], plots.COLOURS[2], plots.COLOURS[3])
_COLOURED = {
    "mixture": plots.COLOURS[3],
    "tokens": plots.COLOURS[4],
    "real sound": "0.25",
}


def _colour(name: str) -> str:
    return next((c for kind, c in _COLOURED.items() if name.startswith(kind)), "0.5")


# --- The program ----------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> tables.Table:
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
    rows = []
    for name, found in results["models"].items():
        moved = found.get("samples", {})
        rows.append(
            [
                name,
                found.get("parameters"),
                found["likelihood"]["nats_per_frame"],
                found["prediction_error"]["decibels"],
                found.get("reading_error", {}).get("decibels"),
                moved.get("squared_step"),
                moved.get("variance"),
            ]
        )
    real = results["real"]
    rows.append(
        ["real sound", None, None, None, None, real["squared_step"], real["variance"]],
    )
    caption = (
        "Held-out frames: log-density, root mean square error of the expected frame and of frames"
        " as they are read; steps and variance of sampled frames"
    )
    return tables.Table("frames", caption, columns, rows, last_apart=True)


def train(
    folder: pathlib.Path, data: Recording, held_out: Recording, settings: Mapping[str, Any]
) -> dict[str, Listener]:
    """Both models."""
    key = jax.random.key(_SEED.value)
    width = data.frames.shape[1]
    trunk = functools.partial(
        calm.trunk,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
    )
    head = heads.MixtureHead(width, components=_COMPONENTS.value, min_scale=MIN_SCALE)
    # It reads no tokens: its embedding table has the one row that a trunk must have.
    mixture = density.create(key, trunk(vocab_size=1), head, reads="vectors")
    codes = fit_codes(jax.random.fold_in(key, 1), data.frames, _CODES.value)
    tokens = density.create(
        key, trunk(vocab_size=_CODES.value), heads.TokenHead(width=_CODES.value)
    )
    listeners = {"mixture": Listener(mixture), "tokens": Listener(tokens, codes)}
    for name, listener in listeners.items():
        lm = calm.train(
            listener.lm,
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
        density.save(folder / name, lm)
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
    data = Recording(samples, units.standardised(frames).astype(np.float32))
    unheard = units.standardised(sound.log_mel(others, analysis)).astype(np.float32)
    held_out = Recording(others, unheard)
    batches.check_length(data.frames, length, "--seconds: the sound")
    batches.check_length(held_out.frames, length, "--held_out_seconds: the held-out sound")
    checksum = hashlib.sha256(data.frames.tobytes()).hexdigest()
    listeners = train(folder, data, held_out, {"sha256_of_frames": checksum})
    codes = cast(Codes, listeners["tokens"].codes)
    deviation = units.deviation

    # Densities and means
    windows = batches.consecutive(held_out.frames, length=length)
    scores = {name: listener.score(windows) for name, listener in listeners.items()}
    scores["codes, no context"] = without_context(codes, windows)
    scores["around the last frame"] = around_the_last(data.frames, windows)
    gain = (scores["mixture"].log_prob - scores["tokens"].log_prob).mean(axis=1)
    as_codes = codes.vectors[listeners["tokens"].heard(windows)]
    read = {"mixture": windows, "tokens": as_codes}
    results: dict[str, Any] = {
        "models": {
            name: {
                "likelihood": likelihood(found, deviation),
                "prediction_error": errors(found.mean, windows[:, 1:], deviation),
            }
            for name, found in scores.items()
        },
        "gain_of_mixture": {"nats_per_frame": float(gain.mean()), "interval": interval(gain)},
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
            "reading_error": errors(read[name], windows, deviation),
            "samples": movement(drawn[name]),
        }
    # As its density says: not only at the codes, but around them.
    indices = np.asarray(quantize.nearest(drawn["tokens"], codes.vectors).indices)
    rng = np.random.default_rng(_SEED.value)
    around = drawn["tokens"] + codes.scales[indices] * rng.standard_normal(drawn["tokens"].shape)
    results["models"]["tokens"]["samples_around_codes"] = movement(around)
    counts = np.bincount(listeners["tokens"].heard(windows).reshape(-1), minlength=_CODES.value)
    shares = counts[counts > 0] / counts.sum()
    results["models"]["tokens"]["code_perplexity"] = float(np.exp(-(shares * np.log(shares)).sum()))
    results["real"] = movement(windows[chosen, prompt:length])
    results["real_as_codes"] = movement(as_codes[chosen, prompt:length])

    # Durations
    heard = {}
    for speed in SPEEDS:
        other = dataclasses.replace(analysis, hop=round(speed * hop))
        found = units.standardised(sound.log_mel(held_out.samples, other)).astype(np.float32)
        heard[other.hop / hop] = batches.consecutive(found, length=length, limit=_SWEPT)
    results["durations"] = sweep(listeners, heard, np.linspace(0.5, 1.5, 21).round(2))

    # Sound and figures
    real = windows[chosen, :length]
    rows = {
        "real sound": real,
        "the same as codes": as_codes[chosen, :length],
        "mixture": sampled["mixture"],
        "tokens": sampled["tokens"],
    }
    rows = {name: units.restored(frames[:_HEARD]) for name, frames in rows.items()}
    waves = {"real": [held_out.samples[i * length * hop :][: length * hop] for i in chosen]}
    for name, excerpts in zip(_WAVES, rows.values(), strict=True):
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
        "frames_spectrograms": spectrograms(
            {name: excerpts[:2] for name, excerpts in rows.items()},
            analysis,
            prompt=prompt,
            sampled=("mixture", "tokens"),
        ),
        "frames_comparison": comparison(
            {n: results["models"][n]["likelihood"] for n in reversed(list(scores))},
            {
                "real sound": steps_of(windows[chosen, prompt:length]),
                "mixture": steps_of(drawn["mixture"]),
                "tokens": steps_of(drawn["tokens"]),
            },
        ),
        "frames_durations": duration_curves(
            results["durations"], 1000 * analysis.seconds_per_frame
        ),
    }
    pause = np.zeros(round(0.3 * rate))
    with written_aside(folder) as aside:
        for name, figure in figures.items():
            plots.save(figure, aside, name)
        for name, excerpts in waves.items():
            parts = [part for excerpt in excerpts[:_HEARD] for part in (excerpt, pause)]
            sound.write_wav(aside / f"{name}.wav", np.concatenate(parts[:-1]), rate)
        np.savez(aside / "codes.npz", **codes._asdict(), **units._asdict())
        write_json(aside / "frames.json", {**results, "run": program.record()})
    print(table(results).as_text())
    low, high = results["gain_of_mixture"]["interval"]
    print(f"\nThe mixture gains {gain.mean():.2f} nats a frame [{low:.2f}, {high:.2f}]")
    print(f"{folder}: frames.json, 3 figures, {len(waves)} .wav files, both models")


_WAVES = ("real_resynthesised", "real_as_codes", "mixture_sample", "tokens_sample")


if __name__ == "__main__":
    program.run(main)
