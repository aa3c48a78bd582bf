"""Samples of density models: a vector is drawn, and mapped back to a token where tokens are read.

The ways back, `quantize=`, from a vector x to a token:

    euclidean      the row nearest to x
    cosine         the row whose angle with x is smallest
    rerank         of the k rows nearest to x, the one where the density is highest
    renormalised   no vector is drawn: the tokens' probabilities are proportional to the density at
                   their rows
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm import quantize as quantize_lib
from continuous_lm.arguments import (
    check_count,
    check_integers,
    check_numbers,
)
from continuous_lm.errors import InputError
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density.distributions import Categorical
from continuous_lm.models.density.model import TRUNK, DensityModel
from continuous_lm.models.density.scoring import density_model, token_table
from continuous_lm.models.generation import (
    DecodeSpec,
    GeneratedTokens,
    decode_batch,
    split_prompts,
    stop_tokens,
)
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params
from continuous_lm.models.samplers import check_sampling

__all__ = [
    "QUANTIZE_METHODS",
    "quantize_to_tokens",
    "sample",
    "steering_direction",
]

QUANTIZE_METHODS = ("euclidean", "cosine", "rerank", "renormalised")


def sample(
    lm: LanguageModel[DensityModel],
    tokens: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    max_new_items: int,
    vectors: ArrayLike | Sequence[ArrayLike] | None = None,
    durations: ArrayLike | Sequence[ArrayLike] | None = None,
    start: ArrayLike = 0.0,
    new_durations: ArrayLike = 1.0,
    temperature: float = 1.0,
    quantize: str = "euclidean",
    num_candidates: int = 16,
    direction: ArrayLike | None = None,
    strength: float = 0.0,
    key: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    max_prefill_length: int = 1024,
) -> GeneratedTokens | np.ndarray:
    """Continues prompts with draws from the density of each next vector.

    The program is compiled as that of `generate` is; temperature, direction and strength are values
    that it runs with.

    Args:
      lm: the density model.
      tokens: the prompts, as of `generate`, for a model that reads tokens, or
      vectors: [B, T, W], or a list of B [T, W], for one that reads vectors; [T, W] is one prompt.
      max_new_items: how many tokens or vectors each prompt gets, at most.
      durations: of the prompts, shaped as these; 1 if left out.
      start: the time at which each prompt begins, a scalar or [B].
      new_durations: d >= 0 of what is new: a scalar, [max_new_items] or
        [B, max_new_items].
      temperature: >= 0; see `distributions`. At 0 the likeliest component's mean is taken.
      quantize: the way back to tokens; see the top of the module.
      num_candidates: k of "rerank".
      direction: [W], steers: each density is shifted by strength * direction before it is drawn
        from; see `steering_direction`.
      strength: 0 changes nothing, bit for bit.
      key: PRNG key; needed unless the temperature is 0.
      stop: tokens that end a row, or () for none; the trunk's eos_token_id if left out.
      max_prefill_length: prompts go through the model in pieces of at most so many.

    Returns:
      `GeneratedTokens` tokens, or the new vectors, float [B, max_new_items, W]; on the
      host.

    Raises:
      InputError: for arguments that do not fit.
    """
    for name, count in {
        "max_new_items": max_new_items,
        "max_prefill_length": max_prefill_length,
        "num_candidates": num_candidates,
    }.items():
        check_count(name, count)
    check_sampling(temperature, None, key)
    if quantize not in QUANTIZE_METHODS:
        raise InputError(
            f"quantize is {quantize!r:.60}; it must be one of {', '.join(QUANTIZE_METHODS)}"
        )
    check_numbers("strength", strength)
    if np.ndim(strength):
        raise InputError(
            f"strength has shape {list(np.shape(strength))}; it must be a scalar"
        )
    model = density_model(lm)
    trunk = lm.params[TRUNK]
    prompt_argument, prompts, other_prompts = "tokens", tokens, vectors
    if model.input_kind == "vectors":
        prompt_argument, prompts, other_prompts = "vectors", vectors, tokens
    if prompts is None or other_prompts is not None:
        raise InputError(
            f"this model reads {prompt_argument}; give {prompt_argument} alone as its prompts"
        )
    if prompt_argument == "vectors" and stop is not None:
        raise InputError("no vector ends a row; leave out stop")
    prompt_dtype = np.dtype(np.int32 if prompt_argument == "tokens" else np.float32)
    decode_model = _DecodeModel(model)
    prompt_list, duration_list = split_prompts(
        decode_model, prompt_argument, prompts, durations, prompt_dtype
    )

    options: dict[str, Any] = {"temperature": np.float32(temperature)}
    if direction is not None:
        if model.predicts_tokens:
            raise InputError("a token head has no mean to shift; leave out direction")
        if np.shape(direction) != (model.head.width,):
            raise InputError(
                f"direction has shape {list(np.shape(direction))}; it must be [{model.head.width}]"
            )
        check_numbers("direction", direction)
        options["shift"] = np.float32(strength) * np.asarray(direction, np.float32)
    elif strength:
        raise InputError("strength needs a direction to steer along")
    if model.has_token_table:
        table = token_table(lm)
        if quantize == "rerank" and num_candidates > len(table):
            raise InputError(
                f"num_candidates is {num_candidates}, but there are {len(table)} tokens"
            )
        options |= {"rows": table, "norms": quantize_lib.squared_norms(table)}
    spec = DecodeSpec(
        decode_model,  # type: ignore[arg-type]
        prompt_argument,
        prompt_argument,
        _VectorSampler(model, quantize, num_candidates),
        lm.config,
        max_prefill_length,
        axes_lib.mesh_of(trunk["embedding"]),
    )
    new_items, lengths = decode_batch(
        spec,
        lm.params,
        prompt_list,
        duration_list,
        max_new_items=max_new_items,
        start=start,
        new_durations=new_durations,
        options=options,
        stop=stop_tokens(
            () if prompt_argument == "vectors" else stop,
            lm.hf_fields,
            lm.config.vocab_size,
        ),
        key=jax.random.key(0) if key is None or temperature == 0 else key,
        dtype=trunk["embedding"].dtype,
    )
    return (
        new_items
        if prompt_argument == "vectors"
        else GeneratedTokens(new_items, lengths)
    )


@dataclasses.dataclass(frozen=True)
class _DecodeModel:
    """What the decode loop asks of a model."""

    model: DensityModel

    def clone(self, *, config: TransformerConfig) -> "_DecodeModel":
        """The same with another configuration of the trunk."""
        return _DecodeModel(self.model.clone(config=config))

    def check(
        self,
        *,
        tokens: ArrayLike | None = None,
        vectors: ArrayLike | None = None,
        durations: ArrayLike | None = None,
    ) -> None:
        """Refuses a prompt that does not fit."""
        self.model.make_inputs(tokens, vectors=vectors, durations=durations)

    def apply(
        self,
        variables: Mapping[str, Params],
        *,
        cache: KVCache,
        position: ArrayLike,
        tokens: ArrayLike | None = None,
        vectors: ArrayLike | None = None,
        durations: ArrayLike | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The hidden states [B, D] at one position, and the cache with all of them."""
        inputs = self.model.make_inputs(
            tokens, vectors=vectors, durations=durations, follows=True
        )
        output = self.model.hidden_states(
            variables["params"], inputs, position=position, cache=cache
        )
        return output.hidden, output.cache


@dataclasses.dataclass(frozen=True)
class _VectorSampler:
    """The next tokens or vectors from hidden states."""

    model: DensityModel
    quantize_method: str
    num_candidates: int

    def __call__(self, params, options, key, hidden, is_done):
        density = self.model.distribution(params, hidden)
        temperature = options["temperature"]
        if isinstance(density, Categorical):
            return density.sample(key, temperature)
        if "shift" in options:
            density = density.shifted(options["shift"])
        if self.model.input_kind == "tokens" and self.quantize_method == "renormalised":
            return Categorical(density.log_probs(options["rows"])).sample(
                key, temperature
            )
        x = density.sample(key, temperature)
        if self.model.input_kind == "vectors":
            return x
        return quantize_to_tokens(
            self.quantize_method,
            density,
            x,
            options,
            num_candidates=self.num_candidates,
        )


def quantize_to_tokens(
    quantize_method: str,
    density: Any,
    x: jax.Array,
    table: dict[str, jax.Array],
    *,
    num_candidates: int = 16,
) -> jax.Array:
    """Tokens int32 [...] of vectors [..., W], by one of `QUANTIZE_METHODS` that maps a vector.

    Args:
      quantize_method: "euclidean", "cosine" or "rerank"; see the top of the module.
      density: that the vectors were drawn from, with the same leading axes.
      x: the vectors.
      table: "rows" [V, W], and "norms", their squared norms [V].
      num_candidates: k of "rerank".
    """
    rows, norms = table["rows"], table["norms"]
    if quantize_method == "rerank":
        candidate_tokens = quantize_lib.k_nearest(
            x, rows, num_candidates, norms=norms
        ).indices
        candidate_log_probs = jax.vmap(density.log_prob, in_axes=-2, out_axes=-1)(
            rows[candidate_tokens]
        )
        best_candidate = jnp.argmax(candidate_log_probs, axis=-1)[..., None]
        return jnp.take_along_axis(candidate_tokens, best_candidate, axis=-1)[..., 0]
    return quantize_lib.nearest(x, rows, metric=quantize_method, norms=norms).indices


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
