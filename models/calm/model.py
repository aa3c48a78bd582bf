"""Next-vector models: text O tokens at a time (CALM, Shao et al., arXiv:2510.27688).

    lm = next_vector.create(key, config, codec, head)       # or calm.load(...)
    hidden = lm.hidden(chunks, durations=d)                 # int [..., T, O] -> [..., T, D]
    nats = lm.loss(chunks, key)                             # [..., T - 1]

The embeddings of a chunk's O tokens are compressed to one input vector of the trunk, and a head
without a likelihood (see `implicit`) draws the latent vector of the next chunk, which the
autoencoder decodes to its tokens. A chunk has a duration, as a token of a `Transformer` has: the
unit of time is the chunk. `calm_sampling` draws text.
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
from continuous_lm.models import transformer
from continuous_lm.models.calm.autoencoder import Autoencoder, AutoencoderConfig, Codec
from continuous_lm.models.calm.implicit_heads import ImplicitHead
from continuous_lm.models.config import TransformerConfig
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
      implementation: of the trunk's attention, and
      remat: whether its layers are computed anew for the backward pass; see `Transformer`.
    """

    config: TransformerConfig
    autoencoder: AutoencoderConfig
    head: ImplicitHead
    inner_size: int | None = None
    num_targets: int = 100
    implementation: str = "auto"
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
        self.trunk = Transformer(config, implementation=self.implementation, remat=self.remat)
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
        check_integers("chunks", chunks, 0, self.config.vocab_size)
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
    params = dict(nn.unbox(jax.jit(model.init)(key, stand_in(model))["params"]))
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
    check_integers("tokens", tokens, 0, np.iinfo(np.int32).max)
    if fill is not None and not isinstance(fill, int | np.integer):
        raise InputError(f"fill is {fill!r:.60}; it must be one token")
    over = -tokens.shape[-1] % chunk_size
    if over and fill is None:
        raise InputError(
            f"{tokens.shape[-1]} tokens are no multiple of a chunk of {chunk_size}; cut them, or"
            " give fill, a token to put in front"
        )
    if over:
        tokens = np.concatenate([np.full((*tokens.shape[:-1], over), fill), tokens], axis=-1)
    return tokens.reshape(*tokens.shape[:-1], -1, chunk_size).astype(np.int32)


def stand_in(model: NextVectorModel) -> np.ndarray:
    """The shortest input, to make parameters with."""
    return np.zeros((1, model.chunk_size), np.int32)
