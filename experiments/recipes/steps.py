"""The steps of a recipe, each a program and its Config, run in order."""

import importlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from continuous_lm.errors import InputError, about
from continuous_lm.experiments import PROGRAMS
from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import train_program
from continuous_lm.io.json_files import read_json


class Step(NamedTuple):
    """A program and its flags.

    Attributes:
      program: its name, of `continuous_lm.experiments.PROGRAMS`.
      config: its Config, with an output_dir.
    """

    program: str
    config: program.RunConfig

    @property
    def folder(self) -> pathlib.Path:
        """The folder of its results."""
        if self.config.output_dir is None:
            raise InputError(f"a step of {self.program} has no output_dir")
        return pathlib.Path(self.config.output_dir)

    @property
    def result_file(self) -> pathlib.Path:
        """The JSON file with the record of its run, the last that the program writes."""
        if self.program.startswith("train_"):
            return self.folder / train_program.RECORD_FILE
        if self.program.startswith("sample_"):
            return self.folder / "sample.json"
        return self.folder / f"{self.program}.json"


class Settings(NamedTuple):
    """Settings of a recipe.

    Attributes:
      folder: folder of all results.
      data: text files; none for the documentation of this Python's library.
      words: words to steer towards.
    """

    folder: pathlib.Path
    data: tuple[str, ...] = ()
    words: tuple[str, ...] = ("file", "path", "directory")


class Recipe(NamedTuple):
    """Steps in their order, and a function for the end, if there is one."""

    steps: list[Step]
    finish: Callable[[], None] | None = None


class StepOutcome(NamedTuple):
    """A step that was run or skipped.

    Attributes:
      step: the step.
      was_skipped: whether its results were there.
      exit_status: exit status of the program; 0 if it was skipped.
    """

    step: Step
    was_skipped: bool
    exit_status: int


def run_steps(steps: Sequence[Step], data: Sequence[str]) -> Iterator[StepOutcome]:
    """Run steps with their printed output; skip the first steps that are done.

    A step is done if its results exist, are from the same flags and versions, and are newer than
    the text. After a step that is not done, all steps run, since they may read its results.

    Args:
      steps: the steps in order.
      data: text files.

    Yields:
      The outcome of each step. Ending the iteration stops the recipe.
    """
    may_skip = True
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.program}: {step.folder}"
        may_skip = may_skip and is_done(step, data)
        if may_skip:
            print(f"{title}: skipped, its results are there", flush=True)
            yield StepOutcome(step, True, 0)
            continue
        print(title, flush=True)
        start_time = time.perf_counter()
        module = importlib.import_module(
            f"continuous_lm.experiments.{PROGRAMS[step.program].module}"
        )
        with about(step.program):
            result: program.Result = module.run(step.config)
        seconds = time.perf_counter() - start_time
        print(f"{result.summary()}\n({seconds:.0f} s)\n", flush=True)
        jax.clear_caches()  # of programs that no other step runs
        yield StepOutcome(step, False, result.exit_status)


def is_done(step: Step, data: Sequence[str]) -> bool:
    """Return whether results of the same flags and versions exist, newer than the text."""
    path = step.result_file
    text_paths = [pathlib.Path(name) for name in data]
    if not all(file_path.is_file() for file_path in (path, *text_paths)):
        return False
    written_time = path.stat().st_mtime
    if any(text_path.stat().st_mtime > written_time for text_path in text_paths):
        return False
    stored = read_json(path).get("run", {})
    current = json.loads(json.dumps(program.settings(step.config)))
    return all(stored.get(name) == current[name] for name in ("flags", "versions"))
