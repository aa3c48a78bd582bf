"""Boolean operators: what is between AND and OR?

    python -m continuous_lm boolean [--model=FOLDER]

The embedding of one operator turns into that of another, for all ten pairs of AND, OR, NAND, NOR
and XOR on all four inputs (Marro et al., arXiv:2504.03933): one figure of forty curves. Where
operators are of different numbers of tokens, they are aligned in time. The embedded model has
learned their truth tables by heart.
"""

import itertools

import continuous_lm as clm
from continuous_lm.experiments.common import answer_curves, plots, pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

OPERATORS = ("AND", "OR", "NAND", "NOR", "XOR")
TEMPLATE = (
    "Question: What is the truth value of the following statement?\n{a} [] {b}\nAnswer (0 or 1): "
)


def made(
    lm: clm.LanguageModel, tokenizer, points, path: str
) -> dict[tuple[str, str], prompt_sweeps.Trial]:
    """(pair of operators, inputs) -> the trial."""
    return {
        (f"{first} to {second}", f"{a}, {b}"): prompt_sweeps.interpolating(
            lm, tokenizer, TEMPLATE.format(a=a, b=b), (first, second), points, path
        )
        for first, second in itertools.combinations(OPERATORS, 2)
        for a, b in itertools.product("01", repeat=2)
    }


def main() -> None:
    """Forty sweeps, figure, table."""
    folder = program.output_dir("boolean")
    lm, tokenizer = pretrained.load()
    answers = single_prompt.tracked(tokenizer, ("0", "1"))
    cells = made(lm, tokenizer, single_prompt.points(0.0), single_prompt.path())
    results = single_prompt.run_all(lm, cells, answers)
    figure = plots.grid(results, xlabel="from the first operator (0) to the second (1)")
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        plots.save(figure, aside, "boolean")
        sweeps = [
            {"pair": pair, "inputs": inputs, **trial.as_json(), "curves": results[place].as_json()}
            for place, trial in cells.items()
            for pair, inputs in [place]
        ]
        write_json(aside / "boolean.json", {"sweeps": sweeps, "run": program.record()})
    print("answers from the first operator to the second, for inputs 0 0, 0 1, 1 0, 1 1\n")
    for pair, rows in itertools.groupby(results.items(), key=lambda item: item[0][0]):
        print(f"{pair:<12} " + "   ".join(f"{_path(result):<8}" for _, result in rows))
    print(f"\n{folder}/boolean.json, .png, .pdf")


def _path(result: answer_curves.Curves) -> str:
    """The answers along a sweep: "0 > 1"."""
    return " > ".join(r.answer for r in result.ranges)


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
