"""The network of an autoencoder: its config, its table of parameters, and pure functions of both.

    mean, log_scale = encode_chunks(config, params, chunks)             # [..., C] -> [..., W] each
    logits = decode_latents(config, params, latents)                    # [..., W] -> [..., C, V]
    nats = chunk_losses(config, params, chunks, key)                    # [..., C] -> [...]

Per-token MLPs, then C tokens are squeezed into one, and more MLPs; the decoder is the mirror image,
and its logits are by the encoder's own table. Nothing is shared between chunks.

These functions check shapes alone, and are there to be traced. `autoencoder.encode` and
`autoencoder.decode` take a loaded model, check values too, and are jitted.
"""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import losses
from continuous_lm.arguments import as_float, as_indices, check_integers
from continuous_lm.errors import InputError
from continuous_lm.models.config import ACTIVATIONS
from continuous_lm.models.layers import rms_norm
from continuous_lm.models.parameters import (
    ONES,
    ZEROS,
    Declaration,
    ParameterModule,
    ParameterTable,
    Params,
    declare,
)

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "check_chunks",
    "chunk_losses",
    "decode_latents",
    "decode_tokens",
    "encode_chunks",
    "parameter_table",
]

_MAX_LOGITS_AT_ONCE = 2**24  # so many are made at once when latents are decoded
_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", -1, -2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes and constants of an `Autoencoder`; letters as in `axes`."""

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
    dropout: float = 0.15  # share of tokens hidden from the encoder, and of W dropped
    kl_weight: float = 0.001
    kl_floor: float = 0.5  # nats of each dimension of the latent that cost nothing

    def __post_init__(self) -> None:
        self._check_types()
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

    def _check_types(self) -> None:
        """Raise InputError for fields of another type than annotated, and sizes below 1."""
        for name, expected_type in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            allowed_types = (int, float) if expected_type is float else (expected_type,)
            if type(value) not in allowed_types:
                raise InputError(
                    f"{name} is {value!r:.60}; it must be {expected_type.__name__}"
                )
            if expected_type is int and value < 1:
                field_name = f"num_{name}" if name.endswith("_layers") else name
                raise InputError(
                    f"{field_name} is {value}; it must be an integer from 1"
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


def parameter_table(config: AutoencoderConfig) -> dict[str, Declaration]:
    """Path -> declaration of every parameter."""
    sizes = config.sizes
    return {
        "embedding": declare(sizes, "V D"),
        **_layers_table(config, "encoder", "J"),
        "squeeze": declare(sizes, "D C D"),
        "squeeze_bias": declare(sizes, "D", ZEROS),
        "encoder_last_norm": declare(sizes, "D", ONES),
        "mean": declare(sizes, "W D", _FAN_IN),
        "mean_bias": declare(sizes, "W", ZEROS),
        "log_scale": declare(sizes, "W D"),
        "log_scale_bias": declare(sizes, "W", ZEROS),
        "latent": declare(sizes, "D W", _FAN_IN),
        "latent_bias": declare(sizes, "D", ZEROS),
        **_layers_table(config, "decoder", "I"),
        "expand": declare(sizes, "C D D"),
        "expand_bias": declare(sizes, "C D", ZEROS),
        "decoder_last_norm": declare(sizes, "D", ONES),
    }


def _layers_table(
    config: AutoencoderConfig, side: str, layer_axis: str
) -> dict[str, Declaration]:
    """The stacked layers of the encoder or the decoder."""
    return {
        f"{side}_norm": declare(config.sizes, f"{layer_axis} D", ONES),
        f"{side}_gate": declare(config.sizes, f"{layer_axis} F D"),
        f"{side}_up": declare(config.sizes, f"{layer_axis} F D"),
        f"{side}_down": declare(config.sizes, f"{layer_axis} D F"),
    }


def check_chunks(config: AutoencoderConfig, chunks: ArrayLike) -> None:
    """Raise InputError unless these are chunks of this model; values are checked outside jit."""
    if np.shape(chunks)[-1:] != (config.chunk_size,):
        raise InputError(
            f"chunks have shape {list(np.shape(chunks))}; it must be"
            f" [..., {config.chunk_size}], tokens of a chunk last"
        )
    check_integers("chunks", chunks, 0, config.vocab_size)


def encode_chunks(
    config: AutoencoderConfig,
    params: Params,
    chunks: ArrayLike,
    token_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean and log standard deviation of the latent vector of each chunk.

    Args:
      config: sizes and constants of the model.
      params: as in `parameter_table`.
      chunks: tokens int [..., C].
      token_mask: bool [..., C], True for tokens that the encoder sees; all if omitted.

    Returns:
      [..., W] each, at least float32.
    """
    check_chunks(config, chunks)
    num_before_squeeze = config.encoder_layers // 2
    x = params["embedding"][as_indices(chunks)]  # [..., C, D]
    x = x if token_mask is None else jnp.where(token_mask[..., None], x, 0)
    x = _run_layers(config, params, "encoder", slice(num_before_squeeze), x)
    x = jnp.einsum("...cD,dcD->...d", x, params["squeeze"]) + params["squeeze_bias"]
    x = _run_layers(config, params, "encoder", slice(num_before_squeeze, None), x)
    x = rms_norm(x, params["encoder_last_norm"], config.norm_eps)  # [..., D]
    mean = jnp.einsum("...d,wd->...w", x, params["mean"]) + params["mean_bias"]
    log_scale = (
        jnp.einsum("...d,wd->...w", x, params["log_scale"]) + params["log_scale_bias"]
    )
    return as_float(mean), as_float(log_scale)


def decode_latents(
    config: AutoencoderConfig, params: Params, latents: ArrayLike
) -> jax.Array:
    """Logits of the C tokens of each chunk, [..., C, V], from latents [..., W]."""
    if np.shape(latents)[-1:] != (config.latent_size,):
        raise InputError(
            f"latents have shape {list(np.shape(latents))}; it must be"
            f" [..., {config.latent_size}]"
        )
    num_before_expand = config.decoder_layers // 2
    z = jnp.asarray(latents, params["latent"].dtype)
    x = jnp.einsum("...w,dw->...d", z, params["latent"]) + params["latent_bias"]
    x = _run_layers(config, params, "decoder", slice(num_before_expand), x)
    x = jnp.einsum("...D,cdD->...cd", x, params["expand"]) + params["expand_bias"]
    x = _run_layers(config, params, "decoder", slice(num_before_expand, None), x)
    x = rms_norm(x, params["decoder_last_norm"], config.norm_eps)  # [..., C, D]
    logits_dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(
        "...d,vd->...v", x, params["embedding"], preferred_element_type=logits_dtype
    )


def decode_tokens(
    config: AutoencoderConfig, params: Params, latents: ArrayLike
) -> jax.Array:
    """The likeliest tokens int32 [..., C] of latents [..., W], decoded a few at a time.

    Memory is that of some logits, [C, V] of each, and not of all.
    """

    def likeliest_tokens(some_latents: jax.Array) -> jax.Array:
        logits = decode_latents(config, params, some_latents)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    all_latents = jnp.asarray(latents)
    flat_latents = all_latents.reshape(-1, all_latents.shape[-1])
    logits_per_chunk = config.chunk_size * config.vocab_size
    decode_batch_size = max(1, _MAX_LOGITS_AT_ONCE // logits_per_chunk)
    if len(flat_latents) <= decode_batch_size:
        return likeliest_tokens(all_latents)
    tokens = jax.lax.map(likeliest_tokens, flat_latents, batch_size=decode_batch_size)
    return tokens.reshape(*all_latents.shape[:-1], -1)


def chunk_losses(
    config: AutoencoderConfig, params: Params, chunks: ArrayLike, key: jax.Array
) -> jax.Array:
    """The training loss of each chunk of int [..., C], in nats: [...].

    The sum of two terms. The first is the cross-entropy of the chunk's C tokens, decoded from a
    sampled latent. A share config.dropout of the encoder's tokens is hidden, and the same share
    of the latent's dimensions is dropped. The second is kl_weight times the KL divergence from
    the standard normal; each dimension has kl_floor nats free.
    """
    token_key, noise_key, dropout_key = jax.random.split(key, 3)
    keep_rate = 1.0 - config.dropout
    chunks = jnp.asarray(chunks)
    token_mask = jax.random.bernoulli(token_key, keep_rate, chunks.shape)
    mean, log_scale = encode_chunks(config, params, chunks, token_mask)
    scale = jnp.exp(log_scale)
    noise = jax.random.normal(noise_key, mean.shape, mean.dtype)
    latent_sample = mean + scale * noise
    is_kept = jax.random.bernoulli(dropout_key, keep_rate, latent_sample.shape)
    latent_sample = jnp.where(is_kept, latent_sample / keep_rate, 0.0)
    logits = decode_latents(config, params, latent_sample)
    nats = jnp.sum(losses.cross_entropy(logits, chunks), axis=-1)
    divergence = losses.gaussian_kl(mean, scale, floor=config.kl_floor)
    return nats + config.kl_weight * divergence


def _run_layers(
    config: AutoencoderConfig, params: Params, side: str, indices: slice, x: jax.Array
) -> jax.Array:
    """x [..., D] through some layers of the encoder or the decoder, pre-normed and residual."""
    activation = ACTIVATIONS[config.activation]
    layers = {
        name: params[f"{side}_{name}"][indices]
        for name in ("norm", "gate", "up", "down")
    }

    def run_layer(x, layer):
        normalized = rms_norm(x, layer["norm"], config.norm_eps)
        gate = activation(jnp.einsum("...d,fd->...f", normalized, layer["gate"]))
        gated = gate * jnp.einsum("...d,fd->...f", normalized, layer["up"])
        return x + jnp.einsum("...f,df->...d", gated, layer["down"]), None

    return jax.lax.scan(run_layer, x, layers)[0]


class Autoencoder(ParameterModule):
    """Chunks of C tokens to latent vectors of width W, and back.

    `Autoencoder(config).apply({"params": params}, chunks)` is a pure function, as are those of
    this module.
    """

    config: AutoencoderConfig

    def parameter_table(self) -> ParameterTable:
        """Path -> declaration of every parameter."""
        return parameter_table(self.config)

    @nn.compact
    def __call__(self, chunks: ArrayLike) -> jax.Array:
        """Logits [..., C, V] of chunks int [..., C], by way of the latent's mean."""
        check_chunks(self.config, chunks)
        params = self.parameters()
        mean, _ = encode_chunks(self.config, params, chunks)
        return decode_latents(self.config, params, mean)
