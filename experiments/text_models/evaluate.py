"""Evaluates models of text, written by the program train, on the held-out part of their data.

    python -m continuous_lm evaluate --models=results/baseline,results/mixture

Likelihood, perplexity, noise and collapse of density models and baselines: see
`densities.evaluation`. Reconstruction of next-vector models. BrierLM of all of them, at the same
positions: see `calm_training`. --data must be what the models were trained on.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.experiments.common import plots
from continuous_lm.experiments.densities import density_training, evaluation
from continuous_lm.experiments.training import tokenized_text
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.model import DensityLM
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes

_MODELS = flags.DEFINE_list(
    "models", None, "Folders that the program train wrote.", required=True
)
_CODEC = flags.DEFINE_string(
    "codec", None, "Folder of the autoencoder, for a next-vector model without its own."
)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=1)
_MAX_WINDOWS = flags.DEFINE_integer(
    "windows", 256, "Sequences, at most.", lower_bound=1
)
_MAX_POSITIONS = flags.DEFINE_integer(
    "positions", 512, "Of BrierLM, at most.", lower_bound=1
)
_CONTEXT_LENGTH = flags.DEFINE_integer(
    "context", 64, "Tokens before each of them.", lower_bound=1
)
_STRIDE = flags.DEFINE_integer(
    "stride", 16, "From one of them to the next.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of draws and intervals.", lower_bound=0)


def evaluate_model(
    lm: DensityLM | LanguageModel[NextVectorModel], data: tokenized_text.Corpus
) -> dict[str, Any]:
    """The numbers of one model's own kind."""
    if isinstance(lm.model, NextVectorModel):
        return calm_training.evaluate_autoencoder(lm, data.held_out, seed=_SEED.value)
    metrics = evaluation.evaluate_density(
        lm,
        data.held_out,
        data.train,
        length=_LENGTH.value,
        windows=_MAX_WINDOWS.value,
        seed=_SEED.value,
    )
    return metrics | {
        "bits_per_byte": evaluation.bits_per_byte(metrics, data.bytes_per_token)
    }


def main() -> None:
    """Numbers, tables, files."""
    folder = program.output_dir("evaluate")
    results: dict[str, dict[str, Any]] = {}
    held_out_tokens = None
    for name in _MODELS.value:
        label = pathlib.PurePath(name).name
        if label in results:
            raise InputError(f"--models: two folders are called {label}; rename one")
        lm = density_training.load_text_model(name, _CODEC.value, program.mesh())
        with about(name):
            data = tokenized_text.read_corpus(lm.tokenizer)
            held_out_tokens = (
                data.held_out if held_out_tokens is None else held_out_tokens
            )
            if not np.array_equal(data.held_out, held_out_tokens):
                raise InputError(
                    "it has another tokenizer than the models before; judge it apart"
                )
            results[label] = {
                "parameters": density_training.num_learned_parameters(lm),
                "data": data.source,
            }
            results[label] |= evaluate_model(lm, data)
            results[label]["brier"] = calm_training.evaluate_brier_lm(
                lm,
                data.held_out,
                context=_CONTEXT_LENGTH.value,
                stride=_STRIDE.value,
                limit=_MAX_POSITIONS.value,
                seed=_SEED.value,
            )
    density_results = {
        label: metrics for label, metrics in results.items() if "nats" in metrics
    }
    result_tables = evaluation.make_tables(density_results) if density_results else []
    result_tables += calm_training.make_tables(results)
    learning_figure = calm_training.plot_learning_curves(
        {
            pathlib.PurePath(folder_name).name: folder_name
            for folder_name in _MODELS.value
        }
    )
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        if learning_figure is not None:
            plots.save(learning_figure, staging_folder, "curves")
        write_json(
            staging_folder / "evaluate.json",
            {"run": program.record(), "models": results},
        )
        for table in result_tables:
            table.write(staging_folder)
    print("\n\n".join(table.as_text() for table in result_tables))
    print("\n{text}, {bytes:,} bytes, SHA-256 {sha256}".format(**data.source))
    print(f"{folder}/evaluate.json, .csv, .md, .tex")


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
