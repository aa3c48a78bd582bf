"""Folders in the Hugging Face layout: location, dtype, tokenizer, fields of config.json."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import tokenization
from continuous_lm.errors import InputError
from continuous_lm.io import safetensors_files
from continuous_lm.models.checkpoints import hub
from continuous_lm.models.checkpoints.config_fields import INERT_FIELDS

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "BUNDLED_FOLDER",
    "DENSITY_FILE",
    "DENSITY_WEIGHTS_FILE",
    "DTYPES_BY_NAME",
    "MODEL_FILES",
    "bundled_models",
    "check_mesh",
    "fields_to_write",
    "find_folder",
    "kept_fields",
    "parameter_dtype",
    "read_tokenizer",
    "write_tokenizer",
]

DENSITY_FILE = "density.json"  # beside the files of a trunk: a density model is on it
DENSITY_WEIGHTS_FILE = "density.safetensors"
# Files that go when another model is written into their folder.
MODEL_FILES = re.compile(
    rf"{safetensors_files.CHECKPOINT_FILES.pattern}"
    rf"|{re.escape(DENSITY_FILE)}|{re.escape(DENSITY_WEIGHTS_FILE)}|tokenizer\.json"
)
BUNDLED_FOLDER = pathlib.Path(__file__).parents[1] / "bundled"
DTYPES_BY_NAME = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": jnp.float64,
}


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(folder.name for folder in BUNDLED_FOLDER.iterdir() if folder.is_dir())


def find_folder(folder_or_name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a checkpoint: a path, a bundled model's, or one of the hub, downloaded."""
    if not isinstance(folder_or_name, str | os.PathLike):
        raise InputError(
            f"{folder_or_name!r:.60} is neither the path of a folder nor a name"
        )
    folder = pathlib.Path(folder_or_name)
    # os.path returns False for names that no file can have; pathlib raises an error.
    if os.path.isdir(folder):  # noqa: PTH112
        return folder
    name = str(folder_or_name)
    if name in bundled_models():
        return BUNDLED_FOLDER / name
    if os.path.exists(folder):  # noqa: PTH110
        raise InputError(f"{folder} is a file; give the folder of a checkpoint")
    if hub.MODEL_NAME.fullmatch(name):
        return hub.download(name)
    raise InputError(
        f"{name!r} is neither a folder nor a bundled model ({', '.join(bundled_models())})"
        " nor org/name on the Hugging Face hub"
    )


def check_mesh(mesh: Mesh | None) -> None:
    """Raise InputError unless `mesh` is a Mesh or None."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            f"mesh is a {type(mesh).__name__}; make one with jax.make_mesh"
        )


def parameter_dtype(fields: Mapping[str, Any], dtype: DTypeLike | None) -> jnp.dtype:
    """Return `dtype`, or config.json's dtype if it is None."""
    if dtype is not None:
        return _as_float_dtype(dtype)
    dtype_names = [
        fields[field]
        for field in ("dtype", "torch_dtype")
        if fields.get(field) is not None
    ]
    if len(dtype_names) == 2 and dtype_names[0] != dtype_names[1]:
        raise InputError(
            f"fields dtype ({dtype_names[0]!r:.60}) and torch_dtype ({dtype_names[1]!r:.60}) differ"
        )
    name = dtype_names[0] if dtype_names else "float32"
    if not isinstance(name, str) or name not in DTYPES_BY_NAME:
        raise InputError(
            f"field dtype is {name!r:.60}; it must be one of {', '.join(DTYPES_BY_NAME)}"
        )
    return _as_float_dtype(name)


def _as_float_dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        float_dtype = jnp.dtype(dtype)
    except TypeError:
        float_dtype = None
    if float_dtype is None or float_dtype not in map(
        jnp.dtype, DTYPES_BY_NAME.values()
    ):
        raise InputError(
            f"dtype is {dtype!r:.60}; it must be one of {', '.join(DTYPES_BY_NAME)}"
        )
    if jax.dtypes.canonicalize_dtype(float_dtype) != float_dtype:
        raise InputError(
            "dtype float64 needs jax.config.update('jax_enable_x64', True) before it"
        )
    return float_dtype


def read_tokenizer(
    folder: pathlib.Path, vocab_size: int
) -> "tokenizers.Tokenizer | None":
    """The folder's tokenizer, if it has one, refused if it has tokens beyond the vocabulary."""
    tokenizer = tokenization.load(folder)
    if tokenizer is not None and _has_tokens_beyond(tokenizer, vocab_size):
        raise InputError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, but config.json's"
            f" vocab_size is {vocab_size}; they do not belong together"
        )
    return tokenizer


def _has_tokens_beyond(tokenizer: "tokenizers.Tokenizer", vocab_size: int) -> bool:
    """Return whether ordinary tokens lie beyond the vocabulary (Gemma 3 has special ones there)."""
    added_tokens = tokenizer.get_added_tokens_decoder()
    special_ids = {
        token_id for token_id, token in added_tokens.items() if token.special
    }
    ordinary_ids = set(tokenizer.get_vocab().values()) - special_ids
    return any(token_id >= vocab_size for token_id in ordinary_ids)


def write_tokenizer(
    staging_folder: pathlib.Path, tokenizer: "tokenizers.Tokenizer | None"
) -> None:
    """Write tokenizer.json, if there is a tokenizer."""
    if tokenizer is not None:
        tokenizer.save(str(staging_folder / "tokenizer.json"))


def kept_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that change nothing, kept for the next time it is written."""
    return {name: value for name, value in fields.items() if name in INERT_FIELDS}


def fields_to_write(hf_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the source's config.json that also hold for a newly written folder."""
    stale = ("dtype", "transformers_version")
    return {name: value for name, value in hf_fields.items() if name not in stale}
