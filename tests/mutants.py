"""Small defects put into the code one at a time, to see which of them the fast tests notice.

    python -m tests.mutants [--only=ID,ID] [--workers=2] [--record]

The table of defects is mutants.toml. Each is made in a copy of the tree, where the tests run that
should fail. It is killed if one of them fails; tests that cannot run, or do not end, kill nothing.
The number killed must not fall below the one in mutants_killed.json, which --record writes unless
it would fall.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures

ROOT = pathlib.Path(__file__).parents[1]
TABLE = pathlib.Path(__file__).with_name("mutants.toml")
RECORD = pathlib.Path(__file__).with_name("mutants_killed.json")
TIMEOUT = 600  # seconds for the tests of one mutant
OPTIONS = [
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "-m",
    "not slow",
    "--hypothesis-seed=0",
]
STATUS = {
    0: "survived",
    1: "killed",
}  # by pytest's exit status; all others: it could not test


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A defect: in `file`, `text` becomes `replacement`, at which one of `tests` should fail."""

    id: str
    file: str  # from the root of the repository
    text: str  # occurs once in it
    replacement: str
    tests: Sequence[str]  # files, or file::test; those that are slow do not run

    def made_in(self, source: str) -> str:
        """The file's source with the defect in it, however its lines are broken."""
        tokens = re.findall(r"\w+|\S", self.text)
        pattern = ""
        for token in tokens:
            trailing_comma = ",?" if token in ")]}" else ""
            pattern += rf"{trailing_comma}\s*{re.escape(token)}"
        places = list(re.finditer(pattern.removeprefix(r"\s*"), source))
        if len(places) != 1:
            raise ValueError(f"{self.id}: its text is {len(places)} times in the file")
        return (
            source[: places[0].start()] + self.replacement + source[places[0].end() :]
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Result of a run of tests."""

    status: str  # killed, survived, error or timeout
    seconds: float
    failed: str  # the first test that did
    output: str


def read_table() -> list[Mutant]:
    """All mutants."""
    return [Mutant(**row) for row in tomllib.loads(TABLE.read_text())["mutant"]]


class Trees:
    """Copies of the tree, one for each worker; when it is left, what runs ends and they go."""

    def __init__(self, workers: int):
        self._folder = tempfile.TemporaryDirectory(
            prefix="mutants-", ignore_cleanup_errors=True
        )
        self._pool = futures.ThreadPoolExecutor(workers)
        self._free: queue.Queue[pathlib.Path] = queue.Queue()
        self._running: set[subprocess.Popen] = set()
        self._lock, self._left = threading.Lock(), False
        for i in range(workers):
            self._free.put(copy_tree(pathlib.Path(self._folder.name, f"tree-{i}")))

    def __enter__(self) -> "Trees":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._left = True
            for process in self._running:
                kill(process)
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def runs(self, jobs: Mapping[str, tuple[Sequence[str], Mutant | None]]) -> Iterator:
        """Name and `Run` of each job, which is tests and the mutant to make, as they end."""
        names = {self._pool.submit(self._run, *job): name for name, job in jobs.items()}
        for done in futures.as_completed(names):
            yield names[done], done.result()

    def _run(self, tests: Sequence[str], mutant: Mutant | None) -> Run:
        tree, begin = self._free.get(), time.monotonic()
        try:
            with changed(tree, mutant) if mutant else contextlib.nullcontext():
                code, output = self._pytest(tree, tests)
        finally:
            shutil.rmtree(
                tree / ".hypothesis", ignore_errors=True
            )  # examples that failed
            self._free.put(tree)
        status = "timeout" if code is None else STATUS.get(code, "error")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return Run(
            status, time.monotonic() - begin, failed[1] if failed else "", output
        )

    def _pytest(
        self, tree: pathlib.Path, tests: Sequence[str]
    ) -> tuple[int | None, str]:
        """Exit status, None if it took too long, and output."""
        with self._lock:
            if self._left:
                return None, ""
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *OPTIONS, *tests],
                cwd=tree,
                env=environment(tree),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # so that what tests start ends with them
            )
            self._running.add(process)
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            kill(process)
            return None, process.communicate()[0]
        finally:
            with self._lock:
                self._running.remove(process)


@contextlib.contextmanager
def changed(tree: pathlib.Path, mutant: Mutant) -> Iterator[None]:
    """Makes a defect, and takes it out again."""
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(mutant.made_in(source))
    try:
        yield
    finally:
        path.write_text(source)


def copy_tree(target: pathlib.Path) -> pathlib.Path:
    """Copies what git knows or would add; links stay links."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listed, cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in names.split("\0")[:-1]:
        if os.path.lexists(ROOT / name):  # else it is deleted, but not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def environment(tree: pathlib.Path) -> dict[str, str]:
    """Return the environment of the tests: the copied tree, fast compilation, no caches."""
    flags = ["--xla_backend_optimization_level=0"]
    if sys.version_info < (3, 12):
        flags.append("--xla_cpu_use_fusion_emitters=false")
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    scratch = tree.with_name(f"{tree.name}-scratch")
    scratch.mkdir(exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(tree),
        # Their clock is too coarse for files that change and return.
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(scratch),
        "XLA_FLAGS": " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip(),
    }


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def by_file(mutants: Sequence[Mutant]) -> dict[str, tuple[list[str], None]]:
    """Their tests as jobs without a defect, one for each file of tests."""
    actual = collections.defaultdict(list)
    for test in sorted({test for mutant in mutants for test in mutant.tests}):
        actual[test.split("::")[0]].append(test)
    return {file: (tests, None) for file, tests in actual.items()}


def worse_than_recorded(survivors: Sequence[str], tried: int, total: int) -> str:
    """Describe a lower number of kills, or new survivors among some; "" if neither."""
    if not RECORD.exists():
        return ""
    record = json.loads(RECORD.read_text())
    if tried == total:
        fewer = tried - len(survivors) < record["killed"]
        return f"that is fewer than the {record['killed']} recorded" if fewer else ""
    new = set(survivors) - set(record["survivors"])
    return f"recorded as killed: {', '.join(sorted(new))}" if new else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what became of the mutants; 1 if fewer are killed than recorded, 2 if tests fail."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__
    )
    parser.add_argument(
        "--only", default="", help="ids of mutants, with commas; all if left out"
    )
    parser.add_argument("--workers", type=int, default=2, help="how many run at once")
    parser.add_argument(
        "--record", action="store_true", help="write down the number killed"
    )
    parser.add_argument(
        "--output", default="results/mutants.json", help="file for the results"
    )
    options = parser.parse_args(arguments)
    table = read_table()
    request = (
        options.only.split(",") if options.only else [mutant.id for mutant in table]
    )
    mutants = [mutant for mutant in table if mutant.id in request]
    if unknown := set(request) - {mutant.id for mutant in mutants}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    if options.record and options.only:
        parser.error("--record needs all mutants, so it does not go with --only")

    actual: dict[str, Run] = {}
    with Trees(options.workers) as trees:
        for file, run in trees.runs(by_file(mutants)):
            print(f"without a defect: {file}, {run.seconds:.0f} s", flush=True)
            if run.status != "survived":
                print(f"{run.output}\n{file} fails without a defect")
                return 2
        files = {mutant.id: mutant.file for mutant in mutants}
        for name, run in trees.runs(
            {mutant.id: (mutant.tests, mutant) for mutant in mutants}
        ):
            actual[name] = run
            columns = (
                f"{name:36}",
                f"{files[name]:39}",
                f"{run.status:8}",
                f"{run.seconds:3.0f} s",
            )
            print(*columns, run.failed, sep=" | ", flush=True)

    rows = [
        {"id": m.id, "file": m.file, **dataclasses.asdict(actual[m.id])}
        for m in mutants
    ]
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, rows)
    survivors = [row["id"] for row in rows if row["status"] != "killed"]
    killed = len(rows) - len(survivors)
    print(f"killed {killed} of {len(rows)}; others: {', '.join(survivors) or 'none'}")
    if worse := worse_than_recorded(survivors, len(rows), len(table)):
        print(worse)
        return 1
    if options.record:
        write(RECORD, {"killed": killed, "of": len(rows), "survivors": survivors})
    return 0


def write(path: pathlib.Path, values: object) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that copies go then, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
