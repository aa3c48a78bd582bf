"""Boolean operators: interpolate between AND, OR, NAND, NOR and XOR.

    python -m continuous_lm boolean [--model=FOLDER]

The embedding of one operator is interpolated to that of another, for all ten pairs of operators on
all four inputs (Marro et al., arXiv:2504.03933). One figure shows the forty curves. Operators with
different numbers of tokens are aligned in time. The embedded model has memorised their truth
tables.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from matplotlib.figure import Figure

import continuous_lm as clm
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
    pretrained,
    program,
    results,
)
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt
from continuous_lm.parallel import processes

OPERATORS = ("AND", "OR", "NAND", "NOR", "XOR")
INPUTS = tuple(itertools.product("01", repeat=2))
TEMPLATE = "Question: What is the truth value of the following statement?\n"
TEMPLATE += "{a} [] {b}\nAnswer (0 or 1): "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    single_prompt.SweepConfig, single_prompt.PathConfig, single_prompt.AnswerConfig
):
    """Flags of boolean."""


Cell = tuple[str, str]  # pair of operators and inputs: ("AND to OR", "0, 1")


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The answers of all pairs of operators on all inputs."""

    sweeps: Mapping[Cell, prompt_sweeps.PromptSweep]
    curves: Mapping[Cell, answer_curves.Curves]

    def answer_sequences(self) -> dict[str, list[str]]:
        """Pair of operators -> the answers along its sweep, "0 > 1", for each of `INPUTS`."""
        sequences: dict[str, list[str]] = {}
        for (pair, _), cell_curves in self.curves.items():
            sequence = " > ".join(r.answer for r in cell_curves.ranges)
            sequences.setdefault(pair, []).append(sequence)
        return sequences

    def figure(self) -> Figure:
        """Forty small panels."""
        return plots.curve_grid(
            dict(self.curves), xlabel="from the first operator (0) to the second (1)"
        )

    def summary(self) -> str:
        lines = [
            "answers from the first operator to the second, for inputs 0 0, 0 1, 1 0, 1 1",
            "",
        ]
        for pair, sequences in self.answer_sequences().items():
            columns = "   ".join(f"{sequence:<8}" for sequence in sequences)
            lines.append(f"{pair:<12} {columns}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            "sweeps": [
                {
                    "pair": cell[0],
                    "inputs": cell[1],
                    **prompt_sweep.as_json(),
                    "curves": self.curves[cell].as_json(),
                }
                for cell, prompt_sweep in self.sweeps.items()
            ]
        }


def make_operator_sweeps(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    points: np.ndarray,
    path: str,
) -> dict[Cell, prompt_sweeps.PromptSweep]:
    """The sweep of each pair of operators on each pair of inputs."""
    return {
        (f"{first} to {second}", f"{a}, {b}"): prompt_sweeps.interpolate_phrases(
            lm, tokenizer, TEMPLATE.format(a=a, b=b), (first, second), points, path
        )
        for first, second in itertools.combinations(OPERATORS, 2)
        for a, b in INPUTS
    }


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> Result:
    """Forty sweeps."""
    answer_tokens = answer_curves.find_answer_tokens(
        tokenizer, ("0", "1"), config.answer_tokens
    )
    operator_sweeps = make_operator_sweeps(
        lm, tokenizer, config.even_points(0.0), config.path
    )
    curves_by_cell = prompt_sweeps.sweep_prompts(
        config, lm, operator_sweeps, answer_tokens
    )
    return Result(operator_sweeps, curves_by_cell)


def run(config: Config) -> Result:
    """Load the model, interpolate between operators, and write the answers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    if folder is not None and processes.is_first_process():
        figures = {"boolean": result.figure()}
        results.write(config, folder, "boolean", result.as_json(), figures)
    return result


if __name__ == "__main__":
    program.main(Config, run)
