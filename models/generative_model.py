"""The protocol of models that `generate` can run: one way to read tokens, vectors or chunks."""

from typing import Any, Protocol, Self, runtime_checkable

import jax
import numpy as np

from continuous_lm.errors import InputError
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params

__all__ = [
    "GenerativeModel",
    "TokenModel",
    "generative_model",
]


@runtime_checkable
class GenerativeModel(Protocol):
    """A model that reads items one after another: tokens, vectors, or chunks of C tokens.

    `Transformer`, `DensityModel` and `NextVectorModel` are such models.
    """

    @property
    def config(self) -> TransformerConfig:
        """The configuration of the trunk."""
        ...

    @property
    def input_kind(self) -> str:
        """The kind of the items: "tokens", "vectors" or "chunks"."""
        ...

    @property
    def tokens_per_item(self) -> int:
        """C of chunks, else 1."""
        ...

    def trunk_params(self, params: Params) -> Params:
        """The trunk's part of the parameters."""
        ...

    def check_prompt(self, items: np.ndarray, durations: np.ndarray) -> None:
        """Raise InputError unless a prompt [T, ...] and its durations [T] fit the model."""
        ...

    def read_items(
        self,
        params: Params,
        items: jax.Array,
        durations: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """The hidden states [B, D] at the last of these items, and the cache with all of them.

        Args:
          params: parameters of the model.
          items: the next ones of B sequences, [B, T, ...].
          durations: d >= 0 [B, T].
          cache: KV cache of the earlier items.
        """
        ...

    def clone(self, *, config: TransformerConfig, remat: bool) -> Self:
        """The same with another configuration of the trunk."""
        ...


class TokenModel(GenerativeModel, Protocol):
    """A generative model with logits of the next token."""

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] from hidden states [..., D]."""
        ...


def generative_model(lm: LanguageModel[Any]) -> GenerativeModel:
    """The model of a language model that generates.

    Raises:
      InputError: if it is of a kind that does not.
    """
    if not isinstance(lm.model, GenerativeModel):
        raise InputError(
            f"lm holds a {type(lm.model).__name__}, which generates nothing; give a trunk, a"
            " density model or a next-vector model"
        )
    return lm.model
