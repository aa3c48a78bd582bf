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
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints import hub, parameter_cache
from continuous_lm.models.checkpoints.config_fields import INERT_FIELDS, ConfigFields
from continuous_lm.models.checkpoints.parameter_layout import (
    ParameterLayout,
    check_parameters,
)
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families.registry import FAMILIES
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.transformer import Transformer

if TYPE_CHECKING:
    import tokenizers

BUNDLED_FOLDER = pathlib.Path(__file__).parent / "bundled"
_DTYPE_BY_NAME = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "float64": jnp.float64,
}


@functools.partial(jax.jit, static_argnums=0)
def _apply_jitted(
    model: Transformer, params: Any, tokens, arguments: dict[str, Any]
) -> jax.Array:
    return cast(jax.Array, model.apply({"params": params}, tokens, **arguments))


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with its parameters and its tokenizer.

    Attributes:
      config: what it computes.
      params: parameter tree, layers stacked on a leading axis.
      tokenizer: of the `tokenizers` library, or None.
      hf_fields: fields of config.json that do not change what is computed (special tokens, length
        of the context), kept for `save`.
      implementation: of attention, and
      remat: whether layers are computed anew for the backward pass; see `Transformer`. To change
        them: `dataclasses.replace(lm, remat=True)`.
      model: the Linen module, whose `apply` is a pure function.
    """

    config: TransformerConfig
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    hf_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implementation: str = "auto"
    remat: bool = False
    model: Transformer = dataclasses.field(init=False)

    def __post_init__(self):
        model = Transformer(
            self.config, implementation=self.implementation, remat=self.remat
        )
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
        return _apply_jitted(self.model, self.params, tokens, arguments)


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
      mesh: devices to shard the parameters over, with axes "data" and "model" (see
        `axes.SHARDING_RULES`); all on the default device if left out.
      ignore_fields: fields of config.json that are known not to change what the model computes.
      cache_dir: where to keep the converted parameters for the next time; nowhere if left out. They
        are converted again when the folder's files have changed.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = _find_folder(folder_or_name)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            f"mesh is a {type(mesh).__name__}; make one with jax.make_mesh"
        )
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        dtype = parameter_dtype(fields, dtype)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    layout = ParameterLayout(
        config, FAMILIES[config.family], parameter_declarations(config)
    )
    specs = layout.parameter_specs(dtype, mesh)
    read_params = functools.partial(layout.read, folder, specs)
    flat_params = (
        read_params()
        if cache_dir is None
        else parameter_cache.load_or_build(cache_dir, folder, specs, read_params)
    )
    params = traverse_util.unflatten_dict(flat_params, sep="/")
    hf_fields = {name: value for name, value in fields.items() if name in INERT_FIELDS}
    return LanguageModel(config, params, tokenizer, hf_fields)


def save(
    folder: str | os.PathLike,
    lm: LanguageModel,
    *,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
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
    with write_atomically(
        folder, stale_pattern=safetensors_files.CHECKPOINT_FILES
    ) as staging_folder:
        write_files(staging_folder, lm, shard_size)


def write_files(
    staging_folder: pathlib.Path,
    lm: LanguageModel,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Writes the files of `save` into a folder that is there, one by one."""
    if not isinstance(lm, LanguageModel):
        raise InputError(
            f"lm is a {type(lm).__name__}; only a LanguageModel can be saved"
        )
    if lm.config.family not in FAMILIES:
        raise InputError(
            f"family is {lm.config.family!r}, which has no layout of checkpoints; only"
            f" {', '.join(FAMILIES)}"
        )
    config, family = lm.config, FAMILIES[lm.config.family]
    layout = ParameterLayout(config, family, parameter_declarations(config))
    if not isinstance(lm.params, Mapping):
        raise InputError(
            f"params are a {type(lm.params).__name__}; they must be a tree of dicts"
        )
    flat_params = traverse_util.flatten_dict(lm.params, sep="/")
    check_parameters(flat_params, layout.declarations)
    dtype = flat_params["embedding"].dtype
    hf_fields = {
        name: value
        for name, value in lm.hf_fields.items()
        if name not in ("dtype", "transformers_version")
    }
    fields = {
        **hf_fields,
        "architectures": [family.architecture],
        "model_type": config.family,
        **family.write_config(config),
        "torch_dtype": dtype.name,
    }
    if _with_full_window_pattern(read_config(fields)) != _with_full_window_pattern(
        config
    ):
        raise InputError(
            f"a config.json of {config.family} cannot express this model: {config}"
        )
    with about("config.json"):
        write_json(staging_folder / "config.json", fields)
    layout.write(staging_folder, flat_params, dtype, shard_size)
    if lm.tokenizer is not None:
        lm.tokenizer.save(str(staging_folder / "tokenizer.json"))


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


def parameter_declarations(
    config: TransformerConfig,
) -> dict[str, nn.LogicallyPartitioned]:
    """Path -> shape and axes of every parameter, from the declarations in the modules."""
    tree = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), jnp.zeros(1, jnp.int32)
    )["params"]
    return traverse_util.flatten_dict(
        tree, sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )


def _has_tokens_beyond(tokenizer: "tokenizers.Tokenizer", vocab_size: int) -> bool:
    """Whether it has tokens beyond the vocabulary, special ones aside (Gemma 3's for images)."""
    special_ids = {
        token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    return any(
        token_id >= vocab_size
        for token_id in set(tokenizer.get_vocab().values()) - special_ids
    )


def _with_full_window_pattern(config: TransformerConfig) -> TransformerConfig:
    """The same model, with one entry of the pattern for each layer."""
    return dataclasses.replace(config, window_pattern=config.windowed_layers)


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(folder.name for folder in BUNDLED_FOLDER.iterdir() if folder.is_dir())


def _find_folder(folder_or_name: str | os.PathLike) -> pathlib.Path:
    if not isinstance(folder_or_name, (str, os.PathLike)):
        raise InputError(
            f"{folder_or_name!r:.60} is neither the path of a folder nor a name"
        )
    folder = pathlib.Path(folder_or_name)
    if os.path.isdir(folder):  # False, not an error, for names that no file can have
        return folder
    if str(folder_or_name) in bundled_models():
        return BUNDLED_FOLDER / str(folder_or_name)
    if os.path.exists(folder):
        raise InputError(f"{folder} is a file; give the folder of a checkpoint")
    if hub.MODEL_NAME.fullmatch(str(folder_or_name)):
        return hub.download(str(folder_or_name))
    raise InputError(
        f"{str(folder_or_name)!r} is neither a folder nor a bundled model"
        f" ({', '.join(bundled_models())})"
        " nor org/name on the Hugging Face hub"
    )


def parameter_dtype(fields: Mapping[str, Any], dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype that is asked for, or else what a config.json says."""
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
    if not isinstance(name, str) or name not in _DTYPE_BY_NAME:
        raise InputError(
            f"field dtype is {name!r:.60}; it must be one of {', '.join(_DTYPE_BY_NAME)}"
        )
    return _as_float_dtype(name)


def _as_float_dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        float_dtype = jnp.dtype(dtype)
    except TypeError:
        float_dtype = None
    if float_dtype is None or float_dtype not in map(
        jnp.dtype, _DTYPE_BY_NAME.values()
    ):
        raise InputError(
            f"dtype is {dtype!r:.60}; it must be one of {', '.join(_DTYPE_BY_NAME)}"
        )
    if jax.dtypes.canonicalize_dtype(float_dtype) != float_dtype:
        raise InputError(
            "dtype float64 needs jax.config.update('jax_enable_x64', True) before it"
        )
    return float_dtype
