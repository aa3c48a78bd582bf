"""Functions of next-vector language models: creation, hidden states, losses.

    lm = calm.create(key, config, autoencoder_lm, head)             # or calm.load(...)
    hidden = calm.hidden_states(lm, chunks, durations=d)            # int [..., T, C] -> [..., T, D]
    nats = calm.loss(lm, chunks, key)                               # [..., T - 1]

Each function checks its arguments once and runs a method of `NextVectorModel`, jitted with the
model static.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.errors import InputError
from continuous_lm.models.calm.autoencoder import autoencoder_model
from continuous_lm.models.calm.autoencoder_network import Autoencoder
from continuous_lm.models.calm.implicit_heads import ImplicitHead
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import initialize

__all__ = [
    "autoencoder_of",
    "create",
    "hidden_states",
    "loss",
    "next_vector_model",
    "transform",
]

_hidden_states = jax.jit(NextVectorModel.hidden_states, static_argnums=0)
_loss = jax.jit(NextVectorModel.loss, static_argnums=0)
_transform = jax.jit(NextVectorModel.transform, static_argnums=0)


def hidden_states(
    lm: LanguageModel[NextVectorModel],
    chunks: ArrayLike,
    *,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: ArrayLike | None = None,
) -> jax.Array:
    """Return the hidden states, the head's input.

    Args:
      lm: the model.
      chunks: tokens int [..., T, C].
      durations: d >= 0 of each chunk, [..., T]; 1 if omitted.
      times: when each chunk ends, [..., T], instead of start + cumulative durations.
      start: the time at which the first chunk begins, scalar or [...]; 0 if omitted.
      position: index of the only chunk to return, an int or int [...] (-1: the last).

    Returns:
      [..., T, D], or [..., D] with `position`.

    Raises:
      InputError: for arguments that do not fit, or if `lm` is another kind of model.
    """
    model = next_vector_model(lm)
    inputs = model.make_inputs(
        chunks, durations=durations, times=times, start=start, position=position
    )
    index = None if position is None else jnp.asarray(position)
    return _hidden_states(model, lm.params, inputs, position=index).hidden


def loss(
    lm: LanguageModel[NextVectorModel],
    chunks: ArrayLike,
    key: jax.Array,
    *,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
) -> jax.Array:
    """The head's loss of each chunk after the first, [..., T - 1]; see `NextVectorModel.loss`.

    Arguments are those of `hidden_states`, and a PRNG key of the targets and the head's noise.

    Raises:
      InputError: for arguments that do not fit, or if `lm` is another kind of model.
    """
    model = next_vector_model(lm)
    inputs = model.make_inputs(chunks, durations=durations, times=times, start=start)
    if inputs.num_chunks < 2:
        raise InputError("a single chunk is predicted from nothing; give at least two")
    return _loss(model, lm.params, inputs, key)


def transform(
    lm: LanguageModel[NextVectorModel], noise: ArrayLike, hidden: ArrayLike
) -> jax.Array:
    """The head's vectors [..., W] from noise [..., U] and hidden states [..., D].

    Raises:
      InputError: for arguments that do not fit, or if `lm` is another kind of model.
    """
    model = next_vector_model(lm)
    return _transform(model, lm.params, jnp.asarray(noise), jnp.asarray(hidden))


def next_vector_model(lm: LanguageModel[NextVectorModel]) -> NextVectorModel:
    """The model of a next-vector language model.

    Raises:
      InputError: if it is another kind of model.
    """
    if not isinstance(lm.model, NextVectorModel):
        raise InputError(
            f"lm holds a {type(lm.model).__name__}, and this needs a NextVectorModel, as of"
            " calm.create and calm.load"
        )
    return lm.model


def autoencoder_of(lm: LanguageModel[NextVectorModel]) -> LanguageModel[Autoencoder]:
    """The autoencoder of a next-vector language model."""
    model = Autoencoder(next_vector_model(lm).autoencoder_config)
    return lm.with_model(model).with_params(lm.params["autoencoder"])


def create(
    key: jax.Array,
    config: TransformerConfig,
    autoencoder_lm: LanguageModel[Autoencoder],
    head: ImplicitHead,
    *,
    inner_size: int | None = None,
    num_targets: int = 100,
) -> LanguageModel[NextVectorModel]:
    """A model with new parameters on a trained autoencoder, whose tokenizer it takes over.

    Args:
      key: PRNG key.
      config: config of the trunk.
      autoencoder_lm: the autoencoder.
      head: a head with the latent's width.
      inner_size: see `NextVectorModel`.
      num_targets: see `NextVectorModel`.
    """
    model = NextVectorModel(
        config,
        autoencoder_model(autoencoder_lm).config,
        head,
        inner_size=inner_size,
        num_targets=num_targets,
    )
    make_params = functools.partial(initialize, table=model.parameter_table())
    params = jax.jit(make_params)(key) | {"autoencoder": autoencoder_lm.params}
    return autoencoder_lm.with_model(model).with_params(params)
