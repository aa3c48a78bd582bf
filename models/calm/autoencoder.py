"""The autoencoder of next-vector models: O tokens to one vector, and back (CALM, arXiv:2510.27688).

    codec = autoencoder.load("path/to/an/autoencoder/folder")
    mean, log_scale = codec.encode(chunks)                              # [..., O] -> [..., W] each
    logits = codec.decode(mean)                                         # [..., W] -> [..., O, V]

Per-token MLPs, then O tokens are squeezed into one, and more MLPs; the decoder is the mirror image,
and its logits are by the encoder's own table. Nothing is shared between chunks.
"""

import dataclasses
import functools
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from continuous_lm import losses
from continuous_lm.arguments import as_float, check_integers
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import as_path, written_aside
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints.config_fields import INERT, MOST_LAYERS, Fields
from continuous_lm.models.checkpoints.parameter_layout import Layout, check_tree, equal, left_over
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import ACTIVATIONS
from continuous_lm.models.families.family import Family
from continuous_lm.models.families.shared_fields import read_activation, write_activation
from continuous_lm.models.language_model import parameter_dtype, read_tokenizer
from continuous_lm.models.transformer import Layer, rms_norm

if TYPE_CHECKING:
    import tokenizers

ARCHITECTURE = "Autoencoder"
_LOGITS = 2**24  # so many are made at once when latents are decoded
_TABLE, _TABLE_AGAIN = "encoder.embed_tokens.weight", "decoder.lm_head_weight"
# Fields of the trunk's kind that a model without attention has no use for.
_WITHOUT_MEANING = frozenset(
    """attention_bias head_dim num_attention_heads num_hidden_layers num_key_value_heads
    partial_rotary_factor rope_parameters rope_scaling rope_theta""".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What an `Autoencoder` computes; letters as in `axes`."""

    vocab_size: int  # V
    hidden_size: int  # D
    mlp_size: int  # F
    encoder_layers: int  # J, half of them before the tokens are squeezed into one
    decoder_layers: int  # I, half of them before it is expanded
    latent_size: int  # W
    chunk_size: int  # O, tokens
    norm_eps: float = 1e-6
    activation: str = "silu"
    # Of training alone:
    dropout: float = 0.15  # the share of tokens that the encoder does not see, and of W dropped
    kl_weight: float = 0.001
    kl_floor: float = 0.5  # nats of each dimension of the latent that cost nothing

    def __post_init__(self):
        for name, wanted in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                raise InputError(f"{name} is {value!r:.60}; it must be {wanted.__name__}")
            if wanted is int and value < 1:
                field = f"num_{name}" if name.endswith("_layers") else name
                raise InputError(f"{field} is {value}; it must be an integer from 1")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
            )
        if not 0 < self.norm_eps < 1:
            raise InputError(f"norm_eps is {self.norm_eps}; it must be above 0, and below 1")
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) % 2:
                raise InputError(
                    f"num_{name} is {getattr(self, name)}; it must be even, half of them on each"
                    " side of the change between tokens and chunks"
                )
        if not 0 <= self.dropout < 1:
            raise InputError(f"ae_dropout is {self.dropout}; it must be at least 0, and below 1")
        for name in ("kl_weight", "kl_floor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, finite")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.mlp_size,
            "J": self.encoder_layers,
            "I": self.decoder_layers,
            "W": self.latent_size,
            "O": self.chunk_size,
        }


class Autoencoder(Layer):
    """Chunks of O tokens to latent vectors of width W, and back.

    `apply` is a pure function: `model.apply({"params": params}, chunks, method="encode")`.
    """

    config: AutoencoderConfig  # type: ignore[assignment]

    def setup(self):
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        within = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", -1, -2)

        def layers(name: str, letter: str) -> dict[str, jax.Array]:
            return {
                "norm": self.weight(f"{name}_norm", f"{letter} D", ones),
                "gate": self.weight(f"{name}_gate", f"{letter} F D"),
                "up": self.weight(f"{name}_up", f"{letter} F D"),
                "down": self.weight(f"{name}_down", f"{letter} D F"),
            }

        self.embedding: Any = self.weight("embedding", "V D")
        self.encoder: Any = layers("encoder", "J")
        self.squeeze: Any = self.weight("squeeze", "D O D")
        self.squeeze_bias: Any = self.weight("squeeze_bias", "D", zeros)
        self.encoder_norm: Any = self.weight("encoder_last_norm", "D", ones)
        self.mean: Any = self.weight("mean", "W D", within)
        self.mean_bias: Any = self.weight("mean_bias", "W", zeros)
        self.log_scale: Any = self.weight("log_scale", "W D")
        self.log_scale_bias: Any = self.weight("log_scale_bias", "W", zeros)
        self.latent: Any = self.weight("latent", "D W", within)
        self.latent_bias: Any = self.weight("latent_bias", "D", zeros)
        self.decoder: Any = layers("decoder", "I")
        self.expand: Any = self.weight("expand", "O D D")
        self.expand_bias: Any = self.weight("expand_bias", "O D", zeros)
        self.decoder_norm: Any = self.weight("decoder_last_norm", "D", ones)

    def __call__(self, chunks: ArrayLike) -> jax.Array:
        """Logits [..., O, V] of chunks int [..., O], by way of the latent's mean."""
        return self.decode(self.encode(chunks)[0])

    def encode(
        self, chunks: ArrayLike, *, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation of the latent vector of each chunk.

        Args:
          chunks: tokens int [..., O].
          seen: bool [..., O], the tokens that are; all if left out.

        Returns:
          [..., W] each, at least float32.
        """
        self.check(chunks)
        x = self.embedding[jnp.asarray(chunks)]
        x = x if seen is None else jnp.where(seen[..., None], x, 0)
        half = self.config.encoder_layers // 2
        x = self._mlps(x, self.encoder, slice(half))
        x = jnp.einsum("...oe,doe->...d", x, self.squeeze) + self.squeeze_bias
        x = self._mlps(x, self.encoder, slice(half, None))
        x = rms_norm(x, self.encoder_norm, self.config.norm_eps)
        mean = jnp.einsum("...d,wd->...w", x, self.mean) + self.mean_bias
        log_scale = jnp.einsum("...d,wd->...w", x, self.log_scale) + self.log_scale_bias
        return as_float(mean), as_float(log_scale)

    def decode(self, latents: ArrayLike) -> jax.Array:
        """Logits of the O tokens of each chunk, [..., O, V], from latents [..., W]."""
        if np.shape(latents)[-1:] != (self.config.latent_size,):
            raise InputError(
                f"latents have shape {list(np.shape(latents))}; it must be"
                f" [..., {self.config.latent_size}]"
            )
        z = jnp.asarray(latents, self.latent.dtype)
        half = self.config.decoder_layers // 2
        x = jnp.einsum("...w,dw->...d", z, self.latent) + self.latent_bias
        x = self._mlps(x, self.decoder, slice(half))
        x = jnp.einsum("...e,ode->...od", x, self.expand) + self.expand_bias
        x = self._mlps(x, self.decoder, slice(half, None))
        x = rms_norm(x, self.decoder_norm, self.config.norm_eps)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", x, self.embedding, preferred_element_type=wide)

    def tokens(self, latents: ArrayLike) -> jax.Array:
        """The likeliest tokens int32 [..., O] of latents [..., W], decoded a few at a time.

        Memory is that of some logits, [O, V] of each, and not of all.
        """
        z = jnp.asarray(latents)
        few = max(1, _LOGITS // (self.config.chunk_size * self.config.vocab_size))

        def likeliest(z):
            return jnp.argmax(self.decode(z), axis=-1).astype(jnp.int32)

        flat = z.reshape(-1, z.shape[-1])
        if len(flat) <= few:
            return likeliest(z)
        return jax.lax.map(likeliest, flat, batch_size=few).reshape(*z.shape[:-1], -1)

    def loss(self, chunks: ArrayLike, key: jax.Array) -> jax.Array:
        """The training loss of each chunk, in nats: [...].

        Cross-entropy of its O tokens from a latent that is drawn, with tokens hidden from the
        encoder and dimensions of the latent dropped (config.dropout of either), and kl_weight times
        the divergence from the standard normal, of which each dimension has kl_floor nats free.
        """
        rate, (first, second, third) = self.config.dropout, jax.random.split(key, 3)
        chunks = jnp.asarray(chunks)
        mean, log_scale = self.encode(
            chunks, seen=jax.random.bernoulli(first, 1.0 - rate, chunks.shape)
        )
        scale = jnp.exp(log_scale)
        z = mean + scale * jax.random.normal(second, mean.shape, mean.dtype)
        kept = jax.random.bernoulli(third, 1.0 - rate, z.shape)
        logits = self.decode(jnp.where(kept, z / (1.0 - rate), 0.0))
        nats = jnp.sum(losses.cross_entropy(logits, chunks), axis=-1)
        divergence = losses.gaussian_kl(mean, scale, floor=self.config.kl_floor)
        return nats + self.config.kl_weight * divergence

    def check(self, chunks: ArrayLike) -> None:
        """Refuses what are no chunks of this model; values only where they are known."""
        if np.shape(chunks)[-1:] != (self.config.chunk_size,):
            raise InputError(
                f"chunks have shape {list(np.shape(chunks))}; it must be"
                f" [..., {self.config.chunk_size}], tokens of a chunk last"
            )
        check_integers("chunks", chunks, 0, self.config.vocab_size)

    def _mlps(self, x: jax.Array, layers: dict[str, jax.Array], which: slice) -> jax.Array:
        """x [..., D] through some of the layers, pre-normed and residual."""
        activation, eps = ACTIVATIONS[self.config.activation], self.config.norm_eps

        def layer(x, p):
            y = rms_norm(x, p["norm"], eps)
            gate = activation(jnp.einsum("...d,fd->...f", y, p["gate"]))
            y = gate * jnp.einsum("...d,fd->...f", y, p["up"])
            return x + jnp.einsum("...f,df->...d", y, p["down"]), None

        return jax.lax.scan(layer, x, jax.tree.map(lambda stack: stack[which], layers))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: Autoencoder, method: str, params: Any, values: jax.Array) -> Any:
    return model.apply({"params": params}, values, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """An autoencoder with its parameters and, if it has one, its tokenizer.

    Attributes:
      config: what it computes.
      params: parameter tree.
      tokenizer: of the `tokenizers` library, or None.
      notes: fields of config.json that do not change what is computed.
      model: the Linen module, whose `apply` is a pure function.
    """

    config: AutoencoderConfig
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Autoencoder = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "model", Autoencoder(self.config))

    def encode(self, chunks: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """`Autoencoder.encode`, jitted; values are checked as long as they are known."""
        self.model.check(chunks)
        return cast(Any, _apply(self.model, "encode", self.params, jnp.asarray(chunks)))

    def decode(self, latents: ArrayLike) -> jax.Array:
        """`Autoencoder.decode`, jitted."""
        return cast(Any, _apply(self.model, "decode", self.params, jnp.asarray(latents)))


def create(
    key: jax.Array,
    config: AutoencoderConfig,
    tokenizer: "tokenizers.Tokenizer | None" = None,
    notes: Mapping[str, Any] | None = None,
) -> Codec:
    """An autoencoder with new parameters."""
    chunk = np.zeros(config.chunk_size, np.int32)
    params = nn.unbox(jax.jit(Autoencoder(config).init)(key, chunk)["params"])
    return Codec(config, params, tokenizer, dict(notes or {}))


# --- Checkpoints, as published --------------------------------------------------------------------


def _table() -> dict[str, Stored]:
    """Parameter path -> where it is stored."""
    table = {"embedding": Stored(_TABLE, "V D")}
    for name in ("encoder", "decoder"):
        layer = f"{name}.{name}_layers.{{layer}}."
        table |= {
            f"{name}_norm": Stored(f"{layer}layernorm.weight", "D"),
            f"{name}_gate": Stored(f"{layer}mlp.gate_proj.weight", "F D"),
            f"{name}_up": Stored(f"{layer}mlp.up_proj.weight", "F D"),
            f"{name}_down": Stored(f"{layer}mlp.down_proj.weight", "D F"),
            f"{name}_last_norm": Stored(f"{name}.norm.weight", "D"),
        }
    moments = "encoder.hidden_to_latent."
    return table | {
        "squeeze": Stored("encoder.squeeze_layer.weight", "D (O D)"),
        "squeeze_bias": Stored("encoder.squeeze_layer.bias", "D"),
        "mean": Stored(f"{moments}weight", "(2 W) D", pick=0),
        "log_scale": Stored(f"{moments}weight", "(2 W) D", pick=1),
        "mean_bias": Stored(f"{moments}bias", "(2 W)", pick=0),
        "log_scale_bias": Stored(f"{moments}bias", "(2 W)", pick=1),
        "latent": Stored("decoder.latent_to_hidden.weight", "D W"),
        "latent_bias": Stored("decoder.latent_to_hidden.bias", "D"),
        "expand": Stored("decoder.expand_layer.weight", "(O D) D"),
        "expand_bias": Stored("decoder.expand_layer.bias", "(O D)"),
    }


def is_config(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is an autoencoder's: by its architectures, or else by its fields."""
    named = fields.get("architectures")
    if isinstance(named, list) and named:
        return any(ARCHITECTURE in str(name) for name in named)
    return {"num_encoder_layers", "num_decoder_layers", "latent_size"} <= set(fields)


def read_config(fields: Mapping[str, Any], ignore_fields: Sequence[str] = ()) -> AutoencoderConfig:
    """The configuration that a config.json describes."""
    if not is_config(fields):
        raise InputError(
            f"this is no autoencoder: architectures is {fields.get('architectures')!r:.60}, and an"
            " autoencoder's config has num_encoder_layers, num_decoder_layers, latent_size"
        )
    reader = Fields(fields)
    reader.must_be("mlp_bias", False)
    reader.must_be("tie_word_embeddings", True, False)  # the decoder's table is the encoder's
    found = AutoencoderConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        mlp_size=reader.integer("intermediate_size"),
        encoder_layers=reader.integer("num_encoder_layers", most=MOST_LAYERS),
        decoder_layers=reader.integer("num_decoder_layers", most=MOST_LAYERS),
        latent_size=reader.integer("latent_size"),
        chunk_size=reader.integer("patch_size", most=2**16),
        norm_eps=float(reader.number("rms_norm_eps", 1e-6)),
        activation=read_activation(reader),
        **{
            name: float(_at_least_0(reader, field, getattr(AutoencoderConfig, name)))
            for name, field in _TRAINING.items()
        },
    )
    reader.finish((*ignore_fields, *_WITHOUT_MEANING))
    return found


_TRAINING = {"dropout": "ae_dropout", "kl_weight": "kl_weight", "kl_floor": "kl_clamp"}


def _at_least_0(reader: Fields, name: str, default: float) -> float:
    """A number that may be 0, which `Fields.number` refuses."""
    value = reader.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InputError(f"field {name} is {value!r:.60}; it must be a number, at least 0")
    return value


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
        **{field: getattr(config, name) for name, field in _TRAINING.items()},
    }


def layout_of(config: AutoencoderConfig, prefix: str = "") -> Layout:
    """Where the parameters lie in a checkpoint, whose tensors' names begin with `prefix`."""
    tree = jax.eval_shape(
        Autoencoder(config).init, jax.random.key(0), np.zeros(config.chunk_size, np.int32)
    )["params"]
    table = {
        path: dataclasses.replace(stored, name=prefix + stored.name)
        for path, stored in _table().items()
    }
    family = Family(read_config, write_config, table, architecture=ARCHITECTURE, prefix="")  # type: ignore[arg-type]
    return Layout(config, family, tree)


def know_table(tensors: safetensors_files.Tensors, prefix: str = "") -> None:
    """Lets the table be found where it is stored as the decoder's alone, as tied tensors may be."""
    table, again = prefix + _TABLE, prefix + _TABLE_AGAIN
    if again in tensors.names and table not in tensors.names:
        tensors.alias(table, again)


def check_rest(tensors: safetensors_files.Tensors, names: set[str], prefix: str = "") -> None:
    """Refuses tensors beyond `names`, but the decoder's own name for the encoder's table."""
    table, again = prefix + _TABLE, prefix + _TABLE_AGAIN
    for name in sorted(tensors.names - names):
        if name != again:
            raise left_over(tensors, name)
        if not equal(tensors[name], tensors[table]):
            raise InputError(f"tensor {name} is not the table {table}, as it must be")


def load(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
) -> Codec:
    """Loads an autoencoder from a folder, as they are published.

    Args:
      folder: with config.json, model.safetensors (or shards) and, if it has one, tokenizer.json.
      dtype: of the parameters; as config.json says if left out.
      mesh: devices to shard the parameters over, with axes "data" and "model".
      ignore_fields: fields of config.json that are known not to change what is computed.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = as_path(folder)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        dtype = parameter_dtype(fields, dtype)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    tensors, layout = safetensors_files.open_tensors(folder), layout_of(config)
    with about(str(folder)):
        know_table(tensors)
        named = layout.named(tensors)
        check_rest(tensors, set(named))
        flat = layout.build(tensors, named, layout.targets(dtype, mesh))
    notes = {name: value for name, value in fields.items() if name in INERT}
    return Codec(config, traverse_util.unflatten_dict(flat, sep="/"), tokenizer, notes)


def save(folder: str | os.PathLike, codec: Codec) -> None:
    """Writes the autoencoder as a folder that `load` reads; whole, or not at all."""
    layout = layout_of(codec.config)
    flat = traverse_util.flatten_dict(codec.params, sep="/")
    check_tree(flat, layout.boxes)
    dtype = flat["embedding"].dtype
    with written_aside(folder, replaces=safetensors_files.FILES) as aside:
        fields = {**codec.notes, **write_config(codec.config), "torch_dtype": dtype.name}
        fields.pop("dtype", None)
        write_json(pathlib.Path(aside) / "config.json", fields)
        layout.write(aside, flat, dtype, safetensors_files.SHARD_SIZE)
        if codec.tokenizer is not None:
            codec.tokenizer.save(str(aside / "tokenizer.json"))
