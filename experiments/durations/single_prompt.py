"""Programs of one prompt: flags of a sweep, its result, and how it is computed and written."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
import tokenizers
from matplotlib.figure import Figure

import continuous_lm as clm
from continuous_lm.analysis.sweep import pmap_sweep
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
    pretrained,
    program,
    results,
)
from continuous_lm.experiments.durations.prompt_sweeps import PromptSweep
from continuous_lm.parallel import processes

MAX_TRACKED_TOKENS = 20  # tokens that are tracked because they reach a threshold

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
    """Flags of what durations change."""

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
class FactorConfig(SweepConfig, ChangeConfig, AnswerConfig):
    """Flags of a span that lasts less."""

    min_factor: float = program.flag(
        0.1, help="The smallest duration factor.", lower_bound=0.0, upper_bound=1.0
    )

    def factors(self) -> np.ndarray:
        """The duration factors of the sweep, [P], up to 1."""
        return self.even_points(self.min_factor)


# --- Results ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Labels:
    """How a sweep is named where it is shown.

    Attributes:
      name: of the program, and of its files.
      points: the x axis of the figure.
      points_short: the heading of the table's first column.
      marks: points to mark in the figure, by their label.
    """

    name: str
    points: str
    points_short: str = "duration factor"
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SweepResult(program.Result):
    """The answers along the sweep of one prompt.

    Attributes:
      prompt: the text, or the template of an interpolation.
      token_names: of the prompt, as the tokenizer names them.
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
        return text

    def write(self, config: program.RunConfig, folder: pathlib.Path) -> None:
        """Writes the figure and every number."""
        values = {
            "prompt": self.prompt,
            "tokens": self.token_names,
            "span": self.token_span,
            "tracked": self.tracked,
            "curves": self.curves.as_json(),
        }
        name = self.labels.name
        results.write(config, folder, name, values, {name: self.figure()})


# --- Programs ---------------------------------------------------------------------------------

Config = TypeVar("Config", bound=SweepConfig)
Result = TypeVar("Result", bound=SweepResult)


def run(
    config: Config,
    compute: Callable[[Config, clm.LanguageModel, tokenizers.Tokenizer], Result],
) -> Result:
    """Loads the model, computes the sweep, and writes it if the Config names a folder."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    if folder is not None and processes.is_first_process():
        result.write(config, folder)
    return result


def sweep_prompt(
    config: SweepConfig,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompt_sweep: PromptSweep,
    answer_tokens: Mapping[str, Sequence[int]],
    labels: Labels,
) -> SweepResult:
    """The probabilities of the answers along the sweep of one prompt, with a progress bar."""
    groups = list(answer_tokens.values())
    arguments = prompt_sweep.sweep.make_arguments()
    if config.pmap:
        probabilities = pmap_sweep(lm, groups, devices=None, **arguments)
    else:
        probabilities = clm.sweep.probabilities(
            lm,
            groups,
            batch_size=config.batch_size,
            progress=labels.name if processes.is_first_process() else None,
            **arguments,
        )
    return SweepResult(
        prompt=prompt_sweep.prompt,
        token_names=tuple(prompt_sweep.token_names),
        token_span=prompt_sweep.token_span,
        tracked={
            answer: tuple(_token_name(tokenizer, token) for token in tokens)
            for answer, tokens in answer_tokens.items()
        },
        curves=answer_curves.Curves(
            prompt_sweep.points, tuple(answer_tokens), probabilities
        ),
        labels=labels,
    )


def _token_name(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    """As the tokenizer names it; a model may have more tokens than its tokenizer."""
    return tokenizer.id_to_token(token) or f"token {token}"


def transition_points(count: int, factors: np.ndarray) -> dict[str, float]:
    """Where a count of mass would change its answer, (k + 1/2) / count, if the sweep gets there."""
    points_by_label = {
        f"{k + 0.5:g}/{count}": (k + 0.5) / count for k in range(1, count)
    }
    return {
        label: point for label, point in points_by_label.items() if point >= factors[0]
    }
