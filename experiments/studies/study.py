"""A study: one experiment on a whole data set, batched across prompts, stopped and resumed at will.

    python -m continuous_lm study --study=counting [--model=FOLDER] [--data=FILE]

counting    200 prompts of a word repeated 2 to 6 times, which shrinks
tutorials   200 how-to tutorials, whose steps shrink
sums        200 sums, of which one number shrinks
words       50 pairs of words that turn into each other, with four yes/no questions each

By default the data set is made of the small language of the embedded model; --data reads a file in
the paper's format (see `datasets`). A prompt that cannot be run is kept with its reason. Results
are written as they come, to records.jsonl; a study that was stopped goes on from there, and
study.json holds them all in the end, for `analysis`.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
import tqdm
from absl import flags

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.experiments.common import (
    absl_pretrained as pretrained,
)
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.common import (
    answer_curves,
)
from continuous_lm.experiments.durations import (
    absl_single_prompt as single_prompt,
)
from continuous_lm.experiments.durations import (
    interpolation,
    prompt_sweeps,
)
from continuous_lm.experiments.studies import datasets
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

PARTIAL_RESULTS_FILE = "records.jsonl"

_STUDY = flags.DEFINE_enum("study", "counting", list(datasets.STUDIES), "Which one.")
_DATA = flags.DEFINE_string(
    "data", None, "A data file.  [default: made of the small language]"
)
_LIMIT = flags.DEFINE_integer("limit", 200, "At most so many prompts.", lower_bound=1)


def study_answer_tokens(
    study: str, tokenizer: tokenizers.Tokenizer, is_bundled: bool
) -> dict[str, list[int]]:
    """What a study tracks; the embedded model gives whole sums, others their first digit."""
    if study == "words":
        return single_prompt.find_answer_tokens(
            tokenizer, interpolation.YES_NO_SPELLINGS
        )
    is_whole_sum = study == "sums" and is_bundled
    return single_prompt.find_answer_tokens(
        tokenizer, [str(i) for i in range(19 if is_whole_sum else 10)]
    )


def make_prompt_sweep(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    task: datasets.Task,
    points: np.ndarray,
    change: str = "both",
    path: str = "linear",
) -> prompt_sweeps.PromptSweep:
    """The sweep that a task asks for."""
    if task.phrases is not None:
        return prompt_sweeps.interpolate_phrases(
            lm, tokenizer, task.prompt, task.phrases, points, path
        )
    assert task.character_span is not None
    return prompt_sweeps.shrink_span(
        tokenizer, task.prompt, task.character_span, points, change
    )


def run_study(
    folder: pathlib.Path,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    tasks: Sequence[datasets.Task],
    answer_tokens: Mapping[str, Sequence[int]],
    points: np.ndarray,
    *,
    batch_size: int = 256,
    progress_label: str = "study",
    change: str = "both",
    path: str = "linear",
    use_pmap: bool = False,
) -> list[dict[str, Any]]:
    """The records of all tasks in their order; those that `folder` has already are not run again.

    Sets of prompts are computed and written together, so that where a study was stopped changes no
    number.
    """
    sweeps_or_errors: list[prompt_sweeps.PromptSweep | str] = []
    for task in tasks:
        try:
            sweeps_or_errors.append(
                make_prompt_sweep(lm, tokenizer, task, points, change, path)
            )
        except InputError as error:
            sweeps_or_errors.append(str(error))
    runnable_tasks = [
        i
        for i, item in enumerate(sweeps_or_errors)
        if isinstance(item, prompt_sweeps.PromptSweep)
    ]
    runnable_sweeps = [
        t.sweep for t in sweeps_or_errors if isinstance(t, prompt_sweeps.PromptSweep)
    ]
    tokens_or_errors = [
        t if isinstance(t, str) else t.token_names for t in sweeps_or_errors
    ]
    task_fields = [
        [t.prompt, dict(t.fields), t.character_span, t.phrases] for t in tasks
    ]
    fingerprint = _study_fingerprint(
        lm,
        [
            task_fields,
            tokens_or_errors,
            dict(answer_tokens),
            points.tolist(),
            batch_size,
            change,
            path,
        ],
    )
    # What process 0 finds counts for all.
    stored_results = (
        list(_read_partial_results(folder / PARTIAL_RESULTS_FILE, fingerprint))
        if processes.is_first_process()
        else []
    )
    curves_by_task = dict(processes.broadcast_from_first(stored_results))
    for indices in tqdm.tqdm(
        clm.sweep.group_by_program(lm, runnable_sweeps, batch_size),
        desc=progress_label,
        unit="batch",
    ):
        task_indices = [runnable_tasks[i] for i in indices]
        if all(task_index in curves_by_task for task_index in task_indices):
            continue
        group_sweeps = [runnable_sweeps[i] for i in indices]
        probabilities = single_prompt.run_group(
            lm, list(answer_tokens.values()), group_sweeps, batch_size, use_pmap
        )
        new_curves = {
            task_index: answer_curves.Curves(
                points, tuple(answer_tokens), rows
            ).as_json()
            for task_index, rows in zip(task_indices, probabilities, strict=True)
        }
        if processes.is_first_process():
            _append_lines(
                folder / PARTIAL_RESULTS_FILE,
                [[task_index, values] for task_index, values in new_curves.items()],
            )
        curves_by_task |= new_curves
    return [
        {"index": i, "prompt": task.prompt, "about": dict(task.fields)}
        | (
            {"failed": sweep_or_error}
            if isinstance(sweep_or_error, str)
            else {"curves": curves_by_task[i]}
        )
        for i, (task, sweep_or_error) in enumerate(
            zip(tasks, sweeps_or_errors, strict=True)
        )
    ]


def _study_fingerprint(lm: clm.LanguageModel, sweep_settings: list) -> str:
    """What must be the same for results to belong together: data, sweeps, device, and the model."""
    run_settings = [
        sweep_settings,
        repr(lm.config),
        jax.__version__,
        jax.devices()[0].device_kind,
    ]
    parameter_prefixes = [
        (
            p.shape,
            str(p.dtype),
            processes.gather_to_hosts(p.reshape(-1)[:4096]).tobytes().hex(),
        )
        for p in jax.tree.leaves(lm.params)
    ]
    return hashlib.sha256(
        json.dumps([run_settings, parameter_prefixes]).encode()
    ).hexdigest()


def _read_partial_results(
    path: pathlib.Path, fingerprint: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What an earlier run of the same study has written.

    A line that was cut off is taken away, one that cannot be read passed over: what it held is
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
    """Adds lines, and waits until they are on the disk."""
    with _explain_write_errors(path), open(path, "ab") as file:
        file.write(b"".join(map(_encode_line, lines)))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _explain_write_errors(path: pathlib.Path) -> Iterator[None]:
    """Says what could not be written: a full disk ends a study with one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror or error}; make room, or choose another"
            " folder"
        ) from error


def write_study(
    folder: pathlib.Path, study: str, model: str, records: Sequence[Mapping]
) -> None:
    """study.json, whole; the partial ones go. Process 0 alone writes."""
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        study_results = {"study": study, "model": model, "records": list(records)}
        write_json(
            staging_folder / "study.json", study_results | {"run": program.record()}
        )
    (folder / PARTIAL_RESULTS_FILE).unlink(missing_ok=True)


def main() -> None:
    """Data, sweeps, file."""
    study = _STUDY.value
    folder = program.output_dir(f"study/{study}")
    tasks = (
        datasets.read_tasks(study, pathlib.Path(_DATA.value))
        if _DATA.value
        else datasets.generate_tasks(study)
    )
    lm, tokenizer = pretrained.load()
    answer_tokens = study_answer_tokens(study, tokenizer, pretrained.is_bundled())
    sweep_points = single_prompt.sweep_points(0.0 if study == "words" else None)
    records = run_study(
        folder,
        lm,
        tokenizer,
        tasks[: _LIMIT.value],
        answer_tokens,
        sweep_points,
        progress_label=study,
        change=single_prompt.duration_change(),
        path=single_prompt.path(),
        use_pmap=program.uses_pmap(),
    )
    write_study(folder, study, pretrained.model_name(), records)
    if not processes.is_first_process():
        return
    failed = [record for record in records if "failed" in record]
    print(f"{len(records)} prompts, of which {len(failed)} could not be run")
    for reason in sorted({record["failed"] for record in failed})[:5]:
        print(f"  {reason}")
    print(f"{folder}/study.json")


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
