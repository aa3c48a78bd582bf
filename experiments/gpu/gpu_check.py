"""Check that this GPU computes the right numbers, and measure its speed.

    python3 -m continuous_lm gpu_check [--sections=attention,sweep] [--allow_cpu]

It checks attention in every form, with all gradients, against float64. It checks a sweep, generated
text and a training step against this machine's CPU. It measures speeds and the benchmark's rows for
a GPU. It needs a checkout and a JAX that sees a GPU, but no installation. Each section is a
separate process with a time limit; all end within eight minutes. A failure becomes a row, and the
other checks continue. The exit status is 1 if any row failed; a speed below its target is not a
failure. The output of a section is in SECTION.log in the folder of results.

--allow_cpu tests the program itself: sizes are tiny, kernels are interpreted where possible, and
figures have no meaning.
"""

import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import program, tables
from continuous_lm.experiments.gpu import (
    attention_checks,
    isolated_checks,
    model_checks,
)
from continuous_lm.experiments.gpu.isolated_checks import Check
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import write_json


class Section(NamedTuple):
    """Checks that run in one process."""

    run: Callable[[bool], Iterable[Check]]
    seconds: float  # that it may take; what others leave over is added


SECTIONS: Mapping[str, Section] = {
    "attention": Section(attention_checks.attention_section, 140.0),
    "sweep": Section(model_checks.sweep_section, 80.0),
    "generation": Section(model_checks.generation_section, 70.0),
    "training": Section(model_checks.training_section, 50.0),
    "benchmark": Section(model_checks.benchmark_section, 80.0),
}
DEVICE_SECONDS = 40.0  # seconds until the device must have been found
CPU = "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of gpu_check."""

    allow_cpu: bool = program.flag(
        False, help="Without a GPU, run everything tiny on the CPU."
    )
    sections: tuple[str, ...] = program.flag(
        tuple(SECTIONS), help=f"Sections to check, of {', '.join(SECTIONS)}."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        select_sections(self.sections)

    def default_folder(self, program_name: str) -> str:
        return "gpu"


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The rows of every section, each printed when it came.

    Attributes:
      rows: section -> rows.
      device: the name of the device.
      seconds: run time of all sections, in seconds.
    """

    rows: Mapping[str, Sequence[Check]]
    device: str
    seconds: float

    def summary(self) -> str:
        warning = "cpu: figures mean nothing\n" if self.device == CPU else ""
        return (
            f"{make_table(self.rows, self.device).as_text()}\n\n{self.seconds:.0f} s;"
            f" a log of each section is beside the results\n{warning}{summarize(self.rows)}"
        )

    @property
    def exit_status(self) -> int:
        verdicts = {check.verdict for checks in self.rows.values() for check in checks}
        return 1 if isolated_checks.FAILED in verdicts else 0


def select_sections(names: Sequence[str]) -> dict[str, Section]:
    """The sections of these names.

    Raises:
      InputError: if one is not known.
    """
    for name in names:
        if name not in SECTIONS:
            valid_names = ", ".join(SECTIONS)
            raise InputError(
                f"--sections: {name!r:.60} is not known; known are {valid_names}"
            )
    return {name: SECTIONS[name] for name in names}


def describe_device(tiny: bool) -> Iterator[dict[str, Any]]:
    """The device that JAX finds; run in a process of its own, which may fail or hang."""
    del tiny
    device = jax.devices()[0]
    yield {
        "platform": jax.default_backend(),
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "version": str(getattr(device.client, "platform_version", "")),
        "host": platform.platform(),
    }


def find_device(folder: os.PathLike[str], allow_cpu: bool) -> dict[str, Any]:
    """The record of the device, of `describe_device`.

    Raises:
      InputError: if it is no GPU (or TPU), unless the CPU is allowed.
    """
    log = absolute_path(folder) / "device.log"
    device_record = next(
        isolated_checks.run_in_process(describe_device, False, DEVICE_SECONDS, log)
    )
    if isinstance(device_record, Check):
        raise InputError(
            f"JAX finds no device: {device_record.note}; its output is in {log}"
        )
    if device_record["platform"] == CPU and not allow_cpu:
        raise InputError(
            f"no GPU: JAX {jax.__version__} of {sys.executable} finds the CPU alone; install"
            " 'jax[cuda12]' or 'jax[cuda13]' there, choose another python, or give --allow_cpu;"
            f" what JAX printed is in {log}"
        )
    return device_record


def run_sections(
    sections: Mapping[str, Section], tiny: bool, folder: os.PathLike[str], device: str
) -> dict[str, list[Check]]:
    """The rows of every section, each printed when it is there."""
    rows: dict[str, list[Check]] = {}
    deadline = time.monotonic()
    for name, section in sections.items():
        deadline += section.seconds
        seconds_left = deadline - time.monotonic()
        log = absolute_path(folder) / f"{name}.log"
        rows[name] = []
        for check in isolated_checks.run_in_process(
            section.run, tiny, seconds_left, log
        ):
            rows[name].append(check)
            cells = [cell for cell in table_cells(name, check, device) if cell]
            print(" | ".join(map(str, cells)), flush=True)
        if not rows[name]:
            rows[name].append(
                Check("all of it", isolated_checks.NOT_RUN, note="it has no rows")
            )
    return rows


# --- Output ---------------------------------------------------------------------------------------


def table_cells(section: str, check: Check, device: str) -> list[tables.Cell]:
    """A row of the table."""
    value = None if check.value is None else f"{check.value:.3g}"
    return [
        section,
        check.what,
        value,
        check.unit or None,
        check.target or None,
        check.verdict,
        device,
        check.note or None,
    ]


def make_table(rows: Mapping[str, Sequence[Check]], device: str) -> tables.Table:
    """All rows, for people."""
    titles = (
        "section",
        "what",
        "value",
        "unit",
        "tolerance or target",
        "verdict",
        "card",
        "note",
    )
    cells = [
        table_cells(name, check, device)
        for name, checks in rows.items()
        for check in checks
    ]
    caption = f"Checks on {device}"
    return tables.Table(
        "gpu", caption, [tables.Column(title) for title in titles], cells
    )


def summarize(rows: Mapping[str, Sequence[Check]]) -> str:
    """The last line.

    >>> summarize({"attention": [Check("dense", isolated_checks.OK)]})
    'passed 1 / FAILED 0 / not run 0 / not supported 0 / only measured 0 / below target 0'
    """
    count = Counter(check.verdict for checks in rows.values() for check in checks)
    verdicts = {
        "passed": isolated_checks.OK,
        "FAILED": isolated_checks.FAILED,
        "not run": isolated_checks.NOT_RUN,
        "not supported": isolated_checks.UNSUPPORTED,
        "only measured": isolated_checks.MEASURED,
        "below target": isolated_checks.MISSED,
    }
    return " / ".join(
        f"{words} {count[verdict]}" for words, verdict in verdicts.items()
    )


def run(config: Config) -> Result:
    """Run all sections, print their rows as they come, and write them with their logs."""
    folder = program.output_folder(config)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary_folder:
            result, _ = check_device(config, pathlib.Path(temporary_folder))
        return result
    folder.mkdir(parents=True, exist_ok=True)
    result, device_record = check_device(config, folder)
    run_record = program.settings(config) | device_record | {"seconds": result.seconds}
    section_rows = {
        name: [dataclasses.asdict(check) for check in checks]
        for name, checks in result.rows.items()
    }
    summary_line = summarize(result.rows)
    table_text = make_table(result.rows, result.device).as_text()
    with write_atomically(folder) as staging_folder:
        write_json(
            staging_folder / "gpu.json",
            {"sections": section_rows, "summary": summary_line, "run": run_record},
        )
        (staging_folder / "gpu.txt").write_text(
            f"{table_text}\n\n{summary_line}\n", encoding="utf-8"
        )
    return result


def check_device(config: Config, folder: pathlib.Path) -> tuple[Result, dict[str, Any]]:
    """The rows of all sections, whose logs go to `folder`, and the record of the device."""
    begin = time.monotonic()
    set_environment()
    device_record = find_device(folder, config.allow_cpu)
    tiny = device_record["platform"] == CPU
    device = CPU if tiny else device_record["device"]
    heading = (
        "cpu: figures mean nothing" if tiny else f"{device}, JAX {jax.__version__}"
    )
    print(f"{heading}\n")
    rows = run_sections(select_sections(config.sections), tiny, folder, device)
    return Result(rows, device, time.monotonic() - begin), device_record


def set_environment() -> None:
    """Prepare the environment that the sections' processes inherit."""
    # Other processes use the device too, PyTorch in the same one: JAX must not take all its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and CPU not in platforms:  # which numbers are compared with
        os.environ["JAX_PLATFORMS"] = f"{platforms},{CPU}"


if __name__ == "__main__":
    program.main(Config, run)
