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

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import as_path, written_aside
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models import language_model
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import AutoencoderConfig
from continuous_lm.models.calm.implicit_heads import IMPLICIT, EnergyHead, ImplicitHead
from continuous_lm.models.calm.model import NextVectorLM, NextVectorModel, chunked, create, stand_in
from continuous_lm.models.checkpoints.config_fields import INERT, MOST_LAYERS, Fields
from continuous_lm.models.checkpoints.parameter_layout import Layout, check_tree, equal, left_over
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.families import llama
from continuous_lm.models.families.family import Family

__all__ = [
    "NextVectorLM",
    "NextVectorModel",
    "chunked",
    "create",
    "is_config",
    "load",
    "read_config",
    "save",
    "write_config",
]

# What a published config.json says beside what is read here, for its own training and loading.
_WITHOUT_MEANING = ("ae_path", "ae_name_or_path", "tie_word_embeddings")
_KINDS = {"energy": "Energy", "flow": "Flow", "diffusion": "Diffusion"}  # in architectures
_CODEC, _HEAD, _HEAD_AGAIN = "ae_model.", "mlp_generator.", "generative_head."
_READ = {
    "read_inner": Stored("embed_proj.0.weight", "F (O D)"),
    "read_inner_bias": Stored("embed_proj.0.bias", "F"),
    "read_outer": Stored("embed_proj.2.weight", "D F"),
    "read_outer_bias": Stored("embed_proj.2.bias", "D"),
    "read_norm": Stored("embed_proj.3.weight", "D"),
    "read_norm_bias": Stored("embed_proj.3.bias", "D"),
}
# The energy head's parameters, each a weight and a bias.
_GENERATOR = {
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
class _Whole(Stored):
    """A parameter that is a stored tensor as it is, or a stack of such."""

    extent: tuple[int, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return self.extent

    def view(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        return tensor


@dataclasses.dataclass(frozen=True)
class _Sizes:
    sizes: Mapping[str, int]


def _layouts(model: NextVectorModel) -> dict[str, Layout]:
    """Where the parameters lie, part by part; those of the autoencoder are under ae_model."""
    tree = jax.eval_shape(model.init, jax.random.key(0), stand_in(model))["params"]
    boxes = traverse_util.flatten_dict(
        tree, sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )

    def part(prefix: str) -> dict[str, nn.LogicallyPartitioned]:
        return {p.removeprefix(prefix): b for p, b in boxes.items() if p.startswith(prefix)}

    def layout(sizes: Mapping[str, int], table: Mapping[str, Stored], prefix: str) -> Layout:
        family = Family(_no_config, _no_config, table, architecture="", prefix="")
        return Layout(_Sizes(sizes), family, part(prefix))

    trunk = {
        path: dataclasses.replace(stored, name=stored.name.replace("model.", "transformer.", 1))
        for path, stored in llama.TENSORS.items()
    }
    inner = boxes["read_inner"].value.shape[0]
    read = {**model.config.sizes, "O": model.chunk_size, "F": inner}
    head = part("head/")
    generator = {}
    for path, box in head.items():
        base, is_bias = path.removesuffix("_bias"), path.endswith("_bias")
        stacked = box.names[0] == "J"
        name = f"{_HEAD}{_GENERATOR[base]}.{'bias' if is_bias else 'weight'}"
        generator[path] = _Whole(name, "", extent=box.value.shape[stacked:])
    found = layout(read, _READ, "read_")
    found = dataclasses.replace(found, boxes={f"read_{p}": b for p, b in found.boxes.items()})
    return {
        "trunk": layout(model.config.sizes, trunk, "trunk/"),
        "": found,
        "head": layout({"J": model.head.depth}, generator, "head/"),
        "autoencoder": autoencoder.layout_of(model.autoencoder, _CODEC),
    }


def _no_config(_: Any) -> Any:
    raise NotImplementedError("a part of a model has no config of its own")


def is_config(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is a next-vector model's: by its architectures, or by its fields."""
    named = fields.get("architectures")
    if isinstance(named, list) and named:
        told = " ".join(map(str, named))
        return any(kind in told for kind in _KINDS.values()) and "patch_size" in fields
    return {"patch_size", "noise_size", "num_mlp_layers"} <= set(fields)


def read_config(
    fields: Mapping[str, Any], ignore_fields: Sequence[str] = ()
) -> tuple[TransformerConfig, int, ImplicitHead, dict[str, Any]]:
    """What a config.json describes.

    Returns:
      the trunk, O, the head, and further attributes of `NextVectorModel`.
    """
    if not is_config(fields):
        raise InputError(
            f"this is no next-vector model: architectures is {fields.get('architectures')!r:.60},"
            " and such a model's config has patch_size, noise_size, num_mlp_layers"
        )
    reader = Fields(fields)
    trunk = dataclasses.replace(llama.read_config(reader), tie_embeddings=True)
    chunk_size = reader.integer("patch_size", most=2**16)
    latent_size = reader.integer("latent_size")
    settings = {"num_targets": reader.integer("num_targets", 100)}
    own = reader.get("head", None)
    if own is not None:
        if not isinstance(own, dict):
            raise InputError("field head must be an object of settings")
        with about("field head"):
            head = heads.from_dict({"width": latent_size} | own, kinds=IMPLICIT)
    else:
        head = EnergyHead(
            width=latent_size,
            noise_size=reader.integer("noise_size"),
            depth=reader.integer("num_mlp_layers", most=MOST_LAYERS),
            num_samples=reader.integer("num_samples", 8),
            beta=float(reader.number("beta", 1.0)),
        )
    reader.nested("autoencoder")
    reader.finish((*ignore_fields, *_WITHOUT_MEANING))
    return trunk, chunk_size, cast(ImplicitHead, head), settings


def write_config(model: NextVectorModel) -> dict[str, Any]:
    """The inverse of `read_config`, with the autoencoder's config inside."""
    head = heads.to_dict(model.head, kinds=IMPLICIT)
    width = head.pop("width")
    fields = {
        **llama.write_config(model.config),
        "architectures": [f"{_KINDS[head['kind']]}Transformer"],
        "model_type": "",
        "patch_size": model.chunk_size,
        "latent_size": width,
        "num_targets": model.num_targets,
        "autoencoder": autoencoder.write_config(model.autoencoder),
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
    folder = as_path(folder)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        trunk, chunk_size, head, settings = read_config(fields, ignore_fields)
        dtype = language_model.parameter_dtype(fields, dtype)
    tensors = safetensors_files.open_tensors(folder)
    autoencoder.know_table(tensors, _CODEC)
    codec = None
    if autoencoder_folder is not None:
        codec = autoencoder.load(
            autoencoder_folder, dtype=dtype, mesh=mesh, ignore_fields=ignore_fields
        )
        coded = codec.config
        if coded.chunk_size != chunk_size:
            raise InputError(
                f"{folder / 'config.json'}: patch_size is {chunk_size}, but {coded.chunk_size} in"
                f" {autoencoder_folder}"
            )
    else:
        with about(str(folder)):
            coded = _codec_config(tensors, fields, chunk_size)
    with about(str(folder)):
        inner = "embed_proj.0.weight"
        if inner in tensors.names and tensors.shape(inner):
            size = tensors.shape(inner)[0]
            settings["inner_size"] = None if size == 2 * trunk.hidden_size else size
        model = NextVectorModel(trunk, coded, head, **settings)
        flat = _read(model, tensors, dtype, mesh, codec and as_path(cast(Any, autoencoder_folder)))
    tokenizer = language_model.read_tokenizer(folder, trunk.vocab_size)
    if codec is not None:
        flat |= {
            f"autoencoder/{path}": array
            for path, array in traverse_util.flatten_dict(codec.params, sep="/").items()
        }
        tokenizer = tokenizer or codec.tokenizer
    notes = {name: value for name, value in fields.items() if name in INERT}
    return NextVectorLM(model, traverse_util.unflatten_dict(flat, sep="/"), tokenizer, notes)


def _read(
    model: NextVectorModel, tensors: safetensors_files.Tensors, dtype, mesh, apart: Any
) -> dict[str, jax.Array]:
    """The parameters by their paths, without the autoencoder's if that lies `apart`."""
    given = set(tensors.names)
    for name in sorted(n for n in given if n.startswith(_HEAD_AGAIN)):
        full = _HEAD + name.removeprefix(_HEAD_AGAIN)
        if full not in given:
            tensors.alias(full, name)
        elif not equal(tensors[name], tensors[full]):
            raise InputError(f"tensor {name} is not {full} again, as it must be")
    layouts = _layouts(model)
    coded = layouts.pop("autoencoder")
    named = {part: layout.named(tensors) for part, layout in layouts.items()}
    if apart is None or any(name.startswith(_CODEC) for name in given):
        named["autoencoder"] = coded.named(tensors)
    if apart is None:
        layouts["autoencoder"] = coded
    elif "autoencoder" in named:
        others = safetensors_files.open_tensors(apart)
        autoencoder.know_table(others)
        for name in named["autoencoder"]:
            if not equal(tensors[name], others[name.removeprefix(_CODEC)]):
                raise InputError(f"tensor {name} is not that of the autoencoder in {apart}")
    known = {name for names in named.values() for name in names.values()}
    again = {name for name in given if name.startswith(_HEAD_AGAIN)}
    again = {name for name in again if _HEAD + name.removeprefix(_HEAD_AGAIN) in known}
    own = known | again
    if "autoencoder" in named:
        autoencoder.check_rest(tensors, own, _CODEC)
    else:
        for name in sorted(given - own):
            raise left_over(tensors, name)
    flat: dict[str, jax.Array] = {}
    for part, layout in layouts.items():
        built = layout.build(tensors, named[part], layout.targets(dtype, mesh))
        flat |= {f"{part}/{path}" if part else path: array for path, array in built.items()}
    return flat


def _codec_config(
    tensors: safetensors_files.Tensors, fields: Mapping[str, Any], chunk_size: int
) -> AutoencoderConfig:
    """Of the autoencoder in a model's own folder."""
    told = fields.get("autoencoder")
    if isinstance(told, dict):
        with about("field autoencoder"):
            found = autoencoder.read_config(told)
            if found.chunk_size != chunk_size:
                raise InputError(
                    f"patch_size is {found.chunk_size}, but {chunk_size} in the model's own config"
                )
            return found

    def shape(name: str) -> tuple[int, ...]:
        full = f"{_CODEC}{name}.weight"
        if full not in tensors.names:
            raise InputError(
                f"there is no tensor {full}: this folder does not hold the autoencoder; give its"
                " folder too"
            )
        found = tensors.shape(full)
        if len(found) != 2:
            raise InputError(f"tensor {full} has shape {list(found)}; it must have two axes")
        return found

    def count(side: str) -> int:
        start = f"{_CODEC}{side}.{side}_layers."
        names = [n.removeprefix(start) for n in tensors.names if n.startswith(start)]
        if not names:
            raise InputError(f"tensor {start}0.layernorm.weight is missing, and all layers like it")
        return len({name.split(".")[0] for name in names})

    vocab_size, hidden_size = shape("encoder.embed_tokens")
    mlp_size, _ = shape("encoder.encoder_layers.0.mlp.gate_proj")
    reader = Fields(fields)
    return AutoencoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        encoder_layers=count("encoder"),
        decoder_layers=count("decoder"),
        latent_size=reader.integer("latent_size"),
        chunk_size=chunk_size,
        norm_eps=float(reader.number("rms_norm_eps", 1e-6)),
        activation=llama.read_config(reader).activation,
    )


def save(
    folder: str | os.PathLike, lm: NextVectorLM, *, shard_size: int = safetensors_files.SHARD_SIZE
) -> None:
    """Writes the model and its autoencoder as one folder that `load` reads; whole, or not at all.

    Args:
      folder: made if it is not there.
      lm: the model.
      shard_size: the most bytes of weights in one file.
    """
    layouts = _layouts(lm.model)
    flat = traverse_util.flatten_dict(lm.params, sep="/")
    parts: dict[str, dict[str, Any]] = {part: {} for part in layouts}
    for path, array in flat.items():
        part, _, rest = path.rpartition("/") if "/" not in path else path.partition("/")
        parts.setdefault(part, {})[rest] = array
    for part in parts.keys() - layouts.keys():
        raise InputError(f"parameter {part} is left over: it has no place")
    for part, layout in layouts.items():
        with about(part or "the compression"):
            check_tree(parts[part], layout.boxes)
    dtype = flat["trunk/embedding"].dtype
    home = {name: part for part, layout in layouts.items() for name in layout.shapes}
    shapes = {name: layouts[part].shapes[name] for name, part in home.items()}

    def tensor(name: str) -> np.ndarray:
        part = home[name]
        return layouts[part].tensor(parts[part], dtype, name)

    notes = {k: v for k, v in lm.notes.items() if k not in ("dtype", "transformers_version")}
    with written_aside(folder, replaces=safetensors_files.FILES) as aside:
        write_json(
            aside / "config.json",
            {**notes, **write_config(lm.model), "torch_dtype": dtype.name},
        )
        safetensors_files.save_tensors(aside, shapes, dtype, tensor, shard_size)
        if lm.tokenizer is not None:
            lm.tokenizer.save(str(aside / "tokenizer.json"))
