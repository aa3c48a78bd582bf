"""The autoencoder of next-vector models: C tokens to one vector, and back (CALM, arXiv:2510.27688).

    lm = autoencoder.load("path/to/an/autoencoder/folder")
    mean, log_scale = autoencoder.encode(lm, chunks)                    # [..., C] -> [..., W] each
    logits = autoencoder.decode(lm, mean)                               # [..., W] -> [..., C, V]

`encode` and `decode` are jitted and check their arguments. The pure functions under them, for
training and for use inside of jit, take (config, params, ...) and have longer names:
`encode_chunks`, `decode_latents`, `decode_tokens`, `chunk_losses`.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.errors import InputError
from continuous_lm.models.calm.autoencoder_checkpoint import (
    is_config,
    load,
    read_config,
    save,
    write_config,
)
from continuous_lm.models.calm.autoencoder_network import (
    Autoencoder,
    AutoencoderConfig,
    check_chunks,
    chunk_losses,
    decode_latents,
    decode_tokens,
    encode_chunks,
    parameter_table,
)
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import initialize

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "autoencoder_model",
    "chunk_losses",
    "create",
    "decode",
    "decode_latents",
    "decode_tokens",
    "encode",
    "encode_chunks",
    "is_config",
    "load",
    "parameter_table",
    "read_config",
    "save",
    "write_config",
]

_encode = jax.jit(encode_chunks, static_argnums=0)
_decode = jax.jit(decode_latents, static_argnums=0)


def encode(
    lm: LanguageModel[Autoencoder], chunks: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Mean and log standard deviation [..., W] of the latent vectors of chunks int [..., C].

    Raises:
      InputError: if `lm` is no autoencoder, or the chunks are none of its chunks.
    """
    model = autoencoder_model(lm)
    check_chunks(model.config, chunks)
    return _encode(model.config, lm.params, jnp.asarray(chunks))


def decode(lm: LanguageModel[Autoencoder], latents: ArrayLike) -> jax.Array:
    """Logits of the C tokens of each chunk, [..., C, V], from latents [..., W].

    Raises:
      InputError: if `lm` is no autoencoder, or the latents are of another width.
    """
    model = autoencoder_model(lm)
    return _decode(model.config, lm.params, jnp.asarray(latents))


def autoencoder_model(lm: LanguageModel[Autoencoder]) -> Autoencoder:
    """The model of an autoencoder's `LanguageModel`.

    Raises:
      InputError: if it is another kind of model.
    """
    if not isinstance(lm.model, Autoencoder):
        raise InputError(
            f"lm holds a {type(lm.model).__name__}, and this needs an Autoencoder, as of"
            " autoencoder.create, autoencoder.load and calm.autoencoder_of"
        )
    return lm.model


def create(
    key: jax.Array,
    config: AutoencoderConfig,
    tokenizer: "tokenizers.Tokenizer | None" = None,
    hf_fields: Mapping[str, Any] | None = None,
) -> LanguageModel[Autoencoder]:
    """An autoencoder with new parameters."""
    model = Autoencoder(config)
    make_params = functools.partial(initialize, table=model.parameter_table())
    return LanguageModel(model, jax.jit(make_params)(key), tokenizer, hf_fields or {})
