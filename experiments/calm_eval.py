"""Judges density models of text: likelihood, perplexity, noise, collapse. See `judging`.

    python -m continuous_lm.experiments.calm_eval --models=results/baseline,results/mixture

--data must be what the models were trained on; of it the held-out part is read.
"""

import pathlib
from typing import Any

from absl import flags

from continuous_lm.errors import InputError, about
from continuous_lm.experiments import calm, corpus, judging, program
from continuous_lm.files import write_json, written_aside

_MODELS = flags.DEFINE_list("models", None, "Folders that calm_train wrote.", required=True)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=1)
_WINDOWS = flags.DEFINE_integer("windows", 256, "Sequences, at most.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of draws and intervals.", lower_bound=0)


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
            results[label]["bits_per_byte"] = judging.bits_per_byte(
                results[label], data.bytes_per_token
            )
    made = judging.tables_of(results)
    with written_aside(folder) as aside:
        write_json(aside / "calm_eval.json", {"run": program.record(), "models": results})
        for table in made:
            table.write(aside)
    print("\n\n".join(table.as_text() for table in made))
    print("\n{text}, {bytes:,} bytes, SHA-256 {sha256}".format(**data.source))
    print(f"{folder}/calm_eval.json, .csv, .md, .tex")


if __name__ == "__main__":
    program.run(main)
