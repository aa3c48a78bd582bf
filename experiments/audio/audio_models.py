"""Two models that hear sound, and what is said of them: densities of frames, samples, figures.

`experiments.frames` says what is compared. Nothing here reads a flag.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from continuous_lm import quantize
from continuous_lm.experiments.audio import sound
from continuous_lm.experiments.common import plots, tables
from continuous_lm.models import density
from continuous_lm.models.density.distributions import Gaussian, Mixture
from continuous_lm.models.density.model import DensityLM, DensityModel

MIN_SCALE = 0.05  # of all densities here, in deviations of a band
SPEEDS = (0.8, 1.0, 1.25)  # hops of the sweep, in those of training
DECIBELS = 10.0 / np.log(10.0)  # in a nat of power
_SHRINKAGE = 10.0  # frames of average deviation that every code is given
SWEPT = 6  # windows in the sweep of durations
HEARD = 4  # excerpts in a .wav file
WAVES = ("real_resynthesised", "real_as_codes", "mixture_sample", "tokens_sample")


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
            return np.asarray(density.sample(self.lm, vectors=prompts, **options))
        drawn: Any = density.sample(self.lm, self.heard(prompts), stop=(), **options)
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
