"""Run a recipe: the programs that make the tables of the documentation, in order.

    python -m continuous_lm recipe --name=calm

calm                a small run of every program of density models
calm_full           the tables of density models, under an hour
next_vectors        a small run of every program of next-vector models
next_vectors_full   the tables of next-vector models, under an hour
embedded            the embedded model, trained again with three seeds

Each is a module of `experiments.recipes`, whose docstring has its time and expected numbers. The
same command resumes a stopped recipe. Its first steps are skipped, with a message, if their results
exist and are from the same flags, versions and text.
"""

import dataclasses
from collections.abc import Callable, Mapping

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import program
from continuous_lm.experiments.recipes import (
    calm,
    calm_full,
    embedded,
    next_vectors,
    next_vectors_full,
    steps,
)
from continuous_lm.experiments.training import tokenized_text

RECIPES: Mapping[str, Callable[[steps.Settings], steps.Recipe]] = {
    "calm": calm.make_recipe,
    "calm_full": calm_full.make_recipe,
    "next_vectors": next_vectors.make_recipe,
    "next_vectors_full": next_vectors_full.make_recipe,
    "embedded": embedded.make_recipe,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tokenized_text.TextConfig, program.RunConfig):
    """Flags of recipe."""

    name: str | None = program.flag(
        None, help="Name of the recipe; required.", choices=tuple(RECIPES)
    )
    words: tuple[str, ...] = program.flag(
        ("file", "path", "directory"), help="Words to steer towards, in calm_full."
    )

    def default_folder(self, program_name: str) -> str:
        """The recipe's name."""
        return self.name or program_name


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Outcomes of the steps.

    Attributes:
      outcomes: outcomes of the steps that ran or were skipped; the last may have failed.
    """

    outcomes: list[steps.StepOutcome]

    def summary(self) -> str:
        num_skipped = sum(outcome.was_skipped for outcome in self.outcomes)
        num_run = len(self.outcomes) - num_skipped
        verdict = f"{num_run} steps run, {num_skipped} skipped"
        if self.exit_status:
            verdict += f"; {self.outcomes[-1].step.program} ended the recipe"
        return verdict

    @property
    def exit_status(self) -> int:
        return self.outcomes[-1].exit_status


def run(config: Config) -> Result:
    """Run the steps of a recipe, up to the first that fails."""
    if config.name is None:
        raise InputError(f"--name is missing: one of {', '.join(RECIPES)}")
    folder = program.output_folder(config)
    if folder is None:
        raise InputError("--output_dir is missing: the folder for all steps")
    settings = steps.Settings(folder, config.data, config.words)
    recipe = RECIPES[config.name](settings)
    outcomes = []
    for outcome in steps.run_steps(recipe.steps, config.data):
        outcomes.append(outcome)
        if outcome.exit_status:
            return Result(outcomes)
    if recipe.finish is not None:
        recipe.finish()
    return Result(outcomes)


if __name__ == "__main__":
    program.main(Config, run)
