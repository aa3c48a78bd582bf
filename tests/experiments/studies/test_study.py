"""Studies: stored results equal the model's, also after a stop."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.common import answer_curves
from continuous_lm.experiments.studies import datasets, study
from tests.fixtures import tiny
from tests.fixtures.programs import ENVIRONMENT, call_program

PROGRAM = "study"
POINTS = np.linspace(0.1, 1.0, 5)
DIGITS = clm.tokenization.DIGITS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of the small language, of one layer: compiling is what takes time here."""
    model = tmp_path_factory.mktemp("model")
    return tiny.save(model, tokenizer=prompts.make_tokenizer(), num_hidden_layers=1)


@pytest.fixture(scope="module")
def lm(folder):
    return clm.load(folder)


def tracked(lm, name="counting"):
    answers = ("yes", "no") if name == "words" else DIGITS
    return answer_curves.find_answer_tokens(lm.tokenizer, answers, "exact")


def studied(folder, lm, name="counting", tasks=None, points=POINTS, change="both"):
    """`study.run_study` with sets of two prompts, so that there is something to stop between."""
    tasks = datasets.generate_tasks(name)[:8] if tasks is None else tasks
    settings = study.SweepSettings(points, change, batch_size=10)
    return study.run_study(folder, lm, lm.tokenizer, tasks, tracked(lm, name), settings)


@pytest.fixture(scope="module")
def full(lm, tmp_path_factory):
    """The records of a run that nobody stopped, and the file it wrote on its way."""
    folder = tmp_path_factory.mktemp("whole")
    records = studied(folder, lm)
    return records, (folder / study.PARTIAL_RESULTS_FILE).read_bytes()


def compute_one(lm, name, task, points, change="both"):
    """Compute one prompt by itself."""
    settings = study.SweepSettings(points, change)
    prompt_sweep = study.make_prompt_sweep(lm, lm.tokenizer, task, settings)
    groups = list(tracked(lm, name).values())
    return clm.sweep.probabilities(
        lm, groups, **prompt_sweep.sweep.make_inputs()._asdict()
    )


# --- Numbers ----------------------------------------------------------------------------------


KILLS = 20
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tutorials", "sums")]


@pytest.mark.parametrize("name", ["counting", "words", *SLOW])
def test_records_are_what_the_model_says_prompt_by_prompt(tmp_path, lm, name):
    tasks = datasets.generate_tasks(name)[: 2 if name in ("counting", "words") else 5]
    points = np.linspace(0.0, 1.0, 5) if name == "words" else POINTS
    records = studied(tmp_path, lm, name, tasks, points)
    assert [record["index"] for record in records] == list(range(len(tasks)))
    for task, record in zip(tasks, records, strict=True):
        assert record["prompt"] == task.prompt
        assert record["about"] == task.fields
        assert record["curves"]["points"] == points.tolist()
        stored = np.array(list(record["curves"]["probabilities"].values())).T
        np.testing.assert_allclose(
            stored, compute_one(lm, name, task, points), rtol=0, atol=1e-6
        )


def test_what_is_varied_is_what_was_asked(tmp_path, lm):
    """Three settings give different numbers, and none resumes another's results."""
    tasks, actual = datasets.generate_tasks("counting")[:2], {}
    for change in ("both", "mass", "times"):
        (record, _) = studied(tmp_path / change, lm, tasks=tasks, change=change)
        actual[change] = np.array(list(record["curves"]["probabilities"].values())).T
        np.testing.assert_allclose(
            actual[change],
            compute_one(lm, "counting", tasks[0], POINTS, change),
            0,
            1e-6,
        )
    assert np.abs(actual["both"] - actual["mass"]).max() > 1e-4
    assert np.abs(actual["both"] - actual["times"]).max() > 1e-4
    with pytest.raises(clm.InputError, match="another study"):
        studied(tmp_path / "mass", lm, tasks=tasks)


def test_prompts_that_cannot_be_run_are_kept_with_their_reason(tmp_path, lm):
    good = datasets.generate_tasks("counting")[:3]
    strange = [
        task
        for word in ("zeppelin", "\ud800")  # a lone surrogate is valid in JSON
        for task in datasets.make_tasks(
            "counting", dict(good[0].fields) | {"word": word}
        )
    ]
    records = studied(tmp_path, lm, tasks=[good[0], *strange, *good[1:]])
    assert [i for i, record in enumerate(records) if "failed" in record] == [1, 2]
    assert "'zeppelin'" in records[1]["failed"]
    assert "curves" not in records[1]
    alone = studied(tmp_path / "alone", lm, tasks=good)
    for record, other in zip([records[0], *records[3:]], alone, strict=True):
        first, second = (r["curves"]["probabilities"]["3"] for r in (record, other))
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


def test_a_study_of_which_nothing_can_be_run(tmp_path, lm):
    record = {"word": "zeppelin", "category": "x", "category_with_article": "an x"}
    tasks = datasets.make_tasks("counting", record | {"repetitions": 2})
    (record,) = studied(tmp_path, lm, tasks=tasks)
    assert "'zeppelin'" in record["failed"]
    assert record["index"] == 0


def test_a_study_without_a_folder_writes_nothing(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    result = study.run(study.Config(model=folder, limit=2, points=5))
    assert not list(tmp_path.iterdir())
    written = study.run(
        study.Config(model=folder, limit=2, points=5, output_dir=tmp_path / "out")
    )
    assert result.records == written.records
    assert json.loads((tmp_path / "out" / "study.json").read_text())["records"] == list(
        result.records
    )


# --- Stopped and resumed ----------------------------------------------------------------------


def partial(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / study.PARTIAL_RESULTS_FILE).write_bytes(content)
    return folder


def cuts(content):
    """Bytes after which a file may end: in its first line, around and within others, at random."""
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    around = [end + shift for end in (ends[0], ends[3]) for shift in (-1, 0, 1)]
    samples = random.Random(0).sample(range(ends[0], len(content)), 8)
    return [0, 1, ends[0] // 2, *around, *samples, len(content) - 1, len(content)]


def test_a_file_cut_anywhere_is_resumed_to_the_same_bits(tmp_path, lm, full):
    records, content = full
    for cut in cuts(content):
        folder = partial(tmp_path / str(cut), content[:cut])
        assert studied(folder, lm) == records, cut
        assert studied(folder, lm) == records, cut  # its own results are read again too


def test_what_is_there_is_not_computed_again(tmp_path, lm, full, monkeypatch):
    records, content = full
    calls, run_group = [], clm.sweep.run_group

    def watched(*arguments):
        calls.append(len(arguments[2]))
        return run_group(*arguments)

    monkeypatch.setattr(clm.sweep, "run_group", watched)
    assert studied(partial(tmp_path / "all", content), lm) == records
    assert not calls
    lines = content.splitlines(keepends=True)
    assert studied(partial(tmp_path / "three", b"".join(lines[:4])), lm) == records
    assert sum(calls) == len(records) - 2  # of a set of two, one alone is no result


BROKEN = {
    "no JSON": b"[3, {broken\n",
    "another type": b"17\n",
    "an empty line": b"\n",
    "no number": b'["3", {}]\n',
    "no values": b"[3, 4]\n",
    "too short": b"[3]\n",
    "zeros of a disk": b"\0" * 50 + b"\n",
    "not text": b"\xff\xfe\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_line_that_cannot_be_read_is_computed_again(tmp_path, lm, full, case):
    records, content = full
    lines = content.splitlines(keepends=True)
    lines[3] = BROKEN[case]
    assert studied(partial(tmp_path, b"".join(lines)), lm) == records


@pytest.mark.parametrize(
    "damage", [b"mine", b"mine\n", b'"mine"\n', b"\0\0", b"{}\n[]\n"]
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, lm, damage):
    partial(tmp_path, damage)
    with pytest.raises(clm.InputError, match=study.PARTIAL_RESULTS_FILE):
        studied(tmp_path, lm)
    assert (tmp_path / study.PARTIAL_RESULTS_FILE).read_bytes() == damage


def retrained(lm, folder):
    other = tiny.save(
        folder / "other", seed=1, tokenizer=lm.tokenizer, num_hidden_layers=1
    )
    return clm.load(other)


CHANGES = {
    "study": lambda lm, _: {"lm": lm, "name": "tutorials"},
    "model": lambda lm, folder: {"lm": retrained(lm, folder)},
    "data": lambda lm, _: {"lm": lm, "tasks": datasets.generate_tasks("counting")[1:9]},
    "number of prompts": lambda lm, _: {
        "lm": lm,
        "tasks": datasets.generate_tasks("counting")[:7],
    },
    "points": lambda lm, _: {"lm": lm, "points": np.linspace(0.2, 1.0, 5)},
}


@pytest.mark.parametrize("case", CHANGES)
def test_results_of_something_else_are_refused(tmp_path, lm, full, case):
    _, content = full
    partial(tmp_path, content)
    with pytest.raises(
        clm.InputError,
        match=f"{tmp_path}/{study.PARTIAL_RESULTS_FILE} is of another study",
    ):
        studied(tmp_path, **CHANGES[case](lm, tmp_path))
    assert (tmp_path / study.PARTIAL_RESULTS_FILE).read_bytes() == content


def test_partial_results_that_cannot_be_read_or_written(tmp_path, lm):
    (tmp_path / "folder" / study.PARTIAL_RESULTS_FILE).mkdir(parents=True)
    with pytest.raises(
        clm.InputError, match=f"cannot write to .*{study.PARTIAL_RESULTS_FILE}"
    ):
        studied(tmp_path / "folder", lm)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(clm.InputError, match="cannot write to"):
        studied(tmp_path / "file" / "below", lm)


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no /dev/full here"
)
def test_a_disk_that_is_full(tmp_path, lm):
    (tmp_path / study.PARTIAL_RESULTS_FILE).symlink_to("/dev/full")
    with pytest.raises(
        clm.InputError, match=f"cannot write to .*{study.PARTIAL_RESULTS_FILE}"
    ):
        study._append_lines(tmp_path / study.PARTIAL_RESULTS_FILE, ["key"])


# --- The program ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder):
    """The program on the random model, as the command line runs it."""

    def run(cwd, *arguments):
        return call_program(cwd, PROGRAM, f"--model={folder}", *arguments)

    return run


def assert_refused(outcome, *culprits):
    status, stdout, stderr = outcome
    assert status != 0
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: ")
    for culprit in culprits:
        assert culprit in stderr.splitlines()[-1]


def stored(folder):
    """study.json without the time and place of the run."""
    values = json.loads((folder / "study.json").read_text())
    values["run"].pop("date")
    values["run"]["flags"].pop("output_dir")
    return values


def test_the_program_writes_one_file_with_so_many_prompts(run, tmp_path, lm):
    data = tmp_path / "data.json"
    records = [dict(task.fields) for task in datasets.generate_tasks("counting")[:4]]
    records.insert(1, records[0] | {"word": "zeppelin"})
    data.write_text(json.dumps(records))
    status, stdout, stderr = run(
        tmp_path, f"--data={data}", "--limit=3", "--points=5", "--output_dir=out"
    )
    assert status == 0, stderr
    assert "3 prompts, of which 1 could not be run" in stdout
    assert "'zeppelin'" in stdout
    assert os.listdir(tmp_path / "out") == ["study.json"]  # the partial file goes
    values = stored(tmp_path / "out")
    assert values["study"] == "counting"
    assert [record["about"]["word"] for record in values["records"]] == [
        record["word"] for record in records[:3]
    ]
    assert ["failed" in record for record in values["records"]] == [False, True, False]
    curve = values["records"][0]["curves"]
    task = datasets.generate_tasks("counting")[0]
    assert values["records"][0]["prompt"] == task.prompt
    actual = np.array([curve["probabilities"][digit] for digit in DIGITS]).T
    np.testing.assert_allclose(
        actual, compute_one(lm, "counting", task, POINTS), rtol=0, atol=1e-6
    )


def test_folders_and_flags_that_cannot_be_used(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(
        run(tmp_path, "--output_dir=file/out"), "cannot write to", "file/out"
    )
    assert_refused(run(tmp_path, "--limit=0", "--output_dir=out"), "limit")
    partial(tmp_path / "other", b'"another key"\n')
    outcome = run(tmp_path, "--output_dir=other", "--limit=1", "--points=2")
    assert_refused(outcome, f"other/{study.PARTIAL_RESULTS_FILE}", "another study")
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]
    assert os.listdir(tmp_path / "other") == [study.PARTIAL_RESULTS_FILE]


# One server process imports everything, and each job is a fork that may be killed. In a fork every
# write is slow and reaches the disk in two halves.
_KILLER = """
import json, os, runpy, signal, sys, time
from continuous_lm.experiments.studies import study

def slowly(path, lines):
    text = b"".join(json.dumps(line).encode() + b"\\n" for line in lines)
    for half in (text[: len(text) // 2], text[len(text) // 2 :]):
        with open(path, "ab") as file:
            file.write(half)
        time.sleep(0.15)

study._append_lines = slowly
for line in sys.stdin:
    seconds, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        study.run(study.program.parse(study.Config, "study", arguments))
        os._exit(0)
    begin, ended = time.monotonic(), 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and seconds is not None and time.monotonic() > begin + seconds:
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        time.sleep(0.005)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - begin]), flush=True)
"""


@pytest.fixture
def killed(folder):
    """A function (output folder, seconds or None) -> exit status, seconds it lived."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _KILLER],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(output, seconds):
        flags = [
            f"--model={folder}",
            f"--output_dir={output}",
            "--limit=8",
            "--points=100",
        ]
        server.stdin.write(json.dumps([seconds, *flags]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    with server:
        yield call
        server.stdin.close()


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(killed, tmp_path):
    status, life = killed(tmp_path / "whole", None)
    assert status == 0
    rng = random.Random(time.time_ns())
    expected, kills, partly = stored(tmp_path / "whole"), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"after_{kills}"
        status, _ = killed(folder, rng.uniform(0, life))
        while status != 0:
            assert status == -9  # killed, and not ended by an error of its own
            kills += 1
            left = folder / study.PARTIAL_RESULTS_FILE
            partly += left.exists() and left.read_bytes().count(b"\n") > 1
            status, _ = killed(folder, rng.uniform(life / 2, 3 * life))
        assert stored(folder) == expected, kills
        assert not (folder / study.PARTIAL_RESULTS_FILE).exists()
    assert partly  # some were stopped amid their results


def test_the_fingerprint_sees_every_layer(tmp_path):
    lm = clm.load(tiny.save(tmp_path, num_hidden_layers=4))

    def fingerprint(lm):
        settings = study.SweepSettings(np.linspace(0.1, 1.0, 3))
        return study._study_fingerprint(lm, [], {"1": [1]}, settings)

    for layer in range(4):
        queries = lm.params["layers"]["attention"]["q"]
        other_queries = queries.at[layer].multiply(1.5)
        layers = lm.params["layers"]
        attention = layers["attention"] | {"q": other_queries}
        params = lm.params | {"layers": layers | {"attention": attention}}
        assert fingerprint(lm.with_params(params)) != fingerprint(lm)
