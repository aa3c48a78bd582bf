"""Next-vector models: text O tokens at a time (CALM, Shao et al., arXiv:2510.27688).

    lm = calm.load("path/to/a/calm/folder", "path/to/its/autoencoder/folder")
    hidden = lm.hidden(chunks, durations=d)                 # int [..., T, O] -> [..., T, D]
    nats = lm.loss(chunks, key)                             # [..., T - 1]

The embeddings of a chunk's O tokens are compressed to one input vector of the trunk, and a head
without a likelihood (see `implicit`) draws the latent vector of the next chunk, which the
autoencoder decodes to its tokens. A chunk has a duration, as a token of a `Transformer` has: the
unit of time is the chunk. `calm_sampling` draws text.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm import checkpoints
from continuous_lm import durations as time
from continuous_lm.errors import InputError, about
from continuous_lm.files import as_path, read_json, write_json, written_aside
from continuous_lm.models import autoencoder, heads, llama, loading, transformer
from continuous_lm.models.autoencoder import Autoencoder, AutoencoderConfig, Codec
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.family import INERT, MOST_LAYERS, Family, Fields, Stored
from continuous_lm.models.implicit import IMPLICIT, EnergyHead, ImplicitHead
from continuous_lm.models.layout import Layout, check_tree, equal, left_over
from continuous_lm.models.transformer import Transformer, layer_norm

if TYPE_CHECKING:
    import tokenizers

_EPS = 1e-6  # of the layer norm over compressed chunks, as published


class NextVectorModel(nn.Module):
    """A trunk that reads chunks of O tokens, and a head that draws the latent vector of the next.

    `apply` is a pure function, as of `Transformer`; methods other than `__call__` by their names.
    Parameters: "trunk", "read_*" (of the compression), "head" and "autoencoder".

    Attributes:
      config: of the trunk; its head, if it says that it has one, is none of this model's.
      autoencoder: of the autoencoder.
      head: draws latent vectors; see `implicit`.
      inner_size: F of the MLP that compresses a chunk's embeddings; 2 D if left out.
      num_targets: how many draws of the autoencoder's posterior the loss takes for each chunk.
      form: of the trunk's attention, and
      remat: whether its layers are computed anew for the backward pass; see `Transformer`.
    """

    config: TransformerConfig
    autoencoder: AutoencoderConfig
    head: ImplicitHead
    inner_size: int | None = None
    num_targets: int = 100
    form: str = "auto"
    remat: bool = False

    def __post_init__(self):
        super().__post_init__()
        pairs = {
            "vocab_size": (self.config.vocab_size, self.autoencoder.vocab_size),
            "latent_size": (self.head.width, self.autoencoder.latent_size),
        }
        for name, (own, other) in pairs.items():
            if own != other:
                raise InputError(f"{name} is {own}, but {other} in the autoencoder")
        if self.head.depth < 1:
            raise InputError("depth of the head is 0; it must be at least 1")
        if self.num_targets < 1:
            raise InputError(f"num_targets is {self.num_targets}; it must be at least 1")

    @property
    def chunk_size(self) -> int:
        """O, the tokens of a chunk."""
        return self.autoencoder.chunk_size

    def setup(self):
        config = dataclasses.replace(self.config, tie_embeddings=True)  # no head of its own
        self.trunk = Transformer(config, form=self.form, remat=self.remat)
        self.codec = Autoencoder(self.autoencoder, name="autoencoder")
        width, inner = config.hidden_size, self.inner_size or 2 * config.hidden_size
        kernel = functools.partial(
            nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal"
        )
        ones, zeros = nn.initializers.ones, nn.initializers.zeros

        def weight(name: str, axes: str, shape: tuple[int, ...], init: Any) -> Any:
            boxed = nn.with_logical_partitioning(init, axes_lib.split(axes))
            return self.param(name, boxed, shape, jnp.float32)

        first = kernel(in_axis=(-2, -1), out_axis=0)
        self.inner = weight("read_inner", "F O D", (inner, self.chunk_size, width), first)
        self.inner_bias = weight("read_inner_bias", "F", (inner,), zeros)
        self.outer = weight("read_outer", "D F", (width, inner), kernel(in_axis=-1, out_axis=0))
        self.outer_bias = weight("read_outer_bias", "D", (width,), zeros)
        self.norm = weight("read_norm", "D", (width,), ones)
        self.norm_bias = weight("read_norm_bias", "D", (width,), zeros)

    def check(self, chunks: ArrayLike, **arguments) -> None:
        """Refuses arguments that do not fit; values only where they are known."""
        shape = np.shape(chunks)
        if len(shape) < 2 or shape[-1] != self.chunk_size:
            raise InputError(
                f"chunks have shape {list(shape)}; it must be [..., T, {self.chunk_size}], the"
                " tokens of a chunk last: see calm.chunked"
            )
        time.check_integers("chunks", chunks, 0, self.config.vocab_size)
        transformer.check(self.config, np.zeros(shape[:-1], np.int32), **arguments)

    def __call__(self, chunks: ArrayLike, **arguments) -> Any:
        """Hidden states, which the head reads.

        Args:
          chunks: tokens int [..., T, O].
          **arguments: durations (of chunks), start, times, at, cache: as of `Transformer.__call__`.

        Returns:
          [..., T, D], or [..., D] with `at`; with a cache: these, and the cache.
        """
        self.check(chunks, **arguments)
        if self.is_initializing():  # makes the table, whose rows are then read
            self.trunk(jnp.zeros(1, jnp.int32), hidden=True)
        table: Any = nn.unbox(self.trunk.variables["params"]["embedding"])
        x = jnp.einsum("...od,fod->...f", table[jnp.asarray(chunks)], self.inner) + self.inner_bias
        x = jnp.einsum("...f,df->...d", jax.nn.silu(x), self.outer) + self.outer_bias
        x = layer_norm(x, self.norm, self.norm_bias, _EPS)
        states = self.trunk(embeddings=x, hidden=True, **arguments)
        if self.is_initializing():
            self.head(states)
            self.codec(chunks)
        return states

    def predictions(self, chunks, *, durations=None, start=None, times=None) -> jax.Array:
        """The hidden states [..., T - 1, D] from which all chunks but the first are predicted."""
        given = {"durations": durations, "times": times}
        cut = {name: jnp.asarray(v)[..., :-1] for name, v in given.items() if v is not None}
        return cast(jax.Array, self(jnp.asarray(chunks)[..., :-1, :], start=start, **cut))

    def loss(self, chunks, key: jax.Array, **arguments) -> jax.Array:
        """The head's loss of each chunk after the first: [..., T - 1].

        The targets are `num_targets` draws of the autoencoder's posterior, which gets no gradient.
        The last duration has no influence.
        """
        hidden = self.predictions(chunks, **arguments)
        of_targets, of_head = jax.random.split(key)
        mean, log_scale = jax.lax.stop_gradient(self.encode(jnp.asarray(chunks)[..., 1:, :]))
        drawn = jax.random.normal(of_targets, (self.num_targets, *mean.shape), mean.dtype)
        return self.head.loss(hidden, mean + jnp.exp(log_scale) * drawn, of_head)

    def encode(self, chunks) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation [..., W] of the latents of chunks int [..., O]."""
        return self.codec.encode(chunks)

    def decode(self, latents) -> jax.Array:
        """Logits [..., O, V] from latents [..., W]."""
        return self.codec.decode(latents)

    def transform(self, noise, hidden) -> jax.Array:
        """The head's vectors [..., W] from noise [..., U] and hidden states [..., D]."""
        return self.head.transform(noise, hidden)

    def draws(self, key: jax.Array, hidden: jax.Array, count: int) -> jax.Array:
        """Chunks of tokens int32 [count, ..., O], drawn and decoded, for hidden states [..., D]."""
        noise = self.head.noise(key, (count, *hidden.shape[:-1]))
        return self.tokens(self.transform(noise, hidden))

    def tokens(self, latents: jax.Array) -> jax.Array:
        """The likeliest tokens int32 [..., O] of latents [..., W]; see `Autoencoder.tokens`."""
        return self.codec.tokens(latents)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: NextVectorModel, method: str, params: Any, *values: Any, **given: Any) -> Any:
    return model.apply({"params": params}, *values, method=method, **given)


@dataclasses.dataclass(frozen=True, eq=False)
class NextVectorLM:
    """A next-vector model with its parameters and, if it has one, its tokenizer.

    Attributes:
      model: the Linen module, whose `apply` is a pure function.
      params: parameter tree: "trunk", "read_inner", ..., "head", "autoencoder".
      tokenizer: of the `tokenizers` library, or None.
      notes: fields of config.json that do not change what is computed.
    """

    model: NextVectorModel
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    @property
    def chunk_size(self) -> int:
        return self.model.chunk_size

    @property
    def codec(self) -> Codec:
        """Its autoencoder."""
        params = self.params["autoencoder"]
        return Codec(self.model.autoencoder, params, self.tokenizer, self.notes)

    def hidden(self, chunks: ArrayLike, **arguments) -> jax.Array:
        """`NextVectorModel.__call__`, jitted; values are checked as long as they are known."""
        given = {k: jnp.asarray(v) for k, v in arguments.items() if v is not None}
        self.model.check(chunks, **given)
        called = _apply(self.model, "__call__", self.params, jnp.asarray(chunks), **given)
        return cast(jax.Array, called)

    def loss(
        self,
        chunks: ArrayLike,
        key: jax.Array,
        *,
        durations: ArrayLike | None = None,
        start: ArrayLike | None = None,
        times: ArrayLike | None = None,
    ) -> jax.Array:
        """`NextVectorModel.loss`, jitted."""
        arguments = {"durations": durations, "start": start, "times": times}
        given = {k: jnp.asarray(v) for k, v in arguments.items() if v is not None}
        self.model.check(chunks, **given)
        if np.shape(chunks)[-2] < 2:
            raise InputError("a single chunk is predicted from nothing; give at least two")
        called = _apply(self.model, "loss", self.params, jnp.asarray(chunks), key, **given)
        return cast(jax.Array, called)

    def transform(self, noise: ArrayLike, hidden: ArrayLike) -> jax.Array:
        """`NextVectorModel.transform`, jitted."""
        values = jnp.asarray(noise), jnp.asarray(hidden)
        return cast(jax.Array, _apply(self.model, "transform", self.params, *values))


def create(
    key: jax.Array,
    config: TransformerConfig,
    codec: Codec,
    head: ImplicitHead,
    **settings: Any,
) -> NextVectorLM:
    """A model with new parameters on a trained autoencoder, whose tokenizer it takes over.

    Args:
      key: PRNG key.
      config: of the trunk.
      codec: the autoencoder.
      head: of the latent's width.
      **settings: further attributes of `NextVectorModel`.
    """
    model = NextVectorModel(config, codec.config, head, **settings)
    params = dict(nn.unbox(jax.jit(model.init)(key, _stand_in(model))["params"]))
    return NextVectorLM(model, params | {"autoencoder": codec.params}, codec.tokenizer, codec.notes)


def chunked(tokens: ArrayLike, chunk_size: int, fill: int | None = None) -> np.ndarray:
    """Tokens int [..., n] as chunks int32 [..., T, O].

    Args:
      tokens: int [..., n].
      chunk_size: O.
      fill: a token that is put in front as often as needed, where O does not divide n; if left out,
        that is refused.
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or not tokens.ndim or not tokens.shape[-1]:
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be integers [..., n]"
        )
    over = -tokens.shape[-1] % chunk_size
    if over and fill is None:
        raise InputError(
            f"{tokens.shape[-1]} tokens are no multiple of a chunk of {chunk_size}; cut them, or"
            " give fill, a token to put in front"
        )
    if over:
        tokens = np.concatenate([np.full((*tokens.shape[:-1], over), fill), tokens], axis=-1)
    return tokens.reshape(*tokens.shape[:-1], -1, chunk_size).astype(np.int32)


def _stand_in(model: NextVectorModel) -> np.ndarray:
    """The shortest input, to make parameters with."""
    return np.zeros((1, model.chunk_size), np.int32)


# --- Checkpoints, as published --------------------------------------------------------------------

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
    tree = jax.eval_shape(model.init, jax.random.key(0), _stand_in(model))["params"]
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
        dtype = loading.parameter_dtype(fields, dtype)
    tensors = checkpoints.open_tensors(folder)
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
    tokenizer = loading.read_tokenizer(folder, trunk.vocab_size)
    if codec is not None:
        flat |= {
            f"autoencoder/{path}": array
            for path, array in traverse_util.flatten_dict(codec.params, sep="/").items()
        }
        tokenizer = tokenizer or codec.tokenizer
    notes = {name: value for name, value in fields.items() if name in INERT}
    return NextVectorLM(model, traverse_util.unflatten_dict(flat, sep="/"), tokenizer, notes)


def _read(
    model: NextVectorModel, tensors: checkpoints.Tensors, dtype, mesh, apart: Any
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
        others = checkpoints.open_tensors(apart)
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
    tensors: checkpoints.Tensors, fields: Mapping[str, Any], chunk_size: int
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
    folder: str | os.PathLike, lm: NextVectorLM, *, shard_size: int = checkpoints.SHARD_SIZE
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
    with written_aside(folder, replaces=checkpoints.FILES) as aside:
        write_json(
            aside / "config.json",
            {**notes, **write_config(lm.model), "torch_dtype": dtype.name},
        )
        checkpoints.save_tensors(aside, shapes, dtype, tensor, shard_size)
        if lm.tokenizer is not None:
            lm.tokenizer.save(str(aside / "tokenizer.json"))
