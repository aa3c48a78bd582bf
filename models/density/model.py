"""Continuous autoregressive models: the trunk, under a head that is a density over the next vector.

The vectors are the rows of a table, one for each token, or anything at all ([T, W], sound or
images), with no tokenizer. Durations mean what they mean in the trunk, and the log-density of what
comes next is differentiable in them.

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

    Parameters are "trunk/...", "head/..." and "read" [D, W], where vectors are read, or "table"
    [V, W], where it is frozen.

    Attributes:
      config: of the trunk.
      head: what predicts; see `heads`.
      input_kind: "tokens", whose vectors are a table's rows, or "vectors" of the head's width.
      table: where the rows come from: "frozen", a table of the model's own that no gradient
        reaches, or "embedding", the trunk's own embedding table, which learns with it. Either is
        standardised: each dimension has mean 0 and standard deviation 1 over the rows.
      token_loss_weight: weight of the tokens' cross-entropy when the density is renormalised over
        the table, against the negative log-density of one of the W dimensions. It keeps a learned
        table from collapsing, as the likelihood alone is best when all tokens that are hard to tell
        apart have the same row; and it makes densities at different rows comparable, which the
        likelihood of many dimensions does not.
      implementation: of the trunk's attention, and
      remat: whether its layers are computed anew for the backward pass; see `Execution`.
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
        """Whether the head predicts tokens themselves, and no vectors."""
        return isinstance(self.head, heads.TokenHead)

    @property
    def is_trunks_own(self) -> bool:
        """Whether the logits are those of the trunk itself, with no parameters beside its own."""
        return (
            isinstance(self.head, heads.TokenHead)
            and self.head.is_tied_without_blocks
            and self.config.tie_embeddings
            and self.config.logits_softcap is None
        )

    @property
    def has_token_table(self) -> bool:
        """Whether the vectors that are predicted are the rows of a table of tokens."""
        return self.input_kind == "tokens" and not self.predicts_tokens

    @property
    def execution(self) -> Execution:
        """How the trunk is computed."""
        return Execution(self.implementation, self.remat)

    @property
    def tokens_per_item(self) -> int:
        """As of `GenerativeModel`."""
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
          durations: of each token or vector, [..., T]; see `Inputs.make`, also for the following.
          times: when each ends, [..., T].
          start: when the first one begins, [...].
          follows: whether there are others before these, in a cache.

        Raises:
          InputError: which argument is wrong, where, and how.
        """
        reads_tokens = self.input_kind == "tokens"
        wanted, unwanted = (tokens, vectors) if reads_tokens else (vectors, tokens)
        if wanted is None or unwanted is not None:
            other_kind = "vectors" if reads_tokens else "tokens"
            raise InputError(
                f"this model reads {self.input_kind}; give {self.input_kind}, and no {other_kind}"
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
        """Hidden states, which the head reads.

        Args:
          tokens: int [..., T], or
          vectors: [..., T, W].
          durations: as of `Transformer.__call__`, also the following.
          times: when each token or vector ends, [..., T].
          start: when the first one begins, [...].
          position: index of the one whose hidden state is wanted.

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
        """The trunk's hidden states [..., T, D], which the head reads, and its cache.

        Args:
          params: of `parameter_table`.
          inputs: of `make_inputs`.
          position: the one position that is wanted, as of `transformer.hidden_states`.
          cache: of the tokens or vectors before these.
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
        """Refuses int tokens [T] or vectors [T, W], with durations [T], that do not fit."""
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
          params: of `parameter_table`.
          items: int tokens [B, T] or vectors [B, T, W].
          durations: d >= 0 [B, T].
          cache: of the items before these.
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
        """What the head is to predict: int tokens [..., T - 1] or vectors [..., T - 1, W]."""
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
