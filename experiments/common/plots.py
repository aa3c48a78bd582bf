"""One way to draw: curves of answers along a sweep, as a figure for a paper."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from continuous_lm.experiments.common.answer_curves import Curves

STYLE: dict[Any, Any] = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "lines.linewidth": 1.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
}
# Okabe & Ito's colours, which stay apart for colour-blind readers; then two more for ten digits.
COLOURS = "#56B4E9 #E69F00 #009E73 #0072B2 #D55E00 #CC79A7 #8C6D31 #7F3C8D #11A579 #A5AA99".split()
FAINT: dict[str, Any] = {"fontsize": 7, "color": "0.5"}
NAME: dict[str, Any] = {"fontweight": "bold", "parse_math": False}
_LEAST = 0.05  # an answer that never gets this probable is not given a line of its own


def answer_curves(curves: Curves, *, xlabel: str, title: str, marks: dict[str, float]) -> Figure:
    """Probability against the sweep's points, each answer named where it leads.

    Where names would lie over each other, a legend names them.

    Args:
      curves: what to draw. An answer that never reaches 5 % is drawn with everything else.
      xlabel: what the points are.
      title: above the axes; the prompt, say.
      marks: label -> point at which a faint vertical line shows an expectation.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 2.9), layout="constrained")
        for label, point in marks.items():
            axes.axvline(point, color="0.75", lw=0.7, ls=(0, (4, 3)), zorder=0)
            at_top = axes.get_xaxis_transform()
            axes.text(point, 1.02, label, transform=at_top, ha="center", **FAINT)
        drawn = curves.probabilities.max(axis=0) >= _LEAST
        rest = curves.other + curves.probabilities[:, ~drawn].sum(axis=1)
        highest = max(curves.probabilities.max(), rest.max())
        top = 1.0 if highest > 0.4 else highest
        names = _names(curves, drawn)
        places = np.array(list(names.values())).reshape(-1, 2)
        apart = _apart(places / [np.ptp(curves.points), top])
        for i, (middle, height) in names.items():
            colour = COLOURS[i % len(COLOURS)]
            named = None if apart else _plain(curves.answers[i])
            axes.plot(curves.points, curves.probabilities[:, i], color=colour, label=named)
            if apart:
                share = (middle - curves.points[0]) / np.ptp(curves.points)
                side = "left" if share < 0.03 else "right" if share > 0.97 else "center"
                height += 0.02 * top
                axes.text(middle, height, curves.answers[i], color=colour, ha=side, **NAME)
        axes.plot(curves.points, rest, color="0.45", lw=1.0, ls=":", label="everything else")
        axes.set(xlim=curves.points[[0, -1]], ylim=(0, 1.1 * top), xlabel=xlabel)
        axes.set(ylabel="probability")
        if top == 1.0:
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        wrapped = "\n".join(textwrap.wrap(title, 88))
        axes.set_title(wrapped, pad=16, fontsize=8, style="italic", parse_math=False)
        place: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (1.0, -0.13)}
        if not apart:
            place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        axes.legend(frameon=False, fontsize=8, borderpad=0.0, **place)
    return figure


def _names(curves: Curves, drawn: np.ndarray) -> dict[int, tuple[float, float]]:
    """Where the names of the answers that are drawn would stand: point and probability."""
    found = {}
    for i in np.flatnonzero(drawn):
        values = curves.probabilities[:, i]
        middle = curves.points[values >= 0.98 * values.max()].mean()
        found[int(i)] = (float(middle), float(np.interp(middle, curves.points, values)))
    return found


def _apart(places: np.ndarray) -> bool:
    """Whether names at these shares of the axes [C, 2] do not lie over each other."""
    distances = np.abs(places[:, None] - places)
    close = (distances < [0.1, 0.1]).all(axis=-1)
    return not np.triu(close, 1).any()


def save(figure: Figure, folder: pathlib.Path, name: str) -> None:
    """PNG and PDF, with no dates inside: the same numbers give the same files."""
    with plt.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png")
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)


def threshold_curves(
    thresholds: np.ndarray, pairs: dict[str, tuple[np.ndarray, np.ndarray]], *, ylabel: str
) -> Figure:
    """What reaches each threshold along a sweep (solid) and in the ordinary sentence (dashed).

    Args:
      thresholds: [T], of probability.
      pairs: model -> observed [T] and counterfactual [T], both in [0, 1].
      ylabel: what they are.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
        for i, (model, (observed, counterfactual)) in enumerate(pairs.items()):
            colour = COLOURS[(i + 3) % len(COLOURS)]  # the first three are faint on their own
            axes.plot(thresholds, observed, color=colour, label=_plain(model))
            axes.plot(thresholds, counterfactual, color=colour, lw=1.1, ls=(0, (4, 2)))
        axes.plot([], [], color="0.35", label="observed, along the sweep")
        label = "counterfactual, ordinary sentence"
        axes.plot([], [], color="0.35", lw=1.1, ls=(0, (4, 2)), label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="threshold of probability", ylabel=ylabel)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def histograms(
    edges: np.ndarray, counts: dict[str, np.ndarray], *, xlabel: str, mark: float
) -> Figure:
    """Shares of records by bin, one outline a model, up to the last bin that has any.

    Args:
      edges: [B + 1].
      counts: model -> records [B].
      xlabel: of what.
      mark: where a faint line shows a bound.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
        axes.axvline(mark, color="0.6", lw=0.7, ls=(0, (4, 3)), zorder=0)
        at_top = axes.get_xaxis_transform()
        axes.text(mark, 1.01, f"{mark:g}", transform=at_top, ha="center", **FAINT)
        for i, (model, records) in enumerate(counts.items()):
            colour = COLOURS[(i + 3) % len(COLOURS)]
            shares = np.asarray(records) / np.sum(records)
            axes.stairs(shares, edges, color=colour, lw=1.4, label=_plain(model))
            if len(counts) == 1:
                axes.stairs(shares, edges, color=colour, alpha=0.15, fill=True)
        last = max(np.flatnonzero(records).max() for records in counts.values())
        right = edges[max(last + 2, np.searchsorted(edges, 2 * mark)).clip(max=len(edges) - 1)]
        axes.set(xlim=(0, right), xlabel=xlabel, ylabel="share of records")
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _plain(text: str) -> str:
    """A label with no mathematics in it, which the legend does not hide for a leading _."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def grid(cells: dict[tuple[str, str], Curves], *, xlabel: str) -> Figure:
    """Small curves in rows and columns, under one pair of axes' labels.

    Args:
      cells: (row, column) -> the curves there, all of the same answers.
      xlabel: what the points are.
    """
    rows, columns = (list(dict.fromkeys(place[i] for place in cells)) for i in (0, 1))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(rows),
            len(columns),
            figsize=(1.5 * len(columns), 1.05 * len(rows) + 0.6),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for (row, column), curves in cells.items():
            ax = axes[rows.index(row), columns.index(column)]
            for i, answer in enumerate(curves.answers):
                colour = COLOURS[i % len(COLOURS)]
                ax.plot(curves.points, curves.probabilities[:, i], color=colour, label=answer)
            ax.set(xlim=curves.points[[0, -1]], ylim=(0, 1.03), yticks=[0, 0.5, 1])
        for ax, column in zip(axes[0], columns, strict=True):
            ax.set_title(column, fontsize=9, parse_math=False)
        for ax, row in zip(axes[:, 0], rows, strict=True):
            ax.set_ylabel(row, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower right", frameon=False, fontsize=8, ncols=len(labels)
        )
        figure.supxlabel(xlabel, fontsize=9)
    return figure


def heat_maps(
    pieces: Sequence[str], gaps: Sequence[str], rows: dict[str, np.ndarray], *, title: str
) -> Figure:
    """A text, once for each row, every piece coloured by its value: orange for, blue against.

    Args:
      pieces: of the text, [T].
      gaps: what stands before each of them.
      rows: name -> values [T]; colours are full at the largest of a row's absolute values.
      title: above them.
    """
    with plt.rc_context(STYLE):
        figure, axes, places, lines = _text_axes(pieces, gaps, rows, title)
        for i, values in enumerate(rows.values()):
            top = max(float(np.abs(values).max()), 1e-9)
            for piece, (line, column), value in zip(pieces, places, values, strict=True):
                x, y = column, i * (lines + 1.5) + line
                colour = COLOURS[4] if value >= 0 else COLOURS[3]
                box = (x - 0.3, y - 0.42), len(_shown(piece)) + 0.6, 0.84
                share = min(abs(float(value)) / top, 1.0)
                axes.add_patch(Rectangle(*box, color=colour, alpha=0.85 * share, lw=0))
                _word(axes, x, y, piece, "white" if share > 0.75 else "black")
    return figure


def durations_over_text(
    pieces: Sequence[str], gaps: Sequence[str], rows: dict[str, np.ndarray], *, title: str
) -> Figure:
    """A text, once for each row, with a bar over every piece as high as it lasts.

    A faint line is the duration 1; orange is shorter than that, blue longer, grey is gone.

    Args:
      pieces: of the text, [T].
      gaps: what stands before each of them.
      rows: name -> durations [T] >= 0.
      title: above them.
    """
    with plt.rc_context(STYLE):
        figure, axes, places, lines = _text_axes(pieces, gaps, rows, title, line_height=2.1)
        top = max(1.0, *(float(np.max(values)) for values in rows.values()))
        for i, values in enumerate(rows.values()):
            for piece, (line, column), d in zip(pieces, places, values, strict=True):
                x, y = column, i * (2.1 * lines + 1.5) + 2.1 * line
                width = len(_shown(piece))
                colour = COLOURS[4] if d < 0.999 else COLOURS[3] if d > 1.001 else "0.6"
                bar = (x, y - 0.45), width, -1.1 * float(d) / top
                axes.add_patch(Rectangle(*bar, color=colour, alpha=0.8, lw=0))
                axes.plot([x, x + width], [y - 0.45 - 1.1 / top] * 2, color="0.75", lw=0.5)
                _word(axes, x, y, piece, "black" if d > 0 else "0.75")
    return figure


def deletion_curves(values: dict[str, np.ndarray]) -> Figure:
    """A log probability as tokens are taken away, in the order of each method.

    Args:
      values: name -> after 0, 1, ..., R of the tokens are gone, [R + 1].
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        for (name, after), colour in zip(values.items(), np.array(COLOURS)[[4, 3, 2]], strict=True):
            axes.plot(np.arange(len(after)), after, color=colour, label=name)
        axes.set(xlabel="tokens taken away", ylabel="log probability")
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


_TEXT_COLUMNS = 84


def _text_axes(pieces, gaps, rows, title, line_height=1.0):
    """Axes in units of a letter and a line, with each row's name, and the places of the pieces."""
    places, line, column = [], 0, 0
    for piece, gap in zip(pieces, gaps, strict=True):
        if "\n" in gap:
            line, column = line + 1, 0
        elif column:
            column += 1
        if column and column + len(_shown(piece)) > _TEXT_COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(_shown(piece))
    lines = line + 1
    height = (lines * line_height + 1.5) * len(rows)
    figure = plt.figure(figsize=(0.0677 * (_TEXT_COLUMNS + 2), 0.2 * (height + 1.5)))
    axes = figure.add_axes((0.0, 0.0, 1.0, height / (height + 1.5)))
    axes.set(xlim=(-1, _TEXT_COLUMNS + 1), ylim=(height - line_height - 0.2, -line_height - 0.9))
    axes.set_axis_off()
    for i, name in enumerate(rows):
        y = i * (lines * line_height + 1.5) - line_height
        axes.text(0, y, name, fontsize=8, style="italic", va="center", parse_math=False)
    wrapped = "\n".join(textwrap.wrap(title, 88))
    figure.suptitle(wrapped, fontsize=9, x=0.012, y=0.995, ha="left", parse_math=False)
    return figure, axes, places, lines


def _shown(piece: str) -> str:
    """A piece as it is drawn: on one line, and never longer than one."""
    return " ".join(piece.split())[:_TEXT_COLUMNS]


def _word(axes, x: float, y: float, piece: str, colour: str) -> None:
    font: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 8, "parse_math": False}
    axes.text(x, y, _shown(piece), va="center", color=colour, **font)
