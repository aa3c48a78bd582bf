"""Next-vector models: text C tokens at a time (CALM, Shao et al., arXiv:2510.27688).

    lm = calm.create(key, config, codec, head)              # or calm.load(...)
    hidden = lm.hidden_states(chunks, durations=d)          # int [..., T, C] -> [..., T, D]
    nats = lm.loss(chunks, key)                             # [..., T - 1]

The embeddings of a chunk's C tokens are compressed to one input vector of the trunk, and a head
without a likelihood (see `implicit_heads`) draws the latent vector of the next chunk, which the
autoencoder decodes to its tokens. A chunk has a duration, as a token of a `Transformer` has: the
unit of time is the chunk. `samplers` draws text.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_integers
from continuous_lm.errors import InputError
from continuous_lm.models import linen_transformer as transformer
from continuous_lm.models.calm.autoencoder import Autoencoder, AutoencoderConfig, Codec
from continuous_lm.models.calm.implicit_heads import ImplicitHead
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.linen_transformer import Transformer, layer_norm

if TYPE_CHECKING:
    import tokenizers

_LAYER_NORM_EPS = 1e-6  # of the layer norm over compressed chunks, as published


class NextVectorModel(nn.Module):
    """A trunk that reads chunks of C tokens, and a head that draws the latent vector of the next.

    `apply` is a pure function, as of `Transformer`; methods other than `__call__` by their names.
    Parameters: "trunk", "read_*" (of the compression), "head" and "autoencoder".

    Attributes:
      config: of the trunk; its head, if it says that it has one, is none of this model's.
      autoencoder_config: of the autoencoder.
      head: draws latent vectors; see `implicit_heads`.
      inner_size: F of the MLP that compresses a chunk's embeddings; 2 D if left out.
      num_targets: how many draws of the autoencoder's posterior the loss takes for each chunk.
      implementation: of the trunk's attention, and
      remat: whether its layers are computed anew for the backward pass; see `Transformer`.
    """

    config: TransformerConfig
    autoencoder_config: AutoencoderConfig
    head: ImplicitHead
    inner_size: int | None = None
    num_targets: int = 100
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self):
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
        if self.num_targets < 1:
            raise InputError(
                f"num_targets is {self.num_targets}; it must be at least 1"
            )

    @property
    def chunk_size(self) -> int:
        """C, the tokens of a chunk."""
        return self.autoencoder_config.chunk_size

    def setup(self):
        config = dataclasses.replace(
            self.config, tie_embeddings=True
        )  # no head of its own
        self.trunk = Transformer(
            config, implementation=self.implementation, remat=self.remat
        )
        self.codec = Autoencoder(self.autoencoder_config, name="autoencoder")
        width, inner_size = (
            config.hidden_size,
            self.inner_size or 2 * config.hidden_size,
        )
        fan_in_init = functools.partial(
            nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal"
        )
        ones, zeros = nn.initializers.ones, nn.initializers.zeros

        def parameter(name: str, axes: str, shape: tuple[int, ...], init: Any) -> Any:
            partitioned_init = nn.with_logical_partitioning(init, axes_lib.split(axes))
            return self.param(name, partitioned_init, shape, jnp.float32)

        inner_init = fan_in_init(in_axis=(-2, -1), out_axis=0)
        self.inner_kernel = parameter(
            "read_inner", "F C D", (inner_size, self.chunk_size, width), inner_init
        )
        self.inner_bias = parameter("read_inner_bias", "F", (inner_size,), zeros)
        self.outer_kernel = parameter(
            "read_outer",
            "D F",
            (width, inner_size),
            fan_in_init(in_axis=-1, out_axis=0),
        )
        self.outer_bias = parameter("read_outer_bias", "D", (width,), zeros)
        self.norm_scale = parameter("read_norm", "D", (width,), ones)
        self.norm_bias = parameter("read_norm_bias", "D", (width,), zeros)

    def check(self, chunks: ArrayLike, **arguments) -> None:
        """Refuses arguments that do not fit; values only where they are known."""
        shape = np.shape(chunks)
        if len(shape) < 2 or shape[-1] != self.chunk_size:
            raise InputError(
                f"chunks have shape {list(shape)}; it must be [..., T, {self.chunk_size}], the"
                " tokens of a chunk last: see calm.split_into_chunks"
            )
        check_integers("chunks", chunks, 0, self.config.vocab_size)
        transformer.check_inputs(
            self.config, np.zeros(shape[:-1], np.int32), **arguments
        )

    def __call__(self, chunks: ArrayLike, **arguments) -> Any:
        """Hidden states, which the head reads.

        Args:
          chunks: tokens int [..., T, C].
          **arguments: durations (of chunks), start, times, position, cache: as of
            `Transformer.__call__`.

        Returns:
          [..., T, D], or [..., D] with `position`; with a cache: these, and the cache.
        """
        self.check(chunks, **arguments)
        if self.is_initializing():  # makes the table, whose rows are then read
            self.trunk(jnp.zeros(1, jnp.int32), return_hidden=True)
        embedding_table: Any = nn.unbox(self.trunk.variables["params"]["embedding"])
        # D as a capital, since sums run over it before c: einsum sorts the letters.
        x = (
            jnp.einsum(
                "...cD,fcD->...f",
                embedding_table[jnp.asarray(chunks)],
                self.inner_kernel,
            )
            + self.inner_bias
        )
        x = (
            jnp.einsum("...f,df->...d", jax.nn.silu(x), self.outer_kernel)
            + self.outer_bias
        )
        x = layer_norm(x, self.norm_scale, self.norm_bias, _LAYER_NORM_EPS)
        hidden_states = self.trunk(embeddings=x, return_hidden=True, **arguments)
        if self.is_initializing():
            self.head(hidden_states)
            self.codec(chunks)
        return hidden_states

    def context_states(
        self, chunks, *, durations=None, start=None, times=None
    ) -> jax.Array:
        """The hidden states [..., T - 1, D] from which all chunks but the first are predicted."""
        timing_arguments = {"durations": durations, "times": times}
        context_arguments = {
            name: jnp.asarray(array)[..., :-1]
            for name, array in timing_arguments.items()
            if array is not None
        }
        return cast(
            jax.Array,
            self(jnp.asarray(chunks)[..., :-1, :], start=start, **context_arguments),
        )

    def loss(self, chunks, key: jax.Array, **arguments) -> jax.Array:
        """The head's loss of each chunk after the first: [..., T - 1].

        The targets are `num_targets` draws of the autoencoder's posterior, which gets no gradient.
        The last duration has no influence.
        """
        hidden = self.context_states(chunks, **arguments)
        target_key, head_key = jax.random.split(key)
        mean, log_scale = jax.lax.stop_gradient(
            self.encode(jnp.asarray(chunks)[..., 1:, :])
        )
        target_noise = jax.random.normal(
            target_key, (self.num_targets, *mean.shape), mean.dtype
        )
        return self.head.loss(
            hidden, mean + jnp.exp(log_scale) * target_noise, head_key
        )

    def encode(self, chunks) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation [..., W] of the latents of chunks int [..., C]."""
        return self.codec.encode(chunks)

    def decode(self, latents) -> jax.Array:
        """Logits [..., C, V] from latents [..., W]."""
        return self.codec.decode(latents)

    def transform(self, noise, hidden) -> jax.Array:
        """The head's vectors [..., W] from noise [..., U] and hidden states [..., D]."""
        return self.head.transform(noise, hidden)

    def sample_chunks(
        self, key: jax.Array, hidden: jax.Array, num_samples: int
    ) -> jax.Array:
        """Chunks of tokens int32 [Z, ..., C], drawn and decoded, for hidden states [..., D]."""
        noise = self.head.noise(key, (num_samples, *hidden.shape[:-1]))
        return self.decode_tokens(self.transform(noise, hidden))

    def decode_tokens(self, latents: jax.Array) -> jax.Array:
        """The likeliest tokens int32 [..., C] of latents [..., W]; see `Autoencoder`'s."""
        return self.codec.decode_tokens(latents)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_jitted(
    model: NextVectorModel, method: str, params: Any, *inputs: Any, **options: Any
) -> Any:
    return model.apply({"params": params}, *inputs, method=method, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class NextVectorLM:
    """A next-vector model with its parameters and, if it has one, its tokenizer.

    Attributes:
      model: the Linen module, whose `apply` is a pure function.
      params: parameter tree: "trunk", "read_inner", ..., "head", "autoencoder".
      tokenizer: of the `tokenizers` library, or None.
      hf_fields: fields of config.json that do not change what is computed.
    """

    model: NextVectorModel
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    hf_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        return Codec(
            self.model.autoencoder_config, params, self.tokenizer, self.hf_fields
        )

    def hidden_states(self, chunks: ArrayLike, **arguments) -> jax.Array:
        """`NextVectorModel.__call__`, jitted; values are checked as long as they are known."""
        inputs = {
            name: jnp.asarray(value)
            for name, value in arguments.items()
            if value is not None
        }
        self.model.check(chunks, **inputs)
        hidden_states = _apply_jitted(
            self.model, "__call__", self.params, jnp.asarray(chunks), **inputs
        )
        return cast(jax.Array, hidden_states)

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
        inputs = {
            name: jnp.asarray(value)
            for name, value in arguments.items()
            if value is not None
        }
        self.model.check(chunks, **inputs)
        if np.shape(chunks)[-2] < 2:
            raise InputError(
                "a single chunk is predicted from nothing; give at least two"
            )
        losses = _apply_jitted(
            self.model, "loss", self.params, jnp.asarray(chunks), key, **inputs
        )
        return cast(jax.Array, losses)

    def transform(self, noise: ArrayLike, hidden: ArrayLike) -> jax.Array:
        """`NextVectorModel.transform`, jitted."""
        inputs = jnp.asarray(noise), jnp.asarray(hidden)
        return cast(
            jax.Array, _apply_jitted(self.model, "transform", self.params, *inputs)
        )


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
    params = dict(nn.unbox(jax.jit(model.init)(key, example_inputs(model))["params"]))
    return NextVectorLM(
        model, params | {"autoencoder": codec.params}, codec.tokenizer, codec.hf_fields
    )


def split_into_chunks(
    tokens: ArrayLike, chunk_size: int, pad_token: int | None = None
) -> np.ndarray:
    """Tokens int [..., n] as chunks int32 [..., T, C].

    Args:
      tokens: int [..., n].
      chunk_size: C.
      pad_token: a token that is put in front as often as needed, where C does not divide n; if left
        out, that is refused.
    """
    tokens = np.asarray(tokens)
    if (
        not np.issubdtype(tokens.dtype, np.integer)
        or not tokens.ndim
        or not tokens.shape[-1]
    ):
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be integers [..., n]"
        )
    check_integers("tokens", tokens, 0, np.iinfo(np.int32).max)
    if pad_token is not None and not isinstance(pad_token, int | np.integer):
        raise InputError(f"pad_token is {pad_token!r:.60}; it must be one token")
    num_padding = -tokens.shape[-1] % chunk_size
    if num_padding and pad_token is None:
        raise InputError(
            f"{tokens.shape[-1]} tokens are no multiple of a chunk of {chunk_size}; cut them, or"
            " give pad_token, a token to put in front"
        )
    if num_padding:
        tokens = np.concatenate(
            [np.full((*tokens.shape[:-1], num_padding), pad_token), tokens], axis=-1
        )
    return tokens.reshape(*tokens.shape[:-1], -1, chunk_size).astype(np.int32)


def example_inputs(model: NextVectorModel) -> np.ndarray:
    """The shortest input, to make parameters with."""
    return np.zeros((1, model.chunk_size), np.int32)
