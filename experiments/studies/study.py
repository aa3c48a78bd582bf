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
from continuous_lm.experiments.common import answer_curves, pretrained, program
from continuous_lm.experiments.durations import interpolation, prompt_sweeps, single_prompt
from continuous_lm.experiments.studies import datasets
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

PARTIAL = "records.jsonl"

_STUDY = flags.DEFINE_enum("study", "counting", list(datasets.STUDIES), "Which one.")
_DATA = flags.DEFINE_string("data", None, "A data file.  [default: made of the small language]")
_LIMIT = flags.DEFINE_integer("limit", 200, "At most so many prompts.", lower_bound=1)


def answers(study: str, tokenizer: tokenizers.Tokenizer, embedded: bool) -> dict[str, list[int]]:
    """What a study tracks; the embedded model gives whole sums, others their first digit."""
    if study == "words":
        return single_prompt.tracked(tokenizer, interpolation.YES_NO)
    whole = study == "sums" and embedded
    return single_prompt.tracked(tokenizer, [str(i) for i in range(19 if whole else 10)])


def trial(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    task: datasets.Task,
    points: np.ndarray,
    vary: str = "both",
    path: str = "linear",
) -> prompt_sweeps.Trial:
    """The sweep that a task asks for."""
    if task.phrases is not None:
        return prompt_sweeps.interpolating(lm, tokenizer, task.prompt, task.phrases, points, path)
    assert task.characters is not None
    return prompt_sweeps.shrinking(tokenizer, task.prompt, task.characters, points, vary)


def run(
    folder: pathlib.Path,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    tasks: Sequence[datasets.Task],
    tracked: Mapping[str, Sequence[int]],
    points: np.ndarray,
    *,
    batch_size: int = 256,
    label: str = "study",
    vary: str = "both",
    path: str = "linear",
    pmap: bool = False,
) -> list[dict[str, Any]]:
    """The records of all tasks in their order; those that `folder` has already are not run again.

    Sets of prompts are computed and written together, so that where a study was stopped changes no
    number.
    """
    made: list[prompt_sweeps.Trial | str] = []
    for task in tasks:
        try:
            made.append(trial(lm, tokenizer, task, points, vary, path))
        except InputError as error:
            made.append(str(error))
    usable = [i for i, found in enumerate(made) if isinstance(found, prompt_sweeps.Trial)]
    sweeps = [t.sweep for t in made if isinstance(t, prompt_sweeps.Trial)]
    read = [t if isinstance(t, str) else t.tokens for t in made]
    about = [[t.prompt, dict(t.about), t.characters, t.phrases] for t in tasks]
    key = _key(lm, [about, read, dict(tracked), points.tolist(), batch_size, vary, path])
    # What process 0 finds counts for all.
    found_there = list(_resume(folder / PARTIAL, key)) if processes.is_first() else []
    done = dict(processes.from_first(found_there))
    for indices in tqdm.tqdm(clm.sweep.plan(lm, sweeps, batch_size), desc=label, unit="batch"):
        numbers = [usable[i] for i in indices]
        if all(number in done for number in numbers):
            continue
        chosen = [sweeps[i] for i in indices]
        found = single_prompt.together(lm, list(tracked.values()), chosen, batch_size, pmap)
        new = {
            number: answer_curves.Curves(points, tuple(tracked), rows).as_json()
            for number, rows in zip(numbers, found, strict=True)
        }
        if processes.is_first():
            _append(folder / PARTIAL, [[number, values] for number, values in new.items()])
        done |= new
    return [
        {"index": i, "prompt": task.prompt, "about": dict(task.about)}
        | ({"failed": what} if isinstance(what, str) else {"curves": done[i]})
        for i, (task, what) in enumerate(zip(tasks, made, strict=True))
    ]


def _key(lm: clm.LanguageModel, sweeps: list) -> str:
    """What must be the same for results to belong together: data, sweeps, device, and the model."""
    said = [sweeps, repr(lm.config), jax.__version__, jax.devices()[0].device_kind]
    marks = [
        (p.shape, str(p.dtype), processes.fetch(p.reshape(-1)[:4096]).tobytes().hex())
        for p in jax.tree.leaves(lm.params)
    ]
    return hashlib.sha256(json.dumps([said, marks]).encode()).hexdigest()


def _resume(path: pathlib.Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """What an earlier run of the same study has written.

    A line that was cut off is taken away, one that cannot be read passed over: what it held is
    computed again.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        first = _line(key)
        if len(content) < len(first) and first.startswith(content):  # cut off in its first line
            path.write_bytes(b"")
            _append(path, [key])
            return
        if not content.startswith(first):
            raise InputError(
                f"{path} is of another study, model or sweep; choose another folder, or remove it"
            )
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    for line in whole[len(first) :].splitlines():
        try:
            number, values = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if type(number) is int and isinstance(values, dict):
            yield number, values


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _append(path: pathlib.Path, lines: Sequence[Any]) -> None:
    """Adds lines, and waits until they are on the disk."""
    with _writing(path), open(path, "ab") as file:
        file.write(b"".join(map(_line, lines)))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Says what could not be written: a full disk ends a study with one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror or error}; make room, or choose another"
            " folder"
        ) from error


def write(folder: pathlib.Path, study: str, model: str, records: Sequence[Mapping]) -> None:
    """study.json, whole; the partial ones go. Process 0 alone writes."""
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        values = {"study": study, "model": model, "records": list(records)}
        write_json(aside / "study.json", values | {"run": program.record()})
    (folder / PARTIAL).unlink(missing_ok=True)


def main() -> None:
    """Data, sweeps, file."""
    study = _STUDY.value
    folder = program.output_dir(f"study/{study}")
    tasks = datasets.read(study, pathlib.Path(_DATA.value)) if _DATA.value else datasets.made(study)
    lm, tokenizer = pretrained.load()
    tracked = answers(study, tokenizer, pretrained.is_bundled())
    points = single_prompt.points(0.0 if study == "words" else None)
    records = run(
        folder,
        lm,
        tokenizer,
        tasks[: _LIMIT.value],
        tracked,
        points,
        label=study,
        vary=single_prompt.vary(),
        path=single_prompt.path(),
        pmap=program.pmap(),
    )
    write(folder, study, pretrained.name(), records)
    if not processes.is_first():
        return
    failed = [record for record in records if "failed" in record]
    print(f"{len(records)} prompts, of which {len(failed)} could not be run")
    for reason in sorted({record["failed"] for record in failed})[:5]:
        print(f"  {reason}")
    print(f"{folder}/study.json")


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
