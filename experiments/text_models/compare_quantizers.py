"""Compare maps from a sampled vector to tokens, on trained models: accuracy, noise, time.

    python -m continuous_lm compare_quantizers --model=results/mixture
    python -m continuous_lm compare_quantizers --model=results/calm-2,results/calm-4

Each map gets the same samples from the density of the next vector, on held-out text. Three maps
search the table: the Euclidean or cosine nearest row, and the nearest few re-ranked by the density.
Vector, residual and finite scalar quantization are fitted to the table's rows, and a code is mapped
to its nearest row. `kept` is the share of rows that their own code maps back to themselves.

For next-vector models the decoder is a further map; see `code_comparison`. Several models can be
given, to compare numbers of tokens C in a vector.
"""

import dataclasses
import pathlib
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import program, tables
from continuous_lm.experiments.densities import code_comparison, density_training
from continuous_lm.experiments.training import tokenized_text
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes

DEFAULT_CANDIDATES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tokenized_text.TextConfig, program.DeviceConfig):
    """Flags of compare_quantizers."""

    model: tuple[str, ...] = program.flag(
        (),
        help="Folder that a training program wrote, several of next-vector models;"
        " required.",
    )
    codec: str | None = program.flag(
        None,
        help="Folder of the autoencoder, for a next-vector model without its own.",
    )
    length: int = program.flag(128, help="Tokens in a sequence.", lower_bound=1)
    windows: int = program.flag(16, help="Number of sequences, at most.", lower_bound=1)
    codes: int = program.flag(
        512, help="Number of codes of the vector quantizer.", lower_bound=2
    )
    stages: int = program.flag(
        4, help="Number of stages of the residual quantizer.", lower_bound=1
    )
    candidates: int | None = program.flag(
        None,
        help=f"Rows of a density model to re-rank.  [default: {DEFAULT_CANDIDATES}]",
        lower_bound=1,
    )
    levels: int = program.flag(
        5, help="Levels of each dimension, finite scalar.", lower_bound=2
    )
    seed: int = program.flag(0, help="Seed of draws and codebooks.", lower_bound=0)


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The numbers of each way, and their table.

    Attributes:
      ways: the numbers of each, of next-vector models with the model's name.
      data: source, size and checksum of the text.
      table: the same numbers as a table.
    """

    ways: list[dict[str, Any]]
    data: dict[str, Any]
    table: tables.Table

    def summary(self) -> str:
        return self.table.as_text()


def compare_for_model(
    config: Config,
    name: str,
    lm: LanguageModel[DensityModel] | LanguageModel[NextVectorModel],
    data: tokenized_text.Corpus,
) -> list[dict[str, Any]]:
    """The numbers of each way for one model."""
    settings = code_comparison.Settings(
        length=config.length,
        windows=config.windows,
        seed=config.seed,
        codes=config.codes,
        stages=config.stages,
        levels=config.levels,
        candidates=config.candidates or DEFAULT_CANDIDATES,
    )
    if isinstance(lm.model, NextVectorModel):
        if config.candidates is not None:
            raise InputError(
                "--candidates: a next-vector model has no rows; leave it out"
            )
        label = pathlib.PurePath(name).name
        latent_results = code_comparison.compare_latent_quantizers(
            lm, data.train, data.held_out, settings
        )
        return [{"model": label, **numbers} for numbers in latent_results]
    if len(config.model) > 1:
        raise InputError(f"--model: {name} is a density model; give it alone")
    return code_comparison.compare_quantizers(lm, data.held_out, settings)


def run(config: Config) -> Result:
    """Load the models, compare the maps, and write numbers and a table."""
    folder = program.output_folder(config)
    if not config.model:
        raise InputError("--model is missing: the folder of a trained model")
    mesh = program.make_mesh(config)
    ways: list[dict[str, Any]] = []
    source: dict[str, Any] = {}
    for name in config.model:
        lm = density_training.load_text_model(name, config.codec, mesh)
        data = tokenized_text.read_corpus(config, lm.tokenizer)
        ways += compare_for_model(config, name, lm, data)
        source = data.source
    table = code_comparison.make_table(ways)
    if folder is not None and processes.is_first_process():
        with write_atomically(folder) as staging_folder:
            contents = {"run": program.record(config), "data": source, "ways": ways}
            write_json(staging_folder / "compare_quantizers.json", contents)
            table.write(staging_folder)
    return Result(ways, source, table)


if __name__ == "__main__":
    program.main(Config, run)
