"""The autoencoder of next-vector models: C tokens to one vector, and back (CALM, arXiv:2510.27688).

    codec = autoencoder.load("path/to/an/autoencoder/folder")
    mean, log_scale = codec.encode(chunks)                              # [..., C] -> [..., W] each
    logits = codec.decode(mean)                                         # [..., W] -> [..., C, V]

Per-token MLPs, then C tokens are squeezed into one, and more MLPs; the decoder is the mirror image,
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
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import read_json, write_json
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
from continuous_lm.models.config import ACTIVATIONS
from continuous_lm.models.families.family import Family
from continuous_lm.models.families.shared_fields import (
    read_activation,
    write_activation,
)
from continuous_lm.models.linen_transformer import (
    ConfigModule,
    rms_norm,
    table_of_boxes,
)

if TYPE_CHECKING:
    import tokenizers

ARCHITECTURE = "Autoencoder"
_MAX_LOGITS_AT_ONCE = 2**24  # so many are made at once when latents are decoded
_TABLE_TENSOR, _TABLE_COPY_TENSOR = (
    "encoder.embed_tokens.weight",
    "decoder.lm_head_weight",
)
# Fields of the trunk's kind that a model without attention has no use for.
_UNUSED_FIELDS = frozenset(
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
    chunk_size: int  # C (K in the paper), tokens
    norm_eps: float = 1e-6
    activation: str = "silu"
    # Of training alone:
    dropout: float = (
        0.15  # the share of tokens that the encoder does not see, and of W dropped
    )
    kl_weight: float = 0.001
    kl_floor: float = 0.5  # nats of each dimension of the latent that cost nothing

    def __post_init__(self):
        for name, expected_type in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if type(value) is not expected_type and not (
                expected_type is float and type(value) is int
            ):
                raise InputError(
                    f"{name} is {value!r:.60}; it must be {expected_type.__name__}"
                )
            if expected_type is int and value < 1:
                field_name = f"num_{name}" if name.endswith("_layers") else name
                raise InputError(
                    f"{field_name} is {value}; it must be an integer from 1"
                )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
            )
        if not 0 < self.norm_eps < 1:
            raise InputError(
                f"norm_eps is {self.norm_eps}; it must be above 0, and below 1"
            )
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) % 2:
                raise InputError(
                    f"num_{name} is {getattr(self, name)}; it must be even, half of them on each"
                    " side of the change between tokens and chunks"
                )
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"ae_dropout is {self.dropout}; it must be at least 0, and below 1"
            )
        for name in ("kl_weight", "kl_floor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be at least 0, finite"
                )

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
            "C": self.chunk_size,
        }


class Autoencoder(ConfigModule):
    """Chunks of C tokens to latent vectors of width W, and back.

    `apply` is a pure function: `model.apply({"params": params}, chunks, method="encode")`.
    """

    config: AutoencoderConfig  # type: ignore[assignment]

    def setup(self):
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        fan_in_init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", -1, -2
        )

        def layer_weights(name: str, letter: str) -> dict[str, jax.Array]:
            return {
                "norm": self.parameter(f"{name}_norm", f"{letter} D", ones),
                "gate": self.parameter(f"{name}_gate", f"{letter} F D"),
                "up": self.parameter(f"{name}_up", f"{letter} F D"),
                "down": self.parameter(f"{name}_down", f"{letter} D F"),
            }

        self.embedding: Any = self.parameter("embedding", "V D")
        self.encoder_layers: Any = layer_weights("encoder", "J")
        self.squeeze_kernel: Any = self.parameter("squeeze", "D C D")
        self.squeeze_bias: Any = self.parameter("squeeze_bias", "D", zeros)
        self.encoder_norm: Any = self.parameter("encoder_last_norm", "D", ones)
        self.mean_kernel: Any = self.parameter("mean", "W D", fan_in_init)
        self.mean_bias: Any = self.parameter("mean_bias", "W", zeros)
        self.log_scale_kernel: Any = self.parameter("log_scale", "W D")
        self.log_scale_bias: Any = self.parameter("log_scale_bias", "W", zeros)
        self.latent_kernel: Any = self.parameter("latent", "D W", fan_in_init)
        self.latent_bias: Any = self.parameter("latent_bias", "D", zeros)
        self.decoder_layers: Any = layer_weights("decoder", "I")
        self.expand_kernel: Any = self.parameter("expand", "C D D")
        self.expand_bias: Any = self.parameter("expand_bias", "C D", zeros)
        self.decoder_norm: Any = self.parameter("decoder_last_norm", "D", ones)

    def __call__(self, chunks: ArrayLike) -> jax.Array:
        """Logits [..., C, V] of chunks int [..., C], by way of the latent's mean."""
        return self.decode(self.encode(chunks)[0])

    def encode(
        self, chunks: ArrayLike, *, token_mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation of the latent vector of each chunk.

        Args:
          chunks: tokens int [..., C].
          token_mask: bool [..., C], the tokens that the encoder sees; all if left out.

        Returns:
          [..., W] each, at least float32.
        """
        self.check(chunks)
        x = self.embedding[jnp.asarray(chunks)]
        x = x if token_mask is None else jnp.where(token_mask[..., None], x, 0)
        num_before_squeeze = self.config.encoder_layers // 2
        x = self._run_layers(x, self.encoder_layers, slice(num_before_squeeze))
        x = jnp.einsum("...cD,dcD->...d", x, self.squeeze_kernel) + self.squeeze_bias
        x = self._run_layers(x, self.encoder_layers, slice(num_before_squeeze, None))
        x = rms_norm(x, self.encoder_norm, self.config.norm_eps)
        mean = jnp.einsum("...d,wd->...w", x, self.mean_kernel) + self.mean_bias
        log_scale = (
            jnp.einsum("...d,wd->...w", x, self.log_scale_kernel) + self.log_scale_bias
        )
        return as_float(mean), as_float(log_scale)

    def decode(self, latents: ArrayLike) -> jax.Array:
        """Logits of the C tokens of each chunk, [..., C, V], from latents [..., W]."""
        if np.shape(latents)[-1:] != (self.config.latent_size,):
            raise InputError(
                f"latents have shape {list(np.shape(latents))}; it must be"
                f" [..., {self.config.latent_size}]"
            )
        latent_vectors = jnp.asarray(latents, self.latent_kernel.dtype)
        num_before_expand = self.config.decoder_layers // 2
        x = (
            jnp.einsum("...w,dw->...d", latent_vectors, self.latent_kernel)
            + self.latent_bias
        )
        x = self._run_layers(x, self.decoder_layers, slice(num_before_expand))
        x = jnp.einsum("...D,cdD->...cd", x, self.expand_kernel) + self.expand_bias
        x = self._run_layers(x, self.decoder_layers, slice(num_before_expand, None))
        x = rms_norm(x, self.decoder_norm, self.config.norm_eps)
        logits_dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum(
            "...d,vd->...v", x, self.embedding, preferred_element_type=logits_dtype
        )

    def decode_tokens(self, latents: ArrayLike) -> jax.Array:
        """The likeliest tokens int32 [..., C] of latents [..., W], decoded a few at a time.

        Memory is that of some logits, [C, V] of each, and not of all.
        """
        latent_vectors = jnp.asarray(latents)
        decode_batch_size = max(
            1, _MAX_LOGITS_AT_ONCE // (self.config.chunk_size * self.config.vocab_size)
        )

        def likeliest_tokens(z):
            return jnp.argmax(self.decode(z), axis=-1).astype(jnp.int32)

        flat_latents = latent_vectors.reshape(-1, latent_vectors.shape[-1])
        if len(flat_latents) <= decode_batch_size:
            return likeliest_tokens(latent_vectors)
        return jax.lax.map(
            likeliest_tokens, flat_latents, batch_size=decode_batch_size
        ).reshape(*latent_vectors.shape[:-1], -1)

    def loss(self, chunks: ArrayLike, key: jax.Array) -> jax.Array:
        """The training loss of each chunk, in nats: [...].

        Cross-entropy of its C tokens from a latent that is drawn, with tokens hidden from the
        encoder and dimensions of the latent dropped (config.dropout of either), and kl_weight times
        the divergence from the standard normal, of which each dimension has kl_floor nats free.
        """
        dropout_rate, (token_key, noise_key, dropout_key) = (
            self.config.dropout,
            jax.random.split(key, 3),
        )
        chunks = jnp.asarray(chunks)
        mean, log_scale = self.encode(
            chunks,
            token_mask=jax.random.bernoulli(
                token_key, 1.0 - dropout_rate, chunks.shape
            ),
        )
        scale = jnp.exp(log_scale)
        latent_sample = mean + scale * jax.random.normal(
            noise_key, mean.shape, mean.dtype
        )
        is_kept = jax.random.bernoulli(
            dropout_key, 1.0 - dropout_rate, latent_sample.shape
        )
        logits = self.decode(
            jnp.where(is_kept, latent_sample / (1.0 - dropout_rate), 0.0)
        )
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

    def _run_layers(
        self, x: jax.Array, layers: dict[str, jax.Array], layer_range: slice
    ) -> jax.Array:
        """x [..., D] through some of the layers, pre-normed and residual."""
        activation, eps = ACTIVATIONS[self.config.activation], self.config.norm_eps

        def run_layer(x, p):
            normalized = rms_norm(x, p["norm"], eps)
            gate = activation(jnp.einsum("...d,fd->...f", normalized, p["gate"]))
            gated = gate * jnp.einsum("...d,fd->...f", normalized, p["up"])
            return x + jnp.einsum("...f,df->...d", gated, p["down"]), None

        return jax.lax.scan(
            run_layer, x, jax.tree.map(lambda stack: stack[layer_range], layers)
        )[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_jitted(
    model: Autoencoder, method: str, params: Any, inputs: jax.Array
) -> Any:
    return model.apply({"params": params}, inputs, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """An autoencoder with its parameters and, if it has one, its tokenizer.

    Attributes:
      config: what it computes.
      params: parameter tree.
      tokenizer: of the `tokenizers` library, or None.
      hf_fields: fields of config.json that do not change what is computed.
      model: the Linen module, whose `apply` is a pure function.
    """

    config: AutoencoderConfig
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    hf_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Autoencoder = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "model", Autoencoder(self.config))

    def encode(self, chunks: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """`Autoencoder.encode`, jitted; values are checked as long as they are known."""
        self.model.check(chunks)
        return cast(
            Any, _apply_jitted(self.model, "encode", self.params, jnp.asarray(chunks))
        )

    def decode(self, latents: ArrayLike) -> jax.Array:
        """`Autoencoder.decode`, jitted."""
        return cast(
            Any, _apply_jitted(self.model, "decode", self.params, jnp.asarray(latents))
        )


def create(
    key: jax.Array,
    config: AutoencoderConfig,
    tokenizer: "tokenizers.Tokenizer | None" = None,
    hf_fields: Mapping[str, Any] | None = None,
) -> Codec:
    """An autoencoder with new parameters."""
    example_chunk = np.zeros(config.chunk_size, np.int32)
    params = nn.unbox(jax.jit(Autoencoder(config).init)(key, example_chunk)["params"])
    return Codec(config, params, tokenizer, dict(hf_fields or {}))


# --- Checkpoints, as published --------------------------------------------------------------------


def _tensor_table() -> dict[str, StoredTensor]:
    """Parameter path -> where it is stored."""
    tensors = {"embedding": StoredTensor(_TABLE_TENSOR, "V D")}
    for name in ("encoder", "decoder"):
        layer_prefix = f"{name}.{name}_layers.{{layer}}."
        tensors |= {
            f"{name}_norm": StoredTensor(f"{layer_prefix}layernorm.weight", "D"),
            f"{name}_gate": StoredTensor(f"{layer_prefix}mlp.gate_proj.weight", "F D"),
            f"{name}_up": StoredTensor(f"{layer_prefix}mlp.up_proj.weight", "F D"),
            f"{name}_down": StoredTensor(f"{layer_prefix}mlp.down_proj.weight", "D F"),
            f"{name}_last_norm": StoredTensor(f"{name}.norm.weight", "D"),
        }
    latent_prefix = "encoder.hidden_to_latent."
    return tensors | {
        "squeeze": StoredTensor("encoder.squeeze_layer.weight", "D (C D)"),
        "squeeze_bias": StoredTensor("encoder.squeeze_layer.bias", "D"),
        "mean": StoredTensor(f"{latent_prefix}weight", "(2 W) D", part_index=0),
        "log_scale": StoredTensor(f"{latent_prefix}weight", "(2 W) D", part_index=1),
        "mean_bias": StoredTensor(f"{latent_prefix}bias", "(2 W)", part_index=0),
        "log_scale_bias": StoredTensor(f"{latent_prefix}bias", "(2 W)", part_index=1),
        "latent": StoredTensor("decoder.latent_to_hidden.weight", "D W"),
        "latent_bias": StoredTensor("decoder.latent_to_hidden.bias", "D"),
        "expand": StoredTensor("decoder.expand_layer.weight", "(C D) D"),
        "expand_bias": StoredTensor("decoder.expand_layer.bias", "(C D)"),
    }


def is_config(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is an autoencoder's: by its architectures, or else by its fields."""
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
    config_fields.must_be(
        "tie_word_embeddings", True, False
    )  # the decoder's table is the encoder's
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
        **{
            name: float(
                _read_nonnegative(
                    config_fields, field, getattr(AutoencoderConfig, name)
                )
            )
            for name, field in _TRAINING_FIELDS.items()
        },
    )
    config_fields.check_all_read((*ignore_fields, *_UNUSED_FIELDS))
    return config


_TRAINING_FIELDS = {
    "dropout": "ae_dropout",
    "kl_weight": "kl_weight",
    "kl_floor": "kl_clamp",
}


def _read_nonnegative(reader: ConfigFields, name: str, default: float) -> float:
    """A number that may be 0, which `ConfigFields.number` refuses."""
    value = reader.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InputError(
            f"field {name} is {value!r:.60}; it must be a number, at least 0"
        )
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
        **{field: getattr(config, name) for name, field in _TRAINING_FIELDS.items()},
    }


def checkpoint_layout(config: AutoencoderConfig, prefix: str = "") -> ParameterLayout:
    """Where the parameters lie in a checkpoint, whose tensors' names begin with `prefix`."""
    declarations = jax.eval_shape(
        Autoencoder(config).init,
        jax.random.key(0),
        np.zeros(config.chunk_size, np.int32),
    )["params"]
    stored_tensors = {
        path: dataclasses.replace(stored, name=prefix + stored.name)
        for path, stored in _tensor_table().items()
    }
    read: Any = read_config  # of an autoencoder, where a family's is of a trunk
    write: Any = write_config
    family = Family(
        read, write, stored_tensors, architecture=ARCHITECTURE, tensor_prefix=""
    )
    return ParameterLayout(config, family, table_of_boxes(declarations))


def alias_table_copy(tensors: safetensors_files.Tensors, prefix: str = "") -> None:
    """Lets the table be found where it is stored as the decoder's alone, as tied tensors may be."""
    table_name, copy_name = prefix + _TABLE_TENSOR, prefix + _TABLE_COPY_TENSOR
    if copy_name in tensors.names and table_name not in tensors.names:
        tensors.alias(table_name, copy_name)


def check_unused_tensors(
    tensors: safetensors_files.Tensors, used_names: set[str], prefix: str = ""
) -> None:
    """Refuses tensors beyond `used_names`, but the decoder's own name for the encoder's table."""
    table_name, copy_name = prefix + _TABLE_TENSOR, prefix + _TABLE_COPY_TENSOR
    for name in sorted(tensors.names - used_names):
        if name != copy_name:
            raise unused_tensor_error(tensors, name)
        if not are_equal(tensors[name], tensors[table_name]):
            raise InputError(
                f"tensor {name} is not the table {table_name}, as it must be"
            )


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
    folder = absolute_path(folder)
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = read_config(fields, ignore_fields)
        dtype = parameter_dtype(fields, dtype)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    tensors, layout = safetensors_files.open_tensors(folder), checkpoint_layout(config)
    with about(str(folder)):
        alias_table_copy(tensors)
        checkpoint_names = layout.checkpoint_names(tensors)
        check_unused_tensors(tensors, set(checkpoint_names))
        flat_params = layout.build(
            tensors, checkpoint_names, layout.parameter_specs(dtype, mesh)
        )
    hf_fields = {name: value for name, value in fields.items() if name in INERT_FIELDS}
    return Codec(
        config, traverse_util.unflatten_dict(flat_params, sep="/"), tokenizer, hf_fields
    )


def save(folder: str | os.PathLike, codec: Codec) -> None:
    """Writes the autoencoder as a folder that `load` reads; whole, or not at all."""
    layout = checkpoint_layout(codec.config)
    flat_params = traverse_util.flatten_dict(codec.params, sep="/")
    check_parameters(flat_params, layout.declarations)
    dtype = flat_params["embedding"].dtype
    with write_atomically(
        folder, stale_pattern=safetensors_files.CHECKPOINT_FILES
    ) as staging_folder:
        fields = {
            **codec.hf_fields,
            **write_config(codec.config),
            "torch_dtype": dtype.name,
        }
        fields.pop("dtype", None)
        write_json(pathlib.Path(staging_folder) / "config.json", fields)
        layout.write(
            staging_folder, flat_params, dtype, safetensors_files.MAX_SHARD_BYTES
        )
        if codec.tokenizer is not None:
            codec.tokenizer.save(str(staging_folder / "tokenizer.json"))
