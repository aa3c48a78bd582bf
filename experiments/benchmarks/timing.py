"""How the benchmark measures: ways to do one thing in turns, and what one costs a fresh process.

Speeds are ratios of two times of one round, which other work on the machine falls on alike; a row
has their median, their least and their largest. OpenMP's idle threads (PyTorch's, faiss's) spin for
some milliseconds after their work and would take the cores of whoever is next. Telling them not to
would slow their small operations; instead, a pause lets them fall asleep.
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

PAUSE = 0.05  # seconds between turns


# --- Rows ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """What a figure should be: at least `least`, or at most `most`."""

    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether it is."""
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f">= {self.least:.3g}" if self.most is None else f"<= {self.most:.3g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a case.

    Attributes:
      what: it says, as "times as fast as faiss".
      value: the median of its figures of all rounds; None if it was not measured.
      low: the least of them.
      high: the largest.
      ours: median of what was measured on our side, in `unit`.
      theirs: the same of the other side.
      unit: of these two.
      target: of the value.
      note: what else there is to say, or why nothing was measured.
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
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a value."""
        if self.target is None or self.value is None:
            return None
        return self.target.met(self.value)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the target in words."""
        target = None if self.target is None else str(self.target)
        return dataclasses.asdict(self) | {"target": target, "met": self.met}


def figures(what: str, values: Sequence[float], **others: Any) -> Row:
    """The row of some figures, one a round."""
    return Row(what, statistics.median(values), min(values), max(values), **others)


def times_as_fast(
    what: str, ours: Sequence[float], theirs: Sequence[float], least: float | None = None, note=""
) -> Row:
    """The row of theirs / ours, of seconds: how many times as fast ours is; at `least` so many."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    medians = dict(ours=statistics.median(ours), theirs=statistics.median(theirs), unit="s")
    return figures(what, ratios, target=least and Target(least), note=note, **medians)


def times_as_much(
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    most: float | None = None,
    unit: str = "s",
    note: str = "",
) -> Row:
    """The row of ours / theirs, of seconds or bytes: how much more ours takes, at `most`."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    medians = dict(ours=statistics.median(ours), theirs=statistics.median(theirs), unit=unit)
    return figures(what, ratios, target=most and Target(most=most), note=note, **medians)


def table(name: str, caption: str, rows: Sequence[Row]) -> tables.Table:
    """The rows, for people."""
    heads = ("figure", "value", "least to most", "target", "met", "ours", "theirs", "note")

    def cells(row: Row) -> list[tables.Cell]:
        met = {None: None, True: "yes", False: "MISSED"}[row.met]
        spread = None if row.low is None else f"{row.low:.3g} to {row.high:.3g}"
        sides = [x if x is None else quantity(x, row.unit) for x in (row.ours, row.theirs)]
        value = None if row.value is None else f"{row.value:.3g}"
        target = None if row.target is None else str(row.target)
        return [row.what, value, spread, target, met, *sides, row.note or None]

    return tables.Table(name, caption, [tables.Column(h) for h in heads], list(map(cells, rows)))


def quantity(value: float, unit: str) -> str:
    """A number of seconds, bytes, ... as people write it.

    >>> quantity(0.0123, "s"), quantity(2.02e9, "B"), quantity(40.0, "tokens/s")
    ('12.3 ms', '2.02e+03 MB', '40 tokens/s')
    """
    if unit == "s" and value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value / 1e6:.3g} MB" if unit == "B" else f"{value:.3g} {unit}".strip()


# --- In this process ----------------------------------------------------------------------------


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes, until what it gives is there."""
    begin = time.perf_counter()
    jax.block_until_ready(run())  # leaves what is not JAX's as it is
    return time.perf_counter() - begin


def in_turns(
    ways: Mapping[str, Callable[[], Any]], repeats: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each way in each of `repeats` rounds, after one more unless all are `warm`.

    Every second round goes backwards: what comes after what is to do no one good.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repeats + (not warm)):
        for name in reversed(list(ways)) if i % 2 else ways:
            time.sleep(PAUSE)
            taken[name].append(seconds(ways[name]))
    return {name: found[-repeats:] for name, found in taken.items()}


def require_equal(what: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Refuses two results that are further apart than `tolerance` times the largest number.

    What does not do the same work is not worth timing.
    """
    error = float(abs(ours - theirs).max() / abs(theirs).max())
    if not error <= tolerance:
        raise InputError(f"{what}: the results differ by {error:.2g} of the largest number")


# --- In a process of its own --------------------------------------------------------------------


class Fresh(NamedTuple):
    """What a call cost a fresh process."""

    seconds: float
    memory: int | None  # bytes: the peak of anonymous memory above its level before the call
    result: Any


def fresh(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> Fresh:
    """Measures the call that `prepare(*arguments)` returns, in a new process.

    What `prepare` does (imports, reading weights) is not measured. The process has no persistent
    compilation cache, so that all that is compiled in the call is compiled anew.

    Args:
      prepare: a function of a module.
      *arguments: for it.

    Raises:
      InputError: if the process fails; why is on its stderr.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, prepare, arguments))
    process.start()
    there.close()
    try:
        here.recv()
        level = peak = anonymous_memory(process.pid)
        here.send(None)
        while not here.poll(0.004):
            peak = max(peak, anonymous_memory(process.pid))
        taken, result = here.recv()
        peak = max(peak, anonymous_memory(process.pid))
        here.send(None)
    except EOFError:
        raise InputError(f"the process that measures {prepare.__name__} failed") from None
    finally:
        here.close()  # which ends a process that waits
        process.join()
    return Fresh(taken, peak - level if level else None, result)


def _serve(pipe: Connection, prepare: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    run = prepare(*arguments)
    pipe.send("ready")
    pipe.recv()
    result = None

    def keep():
        nonlocal result
        result = run()
        return result

    taken = seconds(keep)
    pipe.send((taken, result if isinstance(result, int | float | None) else None))
    pipe.recv()  # what was made is still there while the memory is read


def anonymous_memory(process: int | None) -> int:
    """Bytes of memory of a process that are no file's; 0 where no one says it."""
    status = pathlib.Path(f"/proc/{process}/status")
    found = status.exists() and re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else 0


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
