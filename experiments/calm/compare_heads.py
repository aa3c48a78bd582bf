"""Compare energy, flow and diffusion heads with Gaussians on a target with two modes.

    python -m continuous_lm compare_heads [--steps=1000] [--output_dir=FOLDER]

Each head is fitted to the same stream of data, with the same number of optimiser steps and nearly
the same number of parameters; `two_mode_target` describes the target. The table has the energy
distance between samples and new data, and the share of samples in the modes. It also has network
evaluations for a sample, and samples a second. The figure shows samples. Two rows need no training:
new data, whose distance is 0 up to noise, and the best single Gaussian, in closed form. It takes
two minutes on one core.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from matplotlib.figure import Figure

from continuous_lm.experiments.calm import two_mode_target
from continuous_lm.experiments.common import plots, program, tables
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json

NAME = "compare_heads"  # of the files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of compare_heads."""

    hidden_size: int = program.flag(
        32, help="Width of the blocks of a head.", lower_bound=1
    )
    depth: int = program.flag(2, help="Blocks of a head.", lower_bound=0)
    num_samples: int = program.flag(
        8, help="Draws of noise for each target in a loss.", lower_bound=2
    )
    steps: int = program.flag(1000, help="Optimiser steps of each head.", lower_bound=1)
    batch_size: int = program.flag(128, help="Targets in a step.", lower_bound=1)
    learning_rate: float = program.flag(
        3e-3, help="Peak learning rate.", lower_bound=0.0
    )
    conditions: int = program.flag(
        96, help="Number of angles at which samples are compared.", lower_bound=2
    )
    samples: int = program.flag(200, help="Samples at each angle.", lower_bound=2)
    seed: int = program.flag(
        0, help="Seed of data, parameters and samples.", lower_bound=0
    )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Numbers and samplers of each head, of fresh data and of the best Gaussian.

    Attributes:
      metrics: name -> numbers.
      samplers: name -> sampler.
      table: table of the numbers.
    """

    metrics: dict[str, dict[str, Any]]
    samplers: dict[str, two_mode_target.Sampler]
    table: tables.Table

    def summary(self) -> str:
        return self.table.as_text()


def plot(config: Config, result: Result) -> Figure:
    """Samples of all but the flow by Euler, which look as those of the other flow."""
    samplers = {
        name: sampler
        for name, sampler in result.samplers.items()
        if name != "flow, Euler"
    }
    key = jax.random.key(config.seed + 1)
    return two_mode_target.plot_samples(samplers, result.metrics, key)


def write_files(config: Config, folder: pathlib.Path, result: Result) -> None:
    """Write the numbers, the table and the figure."""
    figure = plot(config, result)
    with write_atomically(folder) as staging_folder:
        contents = {"run": program.record(config), "heads": result.metrics}
        write_json(staging_folder / f"{NAME}.json", contents)
        result.table.write(staging_folder)
        plots.save(figure, staging_folder, NAME)


def run(config: Config) -> Result:
    """Fit the heads, compare them, and write numbers, a table and a figure."""
    folder = program.output_folder(config)
    metrics, samplers = two_mode_target.compare_heads(
        two_mode_target.make_heads(
            config.hidden_size, config.depth, config.num_samples
        ),
        two_mode_target.ComparisonSettings(
            seed=config.seed,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            conditions=config.conditions,
            samples=config.samples,
        ),
    )
    result = Result(metrics, samplers, two_mode_target.make_table(metrics))
    if folder is not None:
        write_files(config, folder, result)
    return result


if __name__ == "__main__":
    program.main(Config, run)
