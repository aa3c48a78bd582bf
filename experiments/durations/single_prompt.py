"""Programs of one prompt: the flags of a sweep, and its result."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from continuous_lm.experiments.common import (
    answer_curves,
    plots,
    pretrained,
    program,
    results,
)
from continuous_lm.parallel import processes

# --- Flags ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(pretrained.PretrainedConfig, program.PmapConfig):
    """Flags of a sweep."""

    points: int = program.flag(100, help="Points of the sweep.", lower_bound=2)
    batch_size: int = program.flag(32, help="Points computed at once.", lower_bound=1)

    def even_points(self, start: float, stop: float = 1.0) -> np.ndarray:
        """The points of a sweep from `start` to `stop`, [P]."""
        return np.linspace(start, stop, self.points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangeConfig(program.CheckedConfig):
    """Flags of the effect of durations."""

    change: Literal["both", "mass", "times"] = program.flag(
        "both", help="Change the weights of keys, their rotary times, or both."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig(program.CheckedConfig):
    """Flags of the answers."""

    answer_tokens: str = program.flag(
        "exact",
        help="Tokens of an answer: its spellings, or all that contain it.",
        choices=list(answer_curves.ANSWER_TOKEN_RULES),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdConfig(program.CheckedConfig):
    """Flags of tokens that are tracked as they are probable."""

    threshold: float = program.flag(
        0.05,
        help="Where no answers are given, tokens that reach this anywhere are tracked.",
        lower_bound=0.0,
        upper_bound=1.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathConfig(program.CheckedConfig):
    """Flags of an interpolation."""

    path: Literal["linear", "spherical"] = program.flag(
        "linear", help="Path of an interpolation between embeddings."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorConfig(SweepConfig):
    """Flags of duration factors."""

    min_factor: float = program.flag(
        0.1, help="The smallest duration factor.", lower_bound=0.0, upper_bound=1.0
    )

    def factors(self) -> np.ndarray:
        """The duration factors of the sweep, [P], up to 1."""
        return self.even_points(self.min_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkConfig(FactorConfig, ChangeConfig, AnswerConfig):
    """Flags of a span that lasts less."""


# --- Results ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels of a sweep in figures, tables and files.

    Attributes:
      name: name of the program and of its files.
      points: label of the figure's x axis.
      points_short: heading of the table's first column.
      marks: label -> point to mark in the figure.
      shows_change: whether the summary has the largest change of a probability.
    """

    name: str
    points: str
    points_short: str = "duration factor"
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shows_change: bool = False


@dataclasses.dataclass(frozen=True)
class SweepResult(program.Result):
    """The answers along the sweep of one prompt.

    Attributes:
      prompt: the text, or the template of an interpolation.
      token_names: the tokenizer's names of the prompt's tokens.
      token_span: the tokens that are changed.
      tracked: answer -> the names of its tokens.
      curves: the probabilities of the answers at every point.
      labels: how it is named where it is shown.
    """

    prompt: str
    token_names: tuple[str, ...]
    token_span: tuple[int, int]
    tracked: Mapping[str, tuple[str, ...]]
    curves: answer_curves.Curves
    labels: Labels

    def figure(self) -> Figure:
        """The curves over the points."""
        labels = self.labels
        return plots.answer_curves(
            self.curves,
            xlabel=labels.points,
            title=self.prompt,
            marks=dict(labels.marks),
        )

    def summary(self) -> str:
        text = f"{self.prompt}\n\n{self.curves.as_table(self.labels.points_short)}"
        if self.curves.probabilities.sum(axis=1).max() < 0.5:
            text += "\n\nWhat is tracked never gets half of the probability: this model answers"
            text += " otherwise."
        if self.labels.shows_change:
            text += "\n\nlargest change of a tracked probability along the sweep:"
            text += f" {self.largest_change(0):.2g}"
        return text

    def largest_change(self, reference_point: int) -> float:
        """The largest difference of a tracked probability from that at one point."""
        probabilities = self.curves.probabilities
        return float(np.abs(probabilities - probabilities[reference_point]).max())

    def write(self, config: program.RunConfig, folder: pathlib.Path | None) -> None:
        """Write the figure and every number, if there is a folder; process 0 alone."""
        if folder is None or not processes.is_first_process():
            return
        values = {
            "prompt": self.prompt,
            "tokens": self.token_names,
            "span": self.token_span,
            "tracked": self.tracked,
            "curves": self.curves.as_json(),
        }
        name = self.labels.name
        results.write(config, folder, name, values, {name: self.figure()})


def transition_points(count: int, factors: np.ndarray) -> dict[str, float]:
    """Return label -> factor (k + 1/2) / count where a count of mass changes, within the sweep."""
    points_by_label = {
        f"{k + 0.5:g}/{count}": (k + 0.5) / count for k in range(1, count)
    }
    return {
        label: point for label, point in points_by_label.items() if point >= factors[0]
    }
