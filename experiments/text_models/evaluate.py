"""Evaluate text models of the training programs on the held-out part of their data.

    python -m continuous_lm evaluate --models=results/baseline,results/mixture

For density models and baselines it computes likelihood, perplexity, noise and collapse (see
`densities.evaluation`); for next-vector models, reconstruction. For all models it computes BrierLM
at the same positions (see `calm.calm_evaluation`). --data must be the models' training data.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_evaluation
from continuous_lm.experiments.common import plots, program, tables
from continuous_lm.experiments.densities import density_training, evaluation
from continuous_lm.experiments.training import tokenized_text
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tokenized_text.TextConfig, program.DeviceConfig):
    """Flags of evaluate."""

    models: tuple[str, ...] = program.flag(
        (), help="Folders that training programs wrote; required."
    )
    codec: str | None = program.flag(
        None,
        help="Folder of the autoencoder, for a next-vector model without its own.",
    )
    length: int = program.flag(128, help="Tokens in a sequence.", lower_bound=1)
    windows: int = program.flag(
        256, help="Number of sequences, at most.", lower_bound=1
    )
    positions: int = program.flag(
        512, help="Number of positions of BrierLM, at most.", lower_bound=1
    )
    context: int = program.flag(
        64, help="Tokens before each position of BrierLM.", lower_bound=1
    )
    stride: int = program.flag(
        16, help="Tokens from one position of BrierLM to the next.", lower_bound=1
    )
    seed: int = program.flag(0, help="Seed of draws and intervals.", lower_bound=0)

    def labels(self) -> dict[str, str]:
        """The name of each model -> its folder."""
        if not self.models:
            raise InputError("--models is missing: folders of trained models")
        folder_by_label: dict[str, str] = {}
        for folder in self.models:
            label = pathlib.PurePath(folder).name
            if label in folder_by_label:
                raise InputError(
                    f"--models: two folders are called {label}; rename one"
                )
            folder_by_label[label] = folder
        return folder_by_label


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Numbers by model.

    Attributes:
      models: label -> numbers.
      data: source, size and checksum of the text.
      tables: tables of all models.
    """

    models: dict[str, dict[str, Any]]
    data: dict[str, Any]
    tables: list[tables.Table]

    def summary(self) -> str:
        data = self.data
        source = f"{data['text']}, {data['bytes']:,} bytes, SHA-256 {data['sha256']}"
        return "\n\n".join([*(table.as_text() for table in self.tables), source])


def evaluate_model(
    config: Config,
    lm: LanguageModel[DensityModel] | LanguageModel[NextVectorModel],
    data: tokenized_text.Corpus,
) -> dict[str, Any]:
    """The numbers of one model, those of its kind first."""
    metrics: dict[str, Any] = {
        "parameters": density_training.num_learned_parameters(lm),
        "data": data.source,
    }
    if isinstance(lm.model, NextVectorModel):
        metrics |= calm_evaluation.evaluate_autoencoder(
            lm, data.held_out, seed=config.seed
        )
    else:
        metrics |= evaluation.evaluate_density(
            lm,
            data.held_out,
            data.train,
            length=config.length,
            windows=config.windows,
            seed=config.seed,
        )
        metrics["bits_per_byte"] = evaluation.bits_per_byte(
            metrics, data.bytes_per_token
        )
    metrics["brier"] = calm_evaluation.evaluate_brier_lm(
        lm,
        data.held_out,
        context=config.context,
        stride=config.stride,
        limit=config.positions,
        seed=config.seed,
    )
    return metrics


def evaluate_models(
    config: Config, folder_by_label: dict[str, str], mesh: Mesh | None
) -> dict[str, dict[str, Any]]:
    """The numbers of all models, which must have the same held-out tokens."""
    results: dict[str, dict[str, Any]] = {}
    held_out_tokens = None
    for label, folder in folder_by_label.items():
        lm = density_training.load_text_model(folder, config.codec, mesh)
        with about(folder):
            data = tokenized_text.read_corpus(config, lm.tokenizer)
            if held_out_tokens is None:
                held_out_tokens = data.held_out
            if not np.array_equal(data.held_out, held_out_tokens):
                raise InputError(
                    "it has another tokenizer than the models before; judge it apart"
                )
            results[label] = evaluate_model(config, lm, data)
    return results


def make_tables(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """The tables of density models, if there are any, and those of all models."""
    density_results = {
        label: metrics for label, metrics in results.items() if "nats" in metrics
    }
    density_tables = evaluation.make_tables(density_results) if density_results else []
    return density_tables + calm_evaluation.make_tables(results)


def write_files(
    config: Config, folder: pathlib.Path, result: Result, curves: Figure | None
) -> None:
    """Write evaluate.json, the tables and the learning curves."""
    with write_atomically(folder) as staging_folder:
        if curves is not None:
            plots.save(curves, staging_folder, "curves")
        write_json(
            staging_folder / "evaluate.json",
            {"run": program.record(config), "models": result.models},
        )
        for table in result.tables:
            table.write(staging_folder)


def run(config: Config) -> Result:
    """Load the models, evaluate them, and write numbers, tables and curves."""
    folder = program.output_folder(config)
    folder_by_label = config.labels()
    results = evaluate_models(config, folder_by_label, program.make_mesh(config))
    *_, last_metrics = results.values()
    result = Result(results, last_metrics["data"], make_tables(results))
    if folder is not None and processes.is_first_process():
        curves = calm_evaluation.plot_learning_curves(folder_by_label)
        write_files(config, folder, result, curves)
    return result


if __name__ == "__main__":
    program.main(Config, run)
