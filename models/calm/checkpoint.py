"""CALM checkpoints (Shao et al., arXiv:2510.27688): next-vector models as they are published.

    lm = calm.load("path/to/a/calm/folder", "path/to/its/autoencoder/folder")
    calm.save("path/to/a/folder/that/holds/both", lm)

A checkpoint has four parts, each with a table of its own: the trunk, named as Llama's, the
compression of a chunk's embeddings, the head, and, in some, the autoencoder.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models import head as heads
from continuous_lm.models.calm import autoencoder_checkpoint
from continuous_lm.models.calm.autoencoder_network import Autoencoder, AutoencoderConfig
from continuous_lm.models.calm.implicit_heads import (
    IMPLICIT_HEADS,
    EnergyHead,
    ImplicitHead,
)
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.calm.next_vector import next_vector_model
from continuous_lm.models.checkpoints import hf_folder
from continuous_lm.models.checkpoints.config_fields import MAX_LAYERS, ConfigFields
from continuous_lm.models.checkpoints.parameter_layout import (
    ParameterLayout,
    are_equal,
    check_parameters,
)
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import flatten, unflatten, with_prefix

__all__ = [
    "AUTOENCODER_PREFIX",
    "AUTOENCODER_TENSORS",
    "COMPRESSION_TENSORS",
    "HEAD_TENSORS",
    "TRUNK_TENSORS",
    "ModelFields",
    "is_config",
    "load",
    "part_layouts",
    "read_config",
    "save",
    "write_config",
]

# Fields of a published config.json for its own training and loading.
_UNUSED_FIELDS = ("ae_path", "ae_name_or_path", "tie_word_embeddings")
# Kind of head -> prefix of its name in config.json's `architectures`.
_ARCHITECTURE_PREFIXES = {
    "energy": "Energy",
    "flow": "Flow",
    "diffusion": "Diffusion",
}

# --- Tensors ----------------------------------------------------------------------------------

AUTOENCODER_PREFIX = "ae_model."
_HEAD_PREFIX = "mlp_generator."
_HEAD_COPY_PREFIX = "generative_head."  # the head's other name
_INNER_TENSOR = "embed_proj.0.weight"
# The head's linear maps and norms, each a weight and a bias.
_HEAD_LAYERS = {
    "noise": "noise_embd",
    "hidden": "hidden_embd",
    "noise_norm": "norm_noise",
    "hidden_norm": "norm_hidden",
    "blocks_norm": "mlp_blocks.{layer}.in_ln",
    "blocks_inner": "mlp_blocks.{layer}.linears.0",
    "blocks_middle": "mlp_blocks.{layer}.linears.2",
    "blocks_outer": "mlp_blocks.{layer}.linears.4",
    "blocks_down": "mlp_blocks.{layer}.down_proj",
    "last_norm": "final_layer.in_ln",
    "last_inner": "final_layer.linears.0",
    "last": "final_layer.linears.2",
    "time": "time_embd",  # of heads with a time input: not published
}


def _with_tensor_prefix(
    old_prefix: str, new_prefix: str, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The table with another prefix of the tensors' names."""
    return {
        path: dataclasses.replace(
            stored, name=new_prefix + stored.name.removeprefix(old_prefix)
        )
        for path, stored in tensors.items()
    }


def _head_tensors() -> dict[str, StoredTensor]:
    """Parameter path -> where it is stored, as it is."""
    tensors = {}
    for path, layer_name in _HEAD_LAYERS.items():
        name = _HEAD_PREFIX + layer_name
        tensors[path] = StoredTensor(f"{name}.weight", axes=None)
        tensors[f"{path}_bias"] = StoredTensor(f"{name}.bias", axes=None)
    return tensors


# Parameter path in the whole model -> where it is stored, of each part.
TRUNK_TENSORS = with_prefix(
    "trunk", _with_tensor_prefix("model.", "transformer.", llama.TENSORS)
)
COMPRESSION_TENSORS = {
    "read_inner": StoredTensor(_INNER_TENSOR, "F (C D)"),
    "read_inner_bias": StoredTensor("embed_proj.0.bias", "F"),
    "read_outer": StoredTensor("embed_proj.2.weight", "D F"),
    "read_outer_bias": StoredTensor("embed_proj.2.bias", "D"),
    "read_norm": StoredTensor("embed_proj.3.weight", "D"),
    "read_norm_bias": StoredTensor("embed_proj.3.bias", "D"),
}
HEAD_TENSORS = with_prefix("head", _head_tensors())
AUTOENCODER_TENSORS = with_prefix(
    "autoencoder",
    _with_tensor_prefix("", AUTOENCODER_PREFIX, autoencoder_checkpoint.TENSORS),
)


def part_layouts(model: NextVectorModel) -> dict[str, ParameterLayout]:
    """The name of each part -> where its parameters lie, by their paths in the whole model."""
    table = model.parameter_table()

    def make_layout(
        tensors: Mapping[str, StoredTensor], sizes: Mapping[str, int]
    ) -> ParameterLayout:
        declarations = {path: table[path] for path in table if path in tensors}
        return ParameterLayout(tensors, declarations, sizes)

    return {
        "trunk": make_layout(TRUNK_TENSORS, model.config.sizes),
        "compression": make_layout(COMPRESSION_TENSORS, model.compression_sizes),
        "head": make_layout(HEAD_TENSORS, {}),
        "autoencoder": make_layout(AUTOENCODER_TENSORS, model.autoencoder_config.sizes),
    }


# --- config.json ------------------------------------------------------------------------------


class ModelFields(NamedTuple):
    """The fields of a next-vector model's config.json."""

    config: TransformerConfig  # of the trunk
    chunk_size: int  # C
    head: ImplicitHead
    num_targets: int


def is_config(fields: Mapping[str, Any]) -> bool:
    """Return whether a config.json is a next-vector model's: by `architectures` or its fields."""
    architectures = fields.get("architectures")
    if isinstance(architectures, list) and architectures:
        joined_names = " ".join(map(str, architectures))
        return (
            any(kind in joined_names for kind in _ARCHITECTURE_PREFIXES.values())
            and "patch_size" in fields
        )
    return {"patch_size", "noise_size", "num_mlp_layers"} <= set(fields)


def read_config(
    fields: Mapping[str, Any], ignore_fields: Sequence[str] = ()
) -> ModelFields:
    """Read the model's settings from the fields of its config.json."""
    if not is_config(fields):
        raise InputError(
            f"this is no next-vector model: architectures is {fields.get('architectures')!r:.60},"
            " and such a model's config has patch_size, noise_size, num_mlp_layers"
        )
    config_fields = ConfigFields(fields)
    trunk = dataclasses.replace(llama.read_config(config_fields), tie_embeddings=True)
    chunk_size = config_fields.integer("patch_size", maximum=2**16)
    latent_size = config_fields.integer("latent_size")
    num_targets = config_fields.integer("num_targets", 100)
    head = _read_head(config_fields, latent_size)
    config_fields.nested("autoencoder")
    config_fields.check_all_read((*ignore_fields, *_UNUSED_FIELDS))
    return ModelFields(trunk, chunk_size, head, num_targets)


def _read_head(config_fields: ConfigFields, latent_size: int) -> ImplicitHead:
    """The head: of field head if that is there, else the published one."""
    head_settings = config_fields.get("head", None)
    if head_settings is None:
        return EnergyHead(
            width=latent_size,
            noise_size=config_fields.integer("noise_size"),
            depth=config_fields.integer("num_mlp_layers", maximum=MAX_LAYERS),
            num_samples=config_fields.integer("num_samples", 8),
            beta=float(config_fields.number("beta", 1.0)),
        )
    if not isinstance(head_settings, dict):
        raise InputError("field head must be an object of settings")
    with about("field head"):
        return heads.from_dict({"width": latent_size} | head_settings, IMPLICIT_HEADS)


def write_config(model: NextVectorModel) -> dict[str, Any]:
    """The inverse of `read_config`, with the autoencoder's config inside."""
    head_settings = model.head.to_dict()
    latent_size = head_settings.pop("width")
    autoencoder_fields = autoencoder_checkpoint.write_config(model.autoencoder_config)
    fields = {
        **llama.write_config(model.config),
        "architectures": [f"{_ARCHITECTURE_PREFIXES[model.head.kind]}Transformer"],
        "model_type": "",
        "patch_size": model.chunk_size,
        "latent_size": latent_size,
        "num_targets": model.num_targets,
        "autoencoder": autoencoder_fields,
    }
    if isinstance(model.head, EnergyHead) and model.head.hidden_size is None:
        return fields | {
            "noise_size": model.head.noise_size,
            "num_mlp_layers": model.head.depth,
            "num_samples": model.head.num_samples,
            "beta": model.head.beta,
        }
    return fields | {"head": head_settings}


# --- Loading ----------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    autoencoder_folder: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
) -> LanguageModel[NextVectorModel]:
    """Load a next-vector model with its autoencoder, as published or as written by `save`.

    Args:
      folder: the model's folder: config.json, model.safetensors (or shards), and optionally
        tokenizer.json.
      autoencoder_folder: the autoencoder's folder. Omit it if the model's folder holds the
        autoencoder too (tensors ae_model.*). If both folders hold one, they must be equal. An
        autoencoder inside the model's folder may lack a config. Its sizes are then read from its
        tensors, so missing last layers are not noticed. Its activation and its norms' epsilon
        are then the trunk's.
      dtype: dtype of all parameters; config.json's dtype if omitted.
      mesh: devices to shard the parameters over, with axes "data" and "model".
      ignore_fields: fields of config.json that are known not to change the result.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = absolute_path(folder)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        model_fields = read_config(fields, ignore_fields)
        param_dtype = hf_folder.parameter_dtype(fields, dtype)
    tensors = safetensors_files.open_tensors(folder)
    autoencoder_checkpoint.alias_table_copy(tensors, AUTOENCODER_PREFIX)
    autoencoder_lm = None
    if autoencoder_folder is not None:
        autoencoder_lm = autoencoder_checkpoint.load(
            autoencoder_folder,
            dtype=param_dtype,
            mesh=mesh,
            ignore_fields=ignore_fields,
        )
        found_size = autoencoder_lm.model.config.chunk_size
        if found_size != model_fields.chunk_size:
            raise InputError(
                f"{folder / 'config.json'}: patch_size is {model_fields.chunk_size}, but"
                f" {found_size} in {autoencoder_folder}"
            )
    with about(str(folder)):
        model = _make_model(tensors, fields, model_fields, autoencoder_lm)
        layouts, checkpoint_names = _check_tensors(model, tensors, autoencoder_folder)
        flat_params: dict[str, jax.Array] = {}
        for part, layout in layouts.items():
            specs = layout.parameter_specs(param_dtype, mesh)
            flat_params |= layout.build(tensors, checkpoint_names[part], specs)
    params = unflatten(flat_params)
    tokenizer = hf_folder.read_tokenizer(folder, model.config.vocab_size)
    if autoencoder_lm is not None:
        params["autoencoder"] = autoencoder_lm.params
        tokenizer = tokenizer or autoencoder_lm.tokenizer
    return LanguageModel(model, params, tokenizer, hf_folder.kept_fields(fields))


def _make_model(
    tensors: safetensors_files.Tensors,
    fields: Mapping[str, Any],
    model_fields: ModelFields,
    autoencoder_lm: LanguageModel[Autoencoder] | None,
) -> NextVectorModel:
    """The model: what config.json leaves open is in the tensors, or in the autoencoder's folder."""
    if autoencoder_lm is None:
        autoencoder_config = _read_autoencoder_config(
            tensors, fields, model_fields.chunk_size
        )
    else:
        autoencoder_config = autoencoder_lm.model.config
    inner_size = None
    if _INNER_TENSOR in tensors.names and tensors.shape(_INNER_TENSOR):
        inner_size = tensors.shape(_INNER_TENSOR)[0]
    is_default = inner_size == 2 * model_fields.config.hidden_size
    return NextVectorModel(
        model_fields.config,
        autoencoder_config,
        model_fields.head,
        inner_size=None if is_default else inner_size,
        num_targets=model_fields.num_targets,
    )


def _check_tensors(
    model: NextVectorModel,
    tensors: safetensors_files.Tensors,
    autoencoder_folder: str | os.PathLike[str] | None,
) -> tuple[dict[str, ParameterLayout], dict[str, dict[str, str]]]:
    """Raise InputError, before reading, unless the tensors are those of the model.

    Returns:
      the layouts of the parts that are read from here, and each part's names: see
      `ParameterLayout.checkpoint_names`.
    """
    _alias_head_copy(tensors)
    layouts = part_layouts(model)
    is_inside = any(name.startswith(AUTOENCODER_PREFIX) for name in tensors.names)
    if autoencoder_folder is not None and not is_inside:
        del layouts["autoencoder"]
    checkpoint_names = {
        part: layout.checkpoint_names(tensors) for part, layout in layouts.items()
    }
    if autoencoder_folder is not None and is_inside:
        _check_same_autoencoder(
            tensors, checkpoint_names["autoencoder"], autoencoder_folder
        )
        del layouts["autoencoder"]
    used_names = set().union(*(names.values() for names in checkpoint_names.values()))
    used_names |= {
        _HEAD_COPY_PREFIX + name.removeprefix(_HEAD_PREFIX)
        for name in used_names
        if name.startswith(_HEAD_PREFIX)
    }
    autoencoder_checkpoint.check_unused_tensors(tensors, used_names, AUTOENCODER_PREFIX)
    return layouts, checkpoint_names


def _alias_head_copy(tensors: safetensors_files.Tensors) -> None:
    """Let the head be found under its first name; where it has both, they must be equal."""
    stored_names = set(tensors.names)
    for name in sorted(stored_names):
        if not name.startswith(_HEAD_COPY_PREFIX):
            continue
        head_name = _HEAD_PREFIX + name.removeprefix(_HEAD_COPY_PREFIX)
        if head_name not in stored_names:
            tensors.alias(head_name, name)
        elif not are_equal(tensors[name], tensors[head_name]):
            raise InputError(f"tensor {name} is not {head_name} again, as it must be")


def _check_same_autoencoder(
    tensors: safetensors_files.Tensors,
    checkpoint_names: Mapping[str, str],
    autoencoder_folder: str | os.PathLike[str],
) -> None:
    """Raise InputError unless the autoencoder inside equals the one in its own folder."""
    folder = absolute_path(autoencoder_folder)
    outer_tensors = safetensors_files.open_tensors(folder)
    autoencoder_checkpoint.alias_table_copy(outer_tensors)
    for name in checkpoint_names:
        outer_name = name.removeprefix(AUTOENCODER_PREFIX)
        if not are_equal(tensors[name], outer_tensors[outer_name]):
            raise InputError(
                f"tensor {name} is not that of the autoencoder in {folder}"
            )


def _read_autoencoder_config(
    tensors: safetensors_files.Tensors, fields: Mapping[str, Any], chunk_size: int
) -> AutoencoderConfig:
    """Return the config of the autoencoder in a model's own folder."""
    autoencoder_fields = fields.get("autoencoder")
    if not isinstance(autoencoder_fields, dict):
        return _config_of_tensors(tensors, fields, chunk_size)
    with about("field autoencoder"):
        config = autoencoder_checkpoint.read_config(autoencoder_fields)
        if config.chunk_size != chunk_size:
            raise InputError(
                f"patch_size is {config.chunk_size}, but {chunk_size} in the model's own config"
            )
    return config


def _config_of_tensors(
    tensors: safetensors_files.Tensors, fields: Mapping[str, Any], chunk_size: int
) -> AutoencoderConfig:
    """Return the config of an autoencoder without config.json, from its tensors and the trunk."""
    vocab_size, hidden_size = _matrix_shape(tensors, "encoder.embed_tokens")
    mlp_size, _ = _matrix_shape(tensors, "encoder.encoder_layers.0.mlp.gate_proj")
    config_fields = ConfigFields(fields)
    return AutoencoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        encoder_layers=_count_layers(tensors, "encoder"),
        decoder_layers=_count_layers(tensors, "decoder"),
        latent_size=config_fields.integer("latent_size"),
        chunk_size=chunk_size,
        norm_eps=float(config_fields.number("rms_norm_eps", 1e-6)),
        activation=llama.read_config(config_fields).activation,
    )


def _matrix_shape(tensors: safetensors_files.Tensors, name: str) -> tuple[int, int]:
    """The shape of a matrix of the autoencoder in a model's own folder."""
    tensor_name = f"{AUTOENCODER_PREFIX}{name}.weight"
    if tensor_name not in tensors.names:
        raise InputError(
            f"there is no tensor {tensor_name}: this folder does not hold the autoencoder; give"
            " its folder too"
        )
    shape = tensors.shape(tensor_name)
    if len(shape) != 2:
        raise InputError(
            f"tensor {tensor_name} has shape {list(shape)}; it must have two axes"
        )
    num_rows, num_columns = shape
    return num_rows, num_columns


def _count_layers(tensors: safetensors_files.Tensors, side: str) -> int:
    """Count the layers of the encoder or the decoder in a model's own folder."""
    prefix = f"{AUTOENCODER_PREFIX}{side}.{side}_layers."
    names = [
        name.removeprefix(prefix) for name in tensors.names if name.startswith(prefix)
    ]
    if not names:
        raise InputError(
            f"tensor {prefix}0.layernorm.weight is missing, and all layers like it"
        )
    return len({name.split(".")[0] for name in names})


# --- Saving -----------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    lm: LanguageModel[NextVectorModel],
    *,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Write the model and its autoencoder as one folder that `load` reads; whole, or not at all.

    Args:
      folder: made if it is not there.
      lm: the model.
      shard_size: the most bytes of weights in one file.

    Raises:
      InputError: if `lm` is another kind of model, config.json cannot express it, or the folder
        cannot be written.
    """
    model = next_vector_model(lm)
    flat_params = flatten(lm.params)
    check_parameters(flat_params, model.parameter_table())
    dtype = flat_params["trunk/embedding"].dtype
    layouts = part_layouts(model).values()
    layout_by_tensor = {
        name: layout for layout in layouts for name in layout.tensor_shapes
    }
    shapes = {
        name: layout.tensor_shapes[name] for name, layout in layout_by_tensor.items()
    }

    def make_tensor(name: str) -> np.ndarray:
        return layout_by_tensor[name].stored_tensor(flat_params, dtype, name)

    fields = {
        **hf_folder.fields_to_write(lm.hf_fields),
        **write_config(model),
        "torch_dtype": dtype.name,
    }
    written_trunk = read_config(fields).config
    if written_trunk != dataclasses.replace(model.trunk_config, family="llama"):
        raise InputError(
            "a config.json of a next-vector model describes a trunk like Llama's and cannot express"
            f" this one: {model.config}"
        )
    with write_atomically(
        folder, stale_pattern=hf_folder.MODEL_FILES
    ) as staging_folder:
        write_json(staging_folder / "config.json", fields)
        safetensors_files.save_tensors(
            staging_folder, shapes, dtype, make_tensor, shard_size
        )
        hf_folder.write_tokenizer(staging_folder, lm.tokenizer)
