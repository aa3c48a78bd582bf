"""What every program shares: its folder of results, how errors end, what a run records."""

import datetime
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging

import continuous_lm as clm
from continuous_lm.files import check_writable

_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for the results.  [default: results/ and the program's name]"
)


def run(main: Callable[[], None]) -> None:
    """Runs `main` as an absl program; an `InputError` ends it with one line and exit status 1."""

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # at absl's INFO libraries are chatty
        try:
            if len(argv) > 1:
                raise clm.InputError(f"{argv[1]!r} is not a flag; flags begin with --, see --help")
            main()
        except clm.InputError as error:
            sys.exit(f"error: {' '.join(str(error).splitlines())}")

    app.run(guarded)


def output_dir(name: str) -> pathlib.Path:
    """The folder for the results of program `name`, known to be writable."""
    folder = pathlib.Path(_OUTPUT_DIR.value or pathlib.Path("results") / name)
    check_writable(folder)
    return folder


def record() -> dict[str, Any]:
    """Flags, versions and device of this run, for its results file."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
    package = __name__.rpartition(".")[0]
    ours = {
        flag.name: flag.value
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(package) or module == sys.argv[0]
        for flag in defined
    }
    return {
        "flags": dict(sorted(ours.items())),
        "versions": {"continuous_lm": clm.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
