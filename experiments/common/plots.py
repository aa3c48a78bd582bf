"""Figures: curves of answers, texts with values, histograms."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from continuous_lm.experiments.common.answer_curves import Curves

MATPLOTLIB_STYLE: dict[Any, Any] = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],  # the second has more symbols
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
FAINT_TEXT: dict[str, Any] = {"fontsize": 7, "color": "0.5"}
ANSWER_NAME_TEXT: dict[str, Any] = {"fontweight": "bold", "parse_math": False}
# An answer that never gets this probable is not given a line of its own.
_MIN_DRAWN_PROBABILITY = 0.05


def answer_curves(
    curves: Curves, *, xlabel: str, title: str, marks: dict[str, float]
) -> Figure:
    """Probability against the sweep's points, each answer named where it leads.

    A legend names the answers if names at the curves would overlap.

    Args:
      curves: the curves. Answers that never reach 5 % are drawn together with all other tokens.
      xlabel: label of the points.
      title: title above the axes, such as the prompt.
      marks: label -> point at which a faint vertical line shows an expectation.
    """
    is_drawn = curves.probabilities.max(axis=0) >= _MIN_DRAWN_PROBABILITY
    faint = curves.probabilities[:, ~is_drawn].sum(axis=1)
    remaining = curves.other_probabilities + faint
    highest = float(max(curves.probabilities.max(), remaining.max()))
    y_limit = 1.0 if highest > 0.4 else highest
    positions_by_answer = _label_positions(curves, is_drawn)
    label_positions = np.array(list(positions_by_answer.values())).reshape(-1, 2)
    labels_fit = _labels_fit(label_positions / [np.ptp(curves.points), y_limit])
    with plt.rc_context(MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 2.9), layout="constrained")
        _draw_marks(axes, marks)
        for answer_index, position in positions_by_answer.items():
            colour = COLOURS[answer_index % len(COLOURS)]
            answer = curves.answers[answer_index]
            axes.plot(
                curves.points,
                curves.probabilities[:, answer_index],
                color=colour,
                label=None if labels_fit else _escape_label(answer),
            )
            if labels_fit:
                _name_curve(axes, curves.points, answer, position, y_limit, colour)
        axes.plot(
            curves.points,
            remaining,
            color="0.45",
            lw=1.0,
            ls=":",
            label="everything else",
        )
        axes.set(xlim=curves.points[[0, -1]], ylim=(0, 1.1 * y_limit), xlabel=xlabel)
        axes.set(ylabel="probability")
        if y_limit == 1.0:
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        wrapped_title = "\n".join(textwrap.wrap(title, 88))
        axes.set_title(
            wrapped_title, pad=16, fontsize=8, style="italic", parse_math=False
        )
        legend_place: dict[str, Any] = _BELOW if labels_fit else _BESIDE
        axes.legend(frameon=False, fontsize=8, borderpad=0.0, **legend_place)
    return figure


_BELOW = {"loc": "upper right", "bbox_to_anchor": (1.0, -0.13)}
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> None:
    """A faint vertical line with its label at each point."""
    transform = axes.get_xaxis_transform()
    for label, point in marks.items():
        axes.axvline(point, color="0.75", lw=0.7, ls=(0, (4, 3)), zorder=0)
        axes.text(point, 1.02, label, transform=transform, ha="center", **FAINT_TEXT)


def _name_curve(
    axes: Axes,
    points: np.ndarray,
    answer: str,
    position: tuple[float, float],
    y_limit: float,
    colour: str,
) -> None:
    """Write an answer above its curve, at a point and a probability."""
    label_point, label_height = position
    relative_point = (label_point - points[0]) / np.ptp(points)
    alignment = "center"
    if relative_point < 0.03:
        alignment = "left"
    elif relative_point > 0.97:
        alignment = "right"
    axes.text(
        label_point,
        label_height + 0.02 * y_limit,
        answer,
        color=colour,
        ha=alignment,
        **ANSWER_NAME_TEXT,
    )


def _label_positions(
    curves: Curves, is_drawn: np.ndarray
) -> dict[int, tuple[float, float]]:
    """Return answer -> position of its name: point and probability."""
    positions_by_answer = {}
    for i in np.flatnonzero(is_drawn):
        values = curves.probabilities[:, i]
        label_point = curves.points[values >= 0.98 * values.max()].mean()
        positions_by_answer[int(i)] = (
            float(label_point),
            float(np.interp(label_point, curves.points, values)),
        )
    return positions_by_answer


def _labels_fit(label_positions: np.ndarray) -> bool:
    """Return whether names at these shares of the axes [A, 2] do not lie over each other."""
    distances = np.abs(label_positions[:, None] - label_positions)
    is_overlapping = (distances < [0.1, 0.1]).all(axis=-1)
    return not np.triu(is_overlapping, 1).any()


def save(figure: Figure, folder: pathlib.Path, name: str) -> None:
    """PNG and PDF, with no dates inside: the same numbers give the same files."""
    with plt.rc_context(MATPLOTLIB_STYLE):
        figure.savefig(folder / f"{name}.png")
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)


def threshold_curves(
    thresholds: np.ndarray,
    model_curves: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    ylabel: str,
) -> Figure:
    """Plot shares above each threshold along a sweep (solid) and in the ordinary sentence (dashed).

    Args:
      thresholds: probabilities, [num_thresholds].
      model_curves: model -> observed and counterfactual, [num_thresholds] each, both in [0, 1].
      ylabel: label of the shares.
    """
    with plt.rc_context(MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
        for i, (model, (observed, counterfactual)) in enumerate(model_curves.items()):
            colour = COLOURS[(i + 3) % len(COLOURS)]  # the first three are faint alone
            axes.plot(thresholds, observed, color=colour, label=_escape_label(model))
            axes.plot(thresholds, counterfactual, color=colour, lw=1.1, ls=(0, (4, 2)))
        axes.plot([], [], color="0.35", label="observed, along the sweep")
        label = "counterfactual, ordinary sentence"
        axes.plot([], [], color="0.35", lw=1.1, ls=(0, (4, 2)), label=label)
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1.03),
            xlabel="threshold of probability",
            ylabel=ylabel,
        )
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def histograms(
    edges: np.ndarray, model_counts: dict[str, np.ndarray], *, xlabel: str, bound: float
) -> Figure:
    """Shares of records by bin, one outline a model, up to the last bin that has any.

    Args:
      edges: [num_bins + 1].
      model_counts: model -> records [num_bins].
      xlabel: label of the binned quantity.
      bound: where a faint line shows a bound.
    """
    with plt.rc_context(MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.2), layout="constrained")
        axes.axvline(bound, color="0.6", lw=0.7, ls=(0, (4, 3)), zorder=0)
        axis_transform = axes.get_xaxis_transform()
        axes.text(
            bound,
            1.01,
            f"{bound:g}",
            transform=axis_transform,
            ha="center",
            **FAINT_TEXT,
        )
        for i, (model, bin_counts) in enumerate(model_counts.items()):
            colour = COLOURS[(i + 3) % len(COLOURS)]
            shares = np.asarray(bin_counts) / np.sum(bin_counts)
            axes.stairs(shares, edges, color=colour, lw=1.4, label=_escape_label(model))
            if len(model_counts) == 1:
                axes.stairs(shares, edges, color=colour, alpha=0.15, fill=True)
        last_bin = max(
            np.flatnonzero(bin_counts).max() for bin_counts in model_counts.values()
        )
        right_bin = max(last_bin + 2, np.searchsorted(edges, 2 * bound))
        right_edge = edges[min(right_bin, len(edges) - 1)]
        axes.set(xlim=(0, right_edge), xlabel=xlabel, ylabel="share of records")
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _escape_label(text: str) -> str:
    """A label with no mathematics in it, which the legend does not hide for a leading _."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def curve_grid(cells: dict[tuple[str, str], Curves], *, xlabel: str) -> Figure:
    """Small curves in rows and columns, under one pair of axes' labels.

    Args:
      cells: (row, column) -> its curves, all of the same answers.
      xlabel: label of the points.
    """
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    with plt.rc_context(MATPLOTLIB_STYLE):
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
            subplot = axes[rows.index(row), columns.index(column)]
            for i, answer in enumerate(curves.answers):
                colour = COLOURS[i % len(COLOURS)]
                subplot.plot(
                    curves.points,
                    curves.probabilities[:, i],
                    color=colour,
                    label=answer,
                )
            subplot.set(xlim=curves.points[[0, -1]], ylim=(0, 1.03), yticks=[0, 0.5, 1])
        for subplot, column in zip(axes[0], columns, strict=True):
            subplot.set_title(column, fontsize=9, parse_math=False)
        for subplot, row in zip(axes[:, 0], rows, strict=True):
            subplot.set_ylabel(
                row, fontsize=8, rotation=0, ha="right", va="center", parse_math=False
            )
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower right",
            frameon=False,
            fontsize=8,
            ncols=len(labels),
        )
        figure.supxlabel(xlabel, fontsize=9)
    return figure


def heat_maps(
    token_texts: Sequence[str],
    separators: Sequence[str],
    rows: dict[str, np.ndarray],
    *,
    title: str,
) -> Figure:
    """A text, once for each row, every piece coloured by its value: orange for, blue against.

    Args:
      token_texts: text of each token, [T].
      separators: what stands before each of them.
      rows: name -> values [T]; colours are full at the largest of a row's absolute values.
      title: above them.
    """
    with plt.rc_context(MATPLOTLIB_STYLE):
        text_axes = _make_text_axes(token_texts, separators, list(rows), title)
        for row, values in enumerate(rows.values()):
            max_value = max(float(np.abs(values).max()), 1e-9)
            for token, value in zip(text_axes.tokens, values, strict=True):
                x, y = text_axes.place(row, token)
                colour = COLOURS[4] if value >= 0 else COLOURS[3]
                opacity = min(abs(float(value)) / max_value, 1.0)
                corner = (x - 0.3, y - 0.42)
                width = len(token.text) + 0.6
                text_axes.axes.add_patch(
                    Rectangle(
                        corner, width, 0.84, color=colour, alpha=0.85 * opacity, lw=0
                    )
                )
                text_axes.write(row, token, "white" if opacity > 0.75 else "black")
    return text_axes.figure


def durations_over_text(
    token_texts: Sequence[str],
    separators: Sequence[str],
    rows: dict[str, np.ndarray],
    *,
    title: str,
) -> Figure:
    """A text, once for each row, with a bar over every piece as high as it lasts.

    A faint line is the duration 1; orange is shorter than that, blue longer, grey is gone.

    Args:
      token_texts: text of each token, [T].
      separators: what stands before each of them.
      rows: name -> durations [T] >= 0.
      title: above them.
    """
    with plt.rc_context(MATPLOTLIB_STYLE):
        text_axes = _make_text_axes(
            token_texts, separators, list(rows), title, line_height=2.1
        )
        max_duration = max(1.0, *(float(np.max(values)) for values in rows.values()))
        for row, values in enumerate(rows.values()):
            for token, duration in zip(text_axes.tokens, values, strict=True):
                x, y = text_axes.place(row, token)
                base, width = y - 0.45, len(token.text)
                height = 1.1 * float(duration) / max_duration
                text_axes.axes.add_patch(
                    Rectangle(
                        (x, base),
                        width,
                        -height,
                        color=_colour_of_duration(duration),
                        alpha=0.8,
                        lw=0,
                    )
                )
                unit_height = base - 1.1 / max_duration
                text_axes.axes.plot(
                    [x, x + width], [unit_height, unit_height], color="0.75", lw=0.5
                )
                text_axes.write(row, token, "black" if duration > 0 else "0.75")
    return text_axes.figure


def _colour_of_duration(duration: float) -> str:
    if duration < 0.999:
        return COLOURS[4]
    return COLOURS[3] if duration > 1.001 else "0.6"


def deletion_curves(curves_by_method: dict[str, np.ndarray]) -> Figure:
    """A log probability as tokens are taken away, in the order of each method.

    Args:
      curves_by_method: name -> after 0, 1, ... of the tokens are gone,
        [num_removed + 1].
    """
    with plt.rc_context(MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        for (method, log_probs), colour in zip(
            curves_by_method.items(), np.array(COLOURS)[[4, 3, 2]], strict=True
        ):
            axes.plot(np.arange(len(log_probs)), log_probs, color=colour, label=method)
        axes.set(xlabel="tokens taken away", ylabel="log probability")
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


_TEXT_COLUMNS = 84
_ROW_GAP = 1.5  # lines between one text and the next
_TOKEN_FONT: dict[str, Any] = {
    "family": "DejaVu Sans Mono",
    "fontsize": 8,
    "parse_math": False,
}


class _PlacedToken(NamedTuple):
    """A piece of a text."""

    text: str  # on one line, and never longer than one
    line: int
    column: int


@dataclasses.dataclass(frozen=True)
class _TextAxes:
    """Axes in units of a letter and a line, on which a text stands several times."""

    figure: Figure
    axes: Axes
    tokens: list[_PlacedToken]
    line_height: float
    row_height: float  # of one text, with the gap after it

    def place(self, row: int, token: _PlacedToken) -> tuple[float, float]:
        """x and y of a piece of one of the texts."""
        return token.column, row * self.row_height + token.line * self.line_height

    def write(self, row: int, token: _PlacedToken, colour: str) -> None:
        """Write a piece at its place."""
        x, y = self.place(row, token)
        self.axes.text(x, y, token.text, va="center", color=colour, **_TOKEN_FONT)


def _make_text_axes(
    token_texts: Sequence[str],
    separators: Sequence[str],
    row_names: Sequence[str],
    title: str,
    line_height: float = 1.0,
) -> _TextAxes:
    """Axes with each row's name, and the places of the pieces."""
    tokens = _place_tokens(token_texts, separators)
    num_lines = tokens[-1].line + 1 if tokens else 1
    row_height = num_lines * line_height + _ROW_GAP
    height = row_height * len(row_names)
    title_height = 1.5
    figure_width = 0.0677 * (_TEXT_COLUMNS + 2)
    figure = plt.figure(figsize=(figure_width, 0.2 * (height + title_height)))
    axes = figure.add_axes((0.0, 0.0, 1.0, height / (height + title_height)))
    axes.set(
        xlim=(-1, _TEXT_COLUMNS + 1),
        ylim=(height - line_height - 0.2, -line_height - 0.9),
    )
    axes.set_axis_off()
    for row, name in enumerate(row_names):
        y = row * row_height - line_height
        axes.text(0, y, name, fontsize=8, style="italic", va="center", parse_math=False)
    wrapped_title = "\n".join(textwrap.wrap(title, 88))
    figure.suptitle(
        wrapped_title, fontsize=9, x=0.012, y=0.995, ha="left", parse_math=False
    )
    return _TextAxes(figure, axes, tokens, line_height, row_height)


def _place_tokens(
    token_texts: Sequence[str], separators: Sequence[str]
) -> list[_PlacedToken]:
    """The pieces on lines of `_TEXT_COLUMNS` letters."""
    tokens = []
    line = column = 0
    for token_text, separator in zip(token_texts, separators, strict=True):
        text = " ".join(token_text.split())[:_TEXT_COLUMNS]
        if "\n" in separator:
            line += 1
            column = 0
        elif column:
            column += 1
        if column and column + len(text) > _TEXT_COLUMNS:
            line += 1
            column = 0
        tokens.append(_PlacedToken(text, line, column))
        column += len(text)
    return tokens
