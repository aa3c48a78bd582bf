"""Timing for the benchmark: alternatives measured in turns, and costs of a fresh process.

Speeds are ratios of two times of one round, so that other load on the machine affects both. A row
has their median, smallest and largest. OpenMP's idle threads (PyTorch's, faiss's) spin for some
milliseconds after their work and would slow the next alternative. Disabling that would slow their
small operations; instead, a pause lets them fall asleep.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import tables

PAUSE_SECONDS = 0.05  # seconds between turns


# --- Rows ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """Target of a figure: at least `minimum`, or at most `maximum`."""

    minimum: float | None = None
    maximum: float | None = None

    def is_met(self, value: float) -> bool:
        """Return whether the value is within the bounds."""
        is_above_minimum = self.minimum is None or value >= self.minimum
        return is_above_minimum and (self.maximum is None or value <= self.maximum)

    def __str__(self) -> str:
        return (
            f">= {self.minimum:.3g}"
            if self.maximum is None
            else f"<= {self.maximum:.3g}"
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a case.

    Attributes:
      what: meaning of the value, such as "times as fast as faiss".
      value: median over the rounds; None if it was not measured.
      low: smallest value of a round.
      high: largest value of a round.
      ours: median measurement of our side, in `unit`.
      theirs: median measurement of the other side, in `unit`.
      unit: unit of these two.
      target: target of the value.
      note: a remark, or the reason why nothing was measured.
    """

    what: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Return whether the target is met; None without a target or a value."""
        if self.target is None or self.value is None:
            return None
        return self.target.is_met(self.value)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the target in words."""
        target = None if self.target is None else str(self.target)
        return dataclasses.asdict(self) | {"target": target, "met": self.is_met}


def median_row(
    label: str,
    values: Sequence[float],
    *,
    ours: float | None = None,
    theirs: float | None = None,
    unit: str = "",
    target: Target | None = None,
    note: str = "",
) -> Row:
    """The row of some figures, one a round; the rest as in `Row`."""
    return Row(
        label,
        statistics.median(values),
        min(values),
        max(values),
        ours=ours,
        theirs=theirs,
        unit=unit,
        target=target,
        note=note,
    )


def speedup_row(
    label: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    minimum: float | None = None,
    note: str = "",
) -> Row:
    """The row of theirs / ours, of seconds: how many times as fast ours is, at least `minimum`."""
    ratios = [
        their_seconds / our_seconds
        for our_seconds, their_seconds in zip(ours, theirs, strict=True)
    ]
    return median_row(
        label,
        ratios,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        unit="s",
        target=None if minimum is None else Target(minimum=minimum),
        note=note,
    )


def cost_ratio_row(
    label: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    maximum: float | None = None,
    unit: str = "s",
    note: str = "",
) -> Row:
    """The row of ours / theirs, of seconds or bytes: how much more ours takes, at `maximum`."""
    ratios = [
        our_cost / their_cost for our_cost, their_cost in zip(ours, theirs, strict=True)
    ]
    return median_row(
        label,
        ratios,
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        unit=unit,
        target=None if maximum is None else Target(maximum=maximum),
        note=note,
    )


def rows_table(name: str, caption: str, rows: Sequence[Row]) -> tables.Table:
    """The rows, for people."""
    titles = (
        "figure",
        "value",
        "least to most",
        "target",
        "met",
        "ours",
        "theirs",
        "note",
    )

    def cells(row: Row) -> list[tables.Cell]:
        met_text = {None: None, True: "yes", False: "MISSED"}[row.is_met]
        spread_text = None if row.low is None else f"{row.low:.3g} to {row.high:.3g}"
        side_texts = [
            x if x is None else format_quantity(x, row.unit)
            for x in (row.ours, row.theirs)
        ]
        value_text = None if row.value is None else f"{row.value:.3g}"
        target_text = None if row.target is None else str(row.target)
        return [
            row.what,
            value_text,
            spread_text,
            target_text,
            met_text,
            *side_texts,
            row.note or None,
        ]

    return tables.Table(
        name,
        caption,
        [tables.Column(title) for title in titles],
        list(map(cells, rows)),
    )


def format_quantity(value: float, unit: str) -> str:
    """A number of seconds, bytes, ... as people write it.

    >>> format_quantity(0.0123, "s"), format_quantity(2.02e9, "B")
    ('12.3 ms', '2.02e+03 MB')
    >>> format_quantity(40.0, "tokens/s")
    '40 tokens/s'
    """
    if unit == "s" and value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value / 1e6:.3g} MB" if unit == "B" else f"{value:.3g} {unit}".strip()


# --- In this process ----------------------------------------------------------------------------


def time_call(timed_call: Callable[[], Any]) -> float:
    """Return the seconds of a call, until its results are ready."""
    begin = time.perf_counter()
    jax.block_until_ready(timed_call())  # ignores objects that are not JAX's
    return time.perf_counter() - begin


def time_in_turns(
    callables: Mapping[str, Callable[[], Any]], repeats: int, *, is_warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each way in each of `repeats` rounds, after one more unless all are `is_warm`.

    Every second round runs in reverse order, so that no entry benefits from its predecessor.
    """
    seconds_by_name: dict[str, list[float]] = {name: [] for name in callables}
    num_rounds = repeats if is_warm else repeats + 1
    for round_index in range(num_rounds):
        names = list(callables)
        if round_index % 2 == 1:
            names.reverse()
        for name in names:
            time.sleep(PAUSE_SECONDS)
            seconds_by_name[name].append(time_call(callables[name]))
    return {
        name: measured_seconds[-repeats:]
        for name, measured_seconds in seconds_by_name.items()
    }


def require_close(label: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Raise unless two results differ by at most `tolerance` times the largest number.

    Only functions with equal results are timed against each other.
    """
    error = float(abs(ours - theirs).max() / abs(theirs).max())
    if not error <= tolerance:
        raise InputError(
            f"{label}: the results differ by {error:.2g} of the largest number"
        )


# --- In a process of its own --------------------------------------------------------------------


class ProcessCost(NamedTuple):
    """Cost of a call in a fresh process."""

    seconds: float
    memory_bytes: (
        int | None
    )  # bytes: the peak of anonymous memory above its level before the call
    result: Any


def measure_in_process(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any
) -> ProcessCost:
    """Measure the call that `prepare(*arguments)` returns, in a new process.

    The work of `prepare` (imports, reading weights) is not measured. The process has no persistent
    compilation cache, so the call includes its compilation.

    Args:
      prepare: a function of a module.
      *arguments: arguments of `prepare`.

    Raises:
      InputError: if the process fails; the reason is on its stderr.
    """
    context = multiprocessing.get_context("spawn")
    parent_pipe, child_pipe = context.Pipe()
    process = context.Process(
        target=_run_in_child, args=(child_pipe, prepare, arguments)
    )
    process.start()
    child_pipe.close()
    try:
        parent_pipe.recv()
        initial_memory = peak_memory = anonymous_memory(process.pid)
        parent_pipe.send(None)
        while not parent_pipe.poll(0.004):
            peak_memory = max(peak_memory, anonymous_memory(process.pid))
        elapsed, result = parent_pipe.recv()
        peak_memory = max(peak_memory, anonymous_memory(process.pid))
        parent_pipe.send(None)
    except EOFError:
        raise InputError(
            f"the process that measures {prepare.__name__} failed"
        ) from None
    finally:
        parent_pipe.close()  # which ends a process that waits
        process.join()
    return ProcessCost(
        elapsed, peak_memory - initial_memory if initial_memory else None, result
    )


def _run_in_child(
    pipe: Connection, prepare: Callable[..., Callable[[], Any]], arguments: tuple
) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    prepared_call = prepare(*arguments)
    pipe.send("ready")
    pipe.recv()
    result = None

    def call_and_keep():
        nonlocal result
        result = prepared_call()
        return result

    elapsed = time_call(call_and_keep)
    pipe.send((elapsed, result if isinstance(result, int | float | None) else None))
    pipe.recv()  # keeps the results alive while the memory is read


def anonymous_memory(process_id: int | None) -> int:
    """Return the anonymous memory of a process in bytes; 0 if the system does not report it."""
    status_file = pathlib.Path(f"/proc/{process_id}/status")
    size_match = status_file.exists() and re.search(
        r"RssAnon:\s+(\d+) kB", status_file.read_text()
    )
    return 1024 * int(size_match[1]) if size_match else 0


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
