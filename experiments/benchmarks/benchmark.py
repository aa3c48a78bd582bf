"""Measure speed against other libraries: ratios of times, measured in turns in one run.

    python -m continuous_lm benchmark [--cases=sweep,nearest] [--repeats=5] [--quick]

Our code and its peers (the extra `peers`: PyTorch, transformers, faiss, vector-quantize-pytorch)
take turns in one process, or in consecutive fresh processes. Other load on the machine then affects
all of them. A figure is the median of the rounds' ratios, with the smallest, the largest and the
target. Peers run at their best settings. Further rows have cold times, memory, and the share of the
machine's own limit (a matrix product, a read of a file). Peers that are not installed are named and
skipped.

--quick is for tests: sizes are tiny, and its figures have no meaning.
"""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

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
from continuous_lm.experiments.common import program, tables
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json

# Quick, repeats -> rows, when they are measured.
BenchmarkCase = Callable[[bool, int], Iterator[Row]]
CASES: Mapping[str, BenchmarkCase] = {
    "sweep": sweep_cases.short_sweep_rows,
    "long-sweep": sweep_cases.long_sweep_rows,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of benchmark."""

    cases: tuple[str, ...] = program.flag(
        tuple(CASES), help="Cases to measure, separated by commas."
    )
    repeats: int = program.flag(5, help="Rounds of each case.", lower_bound=1)
    quick: bool = program.flag(
        False, help="Tiny sizes, to try whether everything runs."
    )
    gigabytes: float = program.flag(
        loading_cases.DEFAULT_GIGABYTES,
        help="Size of the checkpoint that is loaded, in bfloat16.",
        lower_bound=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        select_cases(self.cases, self.gigabytes)


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The rows of every case, whose tables were printed as they came."""

    rows_by_case: Mapping[str, Sequence[Row]]

    def summary(self) -> str:
        failed = failed_cases(self.rows_by_case)
        return f"failed: {', '.join(failed)}" if failed else "all cases ended"

    @property
    def exit_status(self) -> int:
        return 1 if failed_cases(self.rows_by_case) else 0


def select_cases(
    names: Sequence[str], gigabytes: float = loading_cases.DEFAULT_GIGABYTES
) -> dict[str, BenchmarkCase]:
    """The cases of these names; the one that loads a checkpoint of so many gigabytes.

    Raises:
      clm.InputError: if one is not known.
    """
    for name in names:
        if name not in CASES:
            raise clm.InputError(
                f"--cases: {name!r} is not known; known are {', '.join(CASES)}"
            )
    known_cases = dict(CASES)
    known_cases["load"] = functools.partial(
        loading_cases.loading_rows, gigabytes=gigabytes
    )
    return {name: known_cases[name] for name in names}


def run_cases(
    cases: Mapping[str, BenchmarkCase], *, quick: bool, repeats: int
) -> dict[str, list[Row]]:
    """Return the rows of every case; each table is printed when its case ends.

    A case that fails ends in a row with the error, so that the results of other cases are kept.
    """
    rows_by_case: dict[str, list[Row]] = {}
    for case_name, row_generator in cases.items():
        rows: list[Row] = []
        rows_by_case[case_name] = rows
        try:
            for row in row_generator(quick, repeats):
                rows.append(dataclasses.replace(row, target=None) if quick else row)
        except Exception as error:  # noqa: BLE001 (a failed case is a row)
            traceback.print_exc()
            rows.append(Row("failed", note=" ".join(f"{error!r}".split())))
        print(f"{case_table(case_name, rows).as_text()}\n", flush=True)
    return rows_by_case


def case_table(case_name: str, rows: Sequence[Row]) -> tables.Table:
    """The rows of a case, for people."""
    return timing.rows_table(case_name, case_name, rows)


def failed_cases(rows_by_case: Mapping[str, Sequence[Row]]) -> list[str]:
    """The cases that ended too soon."""
    return [
        case_name
        for case_name, rows in rows_by_case.items()
        if any(row.what == "failed" for row in rows)
    ]


def run(config: Config) -> Result:
    """Measure all cases, print their tables and write every figure."""
    folder = program.output_folder(config)
    cases = select_cases(config.cases, config.gigabytes)
    print(f"{jax.devices()[0].device_kind}, {timing.num_cores()} cores\n")
    rows_by_case = run_cases(cases, quick=config.quick, repeats=config.repeats)
    if folder is not None:
        stored_rows = {
            case_name: [row.as_json() for row in rows]
            for case_name, rows in rows_by_case.items()
        }
        run_record = program.record(config) | {"cores": timing.num_cores()}
        with write_atomically(folder) as staging_folder:
            for case_name, rows in rows_by_case.items():
                case_table(case_name, rows).write(staging_folder)
            write_json(
                staging_folder / "benchmark.json",
                {"cases": stored_rows, "run": run_record},
            )
    return Result(rows_by_case)


if __name__ == "__main__":
    program.main(Config, run)
