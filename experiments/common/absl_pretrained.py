"""The pretrained model that a program runs on: its flags, and how it is loaded."""

import pathlib

import jax
import tokenizers
from absl import flags

import continuous_lm as clm
from continuous_lm.experiments.common import absl_program as program

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
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    "Folder that keeps converted parameters for the next run.  [default: none]",
)
_IGNORED_CONFIG_FIELDS = flags.DEFINE_list(
    "ignore_config_fields",
    [],
    "Fields of config.json known not to change what the model computes.",
)


def load() -> tuple[clm.LanguageModel, tokenizers.Tokenizer]:
    """The model that the flags name, and its tokenizer."""
    dtype = _DTYPE.value
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "stored"
    lm = clm.load(
        _MODEL.value,
        dtype=None if dtype == "stored" else dtype,
        ignore_fields=_IGNORED_CONFIG_FIELDS.value,
        cache_dir=_CACHE_DIR.value,
        mesh=program.mesh(),
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
    return _MODEL.value in clm.bundled_models()
