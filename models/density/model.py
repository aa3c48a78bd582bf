"""Continuous autoregressive models: the trunk with a head that is a density over the next vector.

The vectors are the rows of a table, one for each token, or any vectors [T, W], such as sound or
images, without a tokenizer. Durations have the same meaning as in the trunk. The log-density of the
next vector is differentiable in them.

The methods of `DensityModel` are pure functions of parameters and inputs: jit them with the model
static, take gradients, vmap them.

    inputs = model.make_inputs(tokens, durations=d)
    model.log_prob(params, inputs)                                  # nats, [..., T - 1]

`scoring` has the functions of the same names that take a `LanguageModel` and check its arguments.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models import transformer, trunk_inputs
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.density.distributions import Categorical, Density
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.parameters import (
    Declaration,
    Initializer,
    ParameterModule,
    Params,
    declare,
    with_prefix,
)
from continuous_lm.models.transformer import Execution, HiddenStates

__all__ = [
    "HEAD",
    "INPUT_KINDS",
    "READ",
    "TABLE",
    "TABLE_SOURCES",
    "TRUNK",
    "DensityModel",
    "standardize_table",
]

INPUT_KINDS = ("tokens", "vectors")
TABLE_SOURCES = ("frozen", "embedding")
TRUNK = "trunk"  # paths of the parts of the parameter tree
HEAD = "head"
TABLE = "table"
READ = "read"
_UNIT_NORMAL: Initializer = nn.initializers.normal(1.0)


class DensityModel(ParameterModule):
    """A trunk that reads tokens or vectors, and a head on it.

    Parameters are "trunk/..." and "head/...". Models that read vectors also have "read" [D, W];
    models with a frozen table have "table" [V, W].

    Attributes:
      config: config of the trunk.
      head: the head; see `heads`.
      input_kind: "tokens", whose vectors are a table's rows, or "vectors" of the head's width.
      table: source of the rows: "frozen", a separate table without gradients, or "embedding", the
        trunk's embedding table, which is trained. Rows are standardised: each dimension has mean 0
        and standard deviation 1 over the rows.
      token_loss_weight: weight of the token cross-entropy (density renormalised over the table),
        relative to the negative log-density of one of the W dimensions. Likelihood alone collapses
        a learned table: tokens that are hard to distinguish get equal rows. It also leaves
        densities at different rows incomparable.
      implementation: form of the trunk's attention; see `Execution`.
      remat: whether the backward pass recomputes the trunk's layers; see `Execution`.
    """

    config: TransformerConfig
    head: heads.DistributionHead
    input_kind: str = "tokens"
    table: str = "frozen"
    token_loss_weight: float = 0.0
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed_values = {"input_kind": INPUT_KINDS, "table": TABLE_SOURCES}
        for name, allowed in allowed_values.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} is {value!r}, not {' or '.join(allowed)}")
        if not 0.0 <= self.token_loss_weight < float("inf"):
            raise InputError(
                f"token_loss_weight is {self.token_loss_weight!r}; it must be at least 0, and"
                " finite"
            )
        if self.input_kind == "vectors" and self.predicts_tokens:
            raise InputError("a token head needs a model that reads tokens")
        if self.token_loss_weight and not self.has_token_table:
            raise InputError(
                "token_loss_weight is for densities over a table of tokens"
            )
        size_name = "vocab_size" if self.predicts_tokens else "hidden_size"
        expected_width = getattr(self.config, size_name)
        if self.input_kind == "tokens" and self.head.width != expected_width:
            raise InputError(
                f"the head's width is {self.head.width}, but the trunk's {size_name} is"
                f" {expected_width}"
            )

    @property
    def predicts_tokens(self) -> bool:
        """Return whether the head predicts tokens, not vectors."""
        return isinstance(self.head, heads.TokenHead)

    @property
    def is_trunks_own(self) -> bool:
        """Return whether the logits are the trunk's, without further parameters."""
        return (
            isinstance(self.head, heads.TokenHead)
            and self.head.is_tied_without_blocks
            and self.config.tie_embeddings
            and self.config.logits_softcap is None
        )

    @property
    def has_token_table(self) -> bool:
        """Return whether the predicted vectors are the rows of a table of tokens."""
        return self.input_kind == "tokens" and not self.predicts_tokens

    @property
    def execution(self) -> Execution:
        """Execution of the trunk: form of attention and gradient checkpointing."""
        return Execution(self.implementation, self.remat)

    @property
    def tokens_per_item(self) -> int:
        """Number of tokens of an item; see `GenerativeModel`."""
        return 1

    # --- Parameters and inputs ----------------------------------------------------------------

    def parameter_table(self) -> dict[str, Declaration]:
        trunk_table = transformer.parameter_table(self.config)
        return with_prefix(TRUNK, trunk_table) | self.table_above_trunk()

    def table_above_trunk(self) -> dict[str, Declaration]:
        """Path -> declaration of the parameters that are not the trunk's."""
        head_table = self.head.parameter_table(self.config.hidden_size)
        table = with_prefix(HEAD, head_table)
        sizes = self.config.sizes | {"W": self.head.width}
        if self.input_kind == "vectors":
            table[READ] = declare(sizes, "D W")
        elif self.table == "frozen" and self.has_token_table:
            table[TABLE] = declare(sizes, "V W", _UNIT_NORMAL)
        return table

    def make_inputs(
        self,
        tokens: ArrayLike | None = None,
        *,
        vectors: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        follows: bool = False,
    ) -> Inputs:
        """The inputs of a call, checked: shapes always, values where they are known.

        Args:
          tokens: int [..., T], for a model that reads tokens, or
          vectors: [..., T, W], for one that reads vectors: the `embeddings` of the inputs.
          durations: duration of each token or vector, [..., T]; see `Inputs.make` for this and the
            next.
          times: when each ends, [..., T].
          start: when the first one begins, [...].
          follows: whether there are others before these, in a cache.

        Raises:
          InputError: which argument is wrong, where, and how.
        """
        reads_tokens = self.input_kind == "tokens"
        items, other_items = (tokens, vectors) if reads_tokens else (vectors, tokens)
        if items is None or other_items is not None:
            other_kind = "vectors" if reads_tokens else "tokens"
            raise InputError(
                f"this model reads {self.input_kind}; give {self.input_kind}, not {other_kind}"
            )
        return Inputs.make(
            tokens,
            vocab_size=self.config.vocab_size,
            width=self.head.width,
            embeddings=vectors,
            durations=durations,
            times=times,
            start=start,
            window=self.config.window,
            follows=follows,
            vectors_name="vectors",
        )

    @nn.compact
    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        vectors: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        position: ArrayLike | None = None,
    ) -> jax.Array:
        """Return the hidden states, the head's input.

        Args:
          tokens: int [..., T]; or give `vectors`.
          vectors: [..., T, W].
          durations: as in `Transformer.__call__`, like the next arguments.
          times: end time of each token or vector, [..., T].
          start: start time of the first token or vector, [...].
          position: index of the only token or vector to return the hidden state of.

        Returns:
          [..., T, D], or [..., D] with `position`.
        """
        inputs = self.make_inputs(
            tokens, vectors=vectors, durations=durations, times=times, start=start
        )
        trunk_inputs.check_position(inputs, position)
        return self.hidden_states(self.parameters(), inputs, position=position).hidden

    # --- Pure functions -----------------------------------------------------------------------

    def hidden_states(
        self,
        params: Params,
        inputs: Inputs,
        *,
        position: ArrayLike | None = None,
        cache: KVCache | None = None,
    ) -> HiddenStates:
        """Return the trunk's hidden states [..., T, D], the head's input, and its cache.

        Args:
          params: parameters, as in `parameter_table`.
          inputs: inputs, from `make_inputs`.
          position: the only position to return, as in `transformer.hidden_states`.
          cache: KV cache of the earlier tokens or vectors.
        """
        if inputs.embeddings is not None:
            kernel = params[READ]
            vectors = inputs.embeddings.astype(kernel.dtype)
            embedded = jnp.einsum("...w,dw->...d", vectors, kernel)
            inputs = inputs._replace(embeddings=embedded)
        return transformer.hidden_states(
            self.config,
            params[TRUNK],
            inputs,
            position=position,
            cache=cache,
            execution=self.execution,
        )

    def trunk_params(self, params: Params) -> Params:
        """The parameters of the trunk."""
        return params[TRUNK]

    def check_prompt(self, items: ArrayLike, durations: ArrayLike) -> None:
        """Raise InputError unless tokens [T] or vectors [T, W] and durations [T] fit."""
        self._item_inputs(items, durations, follows=False)

    def read_items(
        self,
        params: Params,
        items: jax.Array,
        durations: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """The hidden states [B, D] at the last of these items, and the cache with all of them.

        Args:
          params: parameters, as in `parameter_table`.
          items: int tokens [B, T] or vectors [B, T, W].
          durations: d >= 0 [B, T].
          cache: KV cache of the earlier items.
        """
        inputs = self._item_inputs(items, durations, follows=True)
        states = self.hidden_states(params, inputs, position=-1, cache=cache)
        assert states.cache is not None
        return states.hidden, states.cache

    def _item_inputs(
        self, items: ArrayLike, durations: ArrayLike, *, follows: bool
    ) -> Inputs:
        are_tokens = jnp.issubdtype(jnp.result_type(items), jnp.integer)
        return self.make_inputs(
            items if are_tokens else None,
            vectors=None if are_tokens else items,
            durations=durations,
            follows=follows,
        )

    def context_states(self, params: Params, inputs: Inputs) -> jax.Array:
        """The hidden states [..., T - 1, D] from which all but the first are predicted."""
        return self.hidden_states(params, inputs.first(-1)).hidden

    def distribution(self, params: Params, hidden: jax.Array) -> Density | Categorical:
        """The head's distribution, from hidden states [..., D]."""
        head_params = params.get(HEAD, {})  # a tied head may have none
        if isinstance(self.head, heads.TokenHead) and self.head.tied:
            embedding = params[TRUNK]["embedding"]
            return self.head.distribution(head_params, hidden, embedding)
        return self.head.distribution(head_params, hidden)

    def log_prob(self, params: Params, inputs: Inputs) -> jax.Array:
        """Log-density of each vector after the first, given those before, in nats: [..., T - 1].

        (Log-probability of the tokens, for a token head.) The last duration has no influence.
        """
        hidden = self.context_states(params, inputs)
        target = self.next_targets(params, inputs)
        return self.distribution(params, hidden).log_prob(target)

    def loss(self, params: Params, inputs: Inputs) -> jax.Array:
        """The training loss of each vector after the first, in nats: [..., T - 1]."""
        if self.predicts_tokens:
            return -self.log_prob(params, inputs)
        hidden = self.context_states(params, inputs)
        target = self.next_targets(params, inputs)
        nats = self.head.loss(params[HEAD], hidden, target)
        if self.token_loss_weight and inputs.tokens is not None:
            token_log_prob = Categorical(self.logits(params, hidden)).log_prob(
                inputs.tokens[..., 1:]
            )
            nats = nats - self.token_loss_weight * self.head.width * token_log_prob
        return nats

    def token_logits(self, params: Params, inputs: Inputs) -> jax.Array:
        """Logits of the tokens after the first: the density at every row, [..., T - 1, V].

        Their softmax is the density renormalised over the table.
        """
        return self.logits(params, self.context_states(params, inputs))

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits of tokens [..., V] from hidden states [..., D]."""
        distribution = self.distribution(params, hidden)
        if isinstance(distribution, Categorical):
            return distribution.logits
        return distribution.log_probs(self.token_table(params))

    def token_table(self, params: Params) -> jax.Array:
        """The table of the tokens' vectors, [V, W], standardised.

        Raises:
          InputError: if the model reads vectors, or predicts tokens themselves.
        """
        if not self.has_token_table:
            raise InputError("only a density over a table of tokens has that table")
        if self.table == "frozen":
            return jax.lax.stop_gradient(params[TABLE])
        return standardize_table(params[TRUNK]["embedding"])

    def next_targets(self, params: Params, inputs: Inputs) -> jax.Array:
        """Return the head's targets: int tokens [..., T - 1] or vectors [..., T - 1, W]."""
        if inputs.embeddings is not None:
            return as_float(inputs.embeddings[..., 1:, :])
        assert inputs.tokens is not None
        next_tokens = jnp.asarray(inputs.tokens[..., 1:])
        if self.predicts_tokens:
            return next_tokens
        return self.token_table(params)[next_tokens]


def standardize_table(table: jax.Array) -> jax.Array:
    """The table [V, W] with mean 0 and standard deviation 1 in each column, at least float32."""
    values = as_float(table)
    values = values - jnp.mean(values, axis=0)
    # A column without variance becomes 0, with a finite gradient.
    min_variance = jnp.finfo(values.dtype).eps ** 2
    return values * jax.lax.rsqrt(jnp.mean(values**2, axis=0) + min_variance)
