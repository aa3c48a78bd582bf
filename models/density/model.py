"""Continuous autoregressive models: the trunk, under a head that is a density over the next vector.

The vectors are the rows of a table, one for each token, or anything at all ([T, W], sound or
images), with no tokenizer. Durations mean what they mean in the trunk, and the log-density of what
comes next is differentiable in them.

    lm = density.create(key, config, heads.GaussianHead(width=config.hidden_size))
    lm = density.add_head(clm.load("apples"), heads.MixtureHead(width=96, depth=1), key=key)
    lm.log_prob(tokens, durations=d)                                # nats, [..., T - 1]
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

from continuous_lm.arguments import as_float, check_numbers
from continuous_lm.errors import InputError
from continuous_lm.models import linen_transformer as transformer
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.density.distributions import Categorical
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.linen_transformer import Transformer
from continuous_lm.models.parameters import Declaration

if TYPE_CHECKING:
    import tokenizers

INPUT_KINDS = ("tokens", "vectors")
TABLE_SOURCES = ("frozen", "embedding")
_TRUNK_KEY = "trunk"


class DensityModel(nn.Module):
    """A trunk that reads tokens or vectors, and a head on it.

    `apply` is a pure function, as of `Transformer`; methods other than `__call__` by their names:
    `model.apply({"params": params}, tokens, durations=d, method="log_prob")`.

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
      remat: whether its layers are computed anew for the backward pass; see `Transformer`.
    """

    config: TransformerConfig
    head: heads.Head
    input_kind: str = "tokens"
    table: str = "frozen"
    token_loss_weight: float = 0.0
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in {
            "input_kind": INPUT_KINDS,
            "table": TABLE_SOURCES,
        }.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, not {' or '.join(allowed)}"
                )
        if not 0.0 <= self.token_loss_weight < float("inf"):
            raise InputError(
                f"token_loss_weight is {self.token_loss_weight!r}; it must be at least 0, and"
                " finite"
            )
        width, expected_width = self.head.width, self.config.hidden_size
        if self.predicts_tokens:
            expected_width = self.config.vocab_size
            if self.input_kind == "vectors":
                raise InputError("a token head needs a model that reads tokens")
        if self.input_kind == "tokens" and width != expected_width:
            size_name = "vocab_size" if self.predicts_tokens else "hidden_size"
            raise InputError(
                f"the head's width is {width}, but the trunk's {size_name} is {expected_width}"
            )
        if self.token_loss_weight and (
            self.input_kind == "vectors" or self.predicts_tokens
        ):
            raise InputError(
                "token_loss_weight is for densities over a table of tokens"
            )

    @property
    def predicts_tokens(self) -> bool:
        """Whether the head predicts tokens themselves, and no vectors."""
        return isinstance(self.head, heads.TokenHead)

    def setup(self):
        self.trunk = Transformer(
            self.config, implementation=self.implementation, remat=self.remat
        )
        if self.input_kind == "vectors":
            shape = (self.config.hidden_size, self.head.width)
            partitioned_init = nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("D", "W")
            )
            self.input_kernel: Any = self.param(
                "read", partitioned_init, shape, jnp.float32
            )
        elif self.table == "frozen" and not self.predicts_tokens:
            shape = (self.config.vocab_size, self.head.width)
            partitioned_init = nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("V", "W")
            )
            self.frozen_table: Any = self.param(
                "table", partitioned_init, shape, jnp.float32
            )

    def check(self, tokens=None, *, vectors=None, **arguments) -> None:
        """Refuses arguments that do not fit; values only where they are known."""
        if self.input_kind == "tokens":
            if tokens is None or vectors is not None:
                raise InputError("this model reads tokens; give tokens, and no vectors")
            transformer.check_inputs(self.config, tokens, **arguments)
            return
        if vectors is None or tokens is not None:
            raise InputError("this model reads vectors; give vectors, and no tokens")
        shape = np.shape(vectors)
        if len(shape) < 2 or shape[-1] != self.head.width:
            raise InputError(
                f"vectors have shape {list(shape)}; it must be [..., T, {self.head.width}]"
            )
        check_numbers("vectors", vectors)
        transformer.check_inputs(
            self.config, np.zeros(shape[:-1], np.int32), **arguments
        )

    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        vectors: ArrayLike | None = None,
        **arguments,
    ) -> Any:
        """Hidden states, which the head reads.

        Args:
          tokens: int [..., T], or
          vectors: [..., T, W].
          **arguments: durations, start, times, position, cache: as of `Transformer.__call__`.

        Returns:
          [..., T, D], or [..., D] with `position`; with a cache: these, and the cache.
        """
        self.check(tokens, vectors=vectors, **arguments)
        if vectors is not None:
            embedded_vectors = jnp.einsum(
                "...w,dw->...d",
                jnp.asarray(vectors, self.input_kernel.dtype),
                self.input_kernel,
            )
            hidden_states = self.trunk(
                embeddings=embedded_vectors, return_hidden=True, **arguments
            )
        else:
            hidden_states = self.trunk(tokens, return_hidden=True, **arguments)
        if self.is_initializing():
            self.distribution(hidden_states)
        return hidden_states

    def token_table(self) -> jax.Array:
        """The table of the tokens' vectors, [V, W], standardised."""
        if self.table == "frozen":
            return jax.lax.stop_gradient(self.frozen_table)
        return standardize_table(self._embedding_table())

    def _embedding_table(self) -> jax.Array:
        return cast(jax.Array, nn.unbox(self.trunk.variables["params"]["embedding"]))

    def targets(self, tokens=None, *, vectors=None) -> jax.Array:
        """What the head is to predict, of int tokens [...] or vectors [..., W]."""
        if vectors is not None:
            return as_float(vectors)
        return (
            jnp.asarray(tokens)
            if self.predicts_tokens
            else self.token_table()[jnp.asarray(tokens)]
        )

    def context_states(
        self, tokens=None, *, vectors=None, durations=None, start=None, times=None
    ) -> jax.Array:
        """The hidden states [..., T - 1, D] from which all but the first are predicted."""
        timing_arguments = {"durations": durations, "times": times}
        context_arguments = {
            name: jnp.asarray(array)[..., :-1]
            for name, array in timing_arguments.items()
            if array is not None
        }
        if vectors is not None:
            vectors = jnp.asarray(vectors)[..., :-1, :]
        else:
            tokens = jnp.asarray(tokens)[..., :-1]
        return cast(
            jax.Array, self(tokens, vectors=vectors, start=start, **context_arguments)
        )

    def log_prob(self, tokens=None, *, vectors=None, **arguments) -> jax.Array:
        """Log-density of each vector after the first, given those before, in nats: [..., T - 1].

        (Log-probability of the tokens, for a token head.) The last duration has no influence.
        """
        hidden = self.context_states(tokens, vectors=vectors, **arguments)
        return self._target_log_prob(hidden, self._next_targets(tokens, vectors))

    def loss(self, tokens=None, *, vectors=None, **arguments) -> jax.Array:
        """The training loss of each vector after the first, in nats: [..., T - 1]."""
        hidden = self.context_states(tokens, vectors=vectors, **arguments)
        target = self._next_targets(tokens, vectors)
        if self.predicts_tokens:
            return -self._target_log_prob(hidden, target)
        nats = self.head.loss(hidden, target)
        if self.token_loss_weight:
            token_distribution = Categorical(
                self.head(hidden).log_probs(self.token_table())
            )
            token_log_prob = token_distribution.log_prob(jnp.asarray(tokens)[..., 1:])
            nats = nats - self.token_loss_weight * self.head.width * token_log_prob
        return nats

    def token_logits(self, tokens=None, *, vectors=None, **arguments) -> jax.Array:
        """Logits of the tokens after the first: the density at every row, [..., T - 1, V].

        Their softmax is the density renormalised over the table.
        """
        return self.logits_from_hidden(
            self.context_states(tokens, vectors=vectors, **arguments)
        )

    def logits_from_hidden(self, hidden: jax.Array) -> jax.Array:
        """Logits of tokens [..., V] from hidden states [..., D]."""
        density = self.distribution(hidden)
        return cast(
            jax.Array,
            density.logits
            if self.predicts_tokens
            else density.log_probs(self.token_table()),
        )

    def distribution(self, hidden: jax.Array) -> Any:
        """The head's distribution, from hidden states [..., D]."""
        if isinstance(self.head, heads.TokenHead) and self.head.tied:
            return self.head(hidden, self._embedding_table())
        return self.head(hidden)

    def _target_log_prob(self, hidden: jax.Array, target: jax.Array) -> jax.Array:
        return cast(jax.Array, self.distribution(hidden).log_prob(target))

    def route(self, hidden: jax.Array) -> Any:
        """What `ExpertsHead.route` says of hidden states [..., D]."""
        return cast(heads.ExpertsHead, self.head).route(hidden)

    def _next_targets(self, tokens, vectors) -> jax.Array:
        if vectors is not None:
            return self.targets(vectors=jnp.asarray(vectors)[..., 1:, :])
        return self.targets(jnp.asarray(tokens)[..., 1:])


def standardize_table(table: jax.Array) -> jax.Array:
    """The table [V, W] with mean 0 and standard deviation 1 in each column, at least float32."""
    values = as_float(table)
    values = values - jnp.mean(values, axis=0)
    min_variance = (
        jnp.finfo(values.dtype).eps ** 2
    )  # a column without variance is 0, with a finite gradient
    return values * jax.lax.rsqrt(jnp.mean(values**2, axis=0) + min_variance)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_jitted(
    model: DensityModel, method: str, params: Any, arguments: dict[str, Any]
) -> Any:
    return model.apply({"params": params}, **arguments, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class DensityLM:
    """A density model with its parameters and, where it reads tokens, its tokenizer.

    Attributes:
      model: the Linen module, whose `apply` is a pure function.
      params: parameter tree: "trunk", "head", and "table" or "read".
      tokenizer: of the `tokenizers` library, or None.
      hf_fields: fields of the trunk's config.json that do not change what is computed.
    """

    model: DensityModel
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    hf_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    def log_prob(self, tokens=None, **arguments) -> jax.Array:
        """`DensityModel.log_prob`, jitted; values are checked as long as they are known."""
        return cast(jax.Array, self._apply_checked("log_prob", tokens, arguments))

    def loss(self, tokens=None, **arguments) -> jax.Array:
        """`DensityModel.loss`, jitted."""
        return cast(jax.Array, self._apply_checked("loss", tokens, arguments))

    def token_logits(self, tokens=None, **arguments) -> jax.Array:
        """`DensityModel.token_logits`, jitted."""
        return cast(jax.Array, self._apply_checked("token_logits", tokens, arguments))

    def _apply_checked(self, method: str, tokens, arguments: dict[str, Any]) -> Any:
        inputs = {"tokens": tokens} | arguments
        inputs = {
            name: jnp.asarray(value)
            for name, value in inputs.items()
            if value is not None
        }
        self.model.check(**inputs)
        length = (
            np.shape(inputs["tokens"])[-1]
            if tokens is not None
            else inputs["vectors"].shape[-2]
        )
        if length < 2:
            raise InputError(
                "a single vector is predicted from nothing; give at least two"
            )
        return _apply_jitted(self.model, method, self.params, inputs)


def create(
    key: jax.Array,
    config: TransformerConfig,
    head: heads.Head,
    *,
    table: ArrayLike | None = None,
    tokenizer: "tokenizers.Tokenizer | None" = None,
    **settings: Any,
) -> DensityLM:
    """A model with new parameters.

    Args:
      key: PRNG key.
      config: of the trunk.
      head: what predicts.
      table: [V, W] rows for the tokens, of another model, say: they are standardised and frozen. If
        left out, the rows are the trunk's embedding table, and learned with it.
      tokenizer: kept with the model.
      **settings: further attributes of `DensityModel`.
    """
    model = DensityModel(
        config, head, table="embedding" if table is None else "frozen", **settings
    )
    frozen_table = None
    if table is not None:
        check_numbers("table", table)
        if model.input_kind == "vectors":
            raise InputError(
                "a model that reads vectors has no table of tokens; leave out table"
            )
        expected_shape = (config.vocab_size, head.width)
        if not model.predicts_tokens:
            if np.shape(table) != expected_shape:
                raise InputError(
                    f"table has shape {list(np.shape(table))}; it must be {list(expected_shape)}"
                )
            frozen_table = standardize_table(jnp.asarray(table))
    params = nn.unbox(jax.jit(model.init)(key, **example_inputs(model))["params"])
    if frozen_table is not None:
        params = params | {"table": frozen_table}
    return DensityLM(model, params, tokenizer)


def add_head(
    lm: LanguageModel,
    head: heads.Head,
    *,
    key: jax.Array,
    token_loss_weight: float = 0.0,
) -> DensityLM:
    """A new density head on a pretrained trunk, over the rows of that trunk's embedding table.

    Train the parameters under "head" alone, and the trunk stays as it is.

    Args:
      lm: the language model.
      head: of width D.
      key: PRNG key of the head's parameters.
      token_loss_weight: see `DensityModel`.
    """
    model = DensityModel(
        lm.config,
        head,
        table="embedding",
        token_loss_weight=token_loss_weight,
        implementation=lm.model.implementation,
        remat=lm.model.remat,
    )
    if isinstance(head, heads.TokenHead) and head.tied and not head.depth:
        raise InputError(
            "a tied token head on a pretrained trunk is that model's own; load it"
        )
    hidden = jnp.zeros((1, lm.config.hidden_size), lm.params["embedding"].dtype)
    table_argument = (
        {"table": lm.params["embedding"]} if getattr(head, "tied", False) else {}
    )
    params = {
        "trunk": lm.params,
        "head": nn.unbox(head.init(key, hidden, **table_argument)["params"]),
    }
    return DensityLM(model, params, lm.tokenizer, lm.hf_fields)


def _shape_struct(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def example_inputs(model: DensityModel) -> dict[str, Any]:
    """The shortest input, to make parameters with."""
    if model.input_kind == "tokens":
        return {"tokens": np.zeros(2, np.int32)}
    return {"vectors": np.zeros((2, model.head.width), np.float32)}


def _declarations_above_trunk(
    model: DensityModel,
) -> dict[str, Declaration]:
    """Path -> shape and axes of the parameters above the trunk."""
    param_tree = jax.eval_shape(
        lambda: model.init(jax.random.key(0), **example_inputs(model))
    )["params"]
    flat_params = transformer.table_of_boxes(param_tree)
    return {
        path: declaration
        for path, declaration in flat_params.items()
        if not path.startswith(f"{_TRUNK_KEY}/")
    }
