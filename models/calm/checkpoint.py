"""CALM checkpoints (Shao et al., arXiv:2510.27688): next-vector models as they are published.

    lm = calm.load("path/to/a/calm/folder", "path/to/its/autoencoder/folder")
    calm.save("path/to/a/folder/that/holds/both", lm)

A checkpoint has four parts, each with a table of its own: the trunk, named as Llama's, the
compression of a chunk's embeddings, the head, and, in some, the autoencoder.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import AutoencoderConfig
from continuous_lm.models.calm.implicit_heads import (
    IMPLICIT_HEADS,
    EnergyHead,
    ImplicitHead,
)
from continuous_lm.models.calm.model import (
    NextVectorLM,
    NextVectorModel,
    create,
    example_inputs,
    split_into_chunks,
)
from continuous_lm.models.checkpoints.config_fields import (
    INERT_FIELDS,
    MAX_LAYERS,
    ConfigFields,
)
from continuous_lm.models.checkpoints.hf_folder import parameter_dtype, read_tokenizer
from continuous_lm.models.checkpoints.parameter_layout import (
    ParameterLayout,
    are_equal,
    check_parameters,
    unused_tensor_error,
)
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.families import llama
from continuous_lm.models.families.family import Family
from continuous_lm.models.linen_transformer import table_of_boxes
from continuous_lm.models.parameters import Declaration

__all__ = [
    "NextVectorLM",
    "NextVectorModel",
    "create",
    "is_config",
    "load",
    "read_config",
    "save",
    "split_into_chunks",
    "write_config",
]

# What a published config.json says beside what is read here, for its own training and loading.
_UNUSED_FIELDS = ("ae_path", "ae_name_or_path", "tie_word_embeddings")
_ARCHITECTURE_PREFIXES = {
    "energy": "Energy",
    "flow": "Flow",
    "diffusion": "Diffusion",
}  # in architectures
_CODEC_PREFIX, _HEAD_PREFIX, _HEAD_COPY_PREFIX = (
    "ae_model.",
    "mlp_generator.",
    "generative_head.",
)
_COMPRESSION_TENSORS = {
    "read_inner": StoredTensor("embed_proj.0.weight", "F (C D)"),
    "read_inner_bias": StoredTensor("embed_proj.0.bias", "F"),
    "read_outer": StoredTensor("embed_proj.2.weight", "D F"),
    "read_outer_bias": StoredTensor("embed_proj.2.bias", "D"),
    "read_norm": StoredTensor("embed_proj.3.weight", "D"),
    "read_norm_bias": StoredTensor("embed_proj.3.bias", "D"),
}
# The energy head's parameters, each a weight and a bias.
_HEAD_TENSORS = {
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
    "time": "time_embd",  # of the heads that are told a time: not published
}


@dataclasses.dataclass(frozen=True)
class _UnslicedTensor(StoredTensor):
    """A parameter that is a stored tensor as it is, or a stack of such."""

    stored_shape: tuple[int, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return self.stored_shape

    def view(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        return tensor


@dataclasses.dataclass(frozen=True)
class _AxisSizes:
    sizes: Mapping[str, int]


def _part_layouts(model: NextVectorModel) -> dict[str, ParameterLayout]:
    """Where the parameters lie, part by part; those of the autoencoder are under ae_model."""
    declared_tree = jax.eval_shape(
        model.init, jax.random.key(0), example_inputs(model)
    )["params"]
    declarations = table_of_boxes(declared_tree)

    def part_declarations(prefix: str) -> dict[str, Declaration]:
        return {
            param_path.removeprefix(prefix): param_declaration
            for param_path, param_declaration in declarations.items()
            if param_path.startswith(prefix)
        }

    def make_layout(
        sizes: Mapping[str, int], table: Mapping[str, StoredTensor], prefix: str
    ) -> ParameterLayout:
        family = Family(
            _raise_no_config, _raise_no_config, table, architecture="", tensor_prefix=""
        )
        return ParameterLayout(_AxisSizes(sizes), family, part_declarations(prefix))

    trunk_tensors = {
        path: dataclasses.replace(
            stored, name=stored.name.replace("model.", "transformer.", 1)
        )
        for path, stored in llama.TENSORS.items()
    }
    inner_size = declarations["read_inner"].shape[0]
    compression_sizes = {**model.config.sizes, "C": model.chunk_size, "F": inner_size}
    head_declarations = part_declarations("head/")
    head_tensors = {}
    for path, declaration in head_declarations.items():
        base_path, is_bias = path.removesuffix("_bias"), path.endswith("_bias")
        is_stacked = declaration.axes[0] == "J"
        name = f"{_HEAD_PREFIX}{_HEAD_TENSORS[base_path]}.{'bias' if is_bias else 'weight'}"
        head_tensors[path] = _UnslicedTensor(
            name,
            "",
            stored_shape=declaration.shape[1:] if is_stacked else declaration.shape,
        )
    compression_layout = make_layout(compression_sizes, _COMPRESSION_TENSORS, "read_")
    compression_layout = dataclasses.replace(
        compression_layout,
        declarations={
            f"read_{param_path}": param_declaration
            for param_path, param_declaration in compression_layout.declarations.items()
        },
    )
    return {
        "trunk": make_layout(model.config.sizes, trunk_tensors, "trunk/"),
        "": compression_layout,
        "head": make_layout({"J": model.head.depth}, head_tensors, "head/"),
        "autoencoder": autoencoder.checkpoint_layout(
            model.autoencoder_config, _CODEC_PREFIX
        ),
    }


def _raise_no_config(_: Any) -> Any:
    raise NotImplementedError("a part of a model has no config of its own")


def is_config(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is a next-vector model's: by its architectures, or by its fields."""
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
) -> tuple[TransformerConfig, int, ImplicitHead, dict[str, Any]]:
    """What a config.json describes.

    Returns:
      the trunk, C, the head, and further attributes of `NextVectorModel`.
    """
    if not is_config(fields):
        raise InputError(
            f"this is no next-vector model: architectures is {fields.get('architectures')!r:.60},"
            " and such a model's config has patch_size, noise_size, num_mlp_layers"
        )
    config_fields = ConfigFields(fields)
    trunk = dataclasses.replace(llama.read_config(config_fields), tie_embeddings=True)
    chunk_size = config_fields.integer("patch_size", maximum=2**16)
    latent_size = config_fields.integer("latent_size")
    settings = {"num_targets": config_fields.integer("num_targets", 100)}
    head_settings = config_fields.get("head", None)
    if head_settings is not None:
        if not isinstance(head_settings, dict):
            raise InputError("field head must be an object of settings")
        with about("field head"):
            head = heads.from_dict(
                {"width": latent_size} | head_settings, registry=IMPLICIT_HEADS
            )
    else:
        head = EnergyHead(
            width=latent_size,
            noise_size=config_fields.integer("noise_size"),
            depth=config_fields.integer("num_mlp_layers", maximum=MAX_LAYERS),
            num_samples=config_fields.integer("num_samples", 8),
            beta=float(config_fields.number("beta", 1.0)),
        )
    config_fields.nested("autoencoder")
    config_fields.check_all_read((*ignore_fields, *_UNUSED_FIELDS))
    return trunk, chunk_size, cast(ImplicitHead, head), settings


def write_config(model: NextVectorModel) -> dict[str, Any]:
    """The inverse of `read_config`, with the autoencoder's config inside."""
    head = heads.to_dict(model.head, registry=IMPLICIT_HEADS)
    latent_size = head.pop("width")
    fields = {
        **llama.write_config(model.config),
        "architectures": [f"{_ARCHITECTURE_PREFIXES[head['kind']]}Transformer"],
        "model_type": "",
        "patch_size": model.chunk_size,
        "latent_size": latent_size,
        "num_targets": model.num_targets,
        "autoencoder": autoencoder.write_config(model.autoencoder_config),
    }
    if isinstance(model.head, EnergyHead) and model.head.hidden_size is None:
        return fields | {
            "noise_size": model.head.noise_size,
            "num_mlp_layers": model.head.depth,
            "num_samples": model.head.num_samples,
            "beta": model.head.beta,
        }
    return fields | {"head": head}


def load(
    folder: str | os.PathLike,
    autoencoder_folder: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
) -> NextVectorLM:
    """Loads a next-vector model with its autoencoder, as they are published or as `save` writes.

    Args:
      folder: of the model: config.json, model.safetensors (or shards), perhaps tokenizer.json.
      autoencoder_folder: of its autoencoder. It can be left out if the model's folder holds the
        autoencoder too (tensors ae_model.*); if both do, they must be equal. Without a config of
        its own, that autoencoder's sizes are those of its tensors (that its last layers are
        missing cannot be seen), and its activation and the constant of its norms the trunk's.
      dtype: of all parameters; as the model's config.json says if left out.
      mesh: devices to shard the parameters over, with axes "data" and "model".
      ignore_fields: fields of config.json that are known not to change what is computed.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = absolute_path(folder)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        trunk, chunk_size, head, settings = read_config(fields, ignore_fields)
        dtype = parameter_dtype(fields, dtype)
    tensors = safetensors_files.open_tensors(folder)
    autoencoder.alias_table_copy(tensors, _CODEC_PREFIX)
    codec = None
    if autoencoder_folder is not None:
        codec = autoencoder.load(
            autoencoder_folder, dtype=dtype, mesh=mesh, ignore_fields=ignore_fields
        )
        codec_config = codec.config
        if codec_config.chunk_size != chunk_size:
            raise InputError(
                f"{folder / 'config.json'}: patch_size is {chunk_size}, but"
                f" {codec_config.chunk_size} in"
                f" {autoencoder_folder}"
            )
    else:
        with about(str(folder)):
            codec_config = _read_codec_config(tensors, fields, chunk_size)
    with about(str(folder)):
        inner_tensor = "embed_proj.0.weight"
        if inner_tensor in tensors.names and tensors.shape(inner_tensor):
            inner_size = tensors.shape(inner_tensor)[0]
            settings["inner_size"] = (
                None if inner_size == 2 * trunk.hidden_size else inner_size
            )
        model = NextVectorModel(trunk, codec_config, head, **settings)
        flat_params = _read_params(
            model,
            tensors,
            dtype,
            mesh,
            codec and absolute_path(cast(Any, autoencoder_folder)),
        )
    tokenizer = read_tokenizer(folder, trunk.vocab_size)
    if codec is not None:
        flat_params |= {
            f"autoencoder/{path}": array
            for path, array in traverse_util.flatten_dict(codec.params, sep="/").items()
        }
        tokenizer = tokenizer or codec.tokenizer
    hf_fields = {name: value for name, value in fields.items() if name in INERT_FIELDS}
    return NextVectorLM(
        model, traverse_util.unflatten_dict(flat_params, sep="/"), tokenizer, hf_fields
    )


def _read_params(
    model: NextVectorModel,
    tensors: safetensors_files.Tensors,
    dtype,
    mesh,
    codec_folder: Any,
) -> dict[str, jax.Array]:
    """The parameters by their paths, without the autoencoder's if that lies in `codec_folder`."""
    stored_names = set(tensors.names)
    for name in sorted(
        stored_name
        for stored_name in stored_names
        if stored_name.startswith(_HEAD_COPY_PREFIX)
    ):
        head_name = _HEAD_PREFIX + name.removeprefix(_HEAD_COPY_PREFIX)
        if head_name not in stored_names:
            tensors.alias(head_name, name)
        elif not are_equal(tensors[name], tensors[head_name]):
            raise InputError(f"tensor {name} is not {head_name} again, as it must be")
    layouts = _part_layouts(model)
    codec_layout = layouts.pop("autoencoder")
    checkpoint_names = {
        part: layout.checkpoint_names(tensors) for part, layout in layouts.items()
    }
    if codec_folder is None or any(
        name.startswith(_CODEC_PREFIX) for name in stored_names
    ):
        checkpoint_names["autoencoder"] = codec_layout.checkpoint_names(tensors)
    if codec_folder is None:
        layouts["autoencoder"] = codec_layout
    elif "autoencoder" in checkpoint_names:
        codec_tensors = safetensors_files.open_tensors(codec_folder)
        autoencoder.alias_table_copy(codec_tensors)
        for name in checkpoint_names["autoencoder"]:
            if not are_equal(
                tensors[name], codec_tensors[name.removeprefix(_CODEC_PREFIX)]
            ):
                raise InputError(
                    f"tensor {name} is not that of the autoencoder in {codec_folder}"
                )
    used_names = {
        name for names in checkpoint_names.values() for name in names.values()
    }
    copy_names = {name for name in stored_names if name.startswith(_HEAD_COPY_PREFIX)}
    copy_names = {
        name
        for name in copy_names
        if _HEAD_PREFIX + name.removeprefix(_HEAD_COPY_PREFIX) in used_names
    }
    expected_names = used_names | copy_names
    if "autoencoder" in checkpoint_names:
        autoencoder.check_unused_tensors(tensors, expected_names, _CODEC_PREFIX)
    else:
        for name in sorted(stored_names - expected_names):
            raise unused_tensor_error(tensors, name)
    flat_params: dict[str, jax.Array] = {}
    for part, layout in layouts.items():
        part_params = layout.build(
            tensors, checkpoint_names[part], layout.parameter_specs(dtype, mesh)
        )
        flat_params |= {
            f"{part}/{path}" if part else path: array
            for path, array in part_params.items()
        }
    return flat_params


def _read_codec_config(
    tensors: safetensors_files.Tensors, fields: Mapping[str, Any], chunk_size: int
) -> AutoencoderConfig:
    """Of the autoencoder in a model's own folder."""
    codec_fields = fields.get("autoencoder")
    if isinstance(codec_fields, dict):
        with about("field autoencoder"):
            codec_config = autoencoder.read_config(codec_fields)
            if codec_config.chunk_size != chunk_size:
                raise InputError(
                    f"patch_size is {codec_config.chunk_size}, but {chunk_size} in the model's"
                    " own config"
                )
            return codec_config

    def matrix_shape(name: str) -> tuple[int, ...]:
        tensor_name = f"{_CODEC_PREFIX}{name}.weight"
        if tensor_name not in tensors.names:
            raise InputError(
                f"there is no tensor {tensor_name}: this folder does not hold the autoencoder;"
                " give its"
                " folder too"
            )
        stored_shape = tensors.shape(tensor_name)
        if len(stored_shape) != 2:
            raise InputError(
                f"tensor {tensor_name} has shape {list(stored_shape)}; it must have two axes"
            )
        return stored_shape

    def count_layers(side: str) -> int:
        layers_prefix = f"{_CODEC_PREFIX}{side}.{side}_layers."
        names = [
            stored_name.removeprefix(layers_prefix)
            for stored_name in tensors.names
            if stored_name.startswith(layers_prefix)
        ]
        if not names:
            raise InputError(
                f"tensor {layers_prefix}0.layernorm.weight is missing, and all layers like it"
            )
        return len({name.split(".")[0] for name in names})

    vocab_size, hidden_size = matrix_shape("encoder.embed_tokens")
    mlp_size, _ = matrix_shape("encoder.encoder_layers.0.mlp.gate_proj")
    config_fields = ConfigFields(fields)
    return AutoencoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        encoder_layers=count_layers("encoder"),
        decoder_layers=count_layers("decoder"),
        latent_size=config_fields.integer("latent_size"),
        chunk_size=chunk_size,
        norm_eps=float(config_fields.number("rms_norm_eps", 1e-6)),
        activation=llama.read_config(config_fields).activation,
    )


def save(
    folder: str | os.PathLike,
    lm: NextVectorLM,
    *,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Writes the model and its autoencoder as one folder that `load` reads; whole, or not at all.

    Args:
      folder: made if it is not there.
      lm: the model.
      shard_size: the most bytes of weights in one file.
    """
    layouts = _part_layouts(lm.model)
    flat_params = traverse_util.flatten_dict(lm.params, sep="/")
    params_by_part: dict[str, dict[str, Any]] = {part: {} for part in layouts}
    for path, array in flat_params.items():
        part, _, part_path = (
            path.rpartition("/") if "/" not in path else path.partition("/")
        )
        params_by_part.setdefault(part, {})[part_path] = array
    for part in params_by_part.keys() - layouts.keys():
        raise InputError(f"parameter {part} is left over: it has no place")
    for part, layout in layouts.items():
        with about(part or "the compression"):
            check_parameters(params_by_part[part], layout.declarations)
    dtype = flat_params["trunk/embedding"].dtype
    part_by_tensor = {
        name: part for part, layout in layouts.items() for name in layout.tensor_shapes
    }
    shapes = {
        name: layouts[part].tensor_shapes[name] for name, part in part_by_tensor.items()
    }

    def make_tensor(name: str) -> np.ndarray:
        part = part_by_tensor[name]
        return layouts[part].stored_tensor(params_by_part[part], dtype, name)

    hf_fields = {
        field: value
        for field, value in lm.hf_fields.items()
        if field not in ("dtype", "transformers_version")
    }
    with write_atomically(
        folder, stale_pattern=safetensors_files.CHECKPOINT_FILES
    ) as staging_folder:
        write_json(
            staging_folder / "config.json",
            {**hf_fields, **write_config(lm.model), "torch_dtype": dtype.name},
        )
        safetensors_files.save_tensors(
            staging_folder, shapes, dtype, make_tensor, shard_size
        )
        if lm.tokenizer is not None:
            lm.tokenizer.save(str(staging_folder / "tokenizer.json"))
