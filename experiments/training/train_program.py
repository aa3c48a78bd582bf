"""Shared parts of the training programs: flags, output folder, run record."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import jax

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import fit
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

RECORD_FILE = "train.json"
RUN_FOLDER = "run"  # of `fit`, below the folder of the results

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitFlags(program.CheckedConfig):
    """Flags of training."""

    batch_size: int = program.flag(
        32,
        help="Sequences (of 64 tokens, for an autoencoder) in a step.",
        lower_bound=1,
    )
    accumulate: int = program.flag(
        1, help="Micro-batches of a batch, whose gradients are averaged.", lower_bound=1
    )
    steps: int = program.flag(1000, help="Number of optimiser steps.", lower_bound=1)
    learning_rate: float = program.flag(
        2e-3, help="Peak learning rate.", lower_bound=0.0
    )
    warm_up: int = program.flag(
        100, help="Steps to the peak learning rate.", lower_bound=0
    )
    clip: float = program.flag(
        1.0, help="Largest global norm of a gradient.", lower_bound=0.0
    )
    compute_dtype: Literal["float32", "bfloat16"] = program.flag(
        "float32",
        help="Floating-point type of the computation; parameters are kept in float32.",
    )
    save_every: int = program.flag(
        200, help="Steps from checkpoint to checkpoint.", lower_bound=1
    )
    seed: int = program.flag(
        0, help="Seed of the parameters and of the data's order.", lower_bound=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(FitFlags, program.PmapConfig):
    """Flags of every program that trains."""

    def fit_config(self) -> fit.FitConfig:
        """The settings of `fit.fit`."""
        is_cast = self.compute_dtype != "float32"
        return fit.FitConfig(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            warm_up=self.warm_up,
            clip=self.clip,
            accumulate=self.accumulate,
            compute_dtype=self.compute_dtype if is_cast else None,
            seed=self.seed,
            save_every=self.save_every,
            pmap=self.pmap,
        )

    def output_folder(self) -> pathlib.Path:
        """The folder for the model and, in `run`, the checkpoints of the run.

        Raises:
          InputError: if there is none, since a run needs it, or it cannot be written.
        """
        folder = program.output_folder(self)
        if folder is None:
            raise InputError("--output_dir is missing: the folder of the training run")
        return folder


@dataclasses.dataclass(frozen=True)
class TrainResult(program.Result, Generic[Model]):
    """A trained model.

    Attributes:
      lm: the model.
      data: source, size and checksum of its text.
      folder: where it is written.
    """

    lm: Model
    data: dict[str, Any]
    folder: pathlib.Path

    def summary(self) -> str:
        return "Trained: for evaluate, compare_quantizers and the sample programs"


def write_result(
    config: TrainConfig,
    save_model: Callable[[str | os.PathLike[str], Model], None],
    lm: Model,
    data: dict[str, Any],
) -> TrainResult[Model]:
    """Write the trained model, then the record of its run.

    Args:
      config: config of the run.
      save_model: writes the model into a folder.
      lm: the model.
      data: source, size and checksum of its text.
    """
    folder = config.output_folder()
    save_on_first_process(save_model, folder, lm)
    if processes.is_first_process():
        with write_atomically(folder) as staging_folder:
            record = {"run": program.record(config), "data": data}
            write_json(staging_folder / RECORD_FILE, record)
    return TrainResult(lm, data, folder)


def save_on_first_process(
    save_model: Callable[[str | os.PathLike[str], Model], None],
    folder: str | os.PathLike[str],
    lm: Model,
) -> None:
    """`save_model(folder, lm)` by process 0, which gets all of the parameters first."""
    if jax.process_count() > 1:
        gathered: Any = lm
        lm = dataclasses.replace(
            gathered, params=processes.gather_to_hosts(gathered.params)
        )
    if processes.is_first_process():
        save_model(folder, lm)


def require(value: str | None, flag_name: str, what: str) -> str:
    """Return the value of a required flag.

    Raises:
      InputError: if it is missing, naming the flag and its meaning, `what`.
    """
    if value is None:
        raise InputError(f"--{flag_name} is missing: {what}")
    return value
