"""Judges density models of text: likelihood, perplexity, noise, collapse. See `judging`.

    python -m continuous_lm.experiments.calm_eval --models=results/baseline,results/mixture

--data must be what the models were trained on; of it the held-out part is read.
"""

import pathlib
from typing import Any, cast

from absl import flags

from continuous_lm.errors import InputError, about
from continuous_lm.experiments import calm, corpus, judging, program, tables
from continuous_lm.files import write_json, written_aside

_MODELS = flags.DEFINE_list("models", None, "Folders that calm_train wrote.", required=True)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=1)
_WINDOWS = flags.DEFINE_integer("windows", 256, "Sequences, at most.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of draws and intervals.", lower_bound=0)


def tables_of(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """What is worth comparing, one row a model, from model -> numbers of `judging.judge`."""

    def at(numbers: dict[str, Any], name: str) -> float | None:
        return cast(float | None, numbers[name]["value"])

    def interval(numbers: dict[str, Any], name: str) -> str | None:
        low, high = (numbers[name][end] for end in ("low", "high"))
        return None if high is None else f"{low:.1f} to {high:.1f}"

    perplexity = tables.Table(
        "perplexity",
        "Perplexity of held-out tokens (95 % interval), densities renormalised over the table; with"
        " the contexts of other windows; of the unigram. Accuracy of the token nearest to the mean",
        [
            tables.Column("model"),
            tables.Column("parameters", format=",d"),
            tables.Column("perplexity", format=".1f"),
            tables.Column("95 %"),
            tables.Column("bits a byte", format=".3f"),
            tables.Column("shuffled", format=".1f"),
            tables.Column("unigram", format=".1f"),
            tables.Column("accuracy", format=".1%"),
        ],
        [
            [
                model,
                numbers["parameters"],
                at(numbers, "perplexity"),
                interval(numbers, "perplexity"),
                numbers["bits_per_byte"],
                at(numbers, "shuffled"),
                at(numbers, "unigram"),
                at(numbers, "accuracy_mean"),
            ]
            for model, numbers in results.items()
        ],
    )
    vectors = tables.Table(
        "vectors",
        "Densities: nats a dimension of held-out rows; accuracy of the token nearest to a draw;"
        " a draw's squared distance from it a dimension, and how much farther the second is; scales"
        " at their bound; effective rank of the table; components or experts in use",
        [
            tables.Column("model"),
            tables.Column("width", format="d"),
            tables.Column("nats", format=".4f"),
            tables.Column("accuracy", format=".1%"),
            tables.Column("noise", format=".4f"),
            tables.Column("margin", format=".4f"),
            tables.Column("at bound", format=".1%"),
            tables.Column("rank", format=".1f"),
            tables.Column("use", format=".1f"),
        ],
        [
            [
                model,
                numbers["width"],
                numbers["nll"]["value"] / numbers["width"],
                at(numbers, "accuracy_draw"),
                numbers["noise"]["value"] / numbers["width"],
                numbers["margin"]["value"] / numbers["width"],
                at(numbers, "at_bound"),
                numbers["effective_rank"],
                numbers.get("use"),
            ]
            for model, numbers in results.items()
            if "nll" in numbers
        ],
    )
    return [perplexity, vectors] if vectors.rows else [perplexity]


def main() -> None:
    """Numbers, tables, files."""
    folder = program.output_dir("calm_eval")
    results: dict[str, dict[str, Any]] = {}
    for name in _MODELS.value:
        label = pathlib.PurePath(name).name
        if label in results:
            raise InputError(f"--models: two folders are called {label}; rename one")
        lm = calm.load(name)
        with about(name):
            data = corpus.read(lm.tokenizer)
            results[label] = judging.judge(
                lm,
                data.held_out,
                data.train,
                length=_LENGTH.value,
                windows=_WINDOWS.value,
                seed=_SEED.value,
            ) | {"parameters": calm.num_parameters(lm), "data": data.source}
            results[label]["bits_per_byte"] = judging.bits_per_byte(results[label], data)
    made = tables_of(results)
    with written_aside(folder) as aside:
        write_json(aside / "calm_eval.json", {"run": program.record(), "models": results})
        for table in made:
            table.write(aside)
    print("\n\n".join(table.as_text() for table in made))
    print(f"\n{folder}/calm_eval.json, .csv, .md, .tex")


if __name__ == "__main__":
    program.run(main)
