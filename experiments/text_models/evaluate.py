"""Evaluates models of text, written by the program train, on the held-out part of their data.

    python -m continuous_lm evaluate --models=results/baseline,results/mixture

Likelihood, perplexity, noise and collapse of density models and baselines: see
`densities.evaluation`.
Reconstruction of next-vector models. BrierLM of all of them, at the same positions: see
`calm_training`. --data must be what the models were trained on.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.common import plots, program
from continuous_lm.experiments.densities import density_training, evaluation
from continuous_lm.experiments.training import tokenized_text
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.models.calm.checkpoint import NextVectorLM
from continuous_lm.models.density.model import DensityLM
from continuous_lm.parallel import processes

_MODELS = flags.DEFINE_list("models", None, "Folders that the program train wrote.", required=True)
_CODEC = flags.DEFINE_string(
    "codec", None, "Folder of the autoencoder, for a next-vector model without its own."
)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=1)
_WINDOWS = flags.DEFINE_integer("windows", 256, "Sequences, at most.", lower_bound=1)
_POSITIONS = flags.DEFINE_integer("positions", 512, "Of BrierLM, at most.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 64, "Tokens before each of them.", lower_bound=1)
_STRIDE = flags.DEFINE_integer("stride", 16, "From one of them to the next.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of draws and intervals.", lower_bound=0)


def judged(lm: DensityLM | NextVectorLM, data: tokenized_text.Corpus) -> dict[str, Any]:
    """The numbers of one model's own kind."""
    if isinstance(lm, NextVectorLM):
        return calm_training.judge(lm, data.held_out, seed=_SEED.value)
    found = evaluation.judge(
        lm,
        data.held_out,
        data.train,
        length=_LENGTH.value,
        windows=_WINDOWS.value,
        seed=_SEED.value,
    )
    return found | {"bits_per_byte": evaluation.bits_per_byte(found, data.bytes_per_token)}


def main() -> None:
    """Numbers, tables, files."""
    folder = program.output_dir("evaluate")
    results: dict[str, dict[str, Any]] = {}
    tokens = None
    for name in _MODELS.value:
        label = pathlib.PurePath(name).name
        if label in results:
            raise InputError(f"--models: two folders are called {label}; rename one")
        lm = density_training.load_any(name, _CODEC.value, program.mesh())
        with about(name):
            data = tokenized_text.read(lm.tokenizer)
            tokens = data.held_out if tokens is None else tokens
            if not np.array_equal(data.held_out, tokens):
                raise InputError("it has another tokenizer than the models before; judge it apart")
            results[label] = {
                "parameters": density_training.num_parameters(lm),
                "data": data.source,
            }
            results[label] |= judged(lm, data)
            results[label]["brier"] = calm_training.score(
                lm,
                data.held_out,
                context=_CONTEXT.value,
                stride=_STRIDE.value,
                limit=_POSITIONS.value,
                seed=_SEED.value,
            )
    densities = {label: numbers for label, numbers in results.items() if "nats" in numbers}
    made = evaluation.tables_of(densities) if densities else []
    made += calm_training.tables_of(results)
    learning = calm_training.curves({pathlib.PurePath(n).name: n for n in _MODELS.value})
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        if learning is not None:
            plots.save(learning, aside, "curves")
        write_json(aside / "evaluate.json", {"run": program.record(), "models": results})
        for table in made:
            table.write(aside)
    print("\n\n".join(table.as_text() for table in made))
    print("\n{text}, {bytes:,} bytes, SHA-256 {sha256}".format(**data.source))
    print(f"{folder}/evaluate.json, .csv, .md, .tex")


if __name__ == "__main__":
    program.run(main, meshes=True)
