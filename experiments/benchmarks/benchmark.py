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
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json

# Quick, repeats -> rows, when they are measured.
BenchmarkCase = Callable[[bool, int], Iterator[Row]]
CASES: Mapping[str, BenchmarkCase] = {
    "sweep": functools.partial(sweep_cases.warm_sweep_rows, False),
    "long-sweep": functools.partial(sweep_cases.warm_sweep_rows, True),
    "cold-sweep": sweep_cases.cold_sweep_rows,
    "compiling": sweep_cases.compile_time_rows,
    "attention": attention_cases.attention_rows,
    "nearest": search_cases.nearest_code_rows,
    "quantizers": search_cases.vector_quantizer_rows,
    "load": loading_cases.loading_rows,
    "import": loading_cases.import_time_rows,
    "generation": generation_cases.generation_rows,
    "next-vectors": generation_cases.next_vector_rows,
    "gpu": gpu_cases.gpu_rows,
}
_CASES = flags.DEFINE_list("cases", list(CASES), "What to measure.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes: does it run?")


def select_cases(names: list[str]) -> dict[str, BenchmarkCase]:
    """The cases of these names.

    Raises:
      clm.InputError: if one is not known.
    """
    for name in names:
        if name not in CASES:
            raise clm.InputError(
                f"--cases: {name!r} is not known; known are {', '.join(CASES)}"
            )
    return {name: CASES[name] for name in names}


def run_cases(
    cases: Mapping[str, BenchmarkCase], *, quick: bool, repeats: int
) -> dict[str, list[Row]]:
    """The rows of every case; its table is printed as soon as it is there.

    A case that fails ends in a row that says so: hours of others are not to be lost.
    """
    rows_by_case: dict[str, list[Row]] = {}
    for case_name, row_generator in cases.items():
        rows_by_case[case_name] = []
        try:
            for row in row_generator(quick, repeats):
                rows_by_case[case_name].append(
                    dataclasses.replace(row, target=None) if quick else row
                )
        except Exception as error:
            traceback.print_exc()
            rows_by_case[case_name].append(
                Row("failed", note=" ".join(f"{error!r}".split()))
            )
        print(
            f"{timing.rows_table(case_name, case_name, rows_by_case[case_name]).as_text()}\n",
            flush=True,
        )
    return rows_by_case


def failed_cases(rows_by_case: Mapping[str, list[Row]]) -> list[str]:
    """The cases that ended too soon."""
    return [
        case_name
        for case_name, rows in rows_by_case.items()
        if any(row.what == "failed" for row in rows)
    ]


def main() -> None:
    """Figures, tables, a file."""
    folder = program.output_dir("benchmark")
    cases = select_cases(_CASES.value)
    print(f"{jax.devices()[0].device_kind}, {timing.num_cores()} cores\n")
    rows_by_case = run_cases(cases, quick=_QUICK.value, repeats=_REPEATS.value)
    with write_atomically(folder) as staging_folder:
        for case_name, rows in rows_by_case.items():
            timing.rows_table(case_name, case_name, rows).write(staging_folder)
        stored_rows = {
            case_name: [row.as_json() for row in rows]
            for case_name, rows in rows_by_case.items()
        }
        run_record = program.record() | {"cores": timing.num_cores()}
        write_json(
            staging_folder / "benchmark.json", {"cases": stored_rows, "run": run_record}
        )
    print(f"{folder}: benchmark.json, and each case's table in .csv, .md, .tex")
    if failed_cases(rows_by_case):
        raise clm.InputError(
            f"these cases failed: {', '.join(failed_cases(rows_by_case))}"
        )


if __name__ == "__main__":
    program.run(main)
