"""Checkpoint folders of trunks, of every family: read and written in the Hugging Face layout."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints import hf_folder, parameter_cache
from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.parameter_layout import (
    ParameterLayout,
    check_parameters,
)
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families.registry import FAMILIES
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import flatten, unflatten
from continuous_lm.models.transformer import Transformer, parameter_table

__all__ = [
    "parameter_layout",
    "read",
    "read_config",
    "write",
]


def read(
    folder: pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
    cache_dir: str | os.PathLike[str] | None = None,
) -> LanguageModel[Transformer]:
    """Load the trunk in a folder; arguments as in `loading.load`."""
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        param_dtype = hf_folder.parameter_dtype(fields, dtype)
    tokenizer = hf_folder.read_tokenizer(folder, config.vocab_size)
    layout = parameter_layout(config)
    specs = layout.parameter_specs(param_dtype, mesh)
    read_params = functools.partial(layout.read, folder, specs)
    if cache_dir is None:
        flat_params = read_params()
    else:
        flat_params = parameter_cache.load_or_build(
            cache_dir, folder, specs, read_params
        )
    model = Transformer(config)
    hf_fields = hf_folder.kept_fields(fields)
    return LanguageModel(model, unflatten(flat_params), tokenizer, hf_fields)


def write(
    staging_folder: pathlib.Path,
    lm: LanguageModel[Transformer],
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Write the files of a model into a folder that is there, one by one."""
    config = lm.config
    if config.family not in FAMILIES:
        raise InputError(
            f"family is {config.family!r}, which has no layout of checkpoints; only"
            f" {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.family]
    layout = parameter_layout(config)
    if not isinstance(lm.params, Mapping):
        raise InputError(
            f"params are a {type(lm.params).__name__}; they must be a tree of dicts"
        )
    flat_params = flatten(lm.params)
    check_parameters(flat_params, layout.declarations)
    dtype = flat_params["embedding"].dtype
    fields = {
        **hf_folder.fields_to_write(lm.hf_fields),
        "architectures": [family.architecture],
        "model_type": config.family,
        **family.write_config(config),
        "torch_dtype": dtype.name,
    }
    written_config = read_config(fields)
    if _with_full_window_pattern(written_config) != _with_full_window_pattern(config):
        raise InputError(
            f"a config.json of {config.family} cannot express this model: {config}"
        )
    with about("config.json"):
        write_json(staging_folder / "config.json", fields)
    layout.write(staging_folder, flat_params, dtype, shard_size)
    hf_folder.write_tokenizer(staging_folder, lm.tokenizer)


def read_config(
    fields: dict[str, Any], ignore_fields: Sequence[str] = ()
) -> TransformerConfig:
    """The configuration that a config.json describes."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"field model_type is {model_type!r:.60}, which is not handled; only"
            f" {', '.join(FAMILIES)}"
        )
    config_fields = ConfigFields(fields)
    config = FAMILIES[model_type].read_config(config_fields)
    config_fields.check_all_read(tuple(ignore_fields))
    return config


def parameter_layout(config: TransformerConfig) -> ParameterLayout:
    """Return the layout of a model's parameters in its family's checkpoints."""
    family = FAMILIES[config.family]
    return ParameterLayout(
        family.tensors,
        parameter_table(config),
        config.sizes,
        tensor_prefix=family.tensor_prefix,
        ignored_tensors=family.ignored_tensors,
    )


def _with_full_window_pattern(config: TransformerConfig) -> TransformerConfig:
    """The same model, with one entry of the pattern for each layer."""
    return dataclasses.replace(config, window_pattern=config.windowed_layers)
