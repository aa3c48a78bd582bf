"""Samplers of next-vector models, for `generate`: C tokens a step, at any temperature up to 1.

There are no probabilities to divide by a temperature. Below 1, P(x)^(1 / temperature), normalized,
has to be drawn from, where P is only known by its draws (CALM, Shao et al., arXiv:2510.27688; see
`repeated_draws`):

    Repetition    decodes Z draws and prefers chunks that repeat: one step, a bias that falls with
                  their number, temperatures of 1/n and 0
    Rejection     rejects until the draws agree: no bias, any temperature above 0, and as long as it
                  takes

At a temperature of 1 both take one draw of the head a step.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import check_count, check_integers
from continuous_lm.errors import InputError
from continuous_lm.models.calm import repeated_draws
from continuous_lm.models.calm.chunk_inputs import split_into_chunks
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.calm.next_vector import next_vector_model
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
    "ChunkSampler",
    "Rejection",
    "Repetition",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkSampler(Sampler[NextVectorModel]):
    """Base class of the samplers of next-vector models: prompts become chunks of C tokens.

    Attributes:
      pad_token: token put in front of prompts whose length is not a multiple of C; the model's
        eos_token_id if omitted, as at the end of an earlier text.
    """

    pad_token: int | None = dataclasses.field(default=None, metadata=STATIC)

    def prompt_items(self, lm: LanguageModel[Any], prompt: np.ndarray) -> np.ndarray:
        """The chunks int [T, C] of a prompt int [n]."""
        chunk_size = next_vector_model(lm).chunk_size
        check_integers("tokens", prompt, 0, lm.config.vocab_size)
        return split_into_chunks(prompt, chunk_size, self._resolve_pad_token(lm))

    def _resolve_pad_token(self, lm: LanguageModel[Any]) -> int | None:
        """The token to put in front: that given, or the end of a text, or none."""
        if self.pad_token is None:
            eos_field = lm.hf_fields.get("eos_token_id")
            eos_tokens = np.ravel([] if eos_field is None else eos_field)
            return int(eos_tokens[0]) if len(eos_tokens) else None
        if np.ndim(self.pad_token):
            raise InputError(
                f"pad_token is {self.pad_token!r:.60}; it must be one token"
            )
        check_integers("pad_token", self.pad_token, 0, lm.config.vocab_size)
        return self.pad_token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repetition(ChunkSampler):
    """Draws Z chunks, and one of them by how often it came; see `repetition_sample`.

    For next-vector models. All settings are part of the compiled program.

    Attributes:
      temperature: 1, 1/2, 1/3, ... or 0, at which the chunk that comes most often is taken.
      num_candidates: Z, at least 1 / temperature. At a temperature of 1 one draw is enough.
    """

    temperature: float = dataclasses.field(default=1.0, metadata=STATIC)
    num_candidates: int = dataclasses.field(default=128, metadata=STATIC)

    def resolve(self, lm: LanguageModel[Any]) -> Self:
        next_vector_model(lm)
        check_count("num_candidates", self.num_candidates)
        check_scalar("temperature", self.temperature, 0.0)
        if self.temperature == 0:
            return dataclasses.replace(self, temperature=0.0, pad_token=None)
        order = self.order()
        if order > self.num_candidates:
            raise InputError(
                f"temperature 1/{order} needs at least {order} candidates, not"
                f" {self.num_candidates}"
            )
        # Programs are the same where the chunks are drawn alike.
        return dataclasses.replace(
            self,
            temperature=1.0 / order,
            num_candidates=self.num_candidates if order > 1 else 1,
            pad_token=None,
        )

    @property
    def is_random(self) -> bool:
        return self.temperature > 0

    def order(self) -> int:
        """Number of equal draws required: n at temperature 1/n."""
        if self.temperature == 0:
            return self.num_candidates
        return repeated_draws.inverse_temperature(self.temperature)

    def draw_function(self, model: NextVectorModel, params: Params) -> Draw:
        order = self.order()

        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            if order == 1:
                return model.sample_chunks(params, key, hidden, 1)[0]
            sample_key, choice_key = jax.random.split(key)
            candidates = model.sample_chunks(
                params, sample_key, hidden, self.num_candidates
            )
            return repeated_draws.repetition_sample(choice_key, candidates, n=order)

        return draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rejection(ChunkSampler):
    """Draws chunks until they agree, without bias; see `rejection_sample`.

    For next-vector models.

    Attributes:
      temperature: above 0 and at most 1, a scalar.
      max_rounds: draws for one chunk, at most; part of the compiled program. If none is accepted in
        so many, `generate` raises an error.
    """

    temperature: ArrayLike = 1.0
    max_rounds: int = dataclasses.field(default=10_000, metadata=STATIC)

    def resolve(self, lm: LanguageModel[Any]) -> Self:
        next_vector_model(lm)
        check_count("max_rounds", self.max_rounds)
        check_scalar("temperature", self.temperature, 0.0)
        if not 0 < float(np.asarray(self.temperature)) <= 1:
            raise InputError(
                f"temperature is {self.temperature}; Rejection needs one above 0, and at most 1"
            )
        return dataclasses.replace(
            self, temperature=float_array(self.temperature), pad_token=None
        )

    def draw_function(self, model: NextVectorModel, params: Params) -> Draw:
        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            samples = repeated_draws.rejection_sample(
                key,
                lambda key: model.sample_chunks(params, key, hidden, 1)[0],
                temperature=self.temperature,
                max_rounds=self.max_rounds,
                is_done=is_done,
            )
            return jnp.where(samples.accepted[:, None], samples.items, -1)

        return draw

    def describe_failure(self) -> str:
        return (
            f"no draw was accepted in {self.max_rounds} rounds; raise max_rounds or the"
            " temperature, or take Repetition"
        )
