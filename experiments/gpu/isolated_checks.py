"""Checks of a machine's numbers as rows, and sections of checks in separate processes.

A failed check becomes a row, and the next check runs. A section is a separate process with a time
limit. If it hangs or crashes, only its own rows are missing.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import pathlib
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax

from continuous_lm.experiments.benchmarks.timing import Row, Target, format_quantity

OK, FAILED, MISSED = "ok", "FAILED", "missed"
MEASURED, UNSUPPORTED, NOT_RUN = "measured", "not supported", "not run"


@dataclasses.dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
      what: name of the check or measurement.
      verdict: one of those above; a speed below its target is `MISSED`, a wrong number `FAILED`.
      value: the error, the time or another measurement; None if there is none.
      unit: unit of the value.
      target: the tolerance or the target speed, as text.
      note: a remark, or the reason for a missing value.
    """

    what: str
    verdict: str
    value: float | None = None
    unit: str = ""
    target: str = ""
    note: str = ""


def check_against_target(
    what: str, value: float, target: Target, unit: str = "", note: str = ""
) -> Check:
    """The row of a number that must meet its target; one that is not finite never does."""
    if not math.isfinite(value):
        return Check(
            what, FAILED, None, unit, str(target), f"it is {value}; {note}".rstrip("; ")
        )
    return Check(
        what, OK if target.is_met(value) else FAILED, value, unit, str(target), note
    )


def check_from_row(row: Row) -> Check:
    """A row of the benchmark."""
    verdict = {True: OK, False: MISSED, None: MEASURED}[row.is_met]
    target = "" if row.target is None else str(row.target)
    if row.value is None:
        verdict = NOT_RUN
    sides = [
        f"{side} {format_quantity(value, row.unit)}"
        for side, value in (("ours", row.ours), ("theirs", row.theirs))
        if value is not None
    ]
    note = ", ".join(text for text in (*sides, row.note) if text)
    return Check(row.what, verdict, row.value, target=target, note=note)


def run_guarded(what: str, make: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The rows that `make` gives; if it raises, a row in place of those that are missing."""
    try:
        yield from make()
    except Exception as error:  # noqa: BLE001 (a failed check is a row)
        traceback.print_exc()
        yield Check(what, FAILED, note=one_line(error))


def one_line(error: BaseException) -> str:
    """Return the error's type and the first 300 characters of its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- In a process of its own --------------------------------------------------------------------


def run_in_process(
    section: Callable[[bool], Iterable[Any]],
    tiny: bool,
    seconds: float,
    log: pathlib.Path,
) -> Iterator[Any]:
    """The items of `section(tiny)`, one by one, made in a new process.

    If it raises, crashes or takes longer than `seconds`, a failed `Check` comes last.

    Args:
      section: a function of a module.
      tiny: for it.
      seconds: until the process is killed, with those that it has started.
      log: file for all that it prints.
    """
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    process = context.Process(
        target=_run_in_child, args=(sender, section, tiny, log, cache)
    )
    process.start()
    sender.close()
    grace = 5.0  # in which a process may end by itself
    try:
        while receiver.poll(max(0.0, begin + seconds - time.monotonic())):
            item = receiver.recv()
            if item is None:
                return
            yield item
        grace = 0.0
        why = f"stopped after {seconds:.0f} s; what it had not come to was not run"
        yield Check("all of it", FAILED, note=why)
    except EOFError:
        process.join(grace)
        yield Check(
            "all of it",
            FAILED,
            note=f"{_describe_exit(process.exitcode)}; see {log.name}",
        )
    finally:
        receiver.close()
        process.join(grace)
        if process.is_alive() and process.pid is not None:
            for kill in (os.killpg, os.kill):  # it may not lead a group yet
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(process.pid, signal.SIGKILL)
            process.join(5.0)


def _describe_exit(status: int | None) -> str:
    """Describe the exit status of a process."""
    if status is not None and status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def _run_in_child(
    pipe: Connection,
    section: Callable[[bool], Iterable[Any]],
    tiny: bool,
    log: pathlib.Path,
    cache: str | None,
) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
    for item in run_guarded("all of it", lambda: section(tiny)):
        pipe.send(item)
    pipe.send(None)
