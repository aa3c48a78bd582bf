"""How fast ours is, beside what else there is: ratios, measured in turns in one run.

    python -m continuous_lm benchmark [--cases=sweep,nearest] [--repeats=5] [--quick]

Ours and its peers (the extra `peers`: PyTorch, transformers, faiss, vector-quantize-pytorch) take
turns in one process, or in fresh ones that follow each other, so that what else the machine does
falls on all. A figure is the median of the rounds' own ratios; beside it stand the least and the
largest, and the target. Peers run at their best settings. Cold times, memory, and the share of what
the machine itself can do (a matrix product, a read of a file) have rows of their own. Peers that
are not installed are said and left out.

--quick is for tests: sizes are tiny, and its figures mean nothing.
"""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
from absl import flags

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import (
    attention_cases,
    generation_cases,
    gpu_cases,
    loading_cases,
    search_cases,
    sweep_cases,
    timing,
)
from continuous_lm.experiments.benchmarks.timing import Row
from continuous_lm.experiments.common import program
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json

Case = Callable[[bool, int], Iterator[Row]]  # quick, repeats -> rows, when they are measured
CASES: Mapping[str, Case] = {
    "sweep": functools.partial(sweep_cases.warm, False),
    "long-sweep": functools.partial(sweep_cases.warm, True),
    "cold-sweep": sweep_cases.cold,
    "compiling": sweep_cases.depth,
    "attention": attention_cases.case,
    "nearest": search_cases.nearest,
    "quantizers": search_cases.vector_quantizers,
    "load": loading_cases.load,
    "import": loading_cases.imports,
    "generation": generation_cases.generation,
    "next-vectors": generation_cases.next_vectors,
    "gpu": gpu_cases.case,
}
_CASES = flags.DEFINE_list("cases", list(CASES), "What to measure.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")


def chosen(names: list[str]) -> dict[str, Case]:
    """The cases of these names.

    Raises:
      clm.InputError: if one is not known.
    """
    for name in names:
        if name not in CASES:
            raise clm.InputError(f"--cases: {name!r} is not known; known are {', '.join(CASES)}")
    return {name: CASES[name] for name in names}


def measured(cases: Mapping[str, Case], *, quick: bool, repeats: int) -> dict[str, list[Row]]:
    """The rows of every case; its table is printed as soon as it is there.

    A case that fails ends in a row that says so: hours of others are not to be lost.
    """
    found: dict[str, list[Row]] = {}
    for name, case in cases.items():
        found[name] = []
        try:
            for row in case(quick, repeats):
                found[name].append(dataclasses.replace(row, target=None) if quick else row)
        except Exception as error:
            traceback.print_exc()
            found[name].append(Row("failed", note=" ".join(f"{error!r}".split())))
        print(f"{timing.table(name, name, found[name]).as_text()}\n", flush=True)
    return found


def failed(found: Mapping[str, list[Row]]) -> list[str]:
    """The cases that ended too soon."""
    return [name for name, rows in found.items() if any(row.what == "failed" for row in rows)]


def main() -> None:
    """Figures, tables, a file."""
    folder = program.output_dir("benchmark")
    cases = chosen(_CASES.value)
    print(f"{jax.devices()[0].device_kind}, {timing.cores()} cores\n")
    found = measured(cases, quick=_QUICK.value, repeats=_REPEATS.value)
    with written_aside(folder) as aside:
        for name, rows in found.items():
            timing.table(name, name, rows).write(aside)
        rows_of = {name: [row.as_json() for row in rows] for name, rows in found.items()}
        run = program.record() | {"cores": timing.cores()}
        write_json(aside / "benchmark.json", {"cases": rows_of, "run": run})
    print(f"{folder}: benchmark.json, and each case's table in .csv, .md, .tex")
    if failed(found):
        raise clm.InputError(f"these cases failed: {', '.join(failed(found))}")


if __name__ == "__main__":
    program.run(main)
