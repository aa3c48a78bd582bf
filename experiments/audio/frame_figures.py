"""Figures of `frames`: spectrograms, log-densities of the models, durations of frames."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from continuous_lm.experiments.audio import sound
from continuous_lm.experiments.audio.audio_models import DECIBELS_PER_NAT
from continuous_lm.experiments.common import plots

_DYNAMIC_RANGE = 65.0  # decibels below the loudest band that are shown
_TICK_FREQUENCIES = (250, 500, 1000, 2000, 4000, 8000)  # Hz
_HOP_COLORS = (plots.COLOURS[1], plots.COLOURS[2], plots.COLOURS[3])
_COLOR_BY_KIND = {
    "mixture": plots.COLOURS[3],
    "tokens": plots.COLOURS[4],
    "real sound": "0.25",
}


def _color_of(name: str) -> str:
    for kind, color in _COLOR_BY_KIND.items():
        if name.startswith(kind):
            return color
    return "0.5"


# --- Spectrograms -----------------------------------------------------------------------------


def plot_spectrograms(
    rows: Mapping[str, np.ndarray],
    mel_config: sound.MelConfig,
    *,
    prompt_length: int,
    sampled_rows: Sequence[str],
) -> Figure:
    """Excerpts of frames beside each other, in decibels below the loudest band.

    Args:
      rows: name -> log-mel frames [B, T, W], B excerpts.
      mel_config: settings of the frames.
      prompt_length: frames before a sample begins.
      sampled_rows: the rows that are samples.
    """
    first_excerpts = next(iter(rows.values()))
    num_excerpts = len(first_excerpts)
    peak = max(float(first_excerpts.max()), -100.0)
    prompt_end = prompt_length * mel_config.seconds_per_frame
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, grid = plt.subplots(
            len(rows),
            num_excerpts,
            figsize=(3.3 * num_excerpts, 1.12 * len(rows) + 0.5),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for grid_row, (name, excerpts) in zip(grid, rows.items(), strict=True):
            for axes, frames in zip(grid_row, excerpts, strict=True):
                _show_frames(axes, frames - peak, mel_config)
                if name in sampled_rows:
                    axes.axvline(prompt_end, color="white", lw=0.9, ls=(0, (3, 2)))
            if name in sampled_rows:
                _label_prompt(grid_row[0], prompt_end, mel_config.bands - 2)
            grid_row[0].set_title(name, fontsize=8, loc="left", pad=2.5)
        for axes in grid[:, 0]:
            _label_frequencies(axes, mel_config)
        figure.supylabel("frequency (kHz, in mel bands)", fontsize=9)
        figure.supxlabel("time (s)", fontsize=9)
        image = grid[-1, -1].images[0]
        colorbar = figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, pad=0.015)
        colorbar.set_label("power (dB)", fontsize=8)
        colorbar.ax.tick_params(labelsize=7)
        colorbar.outline.set_visible(False)
    return figure


def _show_frames(axes: Axes, frames: np.ndarray, mel_config: sound.MelConfig) -> None:
    """Draw log-mel frames [T, W], 0 of which is the loudest."""
    end_time = len(frames) * mel_config.seconds_per_frame
    axes.imshow(
        DECIBELS_PER_NAT * frames.T,
        origin="lower",
        aspect="auto",
        extent=(0.0, end_time, -0.5, mel_config.bands - 0.5),
        vmin=-_DYNAMIC_RANGE,
        vmax=0.0,
        cmap="magma",
        interpolation="nearest",
    )
    axes.spines[:].set_visible(False)


def _label_prompt(axes: Axes, prompt_end: float, height: float) -> None:
    """Write on both sides of the prompt's end."""
    style: dict[str, Any] = {"color": "white", "fontsize": 7, "va": "top"}
    axes.text(prompt_end - 0.02, height, "given", ha="right", **style)
    axes.text(prompt_end + 0.02, height, "sampled", **style)


def _label_frequencies(axes: Axes, mel_config: sound.MelConfig) -> None:
    """Mark frequencies on the axis of bands."""
    band_positions = np.arange(-1, mel_config.bands + 1)
    band_frequencies = sound.band_frequencies(
        rate=mel_config.rate, bands=mel_config.bands, low=mel_config.low
    )
    highest = 0.99 * mel_config.rate / 2
    frequencies = [frequency for frequency in _TICK_FREQUENCIES if frequency < highest]
    positions = np.interp(frequencies, band_frequencies, band_positions)
    labels = [f"{frequency / 1000:g}" for frequency in frequencies]
    axes.set_yticks(positions, labels)


# --- Comparison -------------------------------------------------------------------------------


def plot_comparison(
    likelihoods: Mapping[str, Mapping[str, Any]],
    steps_by_name: Mapping[str, np.ndarray],
) -> Figure:
    """The log-densities of held-out frames, and how samples move.

    Args:
      likelihoods: name -> `summarize_likelihood`, the best last.
      steps_by_name: name -> `squared_steps` frames.
    """
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, (likelihood_axes, step_axes) = plt.subplots(
            1, 2, figsize=(7.0, 2.6), layout="constrained", width_ratios=(1.0, 1.15)
        )
        _draw_likelihoods(likelihood_axes, likelihoods)
        _draw_step_distributions(step_axes, steps_by_name)
    return figure


def _draw_likelihoods(axes: Axes, likelihoods: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a model: its interval, its mean and the number."""
    for height, (name, summary) in enumerate(likelihoods.items()):
        color = _color_of(name)
        mean = summary["nats_per_frame"]
        interval = list(summary["interval"])
        axes.plot(interval, [height, height], color=color, lw=1.2, marker="|", ms=7)
        axes.plot(mean, height, "o", color=color, ms=3)
        axes.annotate(
            f"{mean:.1f}".replace("-", "\N{MINUS SIGN}"),
            (mean, height),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=8,
            color=color,
        )
    axes.set_yticks(range(len(likelihoods)), list(likelihoods))
    axes.set(
        ylim=(-0.5, len(likelihoods) - 0.3),
        xlabel="log-density of a held-out frame (nats)",
    )
    axes.margins(x=0.12)


def _draw_step_distributions(
    axes: Axes, steps_by_name: Mapping[str, np.ndarray]
) -> None:
    """The cumulative distribution of each sound's squared steps."""
    for name, values in steps_by_name.items():
        sorted_steps = np.sort(np.maximum(values.reshape(-1), 1e-4))
        cumulative_share = np.arange(1, len(sorted_steps) + 1) / len(sorted_steps)
        style: dict[str, Any] = {}
        if name == "real sound":
            style = {"ls": (0, (4, 2)), "lw": 1.3}
        axes.step(
            sorted_steps,
            cumulative_share,
            where="post",
            color=_color_of(name),
            label=name,
            **style,
        )
    axes.set(xscale="log", ylim=(0, 1.02), xlim=(1e-3, None))
    axes.set(xlabel="squared step from frame to frame", ylabel="share of steps below")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


# --- Durations --------------------------------------------------------------------------------


def plot_duration_curves(
    sweep_results: Mapping[str, Any], milliseconds: float
) -> Figure:
    """The log-density of sound at several hops, against the duration given to its frames.

    Args:
      sweep_results: results of `sweep_durations`.
      milliseconds: the hop in training.
    """
    curves = sweep_results["nats_per_frame"]
    durations = sweep_results["durations"]
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, grid = plt.subplots(
            1,
            len(curves),
            figsize=(3.4 * len(curves), 2.7),
            layout="constrained",
            squeeze=False,
        )
        for axes, (name, curve_by_hop) in zip(grid[0], curves.items(), strict=True):
            for (hop, values), color in zip(
                curve_by_hop.items(), _HOP_COLORS, strict=True
            ):
                label = f"{float(hop) * milliseconds:.3g} ms"
                axes.plot(durations, values, color=color, label=label)
                axes.axvline(float(hop), color=color, lw=0.7, ls=(0, (4, 3)), zorder=0)
                best = int(np.argmax(values))
                axes.plot(durations[best], values[best], "o", color=color, ms=4)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("duration given to each frame")
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
