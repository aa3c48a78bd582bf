"""One way to draw: curves of answers along a sweep, as a figure for a paper."""

import pathlib
import textwrap
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from continuous_lm.experiments.curves import Curves

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
NAME: dict[str, Any] = {"ha": "center", "fontweight": "bold", "parse_math": False}
_LEAST = 0.05  # an answer that never gets this probable is not given a line of its own


def answer_curves(curves: Curves, *, xlabel: str, title: str, marks: dict[str, float]) -> Figure:
    """Probability against the sweep's points, each answer named where it leads.

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
        for i in np.flatnonzero(drawn):
            values, colour = curves.probabilities[:, i], COLOURS[i % len(COLOURS)]
            axes.plot(curves.points, values, color=colour)
            leads = values >= 0.98 * values.max()
            middle = curves.points[leads].mean()
            height = np.interp(middle, curves.points, values) + 0.02
            axes.text(middle, height, curves.answers[i], color=colour, **NAME)
        rest = curves.other + curves.probabilities[:, ~drawn].sum(axis=1)
        axes.plot(curves.points, rest, color="0.45", lw=1.0, ls=":", label="everything else")
        axes.set(xlim=curves.points[[0, -1]], ylim=(0, 1.1), xlabel=xlabel, ylabel="probability")
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        wrapped = "\n".join(textwrap.wrap(title, 88))
        axes.set_title(wrapped, pad=16, fontsize=8, style="italic", parse_math=False)
        axes.legend(
            frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, -0.13), borderpad=0.0
        )
    return figure


def save(figure: Figure, folder: pathlib.Path, name: str) -> None:
    """PNG and PDF, with no dates inside: the same numbers give the same files."""
    with plt.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png")
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)
