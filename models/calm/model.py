"""Next-vector models: text C tokens at a time (CALM, Shao et al., arXiv:2510.27688).

The embeddings of a chunk's C tokens are compressed to one input vector of the trunk. A head without
a likelihood (see `implicit_heads`) draws the latent vector of the next chunk. The autoencoder
decodes that vector to tokens. A chunk has a duration, like a token of a `Transformer`; the unit of
time is the chunk. `samplers` draws text.

The methods of `NextVectorModel` are pure functions of parameters and inputs: jit them with the
model static, take gradients, vmap them.

    inputs = model.make_inputs(chunks, durations=d)                 # int [..., T, C]
    model.hidden_states(params, inputs).hidden                      # [..., T, D]
    model.loss(params, inputs, key)                                 # [..., T - 1]

`next_vector` has the functions of the same names that take a `LanguageModel` and check their
arguments.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_count, check_integers
from continuous_lm.errors import InputError
from continuous_lm.models import transformer
from continuous_lm.models.calm import autoencoder_network
from continuous_lm.models.calm.autoencoder_network import AutoencoderConfig
from continuous_lm.models.calm.chunk_inputs import ChunkInputs
from continuous_lm.models.calm.implicit_heads import ImplicitHead
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.layers import layer_norm
from continuous_lm.models.parameters import (
    ONES,
    ZEROS,
    ParameterModule,
    ParameterTable,
    Params,
    declare,
    with_prefix,
)
from continuous_lm.models.transformer import Execution, HiddenStates

__all__ = [
    "NextVectorModel",
]

_LAYER_NORM_EPS = 1e-6  # of the layer norm over compressed chunks, as published
_FAN_IN = functools.partial(
    nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal", out_axis=0
)


class NextVectorModel(ParameterModule):
    """A trunk that reads chunks of C tokens, and a head that draws the latent vector of the next.

    Parameters: "trunk/...", "read_*" (of the compression), "head/..." and "autoencoder/...".

    Attributes:
      config: config of the trunk. Its fields of an output layer are not used.
      autoencoder_config: config of the autoencoder.
      head: the head that draws latent vectors; see `implicit_heads`.
      inner_size: width F of the MLP that compresses a chunk's embeddings; 2 D if omitted.
      num_targets: number of posterior draws the loss takes for each chunk.
      implementation: form of the trunk's attention; see `Execution`.
      remat: whether the backward pass recomputes the trunk's layers; see `Execution`.
    """

    config: TransformerConfig
    autoencoder_config: AutoencoderConfig
    head: ImplicitHead
    inner_size: int | None = None
    num_targets: int = 100
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        matching_sizes = {
            "vocab_size": (self.config.vocab_size, self.autoencoder_config.vocab_size),
            "latent_size": (self.head.width, self.autoencoder_config.latent_size),
        }
        for name, (model_size, autoencoder_size) in matching_sizes.items():
            if model_size != autoencoder_size:
                raise InputError(
                    f"{name} is {model_size}, but {autoencoder_size} in the autoencoder"
                )
        if self.head.depth < 1:
            raise InputError("depth of the head is 0; it must be at least 1")
        check_count("num_targets", self.num_targets)
        if self.inner_size is not None:
            check_count("inner_size", self.inner_size)

    @property
    def chunk_size(self) -> int:
        """C, the tokens of a chunk."""
        return self.autoencoder_config.chunk_size

    @property
    def input_kind(self) -> str:
        """Kind of the items; this and the next properties implement `GenerativeModel`."""
        return "chunks"

    @property
    def tokens_per_item(self) -> int:
        return self.chunk_size

    @property
    def trunk_config(self) -> TransformerConfig:
        """The trunk's config, without a head of its own."""
        return dataclasses.replace(self.config, tie_embeddings=True)

    @property
    def compression_sizes(self) -> dict[str, int]:
        """The size of each axis of the compression."""
        width = self.config.hidden_size
        inner_size = self.inner_size or 2 * width
        return {"D": width, "F": inner_size, "C": self.chunk_size}

    @property
    def execution(self) -> Execution:
        """Execution of the trunk: form of attention and gradient checkpointing."""
        return Execution(self.implementation, self.remat)

    # --- Parameters and inputs ----------------------------------------------------------------

    def parameter_table(self) -> ParameterTable:
        sizes = self.compression_sizes
        head_table = self.head.parameter_table(self.config.hidden_size)
        autoencoder_table = autoencoder_network.parameter_table(self.autoencoder_config)
        return {
            **with_prefix("trunk", transformer.parameter_table(self.trunk_config)),
            "read_inner": declare(sizes, "F C D", _FAN_IN(in_axis=(-2, -1))),
            "read_inner_bias": declare(sizes, "F", ZEROS),
            "read_outer": declare(sizes, "D F", _FAN_IN(in_axis=-1)),
            "read_outer_bias": declare(sizes, "D", ZEROS),
            "read_norm": declare(sizes, "D", ONES),
            "read_norm_bias": declare(sizes, "D", ZEROS),
            **with_prefix("head", head_table),
            **with_prefix("autoencoder", autoencoder_table),
        }

    def make_inputs(
        self,
        chunks: ArrayLike,
        *,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        position: ArrayLike | None = None,
        follows: bool = False,
    ) -> ChunkInputs:
        """The inputs of a call, checked: shapes always, values where they are known.

        Args:
          chunks: tokens int [..., T, C].
          durations: d >= 0 of each chunk, [..., T]; 1 if omitted.
          times: when each chunk ends, [..., T], instead of start + cumulative durations.
          start: the time at which the first chunk begins, scalar or [...].
          position: index of the only chunk to return the hidden state of, an int or int [...].
          follows: whether there are chunks before these, in a cache.

        Raises:
          InputError: which argument is wrong, where, and how.
        """
        inputs = ChunkInputs.make(
            chunks,
            vocab_size=self.config.vocab_size,
            chunk_size=self.chunk_size,
            durations=durations,
            times=times,
            start=start,
            window=self.config.window,
            follows=follows,
        )
        if position is not None:
            check_integers("position", position, -inputs.num_chunks, inputs.num_chunks)
            position_axes = {"position": np.shape(position)}
            axes_lib.broadcast_leading_axes(inputs.leading_axes() | position_axes)
        return inputs

    @nn.compact
    def __call__(
        self,
        chunks: ArrayLike,
        *,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        position: ArrayLike | None = None,
    ) -> jax.Array:
        """Hidden states [..., T, D], or [..., D] with `position`, which the head reads.

        Arguments are those of `make_inputs`.
        """
        inputs = self.make_inputs(
            chunks, durations=durations, times=times, start=start, position=position
        )
        return self.hidden_states(self.parameters(), inputs, position=position).hidden

    # --- Pure functions -----------------------------------------------------------------------

    def compress(self, params: Params, chunks: jax.Array) -> jax.Array:
        """The trunk's input vectors [..., T, D] of chunks int [..., T, C]."""
        embedded = params["trunk"]["embedding"][chunks]  # [..., T, C, D]
        # D as a capital, since sums run over it before c: einsum sorts the letters.
        x = jnp.einsum("...cD,fcD->...f", embedded, params["read_inner"])
        x = jax.nn.silu(x + params["read_inner_bias"])
        x = jnp.einsum("...f,df->...d", x, params["read_outer"])
        x = x + params["read_outer_bias"]
        scale, bias = params["read_norm"], params["read_norm_bias"]
        return layer_norm(x, scale, bias, _LAYER_NORM_EPS)

    def hidden_states(
        self,
        params: Params,
        inputs: ChunkInputs,
        *,
        position: ArrayLike | None = None,
        cache: KVCache | None = None,
    ) -> HiddenStates:
        """Return the trunk's states; `.hidden` [..., T, D] is the head's input.

        Args:
          params: parameters, as in `parameter_table`.
          inputs: inputs, from `make_inputs`.
          position: the only position to return, as in `transformer.hidden_states`.
          cache: KV cache of the earlier chunks.
        """
        embeddings = self.compress(params, inputs.chunks)
        return transformer.hidden_states(
            self.trunk_config,
            params["trunk"],
            inputs.with_embeddings(embeddings),
            position=position,
            cache=cache,
            execution=self.execution,
        )

    def trunk_params(self, params: Params) -> Params:
        """The parameters of the trunk."""
        return params["trunk"]

    def check_prompt(self, items: ArrayLike, durations: ArrayLike) -> None:
        """Raise InputError unless chunks [T, C] and durations [T] fit the model."""
        self.make_inputs(items, durations=durations)

    def read_items(
        self,
        params: Params,
        items: jax.Array,
        durations: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """The hidden states [B, D] at the last of these chunks, and the cache with all of them.

        Args:
          params: parameters, as in `parameter_table`.
          items: chunks int [B, T, C].
          durations: d >= 0 [B, T].
          cache: KV cache of the earlier chunks.
        """
        inputs = self.make_inputs(items, durations=durations, follows=True)
        states = self.hidden_states(params, inputs, position=-1, cache=cache)
        assert states.cache is not None
        return states.hidden, states.cache

    def context_states(self, params: Params, inputs: ChunkInputs) -> jax.Array:
        """The hidden states [..., T - 1, D] from which all but the first chunk are predicted."""
        return self.hidden_states(params, inputs.first(-1)).hidden

    def loss(self, params: Params, inputs: ChunkInputs, key: jax.Array) -> jax.Array:
        """The head's loss of each chunk after the first: [..., T - 1].

        The targets are `num_targets` draws of the autoencoder's posterior, which gets no gradient.
        The last duration has no influence.
        """
        hidden = self.context_states(params, inputs)
        target_key, head_key = jax.random.split(key)
        posterior = jax.lax.stop_gradient(
            self.encode(params, inputs.chunks[..., 1:, :])
        )
        # Hidden states have more leading axes than chunks where durations do.
        latents_shape = (*hidden.shape[:-1], self.head.width)
        mean, log_scale = (jnp.broadcast_to(x, latents_shape) for x in posterior)
        noise_shape = (self.num_targets, *mean.shape)
        target_noise = jax.random.normal(target_key, noise_shape, mean.dtype)
        targets = mean + jnp.exp(log_scale) * target_noise
        return self.head.loss(params["head"], hidden, targets, head_key)

    def transform(
        self, params: Params, noise: ArrayLike, hidden: ArrayLike
    ) -> jax.Array:
        """The head's vectors [..., W] from noise [..., U] and hidden states [..., D]."""
        return self.head.transform(params["head"], noise, hidden)

    def encode(self, params: Params, chunks: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation [..., W] of the latents of chunks int [..., C]."""
        return autoencoder_network.encode_chunks(
            self.autoencoder_config, params["autoencoder"], chunks
        )

    def decode(self, params: Params, latents: ArrayLike) -> jax.Array:
        """Logits [..., C, V] from latents [..., W]."""
        return autoencoder_network.decode_latents(
            self.autoencoder_config, params["autoencoder"], latents
        )

    def decode_tokens(self, params: Params, latents: ArrayLike) -> jax.Array:
        """The likeliest tokens int32 [..., C] of latents [..., W]."""
        return autoencoder_network.decode_tokens(
            self.autoencoder_config, params["autoencoder"], latents
        )

    def sample_chunks(
        self, params: Params, key: jax.Array, hidden: jax.Array, num_samples: int
    ) -> jax.Array:
        """Chunks of tokens int32 [Z, ..., C], drawn and decoded, for hidden states [..., D]."""
        noise = self.head.noise(key, (num_samples, *hidden.shape[:-1]))
        return self.decode_tokens(params, self.transform(params, noise, hidden))
