"""Functions of density language models: creation, log-densities, losses.

    lm = density.create(key, config, heads.GaussianHead(width=config.hidden_size))
    lm = density.add_head(clm.load("apples"), heads.MixtureHead(width=96, depth=1), key=key)
    density.log_prob(lm, tokens, durations=d)                       # nats, [..., T - 1]

Each function checks its arguments once and runs a method of `DensityModel`, jitted with the model
static. Leading axes broadcast: tokens [T] with durations [P, T] give [P, T - 1].
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import check_numbers
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.density.model import (
    TABLE,
    TRUNK,
    DensityModel,
    standardize_table,
)
from continuous_lm.models.language_model import LanguageModel, trunk_model
from continuous_lm.models.parameters import initialize
from continuous_lm.models.transformer import Transformer

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "add_head",
    "create",
    "density_model",
    "log_prob",
    "loss",
    "token_logits",
    "token_table",
]

_log_prob = jax.jit(DensityModel.log_prob, static_argnums=0)
_loss = jax.jit(DensityModel.loss, static_argnums=0)
_token_logits = jax.jit(DensityModel.token_logits, static_argnums=0)
_token_table = jax.jit(DensityModel.token_table, static_argnums=0)


def log_prob(
    lm: LanguageModel[DensityModel],
    tokens: ArrayLike | None = None,
    *,
    vectors: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
) -> jax.Array:
    """Log-density of each vector after the first, given those before, in nats: [..., T - 1].

    (Log-probability of the tokens, for a token head.)

    Args:
      lm: the density model.
      tokens: int [..., T], for a model that reads tokens, or
      vectors: [..., T, W], for one that reads vectors.
      durations: d >= 0 of each token or vector, [..., T]; 1 if omitted. The last one has no
        influence.
      times: when each ends, [..., T], instead of start + cumulative durations.
      start: the time at which the first one begins, scalar or [...]; 0 if omitted.

    Raises:
      InputError: for arguments that do not fit, a single vector, or another kind of model.
    """
    model = density_model(lm)
    inputs = model.make_inputs(
        tokens, vectors=vectors, durations=durations, times=times, start=start
    )
    _check_length(inputs)
    return _log_prob(model, lm.params, inputs)


def loss(
    lm: LanguageModel[DensityModel],
    tokens: ArrayLike | None = None,
    *,
    vectors: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
) -> jax.Array:
    """The training loss of each vector after the first, in nats: [..., T - 1].

    Arguments and errors are those of `log_prob`.
    """
    model = density_model(lm)
    inputs = model.make_inputs(
        tokens, vectors=vectors, durations=durations, times=times, start=start
    )
    _check_length(inputs)
    return _loss(model, lm.params, inputs)


def token_logits(
    lm: LanguageModel[DensityModel],
    tokens: ArrayLike,
    *,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
) -> jax.Array:
    """Logits of the tokens after the first: the density at every row, [..., T - 1, V].

    Their softmax is the density renormalised over the table. Arguments and errors are those of
    `log_prob`, and only a model that reads tokens has logits.
    """
    model = density_model(lm)
    inputs = model.make_inputs(tokens, durations=durations, times=times, start=start)
    _check_length(inputs)
    return _token_logits(model, lm.params, inputs)


def token_table(lm: LanguageModel[DensityModel]) -> jax.Array:
    """Return the standardised vectors of the tokens [V, W], the head's targets.

    Raises:
      InputError: if the model reads vectors, or predicts tokens themselves.
    """
    return _token_table(density_model(lm), lm.params)


def density_model(lm: LanguageModel[DensityModel]) -> DensityModel:
    """The model of a density language model.

    Raises:
      InputError: if it is another kind of model.
    """
    if not isinstance(lm.model, DensityModel):
        raise InputError(
            f"lm holds a {type(lm.model).__name__}, and this needs a DensityModel, as of"
            " density.add_head, density.create and density.load"
        )
    return lm.model


def _check_length(inputs: Inputs) -> None:
    if inputs.num_tokens < 2:
        raise InputError("a single vector is predicted from nothing; give at least two")


# --- New models -------------------------------------------------------------------------------


def create(
    key: jax.Array,
    config: TransformerConfig,
    head: heads.DistributionHead,
    *,
    input_kind: str = "tokens",
    table: ArrayLike | None = None,
    token_loss_weight: float = 0.0,
    implementation: str = "auto",
    remat: bool = False,
    tokenizer: "tokenizers.Tokenizer | None" = None,
) -> LanguageModel[DensityModel]:
    """A model with new parameters.

    Args:
      key: PRNG key.
      config: config of the trunk.
      head: the head.
      input_kind: "tokens" or "vectors"; see `DensityModel`, also for the settings below.
      table: [V, W] rows of the tokens, for example of another model; they are standardised and
        frozen. If omitted, the rows are the trunk's embedding table, which is trained.
      token_loss_weight: weight of the tokens' cross-entropy in the loss.
      implementation: form of attention.
      remat: whether the backward pass recomputes layers.
      tokenizer: tokenizer stored with the model.
    """
    model = DensityModel(
        config,
        head,
        input_kind=input_kind,
        table="embedding" if table is None else "frozen",
        token_loss_weight=token_loss_weight,
        implementation=implementation,
        remat=remat,
    )
    rows = None if table is None else _check_table(model, table)
    parameter_table = model.parameter_table()
    params = jax.jit(functools.partial(initialize, table=parameter_table))(key)
    if rows is not None and model.has_token_table:
        params = params | {TABLE: rows}
    return LanguageModel(model, params, tokenizer)


def _check_table(model: DensityModel, table: ArrayLike) -> jax.Array:
    """Given rows for tokens [V, W], standardised."""
    check_numbers("table", table)
    if model.input_kind == "vectors":
        raise InputError(
            "a model that reads vectors has no table of tokens; leave out table"
        )
    expected_shape = (model.config.vocab_size, model.head.width)
    if model.has_token_table and np.shape(table) != expected_shape:
        raise InputError(
            f"table has shape {list(np.shape(table))}; it must be {list(expected_shape)}"
        )
    return standardize_table(jnp.asarray(table))


def add_head(
    lm: LanguageModel[Transformer],
    head: heads.DistributionHead,
    *,
    key: jax.Array,
    token_loss_weight: float = 0.0,
) -> LanguageModel[DensityModel]:
    """A new density head on a pretrained trunk, over the rows of that trunk's embedding table.

    Train the parameters under "head" alone, and the trunk stays as it is.

    Args:
      lm: the language model.
      head: a head of width D.
      key: PRNG key of the head's parameters.
      token_loss_weight: see `DensityModel`.

    Raises:
      InputError: if the head does not fit, or `lm` is another kind of model.
    """
    trunk = trunk_model(lm)
    model = DensityModel(
        lm.config,
        head,
        table="embedding",
        token_loss_weight=token_loss_weight,
        implementation=trunk.implementation,
        remat=trunk.remat,
    )
    if model.is_trunks_own:
        raise InputError(
            "a tied token head on a pretrained trunk is that model's own; load it"
        )
    above_trunk = jax.jit(
        functools.partial(initialize, table=model.table_above_trunk())
    )(key)
    return lm.with_model(model).with_params({TRUNK: lm.params, **above_trunk})
