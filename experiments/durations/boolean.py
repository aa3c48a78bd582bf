"""Boolean operators: what is between AND and OR?

    python -m continuous_lm boolean [--model=FOLDER]

The embedding of one operator turns into that of another, for all ten pairs of AND, OR, NAND, NOR
and XOR on all four inputs (Marro et al., arXiv:2504.03933): one figure of forty curves. Where
operators are of different numbers of tokens, they are aligned in time. The embedded model has
learned their truth tables by heart.
"""

import itertools

import continuous_lm as clm
from continuous_lm.experiments.common import (
    absl_pretrained as pretrained,
)
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
)
from continuous_lm.experiments.durations import absl_single_prompt as single_prompt
from continuous_lm.experiments.durations import prompt_sweeps
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

OPERATORS = ("AND", "OR", "NAND", "NOR", "XOR")
TEMPLATE = "Question: What is the truth value of the following statement?\n"
TEMPLATE += "{a} [] {b}\nAnswer (0 or 1): "


def make_operator_sweeps(
    lm: clm.LanguageModel, tokenizer, points, path: str
) -> dict[tuple[str, str], prompt_sweeps.PromptSweep]:
    """(pair of operators, inputs) -> the sweep."""
    return {
        (f"{first} to {second}", f"{a}, {b}"): prompt_sweeps.interpolate_phrases(
            lm, tokenizer, TEMPLATE.format(a=a, b=b), (first, second), points, path
        )
        for first, second in itertools.combinations(OPERATORS, 2)
        for a, b in itertools.product("01", repeat=2)
    }


def main() -> None:
    """Forty sweeps, figure, table."""
    folder = program.output_dir("boolean")
    lm, tokenizer = pretrained.load()
    answer_tokens = single_prompt.find_answer_tokens(tokenizer, ("0", "1"))
    prompt_sweeps = make_operator_sweeps(
        lm, tokenizer, single_prompt.sweep_points(0.0), single_prompt.path()
    )
    curves_by_cell = single_prompt.run_sweeps(lm, prompt_sweeps, answer_tokens)
    figure = plots.curve_grid(
        curves_by_cell, xlabel="from the first operator (0) to the second (1)"
    )
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        plots.save(figure, staging_folder, "boolean")
        sweep_records = [
            {
                "pair": pair,
                "inputs": inputs,
                **prompt_sweep.as_json(),
                "curves": curves_by_cell[cell].as_json(),
            }
            for cell, prompt_sweep in prompt_sweeps.items()
            for pair, inputs in [cell]
        ]
        write_json(
            staging_folder / "boolean.json",
            {"sweeps": sweep_records, "run": program.record()},
        )
    print(
        "answers from the first operator to the second, for inputs 0 0, 0 1, 1 0, 1 1\n"
    )
    for pair, pair_results in itertools.groupby(
        curves_by_cell.items(), key=lambda item: item[0][0]
    ):
        print(
            f"{pair:<12} "
            + "   ".join(
                f"{_answer_sequence(answer_curves):<8}"
                for _, answer_curves in pair_results
            )
        )
    print(f"\n{folder}/boolean.json, .png, .pdf")


def _answer_sequence(answer_curves: answer_curves.Curves) -> str:
    """The answers along a sweep: "0 > 1"."""
    return " > ".join(r.answer for r in answer_curves.ranges)


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
