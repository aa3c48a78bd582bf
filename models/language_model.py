"""Checkpoint folders to language models and back, for every family."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import tokenization
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints import hub, parameter_cache
from continuous_lm.models.checkpoints.config_fields import INERT, Fields
from continuous_lm.models.checkpoints.parameter_layout import Layout, check_tree
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import (
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
from continuous_lm.models.families.family import Family
from continuous_lm.models.kv_cache import KVCache
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
      implementation: of attention, and
      remat: whether layers are computed anew for the backward pass; see `Transformer`. To change
        them: `dataclasses.replace(lm, remat=True)`.
      model: the Linen module, whose `apply` is a pure function.
    """

    config: TransformerConfig
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implementation: str = "auto"
    remat: bool = False
    model: Transformer = dataclasses.field(init=False)

    def __post_init__(self):
        model = Transformer(self.config, implementation=self.implementation, remat=self.remat)
        object.__setattr__(self, "model", model)

    def __call__(self, tokens=None, **arguments) -> jax.Array:
        """`model.apply({"params": params}, ...)`, jitted; arguments as of `Transformer.__call__`.

        Values are checked before they are compiled over, as long as they are known.
        """
        tokens = None if tokens is None else jnp.asarray(tokens)
        arguments = {
            name: value if isinstance(value, KVCache) else jnp.asarray(value)
            for name, value in arguments.items()
            if value is not None
        }
        self.model.check(tokens, **arguments)
        return _apply(self.model, self.params, tokens, arguments)


def load(
    folder_or_name: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
    cache_dir: str | os.PathLike | None = None,
) -> LanguageModel:
    """Loads a checkpoint folder in the Hugging Face layout, a bundled model, or one of the hub.

    What the devices hold is read once, cast on the way, and placed; there is never a second copy of
    the model in memory, and on many hosts each reads what its own devices hold.

    Args:
      folder_or_name: a folder with config.json, model.safetensors (or shards with their index) and,
        if it has one, tokenizer.json; or the name of a bundled model, such as "apples"; or
        "org/name" or "org/name@revision" on the Hugging Face hub, which needs the extra `hub`.
      dtype: of the parameters, and so of the computation; as config.json says if left out.
      mesh: devices to shard the parameters over, with axes "data" and "model" (see `axes.RULES`);
        all on the default device if left out.
      ignore_fields: fields of config.json that are known not to change what the model computes.
      cache_dir: where to keep the converted parameters for the next time; nowhere if left out. They
        are converted again when the folder's files have changed.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = _find(folder_or_name)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(f"mesh is a {type(mesh).__name__}; make one with jax.make_mesh")
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        dtype = parameter_dtype(fields, dtype)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    layout = Layout(config, FAMILIES[config.family], parameter_boxes(config))
    targets = layout.targets(dtype, mesh)
    build = functools.partial(layout.read, folder, targets)
    flat = (
        build() if cache_dir is None else parameter_cache.through(cache_dir, folder, targets, build)
    )
    params = traverse_util.unflatten_dict(flat, sep="/")
    notes = {name: value for name, value in fields.items() if name in INERT}
    return LanguageModel(config, params, tokenizer, notes)


def save(
    folder: str | os.PathLike, lm: LanguageModel, *, shard_size: int = safetensors_files.SHARD_SIZE
) -> None:
    """Writes `lm` as a checkpoint folder in the Hugging Face layout, in the parameters' dtype.

    The files reach the folder when all of them are written, not before; weights that were there are
    then gone. Parameters are fetched from their devices tensor by tensor.

    Args:
      folder: made if it is not there.
      lm: the model.
      shard_size: the most bytes of weights in one file; a model that is larger becomes several
        files with an index.

    Raises:
      InputError: if the folder cannot be written, or the family's config.json cannot express the
        model.
    """
    with written_aside(folder, replaces=safetensors_files.FILES) as aside:
        write(aside, lm, shard_size)


def write(
    aside: pathlib.Path, lm: LanguageModel, shard_size: int = safetensors_files.SHARD_SIZE
) -> None:
    """Writes the files of `save` into a folder that is there, one by one."""
    if not isinstance(lm, LanguageModel):
        raise InputError(f"lm is a {type(lm).__name__}; only a LanguageModel can be saved")
    if lm.config.family not in FAMILIES:
        raise InputError(
            f"family is {lm.config.family!r}, which has no layout of checkpoints; only"
            f" {', '.join(FAMILIES)}"
        )
    config, family = lm.config, FAMILIES[lm.config.family]
    layout = Layout(config, family, parameter_boxes(config))
    if not isinstance(lm.params, Mapping):
        raise InputError(f"params are a {type(lm.params).__name__}; they must be a tree of dicts")
    flat = traverse_util.flatten_dict(lm.params, sep="/")
    check_tree(flat, layout.boxes)
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
    with about("config.json"):
        write_json(aside / "config.json", fields)
    layout.write(aside, flat, dtype, shard_size)
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


def read_tokenizer(folder: pathlib.Path, vocab_size: int) -> "tokenizers.Tokenizer | None":
    """The folder's tokenizer, if it has one, refused if it has tokens beyond the vocabulary."""
    tokenizer = tokenization.load(folder)
    if tokenizer is not None and _excess(tokenizer, vocab_size):
        raise InputError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, but config.json's"
            f" vocab_size is {vocab_size}; they do not belong together"
        )
    return tokenizer


def parameter_boxes(config: TransformerConfig) -> dict[str, nn.LogicallyPartitioned]:
    """Path -> shape and axes of every parameter, from the declarations in the modules."""
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros(1, jnp.int32))[
        "params"
    ]
    return traverse_util.flatten_dict(
        tree, sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )


def _excess(tokenizer: "tokenizers.Tokenizer", vocab_size: int) -> bool:
    """Whether it has tokens beyond the vocabulary, special ones aside (Gemma 3's for images)."""
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return any(i >= vocab_size for i in set(tokenizer.get_vocab().values()) - special)


def _written_out(config: TransformerConfig) -> TransformerConfig:
    """The same model, with one entry of the pattern for each layer."""
    return dataclasses.replace(config, window_pattern=config.windowed)


def bundled() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(p.name for p in BUNDLED.iterdir() if p.is_dir())


def _find(folder_or_name: str | os.PathLike) -> pathlib.Path:
    if not isinstance(folder_or_name, (str, os.PathLike)):
        raise InputError(f"{folder_or_name!r:.60} is neither the path of a folder nor a name")
    folder = pathlib.Path(folder_or_name)
    if os.path.isdir(folder):  # False, not an error, for names that no file can have
        return folder
    if str(folder_or_name) in bundled():
        return BUNDLED / str(folder_or_name)
    if os.path.exists(folder):
        raise InputError(f"{folder} is a file; give the folder of a checkpoint")
    if hub.NAME.fullmatch(str(folder_or_name)):
        return hub.fetch(str(folder_or_name))
    raise InputError(
        f"{str(folder_or_name)!r} is neither a folder nor a bundled model ({', '.join(bundled())})"
        " nor org/name on the Hugging Face hub"
    )


def parameter_dtype(fields: Mapping[str, Any], dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype that is asked for, or else what a config.json says."""
    if dtype is not None:
        return _float_dtype(dtype)
    given = [fields[k] for k in ("dtype", "torch_dtype") if fields.get(k) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise InputError(
            f"fields dtype ({given[0]!r:.60}) and torch_dtype ({given[1]!r:.60}) differ"
        )
    name = given[0] if given else "float32"
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
