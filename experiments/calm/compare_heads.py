"""Energy, flow and diffusion heads against Gaussians, on one target of two modes, on one page.

    python -m continuous_lm compare_heads [--steps=1000] [--output_dir=FOLDER]

Each head is fitted to the same stream of data, with as many optimiser steps and nearly as many
parameters: see `two_mode_target` for the target. The table holds the energy distance of their
samples to fresh data, the share of samples in the modes, how often the network is evaluated for a
sample, and samples a second; the figure holds samples. Two rows ask for no training: fresh data,
which says what 0 looks like, and the best single Gaussian, in closed form. It takes two minutes of
one core.
"""

import jax
from absl import flags

from continuous_lm.experiments.calm import two_mode_target
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.experiments.common import plots
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json

_HIDDEN_SIZE = flags.DEFINE_integer(
    "hidden_size", 32, "D of the blocks.", lower_bound=1
)
_DEPTH = flags.DEFINE_integer("depth", 2, "Blocks.", lower_bound=0)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 8, "Draws of noise for each target in a loss.", lower_bound=2
)
_STEPS = flags.DEFINE_integer(
    "steps", 1000, "Optimiser steps of each head.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 128, "Targets in a step.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 3e-3, "At its peak.", lower_bound=0.0
)
_CONDITIONS = flags.DEFINE_integer(
    "conditions", 96, "Angles to judge at.", lower_bound=2
)
_SAMPLES = flags.DEFINE_integer("samples", 200, "At each of them.", lower_bound=2)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of data, parameters and samples.", lower_bound=0
)


def main() -> None:
    """Fits, numbers, a table, a figure."""
    folder = program.output_dir("compare_heads")
    candidate_heads = two_mode_target.make_heads(
        _HIDDEN_SIZE.value, _DEPTH.value, _NUM_SAMPLES.value
    )
    metrics, samplers = two_mode_target.compare_heads(
        candidate_heads,
        seed=_SEED.value,
        steps=_STEPS.value,
        batch_size=_BATCH_SIZE.value,
        learning_rate=_LEARNING_RATE.value,
        conditions=_CONDITIONS.value,
        samples=_SAMPLES.value,
    )
    metrics_table = two_mode_target.make_table(metrics)
    plotted_samplers = {
        name: sampler for name, sampler in samplers.items() if name != "flow, Euler"
    }  # as the other
    figure = two_mode_target.plot_samples(
        plotted_samplers, metrics, jax.random.key(_SEED.value + 1)
    )
    with write_atomically(folder) as staging_folder:
        write_json(
            staging_folder / "compare_heads.json",
            {"run": program.record(), "heads": metrics},
        )
        metrics_table.write(staging_folder)
        plots.save(figure, staging_folder, "compare_heads")
    print(
        f"{metrics_table.as_text()}\n\n{folder}: compare_heads.json, .csv, .md, .tex, .png, .pdf"
    )


if __name__ == "__main__":
    program.run(main)
