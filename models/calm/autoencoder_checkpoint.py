"""Folders of autoencoders, as they are published (CALM, arXiv:2510.27688): `load` and `save`.

`parameter_layout`, `alias_table_copy` and `check_unused_tensors` serve the folders of next-vector
models too, in which an autoencoder's tensors have a prefix.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.calm.autoencoder_network import (
    Autoencoder,
    AutoencoderConfig,
    parameter_table,
)
from continuous_lm.models.checkpoints import hf_folder
from continuous_lm.models.checkpoints.config_fields import MAX_LAYERS, ConfigFields
from continuous_lm.models.checkpoints.parameter_layout import (
    ParameterLayout,
    are_equal,
    check_parameters,
    unused_tensor_error,
)
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.families.shared_fields import (
    read_activation,
    write_activation,
)
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import flatten, unflatten

__all__ = [
    "ARCHITECTURE",
    "TABLE_COPY_TENSOR",
    "TABLE_TENSOR",
    "TENSORS",
    "alias_table_copy",
    "check_unused_tensors",
    "checkpoint_layout",
    "is_config",
    "load",
    "read_config",
    "save",
    "write_config",
]

ARCHITECTURE = "Autoencoder"
TABLE_TENSOR = "encoder.embed_tokens.weight"
TABLE_COPY_TENSOR = "decoder.lm_head_weight"  # the table again, in some folders

# Fields of the trunk's kind that a model without attention has no use for.
_UNUSED_FIELDS = frozenset(
    """attention_bias head_dim num_attention_heads num_hidden_layers num_key_value_heads
    partial_rotary_factor rope_parameters rope_scaling rope_theta""".split()
)


# --- Tensors ----------------------------------------------------------------------------------


def _layers_tensors(side: str) -> dict[str, StoredTensor]:
    """Return the stored tensors of the layers and the last norm of the encoder or the decoder."""
    layer_prefix = f"{side}.{side}_layers.{{layer}}."
    return {
        f"{side}_norm": StoredTensor(f"{layer_prefix}layernorm.weight", "D"),
        f"{side}_gate": StoredTensor(f"{layer_prefix}mlp.gate_proj.weight", "F D"),
        f"{side}_up": StoredTensor(f"{layer_prefix}mlp.up_proj.weight", "F D"),
        f"{side}_down": StoredTensor(f"{layer_prefix}mlp.down_proj.weight", "D F"),
        f"{side}_last_norm": StoredTensor(f"{side}.norm.weight", "D"),
    }


_LATENT_WEIGHT = "encoder.hidden_to_latent.weight"
_LATENT_BIAS = "encoder.hidden_to_latent.bias"

# Parameter path -> where it is stored.
TENSORS: Mapping[str, StoredTensor] = {
    "embedding": StoredTensor(TABLE_TENSOR, "V D"),
    **_layers_tensors("encoder"),
    "squeeze": StoredTensor("encoder.squeeze_layer.weight", "D (C D)"),
    "squeeze_bias": StoredTensor("encoder.squeeze_layer.bias", "D"),
    "mean": StoredTensor(_LATENT_WEIGHT, "(2 W) D", part_index=0),
    "log_scale": StoredTensor(_LATENT_WEIGHT, "(2 W) D", part_index=1),
    "mean_bias": StoredTensor(_LATENT_BIAS, "(2 W)", part_index=0),
    "log_scale_bias": StoredTensor(_LATENT_BIAS, "(2 W)", part_index=1),
    "latent": StoredTensor("decoder.latent_to_hidden.weight", "D W"),
    "latent_bias": StoredTensor("decoder.latent_to_hidden.bias", "D"),
    **_layers_tensors("decoder"),
    "expand": StoredTensor("decoder.expand_layer.weight", "(C D) D"),
    "expand_bias": StoredTensor("decoder.expand_layer.bias", "(C D)"),
}


def checkpoint_layout(config: AutoencoderConfig) -> ParameterLayout:
    """Return the layout of an autoencoder's parameters in a checkpoint folder."""
    return ParameterLayout(TENSORS, parameter_table(config), config.sizes)


def alias_table_copy(tensors: safetensors_files.Tensors, prefix: str = "") -> None:
    """Let the table be found where it is stored as the decoder's alone, as tied tensors may be."""
    table_name = prefix + TABLE_TENSOR
    copy_name = prefix + TABLE_COPY_TENSOR
    if copy_name in tensors.names and table_name not in tensors.names:
        tensors.alias(table_name, copy_name)


def check_unused_tensors(
    tensors: safetensors_files.Tensors, used_names: set[str], prefix: str = ""
) -> None:
    """Raise InputError for tensors beyond `used_names`, except a copy of the tied table."""
    table_name = prefix + TABLE_TENSOR
    copy_name = prefix + TABLE_COPY_TENSOR
    for name in sorted(tensors.names - used_names):
        if name != copy_name:
            raise unused_tensor_error(tensors, name)
        if not are_equal(tensors[name], tensors[table_name]):
            raise InputError(
                f"tensor {name} is not the table {table_name}, as it must be"
            )


# --- config.json ------------------------------------------------------------------------------


def is_config(fields: Mapping[str, Any]) -> bool:
    """Return whether a config.json is an autoencoder's: by `architectures`, else by its fields."""
    architectures = fields.get("architectures")
    if isinstance(architectures, list) and architectures:
        return any(ARCHITECTURE in str(name) for name in architectures)
    return {"num_encoder_layers", "num_decoder_layers", "latent_size"} <= set(fields)


def read_config(
    fields: Mapping[str, Any], ignore_fields: Sequence[str] = ()
) -> AutoencoderConfig:
    """The configuration that a config.json describes."""
    if not is_config(fields):
        raise InputError(
            f"this is no autoencoder: architectures is {fields.get('architectures')!r:.60}, and an"
            " autoencoder's config has num_encoder_layers, num_decoder_layers, latent_size"
        )
    config_fields = ConfigFields(fields)
    config_fields.must_be("mlp_bias", False)
    # Either way the decoder's table is the encoder's.
    config_fields.must_be("tie_word_embeddings", True, False)
    defaults = AutoencoderConfig
    config = AutoencoderConfig(
        vocab_size=config_fields.integer("vocab_size"),
        hidden_size=config_fields.integer("hidden_size"),
        mlp_size=config_fields.integer("intermediate_size"),
        encoder_layers=config_fields.integer("num_encoder_layers", maximum=MAX_LAYERS),
        decoder_layers=config_fields.integer("num_decoder_layers", maximum=MAX_LAYERS),
        latent_size=config_fields.integer("latent_size"),
        chunk_size=config_fields.integer("patch_size", maximum=2**16),
        norm_eps=float(config_fields.number("rms_norm_eps", 1e-6)),
        activation=read_activation(config_fields),
        dropout=_read_nonnegative(config_fields, "ae_dropout", defaults.dropout),
        kl_weight=_read_nonnegative(config_fields, "kl_weight", defaults.kl_weight),
        kl_floor=_read_nonnegative(config_fields, "kl_clamp", defaults.kl_floor),
    )
    config_fields.check_all_read((*ignore_fields, *_UNUSED_FIELDS))
    return config


def _read_nonnegative(config_fields: ConfigFields, name: str, default: float) -> float:
    """A number that may be 0, which `ConfigFields.number` refuses."""
    value = config_fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InputError(
            f"field {name} is {value!r:.60}; it must be a number, at least 0"
        )
    return float(value)


def write_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_encoder_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "latent_size": config.latent_size,
        "patch_size": config.chunk_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config.activation),
        "tie_word_embeddings": True,
        "ae_dropout": config.dropout,
        "kl_weight": config.kl_weight,
        "kl_clamp": config.kl_floor,
    }


# --- Folders ----------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
) -> LanguageModel[Autoencoder]:
    """Load an autoencoder from a folder in the published layout.

    Args:
      folder: with config.json, model.safetensors (or shards) and, if it has one, tokenizer.json.
      dtype: dtype of the parameters; config.json's dtype if omitted.
      mesh: devices to shard the parameters over, with axes "data" and "model".
      ignore_fields: fields of config.json that are known not to change the result.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = absolute_path(folder)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        param_dtype = hf_folder.parameter_dtype(fields, dtype)
    tokenizer = hf_folder.read_tokenizer(folder, config.vocab_size)
    tensors = safetensors_files.open_tensors(folder)
    layout = checkpoint_layout(config)
    with about(str(folder)):
        alias_table_copy(tensors)
        checkpoint_names = layout.checkpoint_names(tensors)
        check_unused_tensors(tensors, set(checkpoint_names))
        specs = layout.parameter_specs(param_dtype, mesh)
        flat_params = layout.build(tensors, checkpoint_names, specs)
    return LanguageModel(
        Autoencoder(config),
        unflatten(flat_params),
        tokenizer,
        hf_folder.kept_fields(fields),
    )


def save(
    folder: str | os.PathLike[str],
    lm: LanguageModel[Autoencoder],
    *,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Write the autoencoder as a folder that `load` reads; whole, or not at all.

    Args:
      folder: made if it is not there.
      lm: the autoencoder.
      shard_size: the most bytes of weights in one file.

    Raises:
      InputError: if `lm` is another kind of model, or the folder cannot be written.
    """
    if not isinstance(lm.model, Autoencoder):
        raise InputError(
            f"lm holds a {type(lm.model).__name__}, and this needs an Autoencoder"
        )
    layout = checkpoint_layout(lm.model.config)
    flat_params = flatten(lm.params)
    check_parameters(flat_params, layout.declarations)
    dtype = flat_params["embedding"].dtype
    fields = {
        **lm.hf_fields,
        **write_config(lm.model.config),
        "torch_dtype": dtype.name,
    }
    fields.pop("dtype", None)
    with write_atomically(
        folder, stale_pattern=hf_folder.MODEL_FILES
    ) as staging_folder:
        write_json(staging_folder / "config.json", fields)
        layout.write(staging_folder, flat_params, dtype, shard_size)
        hf_folder.write_tokenizer(staging_folder, lm.tokenizer)
