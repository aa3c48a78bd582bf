"""Checkpoint folders to language models and back, for every family."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm import checkpoints, tokenization
from continuous_lm.errors import InputError, about
from continuous_lm.files import read_json, write_json, written_aside
from continuous_lm.models import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
)
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.family import INERT, Family, Fields
from continuous_lm.models.transformer import Transformer

if TYPE_CHECKING:
    import tokenizers

FAMILIES: dict[str, Family] = {  # by model_type
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "gpt2": gpt2.FAMILY,
}
BUNDLED = pathlib.Path(__file__).parent / "bundled"
_DTYPES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": jnp.float64,
}


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Transformer, params: Any, tokens, arguments: dict[str, Any]) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, tokens, **arguments))


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with its parameters and its tokenizer.

    Attributes:
      config: what it computes.
      params: parameter tree, layers stacked on a leading axis.
      tokenizer: of the `tokenizers` library, or None.
      notes: fields of config.json that do not change what is computed (special tokens, length of
        the context), kept for `save`.
      model: the Linen module, whose `apply` is a pure function.
    """

    config: TransformerConfig
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Transformer = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "model", Transformer(self.config))

    def __call__(self, tokens=None, **arguments) -> jax.Array:
        """`model.apply({"params": params}, ...)`, jitted; arguments as of `Transformer.__call__`.

        Values are checked before they are compiled over, as long as they are known.
        """
        tokens = None if tokens is None else jnp.asarray(tokens)
        arguments = {k: jnp.asarray(v) for k, v in arguments.items() if v is not None}
        self.model.check(tokens, **arguments)
        return _apply(self.model, self.params, tokens, arguments)


def load(
    folder_or_name: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
) -> LanguageModel:
    """Loads a checkpoint folder in the Hugging Face layout, or a bundled model by its name.

    Tensors are read one at a time into stacked buffers, cast on the way, and placed; there is never
    a second copy of the model in memory.

    Args:
      folder_or_name: a folder with config.json, model.safetensors (or shards with their index) and,
        if it has one, tokenizer.json; or the name of a bundled model, such as "apples".
      dtype: of the parameters, and so of the computation; as config.json says if left out.
      mesh: devices to shard the parameters over, with axes "data" and "model" (see `axes.RULES`);
        all on the default device if left out.
      ignore_fields: fields of config.json that are known not to change what the model computes.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = _find(folder_or_name)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        dtype = _dtype(fields) if dtype is None else _float_dtype(dtype)
    tokenizer = tokenization.load(folder)
    if tokenizer is not None and _excess(tokenizer, config.vocab_size):
        raise InputError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, but config.json's"
            f" vocab_size is {config.vocab_size}; they do not belong together"
        )
    params = load_params(folder, config, dtype, mesh)
    notes = {name: value for name, value in fields.items() if name in INERT}
    return LanguageModel(config, params, tokenizer, notes)


def save(folder: str | os.PathLike, lm: LanguageModel) -> None:
    """Writes `lm` as a checkpoint folder in the Hugging Face layout, in the parameters' dtype.

    The files reach the folder when all of them are written, not before.

    Raises:
      InputError: if the folder cannot be written, or the family's config.json cannot express the
        model.
    """
    config, family = lm.config, FAMILIES[lm.config.family]
    boxes = parameter_boxes(config)
    flat = {
        path: np.asarray(value)
        for path, value in traverse_util.flatten_dict(lm.params, sep="/").items()
    }
    _check_tree(flat, boxes)
    dtype = flat["embedding"].dtype
    notes = {k: v for k, v in lm.notes.items() if k not in ("dtype", "transformers_version")}
    fields = {
        **notes,
        "architectures": [family.architecture],
        "model_type": config.family,
        **family.write_config(config),
        "torch_dtype": dtype.name,
    }
    if _written_out(read_config(fields)) != _written_out(config):
        raise InputError(f"a config.json of {config.family} cannot express this model: {config}")
    tensors = {}
    for template, paths in _groups(boxes, family).items():
        for layer in _layers(template, config):
            shape = family.tensors[paths[0]].shape(config.sizes)
            tensor = tensors[template.format(layer=layer)] = np.empty(shape, dtype)
            for path in paths:
                part, axes = _part(flat[path], boxes[path], layer)
                family.tensors[path].view(tensor, axes, config.sizes)[...] = part
    with written_aside(folder) as aside:
        write_json(aside / "config.json", fields)
        checkpoints.save_tensors(aside / checkpoints.WEIGHTS, tensors)
        if lm.tokenizer is not None:
            lm.tokenizer.save(str(aside / "tokenizer.json"))


def read_config(fields: dict[str, Any], ignore_fields: Sequence[str] = ()) -> TransformerConfig:
    """The configuration that a config.json describes."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"field model_type is {kind!r:.60}, which is not handled; only {', '.join(FAMILIES)}"
        )
    reader = Fields(fields)
    config = FAMILIES[kind].read_config(reader)
    reader.finish(tuple(ignore_fields))
    return config


def parameter_boxes(config: TransformerConfig) -> dict[str, nn.LogicallyPartitioned]:
    """Path -> shape and axes of every parameter, from the declarations in the modules."""
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros(1, jnp.int32))[
        "params"
    ]
    return traverse_util.flatten_dict(
        tree, sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )


def load_params(
    folder: pathlib.Path, config: TransformerConfig, dtype: DTypeLike, mesh: Mesh | None = None
) -> Any:
    """The parameter tree that a folder's tensors hold."""
    family, params = FAMILIES[config.family], {}
    with checkpoints.open_tensors(folder) as tensors, about(str(folder)):
        boxes = parameter_boxes(config)
        named = _check_names(tensors, boxes, config)
        for template, paths in _groups(boxes, family).items():
            buffers = {path: _aligned_empty(boxes[path].value.shape, dtype) for path in paths}
            for layer in _layers(template, config):
                tensor = tensors.read(named[template.format(layer=layer)])
                for path, buffer in buffers.items():
                    part, axes = _part(buffer, boxes[path], layer)
                    part[...] = family.tensors[path].view(tensor, axes, config.sizes)
            for path, buffer in buffers.items():
                axes = _axes(boxes[path])
                place = None if mesh is None else axes_lib.sharding(mesh, axes, buffer.shape)
                params[path] = jax.device_put(buffer, place)
    return traverse_util.unflatten_dict(params, sep="/")


def _groups(boxes: Mapping[str, Any], family: Family) -> dict[str, list[str]]:
    """Stored name -> the parameters that lie in that tensor: one, or several in a fused one."""
    groups: dict[str, list[str]] = {}
    for path in boxes:
        groups.setdefault(family.tensors[path].name, []).append(path)
    return groups


def _layers(template: str, config: TransformerConfig) -> range:
    """The layers that have a tensor of this name."""
    return range(config.num_layers if "{layer}" in template else 1)


def _part(
    whole: np.ndarray, box: nn.LogicallyPartitioned, layer: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One layer of a parameter, or all of it if it has no layers; and the axes of that."""
    axes = _axes(box)
    return (whole[layer], axes[1:]) if axes[0] == "L" else (whole, axes)


def _axes(box: nn.LogicallyPartitioned) -> tuple[str, ...]:
    return cast(tuple[str, ...], box.names)


def _check_names(
    tensors: checkpoints.Tensors, boxes: Mapping[str, Any], config: TransformerConfig
) -> dict[str, str]:
    """Refuses a tensor that is missing, left over or of another shape, before anything is read.

    Returns:
      the name of each tensor in the family's table -> its name in this checkpoint.
    """
    family, names = FAMILIES[config.family], tensors.names
    bare = not any(name.startswith(family.prefix) for name in names)
    named: dict[str, str] = {}
    for template, paths in _groups(boxes, family).items():
        shape = family.tensors[paths[0]].shape(config.sizes)
        for layer in _layers(template, config):
            full = template.format(layer=layer)
            name = named[full] = full.removeprefix(family.prefix) if bare else full
            if name not in names:
                raise InputError(f"tensor {name} {list(shape)} is missing")
            if tensors.shape(name) != shape:
                raise InputError(
                    f"tensor {name} in {tensors.path(name).name} has shape"
                    f" {list(tensors.shape(name))}, but config.json asks for {list(shape)}"
                )
    for name in sorted(names - set(named.values())):
        full = family.prefix + name if bare else name
        if any(re.fullmatch(pattern, full) for pattern in family.ignored):
            continue
        if config.tie_embeddings and name == family.tensors["head"].name:
            # Some exporters write the tied table twice.
            table = tensors.read(named[family.tensors["embedding"].name])
            if tensors.shape(name) == table.shape and np.array_equal(tensors.read(name), table):
                continue
            raise InputError(
                f"tensor {name} is not the embedding table, as tie_word_embeddings says"
            )
        raise InputError(
            f"tensor {name} in {tensors.path(name).name} is left over: it has no place"
        )
    return named


def _excess(tokenizer: "tokenizers.Tokenizer", vocab_size: int) -> bool:
    """Whether it has tokens beyond the vocabulary, special ones aside (Gemma 3's for images)."""
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return any(i >= vocab_size for i in set(tokenizer.get_vocab().values()) - special)


def _written_out(config: TransformerConfig) -> TransformerConfig:
    """The same model, with one entry of the pattern for each layer."""
    return dataclasses.replace(config, window_pattern=config.windowed)


def _check_tree(flat: dict[str, np.ndarray], boxes) -> None:
    for path in sorted(set(flat) ^ set(boxes)):
        raise InputError(
            f"parameter {path} is {'missing' if path in boxes else 'left over: it has no place'}"
        )
    for path, box in boxes.items():
        if flat[path].shape != box.value.shape:
            raise InputError(
                f"parameter {path} has shape {flat[path].shape}; it must be {box.value.shape}"
            )


def _find(folder_or_name: str | os.PathLike) -> pathlib.Path:
    folder = pathlib.Path(folder_or_name)
    if os.path.isdir(folder):  # False, not an error, for names that no file can have
        return folder
    bundled = sorted(p.name for p in BUNDLED.iterdir() if p.is_dir())
    if str(folder_or_name) in bundled:
        return BUNDLED / str(folder_or_name)
    if os.path.exists(folder):
        raise InputError(f"{folder} is a file; give the folder of a checkpoint")
    raise InputError(
        f"{str(folder_or_name)!r} is neither a folder nor a bundled model ({', '.join(bundled)})"
    )


def _dtype(fields: dict[str, Any]) -> jnp.dtype:
    name = next(
        (fields[k] for k in ("dtype", "torch_dtype") if fields.get(k) is not None), "float32"
    )
    if not isinstance(name, str) or name not in _DTYPES:
        raise InputError(f"field dtype is {name!r:.60}; it must be one of {', '.join(_DTYPES)}")
    return _float_dtype(name)


def _float_dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in map(jnp.dtype, _DTYPES.values()):
        raise InputError(f"dtype is {dtype!r:.60}; it must be one of {', '.join(_DTYPES)}")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise InputError("dtype float64 needs jax.config.update('jax_enable_x64', True) before it")
    return found


def _aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An empty array that the CPU backend can take over as it is, instead of copying it."""
    dtype, alignment = jnp.dtype(dtype), 64
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + alignment, np.uint8)
    offset = -raw.ctypes.data % alignment
    return raw[offset : offset + size].view(dtype).reshape(shape)
