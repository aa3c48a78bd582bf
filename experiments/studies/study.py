"""A study: one experiment on a whole data set, batched across prompts and resumable.

    python -m continuous_lm study --study=counting [--model=FOLDER] [--data=FILE]

counting    200 prompts with a word repeated 2 to 6 times, which shrinks
tutorials   200 how-to tutorials, whose steps shrink
sums        200 sums with one shrinking number
words       50 interpolations from a word to another, with four yes/no questions each

By default the data set is made from the small language of the embedded model; --data reads a file
in the paper's format (see `datasets`). A prompt that cannot run is stored with the reason. Each
result is appended to records.jsonl, from which a stopped study is resumed. At the end study.json
holds all results, for `analysis`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
import tqdm

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.experiments.common import answer_curves, pretrained, program, results
from continuous_lm.experiments.durations import (
    interpolation,
    prompt_sweeps,
    single_prompt,
    sums,
)
from continuous_lm.experiments.studies import datasets
from continuous_lm.parallel import processes

PARTIAL_RESULTS_FILE = "records.jsonl"
NUM_FINGERPRINT_ENTRIES = 4096  # of each parameter, at most
MAX_REASONS = 5  # why prompts could not be run, in the summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    single_prompt.FactorConfig,
    single_prompt.ChangeConfig,
    single_prompt.PathConfig,
    single_prompt.AnswerConfig,
):
    """Flags of study."""

    study: str = program.flag(
        "counting", help="Study to run; see above.", choices=list(datasets.STUDIES)
    )
    data: str | None = program.flag(
        None, help="A data file.  [default: made of the small language]"
    )
    limit: int = program.flag(200, help="Number of prompts, at most.", lower_bound=1)
    batch_size: int = program.flag(256, help="Points computed at once.", lower_bound=1)

    def default_folder(self, program_name: str) -> str:
        return f"{program_name}/{self.study}"

    def sweep_settings(self) -> "SweepSettings":
        """Settings of each prompt's sweep."""
        starts_at_zero = self.study == "words"
        points = self.even_points(0.0 if starts_at_zero else self.min_factor)
        return SweepSettings(points, self.change, self.path, self.batch_size, self.pmap)


class SweepSettings(NamedTuple):
    """Settings of the sweep of each prompt of a study."""

    points: np.ndarray  # [P]
    change: str = "both"
    path: str = "linear"
    batch_size: int = 256
    pmap: bool = False


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The records of all prompts, in the JSON form in which a resumed study reads them."""

    study: str
    model: str
    records: tuple[Mapping[str, Any], ...]

    def failed(self) -> list[Mapping[str, Any]]:
        """The records of prompts that could not be run."""
        return [record for record in self.records if "failed" in record]

    def summary(self) -> str:
        failed = self.failed()
        reasons = sorted({record["failed"] for record in failed})[:MAX_REASONS]
        header = f"{len(self.records)} prompts, of which {len(failed)} could not be run"
        return "\n".join([header, *(f"  {reason}" for reason in reasons)])

    def as_json(self) -> dict[str, Any]:
        """Every number, as `analysis` reads it."""
        return {
            "study": self.study,
            "model": self.model,
            "records": list(self.records),
        }

    def write(self, config: program.RunConfig, folder: pathlib.Path) -> None:
        """study.json, whole; the partial results go. Process 0 alone writes."""
        if not processes.is_first_process():
            return
        results.write(config, folder, "study", self.as_json(), {})
        (folder / PARTIAL_RESULTS_FILE).unlink(missing_ok=True)


def study_answers(study: str, is_bundled: bool) -> answer_curves.Answers:
    """The answers that a study tracks."""
    if study == "words":
        return interpolation.YES_NO_SPELLINGS
    if study == "sums":
        return sums.possible_answers(is_bundled)
    return clm.tokenization.DIGITS


def make_prompt_sweep(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    task: datasets.Task,
    settings: SweepSettings,
) -> prompt_sweeps.PromptSweep:
    """The sweep that a task asks for."""
    points = settings.points
    if task.phrases is not None:
        return prompt_sweeps.interpolate_phrases(
            lm, tokenizer, task.prompt, task.phrases, points, settings.path
        )
    assert task.character_span is not None
    return prompt_sweeps.shrink_span(
        tokenizer, task.prompt, task.character_span, points, settings.change
    )


def run_study(
    folder: pathlib.Path | None,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    tasks: Sequence[datasets.Task],
    answer_tokens: Mapping[str, Sequence[int]],
    settings: SweepSettings,
    progress_label: str = "study",
) -> list[dict[str, Any]]:
    """The records of all tasks in their order; those that `folder` has already are not run again.

    Sets of prompts are computed and written together, so that where a study was stopped changes no
    number.
    """
    sweeps_by_task: dict[int, prompt_sweeps.PromptSweep] = {}
    reasons_by_task: dict[int, str] = {}  # why others cannot be run
    for task_index, task in enumerate(tasks):
        try:
            sweeps_by_task[task_index] = make_prompt_sweep(
                lm, tokenizer, task, settings
            )
        except InputError as error:
            reasons_by_task[task_index] = str(error)
    partial_results = PartialResults(folder)
    if folder is not None:
        inputs = _study_inputs(tasks, sweeps_by_task, reasons_by_task)
        partial_results.read(_study_fingerprint(lm, inputs, answer_tokens, settings))
    _compute_curves(
        lm, sweeps_by_task, answer_tokens, settings, partial_results, progress_label
    )
    records: list[dict[str, Any]] = []
    for task_index, task in enumerate(tasks):
        record = {
            "index": task_index,
            "prompt": task.prompt,
            "about": dict(task.fields),
        }
        if task_index in reasons_by_task:
            record["failed"] = reasons_by_task[task_index]
        else:
            record["curves"] = partial_results.curves_by_task[task_index]
        records.append(record)
    return records


def _compute_curves(
    lm: clm.LanguageModel,
    sweeps_by_task: Mapping[int, prompt_sweeps.PromptSweep],
    answer_tokens: Mapping[str, Sequence[int]],
    settings: SweepSettings,
    partial_results: "PartialResults",
    progress_label: str,
) -> None:
    """Run the sets of prompts that are not in the partial results, and add them."""
    runnable_tasks = list(sweeps_by_task)
    sweeps = [prompt_sweep.sweep for prompt_sweep in sweeps_by_task.values()]
    groups = list(answer_tokens.values())
    sweep_groups = clm.sweep.group_by_program(lm, sweeps, settings.batch_size)
    for indices in tqdm.tqdm(sweep_groups, desc=progress_label, unit="batch"):
        task_indices = [runnable_tasks[i] for i in indices]
        if partial_results.curves_by_task.keys() >= set(task_indices):
            continue
        group_sweeps = [sweeps[i] for i in indices]
        group_probabilities = prompt_sweeps.run_group(
            lm, groups, group_sweeps, settings.batch_size, settings.pmap
        )
        new_curves = {}
        for task_index, probabilities in zip(
            task_indices, group_probabilities, strict=True
        ):
            curves = answer_curves.Curves(
                settings.points, tuple(answer_tokens), probabilities
            )
            new_curves[task_index] = curves.as_json()
        partial_results.add(new_curves)


# --- Stopped and resumed ----------------------------------------------------------------------


class PartialResults:
    """The curves of the prompts that have been run, and the file that holds them meanwhile.

    Attributes:
      curves_by_task: index of a task -> its curves, as JSON.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._path = None if folder is None else folder / PARTIAL_RESULTS_FILE
        self.curves_by_task: dict[int, dict[str, Any]] = {}

    def read(self, fingerprint: str) -> None:
        """Read the results of an earlier run; process 0 sends them to all processes."""
        stored_results: list[tuple[int, dict[str, Any]]] = []
        if self._path is not None and processes.is_first_process():
            stored_results = list(_read_partial_results(self._path, fingerprint))
        self.curves_by_task |= dict(processes.broadcast_from_first(stored_results))

    def add(self, new_curves: Mapping[int, dict[str, Any]]) -> None:
        """Add the curves of a set of prompts; process 0 writes them."""
        if self._path is not None and processes.is_first_process():
            lines = [[task_index, curves] for task_index, curves in new_curves.items()]
            _append_lines(self._path, lines)
        self.curves_by_task |= new_curves


def _study_inputs(
    tasks: Sequence[datasets.Task],
    sweeps_by_task: Mapping[int, prompt_sweeps.PromptSweep],
    reasons_by_task: Mapping[int, str],
) -> list[Any]:
    """The prompts of a study and the tokens that the model reads, as JSON."""
    task_fields = [
        [task.prompt, dict(task.fields), task.character_span, task.phrases]
        for task in tasks
    ]
    token_names = {i: sweep.token_names for i, sweep in sweeps_by_task.items()}
    names_or_reasons = token_names | dict(reasons_by_task)
    return [task_fields, [names_or_reasons[i] for i in range(len(tasks))]]


def _study_fingerprint(
    lm: clm.LanguageModel,
    inputs: list[Any],
    answer_tokens: Mapping[str, Sequence[int]],
    settings: SweepSettings,
) -> str:
    """Return the properties that a resumed study must share: data, sweeps, device and model."""
    sweep_settings = [
        *inputs,
        dict(answer_tokens),
        settings.points.tolist(),
        settings.batch_size,
        settings.change,
        settings.path,
    ]
    run_settings = [
        sweep_settings,
        repr(lm.config),
        jax.__version__,
        jax.devices()[0].device_kind,
    ]
    parameter_samples = []
    for parameter in jax.tree.leaves(lm.params):
        # Entries from all layers, which are stacked: not the first ones only.
        stride = -(-parameter.size // NUM_FINGERPRINT_ENTRIES)
        entries = processes.gather_to_hosts(parameter.reshape(-1)[::stride])
        parameter_samples.append(
            (parameter.shape, str(parameter.dtype), entries.tobytes().hex())
        )
    fingerprinted = json.dumps([run_settings, parameter_samples])
    return hashlib.sha256(fingerprinted.encode()).hexdigest()


def _read_partial_results(
    path: pathlib.Path, fingerprint: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the results of an earlier run of the same study.

    An incomplete last line is removed, and an unreadable line is skipped. Their prompts are
    computed again.
    """
    with _explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        fingerprint_line = _encode_line(fingerprint)
        if len(content) < len(fingerprint_line) and fingerprint_line.startswith(
            content
        ):  # cut off in its first line
            path.write_bytes(b"")
            _append_lines(path, [fingerprint])
            return
        if not content.startswith(fingerprint_line):
            raise InputError(
                f"{path} is of another study, model or sweep; choose another folder, or remove it"
            )
        complete_lines = content[: content.rfind(b"\n") + 1]
        if len(complete_lines) < len(content):
            os.truncate(path, len(complete_lines))
    for line in complete_lines[len(fingerprint_line) :].splitlines():
        try:
            task_index, stored_curves = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if type(task_index) is int and isinstance(stored_curves, dict):
            yield task_index, stored_curves


def _encode_line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _append_lines(path: pathlib.Path, lines: Sequence[Any]) -> None:
    """Add lines, and wait until they are on the disk."""
    with _explain_write_errors(path), path.open("ab") as file:
        file.write(b"".join(map(_encode_line, lines)))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _explain_write_errors(path: pathlib.Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names the file, for example for a full disk."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror or error}; make room, or choose another"
            " folder"
        ) from error


# --- Program ----------------------------------------------------------------------------------


def compute(
    config: Config,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    folder: pathlib.Path | None,
) -> Result:
    """Run the study, or resume it from the folder, and write it."""
    if config.data is None:
        tasks = datasets.generate_tasks(config.study)
    else:
        tasks = datasets.read_tasks(config.study, pathlib.Path(config.data))
    answer_tokens = answer_curves.find_answer_tokens(
        tokenizer, study_answers(config.study, config.is_bundled), config.answer_tokens
    )
    records = run_study(
        folder,
        lm,
        tokenizer,
        tasks[: config.limit],
        answer_tokens,
        config.sweep_settings(),
        progress_label=config.study,
    )
    result = Result(config.study, config.model_name, tuple(records))
    if folder is not None:
        result.write(config, folder)
    return result


def run(config: Config) -> Result:
    """Load the model, run the study, and write its records."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    return compute(config, lm, tokenizer, folder)


if __name__ == "__main__":
    program.main(Config, run)
