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
    "model",
    "apples",
    "A checkpoint folder, a bundled model by its name, or org/name on the Hugging Face hub.",
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
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir", None, "Folder that keeps converted parameters for the next run.  [default: none]"
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
        _MODEL.value,
        dtype=None if dtype == "stored" else dtype,
        ignore_fields=_IGNORE.value,
        cache_dir=_CACHE_DIR.value,
    )
    if lm.tokenizer is None:
        raise clm.InputError(
            f"{_MODEL.value} has no tokenizer.json, which this program needs to read its prompt"
        )
    return lm, lm.tokenizer


def model_name() -> str:
    """What --model names, without the folders it lies in."""
    return pathlib.PurePath(_MODEL.value).name


def is_bundled() -> bool:
    """Whether --model names a bundled model, which knows the small language alone."""
    return _MODEL.value in clm.bundled()


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
