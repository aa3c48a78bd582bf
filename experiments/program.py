"""What every program shares: the model's flags, how errors end, what a run records."""

import datetime
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import tokenizers
from absl import app, flags, logging

import continuous_lm as clm
from continuous_lm.files import check_writable

_MODEL = flags.DEFINE_string(
    "model", "apples", "A checkpoint folder, or a bundled model by its name."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "stored", "float32", "bfloat16", "float16"],
    "Of the parameters and the computation. auto: as stored on an accelerator, float32 on a CPU.",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for the results.  [default: results/ and the program's name]"
)
_IGNORE = flags.DEFINE_list(
    "ignore_config_fields", [], "Fields of config.json known not to change what the model computes."
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


def load_model() -> tuple[clm.LanguageModel, tokenizers.Tokenizer]:
    """The model that the flags name, and its tokenizer."""
    dtype = _DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "stored"
    lm = clm.load(
        _MODEL.value, dtype=None if dtype == "stored" else dtype, ignore_fields=_IGNORE.value
    )
    if lm.tokenizer is None:
        raise clm.InputError(
            f"{_MODEL.value} has no tokenizer.json, which this program needs to read its prompt"
        )
    return lm, lm.tokenizer


def record() -> dict[str, Any]:
    """Flags, versions and device of this run, for its results file."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
    own = {
        flag.name: flag.value
        for flag in flags.FLAGS.get_key_flags_for_module(sys.modules["__main__"])
    }
    shared = {flag.name: flag.value for flag in flags.FLAGS.get_flags_for_module(__name__)}
    return {
        "flags": dict(sorted((own | shared).items())),
        "versions": {"continuous_lm": clm.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
