"""Samplers of density models, for `generate`: a vector is drawn, and mapped back to a token.

    NearestRow     the token whose row is nearest to the vector that was drawn
    Rerank         of the k rows nearest to it, the token of that where the density is highest
    Renormalized   no vector is drawn: the tokens' probabilities are proportional to the density at
                   their rows
    NextVector     the vector itself, for models that read vectors

Models with a token head have logits: `Greedy` and `Temperature` are theirs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import quantize
from continuous_lm.arguments import check_count, check_integers, check_numbers
from continuous_lm.errors import InputError
from continuous_lm.models.density.distributions import Categorical, Density
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.density.scoring import density_model, token_table
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params
from continuous_lm.models.samplers import (
    STATIC,
    Draw,
    Sampler,
    check_scalar,
    float_array,
)

__all__ = [
    "METRICS",
    "DensitySampler",
    "NearestRow",
    "NextVector",
    "Renormalized",
    "Rerank",
    "rerank",
    "steering_direction",
]

METRICS = ("euclidean", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DensitySampler(Sampler[DensityModel]):
    """Base class of the samplers of densities: temperature and steering.

    Attributes:
      temperature: >= 0, a scalar; see `distributions`. At 0 a sample is the likeliest component's
        mean, and no key is needed.
      direction: [W], steering direction. Each density is shifted by strength * direction before
        sampling; see `steering_direction`.
      strength: a scalar; 0 leaves the samples bitwise unchanged.
    """

    temperature: ArrayLike = 1.0
    direction: ArrayLike | None = None
    strength: ArrayLike = 0.0

    def resolve(self, lm: LanguageModel[Any]) -> Self:
        self.check_model(density_model(lm))
        check_scalar("temperature", self.temperature, 0.0)
        check_scalar("strength", self.strength)
        direction = None
        if self.direction is not None:
            width = density_model(lm).head.width
            if np.shape(self.direction) != (width,):
                raise InputError(
                    f"direction has shape {list(np.shape(self.direction))}; it must be [{width}]"
                )
            check_numbers("direction", self.direction)
            direction = float_array(self.direction)
        elif np.any(self.strength):
            raise InputError("strength needs a direction to steer along")
        return dataclasses.replace(
            self,
            temperature=float_array(self.temperature),
            direction=direction,
            strength=float_array(self.strength),
        )

    @property
    def is_random(self) -> bool:
        return bool(np.asarray(self.temperature) > 0)

    def check_model(self, model: DensityModel) -> None:
        """Raise InputError for a model without a table of tokens."""
        if not model.has_token_table:
            other = "Greedy or Temperature" if model.predicts_tokens else "NextVector"
            kind = "token head" if model.predicts_tokens else "model that reads vectors"
            raise InputError(
                f"{type(self).__name__} needs a density over a table of tokens, and this is a"
                f" {kind}; give {other}"
            )

    def density(
        self, model: DensityModel, params: Params, hidden: jax.Array
    ) -> Density:
        """The density of the next vector from hidden states [..., D], shifted."""
        density = model.distribution(params, hidden)
        assert not isinstance(density, Categorical)
        if self.direction is None:
            return density
        return density.shifted(self.strength * jnp.asarray(self.direction))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NearestRow(DensitySampler):
    """Draws a vector, and takes the token whose row is nearest to it.

    For densities over a table of tokens.

    Attributes:
      metric: "euclidean", or "cosine": the row whose angle with the vector is smallest.
    """

    metric: str = dataclasses.field(default="euclidean", metadata=STATIC)

    def resolve(self, lm: LanguageModel[Any]) -> Self:
        if self.metric not in METRICS:
            raise InputError(
                f"metric is {self.metric!r:.60}; it must be one of {', '.join(METRICS)}"
            )
        return super().resolve(lm)

    def draw_function(self, model: DensityModel, params: Params) -> Draw:
        rows = model.token_table(params)
        norms = quantize.squared_norms(rows)

        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            x = self.density(model, params, hidden).sample(key, self.temperature)
            return quantize.nearest(x, rows, metric=self.metric, norms=norms).indices

        return draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rerank(DensitySampler):
    """Draws a vector, and takes the token where the density is highest among the nearest rows.

    For densities over a table of tokens.

    Attributes:
      num_candidates: how many rows, the nearest to the vector, are compared.
    """

    num_candidates: int = dataclasses.field(default=16, metadata=STATIC)

    def resolve(self, lm: LanguageModel[Any]) -> Self:
        check_count("num_candidates", self.num_candidates)
        vocab_size = lm.config.vocab_size
        if self.num_candidates > vocab_size:
            raise InputError(
                f"num_candidates is {self.num_candidates}, but there are {vocab_size} tokens"
            )
        return super().resolve(lm)

    def draw_function(self, model: DensityModel, params: Params) -> Draw:
        rows = model.token_table(params)
        norms = quantize.squared_norms(rows)

        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            density = self.density(model, params, hidden)
            x = density.sample(key, self.temperature)
            return rerank(density, x, rows, self.num_candidates, norms=norms)

        return draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Renormalized(DensitySampler):
    """Draws tokens with probabilities proportional to density(row)^(1 / temperature).

    For densities over a table of tokens. Without steering this is `Temperature`.
    """

    def draw_function(self, model: DensityModel, params: Params) -> Draw:
        rows = model.token_table(params)

        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            logits = self.density(model, params, hidden).log_probs(rows)
            return Categorical(logits).sample(key, self.temperature)

        return draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NextVector(DensitySampler):
    """Draws the next vector from the density, for models that read vectors."""

    def check_model(self, model: DensityModel) -> None:
        if model.input_kind != "vectors":
            raise InputError(
                "NextVector draws vectors, and this model reads tokens; give NearestRow, Rerank or"
                " Renormalized, or Greedy or Temperature for a token head"
            )

    def draw_function(self, model: DensityModel, params: Params) -> Draw:
        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            return self.density(model, params, hidden).sample(key, self.temperature)

        return draw


def rerank(
    density: Density,
    x: jax.Array,
    rows: jax.Array,
    num_candidates: int,
    *,
    norms: jax.Array | None = None,
) -> jax.Array:
    """Tokens int32 [...] of vectors [..., W]: of the nearest rows, that of the highest density.

    Args:
      density: that the vectors were drawn from, with the same leading axes.
      x: the vectors.
      rows: rows of the tokens [V, W].
      num_candidates: how many rows, the nearest to each vector, are compared.
      norms: `quantize.squared_norms(rows)`; computed if omitted.
    """
    candidates = quantize.k_nearest(x, rows, num_candidates, norms=norms).indices
    log_prob_of_each = jax.vmap(density.log_prob, in_axes=-2, out_axes=-1)
    log_probs = log_prob_of_each(rows[candidates])
    best_candidate = jnp.argmax(log_probs, axis=-1)[..., None]
    return jnp.take_along_axis(candidates, best_candidate, axis=-1)[..., 0]


def steering_direction(
    lm: LanguageModel[DensityModel], towards: Sequence[int], away: Sequence[int] = ()
) -> jax.Array:
    """The mean of some tokens' vectors less that of others', [W].

    Args:
      lm: a density model that reads tokens.
      towards: tokens.
      away: tokens; if there are none, the mean of all.
    """
    if not density_model(lm).has_token_table:
        raise InputError(
            "only a density over a table of tokens can be steered by tokens"
        )
    rows = token_table(lm)
    for name, tokens in {"towards": towards, "away": away}.items():
        if not len(tokens) and name == "towards":
            raise InputError("towards is empty; name at least one token")
        if len(tokens):
            check_integers(name, np.asarray(tokens), 0, len(rows))
    away_rows = rows[np.asarray(away, int)] if len(away) else rows
    towards_rows = rows[np.asarray(towards, int)]
    return jnp.mean(towards_rows, axis=0) - jnp.mean(away_rows, axis=0)
