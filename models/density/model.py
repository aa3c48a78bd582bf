"""Continuous autoregressive models: the trunk, under a head that is a density over the next vector.

The vectors are the rows of a table, one for each token, or anything at all ([T, W], sound or
images), with no tokenizer. Durations mean what they mean in the trunk, and the log-density of what
comes next is differentiable in them.

    lm = density.create(key, config, heads.GaussianHead(width=config.hidden_size))
    lm = density.on(clm.load("apples"), heads.MixtureHead(width=96, depth=1), key=key)
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
from flax import traverse_util
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_numbers
from continuous_lm.errors import InputError
from continuous_lm.models import transformer
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.density.distributions import Categorical
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.transformer import Transformer

if TYPE_CHECKING:
    import tokenizers

READS = ("tokens", "vectors")
TABLES = ("frozen", "embedding")
_TRUNK = "trunk"


class DensityModel(nn.Module):
    """A trunk that reads tokens or vectors, and a head on it.

    `apply` is a pure function, as of `Transformer`; methods other than `__call__` by their names:
    `model.apply({"params": params}, tokens, durations=d, method="log_prob")`.

    Attributes:
      config: of the trunk.
      head: what predicts; see `heads`.
      reads: "tokens", whose vectors are a table's rows, or "vectors" of the head's width.
      table: where the rows come from: "frozen", a table of the model's own that no gradient
        reaches, or "embedding", the trunk's own embedding table, which learns with it. Either is
        standardised: each dimension has mean 0 and standard deviation 1 over the rows.
      contrast: weight of the tokens' cross-entropy when the density is renormalised over the table,
        against the negative log-density of one of the W dimensions. It keeps a learned table from
        collapsing, as the likelihood alone is best when all tokens that are hard to tell apart
        have the same row; and it makes densities at different rows comparable, which the
        likelihood of many dimensions does not.
      implementation: of the trunk's attention, and
      remat: whether its layers are computed anew for the backward pass; see `Transformer`.
    """

    config: TransformerConfig
    head: heads.Head
    reads: str = "tokens"
    table: str = "frozen"
    contrast: float = 0.0
    implementation: str = "auto"
    remat: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, known in {"reads": READS, "table": TABLES}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, not {' or '.join(known)}")
        if not 0.0 <= self.contrast < float("inf"):
            raise InputError(f"contrast is {self.contrast!r}; it must be at least 0, and finite")
        width, wanted = self.head.width, self.config.hidden_size
        if self.speaks:
            wanted = self.config.vocab_size
            if self.reads == "vectors":
                raise InputError("a token head needs a model that reads tokens")
        if self.reads == "tokens" and width != wanted:
            told = "vocab_size" if self.speaks else "hidden_size"
            raise InputError(f"the head's width is {width}, but the trunk's {told} is {wanted}")
        if self.contrast and (self.reads == "vectors" or self.speaks):
            raise InputError("contrast is for densities over a table of tokens")

    @property
    def speaks(self) -> bool:
        """Whether the head predicts tokens themselves, and no vectors."""
        return isinstance(self.head, heads.TokenHead)

    def setup(self):
        self.trunk = Transformer(self.config, implementation=self.implementation, remat=self.remat)
        if self.reads == "vectors":
            shape = (self.config.hidden_size, self.head.width)
            boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("D", "W"))
            self.read: Any = self.param("read", boxed, shape, jnp.float32)
        elif self.table == "frozen" and not self.speaks:
            shape = (self.config.vocab_size, self.head.width)
            boxed = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("V", "W"))
            self.frozen: Any = self.param("table", boxed, shape, jnp.float32)

    def check(self, tokens=None, *, vectors=None, **arguments) -> None:
        """Refuses arguments that do not fit; values only where they are known."""
        if self.reads == "tokens":
            if tokens is None or vectors is not None:
                raise InputError("this model reads tokens; give tokens, and no vectors")
            transformer.check(self.config, tokens, **arguments)
            return
        if vectors is None or tokens is not None:
            raise InputError("this model reads vectors; give vectors, and no tokens")
        shape = np.shape(vectors)
        if len(shape) < 2 or shape[-1] != self.head.width:
            raise InputError(
                f"vectors have shape {list(shape)}; it must be [..., T, {self.head.width}]"
            )
        check_numbers("vectors", vectors)
        transformer.check(self.config, np.zeros(shape[:-1], np.int32), **arguments)

    def __call__(
        self, tokens: ArrayLike | None = None, *, vectors: ArrayLike | None = None, **arguments
    ) -> Any:
        """Hidden states, which the head reads.

        Args:
          tokens: int [..., T], or
          vectors: [..., T, W].
          **arguments: durations, start, times, at, cache: as of `Transformer.__call__`.

        Returns:
          [..., T, D], or [..., D] with `at`; with a cache: these, and the cache.
        """
        self.check(tokens, vectors=vectors, **arguments)
        if vectors is not None:
            read = jnp.einsum("...w,dw->...d", jnp.asarray(vectors, self.read.dtype), self.read)
            states = self.trunk(embeddings=read, hidden=True, **arguments)
        else:
            states = self.trunk(tokens, hidden=True, **arguments)
        if self.is_initializing():
            self.distribution(states)
        return states

    def rows(self) -> jax.Array:
        """The table of the tokens' vectors, [V, W], standardised."""
        if self.table == "frozen":
            return jax.lax.stop_gradient(self.frozen)
        return standardised(self._embedding())

    def _embedding(self) -> jax.Array:
        return cast(jax.Array, nn.unbox(self.trunk.variables["params"]["embedding"]))

    def targets(self, tokens=None, *, vectors=None) -> jax.Array:
        """What the head is to predict, of int tokens [...] or vectors [..., W]."""
        if vectors is not None:
            return as_float(vectors)
        return jnp.asarray(tokens) if self.speaks else self.rows()[jnp.asarray(tokens)]

    def predictions(
        self, tokens=None, *, vectors=None, durations=None, start=None, times=None
    ) -> jax.Array:
        """The hidden states [..., T - 1, D] from which all but the first are predicted."""
        given = {"durations": durations, "times": times}
        cut = {name: jnp.asarray(v)[..., :-1] for name, v in given.items() if v is not None}
        if vectors is not None:
            vectors = jnp.asarray(vectors)[..., :-1, :]
        else:
            tokens = jnp.asarray(tokens)[..., :-1]
        return cast(jax.Array, self(tokens, vectors=vectors, start=start, **cut))

    def log_prob(self, tokens=None, *, vectors=None, **arguments) -> jax.Array:
        """Log-density of each vector after the first, given those before, in nats: [..., T - 1].

        (Log-probability of the tokens, for a token head.) The last duration has no influence.
        """
        hidden = self.predictions(tokens, vectors=vectors, **arguments)
        return self._log_prob(hidden, self._following(tokens, vectors))

    def loss(self, tokens=None, *, vectors=None, **arguments) -> jax.Array:
        """The training loss of each vector after the first, in nats: [..., T - 1]."""
        hidden = self.predictions(tokens, vectors=vectors, **arguments)
        target = self._following(tokens, vectors)
        if self.speaks:
            return -self._log_prob(hidden, target)
        nats = self.head.loss(hidden, target)
        if self.contrast:
            following = Categorical(self.head(hidden).log_probs(self.rows()))
            told = following.log_prob(jnp.asarray(tokens)[..., 1:])
            nats = nats - self.contrast * self.head.width * told
        return nats

    def token_logits(self, tokens=None, *, vectors=None, **arguments) -> jax.Array:
        """Logits of the tokens after the first: the density at every row, [..., T - 1, V].

        Their softmax is the density renormalised over the table.
        """
        return self.logits_of(self.predictions(tokens, vectors=vectors, **arguments))

    def logits_of(self, hidden: jax.Array) -> jax.Array:
        """Logits of tokens [..., V] from hidden states [..., D]."""
        density = self.distribution(hidden)
        return cast(jax.Array, density.logits if self.speaks else density.log_probs(self.rows()))

    def distribution(self, hidden: jax.Array) -> Any:
        """The head's distribution, from hidden states [..., D]."""
        if isinstance(self.head, heads.TokenHead) and self.head.tied:
            return self.head(hidden, self._embedding())
        return self.head(hidden)

    def _log_prob(self, hidden: jax.Array, target: jax.Array) -> jax.Array:
        return cast(jax.Array, self.distribution(hidden).log_prob(target))

    def routes(self, hidden: jax.Array) -> Any:
        """What `ExpertsHead.routed` says of hidden states [..., D]."""
        return cast(heads.ExpertsHead, self.head).routed(hidden)

    def _following(self, tokens, vectors) -> jax.Array:
        if vectors is not None:
            return self.targets(vectors=jnp.asarray(vectors)[..., 1:, :])
        return self.targets(jnp.asarray(tokens)[..., 1:])


def standardised(table: jax.Array) -> jax.Array:
    """The table [V, W] with mean 0 and standard deviation 1 in each column, at least float32."""
    wide = as_float(table)
    wide = wide - jnp.mean(wide, axis=0)
    least = jnp.finfo(wide.dtype).eps ** 2  # a column without variance is 0, with a finite gradient
    return wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=0) + least)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: DensityModel, method: str, params: Any, arguments: dict[str, Any]) -> Any:
    return model.apply({"params": params}, **arguments, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class DensityLM:
    """A density model with its parameters and, where it reads tokens, its tokenizer.

    Attributes:
      model: the Linen module, whose `apply` is a pure function.
      params: parameter tree: "trunk", "head", and "table" or "read".
      tokenizer: of the `tokenizers` library, or None.
      notes: fields of the trunk's config.json that do not change what is computed.
    """

    model: DensityModel
    params: Any
    tokenizer: "tokenizers.Tokenizer | None" = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    def log_prob(self, tokens=None, **arguments) -> jax.Array:
        """`DensityModel.log_prob`, jitted; values are checked as long as they are known."""
        return cast(jax.Array, self._call("log_prob", tokens, arguments))

    def loss(self, tokens=None, **arguments) -> jax.Array:
        """`DensityModel.loss`, jitted."""
        return cast(jax.Array, self._call("loss", tokens, arguments))

    def token_logits(self, tokens=None, **arguments) -> jax.Array:
        """`DensityModel.token_logits`, jitted."""
        return cast(jax.Array, self._call("token_logits", tokens, arguments))

    def _call(self, method: str, tokens, arguments: dict[str, Any]) -> Any:
        given = {"tokens": tokens} | arguments
        given = {k: jnp.asarray(v) for k, v in given.items() if v is not None}
        self.model.check(**given)
        length = np.shape(given["tokens"])[-1] if tokens is not None else given["vectors"].shape[-2]
        if length < 2:
            raise InputError("a single vector is predicted from nothing; give at least two")
        return _apply(self.model, method, self.params, given)


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
    model = DensityModel(config, head, table="embedding" if table is None else "frozen", **settings)
    rows = None
    if table is not None:
        check_numbers("table", table)
        if model.reads == "vectors":
            raise InputError("a model that reads vectors has no table of tokens; leave out table")
        wanted = (config.vocab_size, head.width)
        if not model.speaks:
            if np.shape(table) != wanted:
                raise InputError(
                    f"table has shape {list(np.shape(table))}; it must be {list(wanted)}"
                )
            rows = standardised(jnp.asarray(table))
    params = nn.unbox(jax.jit(model.init)(key, **stand_in(model))["params"])
    if rows is not None:
        params = params | {"table": rows}
    return DensityLM(model, params, tokenizer)


def on(lm: LanguageModel, head: heads.Head, *, key: jax.Array, contrast: float = 0.0) -> DensityLM:
    """A new density head on a pretrained trunk, over the rows of that trunk's embedding table.

    Train the parameters under "head" alone, and the trunk stays as it is.

    Args:
      lm: the language model.
      head: of width D.
      key: PRNG key of the head's parameters.
      contrast: see `DensityModel`.
    """
    model = DensityModel(
        lm.config,
        head,
        table="embedding",
        contrast=contrast,
        implementation=lm.implementation,
        remat=lm.remat,
    )
    if isinstance(head, heads.TokenHead) and head.tied and not head.depth:
        raise InputError("a tied token head on a pretrained trunk is that model's own; load it")
    hidden = jnp.zeros((1, lm.config.hidden_size), lm.params["embedding"].dtype)
    tied = {"table": lm.params["embedding"]} if getattr(head, "tied", False) else {}
    params = {"trunk": lm.params, "head": nn.unbox(head.init(key, hidden, **tied)["params"])}
    return DensityLM(model, params, lm.tokenizer, lm.notes)


def _shape(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def stand_in(model: DensityModel) -> dict[str, Any]:
    """The shortest input, to make parameters with."""
    if model.reads == "tokens":
        return {"tokens": np.zeros(2, np.int32)}
    return {"vectors": np.zeros((2, model.head.width), np.float32)}


def _boxes(model: DensityModel) -> dict[str, nn.LogicallyPartitioned]:
    """Path -> shape and axes of the parameters above the trunk."""
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), **stand_in(model)))["params"]
    flat = traverse_util.flatten_dict(
        tree, sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )
    return {p: box for p, box in flat.items() if not p.startswith(f"{_TRUNK}/")}
