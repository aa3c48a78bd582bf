"""The one value for a model of any kind: the Linen module, its parameters, its tokenizer."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.typing import ArrayLike

from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models import transformer, trunk_inputs
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.parameters import ParameterModule, Params
from continuous_lm.models.transformer import Output, Transformer

if TYPE_CHECKING:
    import tokenizers
    from typing_extensions import TypeVar as TypeVarWithDefault

    # `LanguageModel` alone is one of a trunk.
    Model = TypeVarWithDefault("Model", bound=ParameterModule, default=Transformer)
else:
    Model = TypeVar("Model", bound=ParameterModule)
OtherModel = TypeVar("OtherModel", bound=ParameterModule)

__all__ = ["LanguageModel", "trunk_model"]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel(Generic[Model]):
    """A model with its parameters and its tokenizer.

    The model is a `Transformer` (the trunk with its softmax), a `density.DensityModel`, a
    `calm.NextVectorModel` or a `calm.Autoencoder`. A trunk is called as a function; the functions
    of the other kinds are in `models.density` and `models.calm`.

    Attributes:
      model: the Linen module, whose `apply` is a pure function.
      params: parameter tree, layers stacked on a leading axis.
      tokenizer: tokenizer of the `tokenizers` library, or None.
      hf_fields: fields of config.json that do not change the output (special tokens, length of the
        context), stored for `save`.
    """

    model: Model
    params: Params
    tokenizer: "tokenizers.Tokenizer | None" = None
    hf_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> TransformerConfig:
        """The configuration of the trunk."""
        config = getattr(self.model, "config", None)
        if not isinstance(config, TransformerConfig):
            raise InputError(
                f"a {type(self.model).__name__} has no trunk; its own configuration is"
                " lm.model.config"
            )
        return config

    def with_model(self, model: OtherModel) -> "LanguageModel[OtherModel]":
        """The same parameters and tokenizer under another module."""
        return LanguageModel(model, self.params, self.tokenizer, self.hf_fields)

    def with_execution(
        self, *, implementation: str | None = None, remat: bool | None = None
    ) -> "LanguageModel[Model]":
        """Return the same model with another form of execution; see `transformer.Execution`.

        Args:
          implementation: form of attention; unchanged if omitted.
          remat: whether the backward pass recomputes layers; unchanged if omitted.

        Raises:
          InputError: for a model without a trunk, an autoencoder.
        """
        changes: dict[str, Any] = {"implementation": implementation, "remat": remat}
        new_settings = {
            name: value for name, value in changes.items() if value is not None
        }
        for name in new_settings:
            if not hasattr(self.model, name):
                kind = type(self.model).__name__
                raise InputError(f"{name} is not a setting of {kind}; omit it")
        return self.with_model(self.model.clone(**new_settings))

    def with_params(self, params: Params) -> "LanguageModel[Model]":
        """The same model with other parameters."""
        return LanguageModel(self.model, params, self.tokenizer, self.hf_fields)

    def __post_init__(self) -> None:
        # The boxes of `Transformer.init`, which hold the names of axes, are no arrays.
        leaves = jax.tree.leaves(self.params, is_leaf=_is_box)
        if any(map(_is_box, leaves)):
            object.__setattr__(self, "params", nn.unbox(self.params))

    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        position: ArrayLike | None = None,
    ) -> jax.Array:
        """Logits of the next token: `lm.model.apply({"params": lm.params}, ...)`, jitted.

        Arguments and result are those of `Transformer.__call__`. Values are checked before they are
        compiled over, where they are known.
        """
        model = trunk_model(self)
        inputs = trunk_inputs.make_inputs(
            model.config,
            tokens,
            embeddings=embeddings,
            durations=durations,
            times=times,
            start=start,
            position=position,
        )
        return _logits(model, self.params, inputs, _optional_array(position))

    def forward(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        position: ArrayLike | None = None,
        cache: KVCache | None = None,
        prefix: KVCache | None = None,
        capture: Sequence[str] = (),
    ) -> Output:
        """Logits, hidden states, the cache and captured intermediates, jitted.

        Arguments are those of `Transformer.__call__` and of `transformer.forward`.
        """
        model = trunk_model(self)
        inputs = trunk_inputs.make_inputs(
            model.config,
            tokens,
            embeddings=embeddings,
            durations=durations,
            times=times,
            start=start,
            position=position,
            cache=cache,
            prefix=prefix,
        )
        if isinstance(capture, str):
            raise InputError(f"capture is {capture!r:.60}; it must be a tuple of names")
        return _forward(
            model,
            self.params,
            inputs,
            _optional_array(position),
            cache,
            prefix,
            tuple(capture),
        )

    def prefill(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
    ) -> KVCache:
        """Keys and values of tokens, as the `prefix` of later calls of `forward`, jitted."""
        model = trunk_model(self)
        inputs = trunk_inputs.make_inputs(
            model.config,
            tokens,
            embeddings=embeddings,
            durations=durations,
            times=times,
            start=start,
        )
        return _prefill(model, self.params, inputs)


def trunk_model(lm: LanguageModel[Any]) -> Transformer:
    """The module of a trunk with its softmax; other kinds of models are refused."""
    if isinstance(lm.model, Transformer):
        return lm.model
    raise InputError(
        f"lm holds a {type(lm.model).__name__}, and this needs a Transformer; use the functions of"
        " models.density or models.calm"
    )


def _is_box(node: object) -> bool:
    return isinstance(node, meta.AxisMetadata)


def _optional_array(values: ArrayLike | None) -> jax.Array | None:
    return None if values is None else jnp.asarray(values)


@functools.partial(jax.jit, static_argnames="model")
def _logits(
    model: Transformer, params: Params, inputs: Inputs, position: jax.Array | None
) -> jax.Array:
    output = transformer.hidden_states(
        model.config, params, inputs, position=position, execution=model.execution
    )
    return transformer.unembed(model.config, params, output.hidden)


@functools.partial(jax.jit, static_argnames=("model", "capture"))
def _forward(
    model: Transformer,
    params: Params,
    inputs: Inputs,
    position: jax.Array | None,
    cache: KVCache | None,
    prefix: KVCache | None,
    capture: tuple[str, ...],
) -> Output:
    return transformer.forward(
        model.config,
        params,
        inputs,
        position=position,
        cache=cache,
        prefix=prefix,
        capture=capture,
        execution=model.execution,
    )


@functools.partial(jax.jit, static_argnames="model")
def _prefill(model: Transformer, params: Params, inputs: Inputs) -> KVCache:
    return transformer.prefill(model.config, params, inputs, model.execution)
