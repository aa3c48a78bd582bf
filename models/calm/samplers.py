"""Text from next-vector models: C tokens a step, at any temperature, without a likelihood.

A temperature of 1 takes one draw of the head a step. Below that, P(x)^(1 / temperature),
normalized, has to be drawn from, where P is only known by its draws (CALM, Shao et al.,
arXiv:2510.27688; see `repeated_draws`):

    batch     decodes `num_candidates` draws and prefers chunks that repeat: one step, a bias that
              falls with their number, temperatures of 1/n
    exact     rejects until the draws agree: no bias, any temperature <= 1, and as long as it takes

At 0 the chunk that comes most often among the candidates is taken.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_count, check_integers
from continuous_lm.errors import InputError, about
from continuous_lm.models.calm import repeated_draws
from continuous_lm.models.calm.chunk_inputs import split_into_chunks
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.calm.next_vector import next_vector_model
from continuous_lm.models.config import TransformerConfig
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
    "SAMPLING_METHODS",
    "sample",
]

SAMPLING_METHODS = ("batch", "exact")


def sample(
    lm: LanguageModel[NextVectorModel],
    tokens: ArrayLike | Sequence[ArrayLike],
    *,
    max_new_tokens: int,
    durations: ArrayLike | Sequence[ArrayLike] | None = None,
    start: ArrayLike = 0.0,
    new_durations: ArrayLike = 1.0,
    temperature: float = 1.0,
    method: str = "batch",
    num_candidates: int = 128,
    max_rounds: int = 10_000,
    pad_token: int | None = None,
    key: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    max_prefill_length: int = 1024,
) -> GeneratedTokens:
    """Continues prompts chunk by chunk, in the compiled loop of `generate`.

    Args:
      lm: the model.
      tokens: the prompts: int [B, n], or a list of B of different lengths; [n] is one prompt.
      max_new_tokens: how many tokens each prompt gets, at most.
      durations: of the prompts' chunks, [B, T], or a list of B; 1 if left out.
      start: the time at which each prompt begins, a scalar or [B].
      new_durations: d >= 0 of new chunks: a scalar, [T] or [B, T], T = ceil(max_new_tokens / C).
      temperature: from 0 to 1.
      method: "batch", for 1, 1/2, 1/3 ... and 0, or "exact", for all above 0.
      num_candidates: Z, the draws that "batch" chooses from.
      max_rounds: draws in "exact" for one chunk, at most.
      pad_token: a token that is put in front of prompts whose length C does not divide;
        eos_token_id of the model's hf_fields if left out: the end of the text before.
      key: PRNG key; at temperature 0 one is made if it is left out.
      stop: tokens that end a row, wherever in a chunk they are; eos_token_id of hf_fields
        if left out, () for none.
      max_prefill_length: prompts go through the model in pieces of at most so many chunks.

    Returns:
      The new tokens, on the host.

    Raises:
      InputError: for arguments that do not fit, or if "exact" has accepted no draw for a chunk in
        max_rounds.
    """
    model = next_vector_model(lm)
    counts = {
        "max_new_tokens": max_new_tokens,
        "max_prefill_length": max_prefill_length,
        "num_candidates": num_candidates,
    }
    for name, value in (counts | {"max_rounds": max_rounds}).items():
        check_count(name, value)
    check_sampling(temperature, None, key)
    if method not in SAMPLING_METHODS:
        raise InputError(
            f"method is {method!r:.60}; it must be one of {', '.join(SAMPLING_METHODS)}"
        )
    if method == "exact" and not 0 < temperature <= 1:
        raise InputError(
            f"temperature is {temperature}; exact needs one above 0, and at most 1"
        )
    inverse_temperature = 0
    if method == "batch":
        inverse_temperature = (
            num_candidates
            if temperature == 0
            else repeated_draws.inverse_temperature(temperature)
        )
        if inverse_temperature > num_candidates:
            raise InputError(
                f"temperature 1/{inverse_temperature} needs at least {inverse_temperature}"
                f" candidates, not {num_candidates}"
            )
    stop_ids = stop_tokens(stop, lm.hf_fields, lm.config.vocab_size)
    chunk_size = model.chunk_size
    prompts: Any = list(cast(Any, tokens)) if np.iterable(tokens) else []
    if not prompts:
        raise InputError(
            "tokens must be one prompt's [n], or a list of prompts; give at least one"
        )
    chunked_prompts = []
    for i, row in enumerate([tokens] if np.ndim(prompts[0]) == 0 else prompts):
        with about(f"prompt {i}"):
            check_integers("tokens", row, 0, lm.config.vocab_size)
            chunked_prompts.append(
                split_into_chunks(
                    cast(Any, row), chunk_size, _resolve_pad_token(lm, pad_token)
                )
            )
    decode_model = _DecodeModel(model)
    prompt_list, duration_list = split_prompts(
        decode_model, "chunks", chunked_prompts, durations, np.dtype(np.int32)
    )
    num_new_chunks = -(-max_new_tokens // chunk_size)
    trunk_params = lm.params["trunk"]
    spec = DecodeSpec(
        decode_model,
        "chunks",
        "chunks",
        _ChunkSampler(
            model,
            method,
            inverse_temperature,
            num_candidates if inverse_temperature > 1 else 1,
            max_rounds if method == "exact" else 1,
        ),
        lm.config,
        max_prefill_length,
        axes_lib.mesh_of(trunk_params["embedding"]),
    )
    new_chunks, lengths = decode_batch(
        spec,
        lm.params,
        prompt_list,
        duration_list,
        max_new_items=num_new_chunks,
        start=start,
        new_durations=new_durations,
        options={"temperature": np.float32(temperature)},
        stop=stop_ids,
        key=jax.random.key(0) if key is None else key,
        dtype=trunk_params["embedding"].dtype,
    )
    for i, row in enumerate(new_chunks):
        if (row[: lengths[i]] < 0).any():
            raise InputError(
                f"prompt {i}: no draw was accepted in {max_rounds} rounds at new chunk"
                f" {lengths[i] - 1}; raise max_rounds or the temperature, or take method='batch'"
            )
    return _truncate_at_stop(
        new_chunks.reshape(len(new_chunks), -1),
        lengths * chunk_size,
        stop_ids,
        max_new_tokens,
    )


@dataclasses.dataclass(frozen=True)
class _DecodeModel:
    """What the decode loop asks of a model."""

    model: NextVectorModel

    def clone(self, *, config: TransformerConfig) -> "_DecodeModel":
        """The same with another config of the trunk."""
        return _DecodeModel(self.model.clone(config=config))

    def check(self, *, chunks: ArrayLike, durations: ArrayLike) -> None:
        """Refuses a prompt that does not fit."""
        self.model.make_inputs(chunks, durations=durations)

    def apply(
        self,
        variables: Mapping[str, Params],
        *,
        chunks: ArrayLike,
        durations: ArrayLike,
        cache: KVCache,
        position: ArrayLike,
    ) -> tuple[jax.Array, KVCache | None]:
        """The hidden states [B, D] at one position, and the cache with all of them."""
        inputs = self.model.make_inputs(chunks, durations=durations, follows=True)
        output = self.model.hidden_states(
            variables["params"], inputs, position=position, cache=cache
        )
        return output.hidden, output.cache


@dataclasses.dataclass(frozen=True)
class _ChunkSampler:
    """The next chunks [B, C] from hidden states [B, D]; -1 where none was accepted."""

    model: NextVectorModel
    method: str
    inverse_temperature: int  # n of a temperature of 1/n
    num_candidates: int
    max_rounds: int

    def __call__(self, params, options, key, hidden, is_done):
        def sample_chunks(key, count):
            return self.model.sample_chunks(params, key, hidden, count)

        if self.method == "exact":
            samples = repeated_draws.rejection_sample(
                key,
                lambda key: sample_chunks(key, 1)[0],
                temperature=options["temperature"],
                max_rounds=self.max_rounds,
                is_done=is_done,
            )
            return jnp.where(samples.accepted[:, None], samples.items, -1)
        if self.inverse_temperature == 1:
            return sample_chunks(key, 1)[0]
        sample_key, choice_key = jax.random.split(key)
        return repeated_draws.repetition_sample(
            choice_key,
            sample_chunks(sample_key, self.num_candidates),
            n=self.inverse_temperature,
        )


def _resolve_pad_token(
    lm: LanguageModel[NextVectorModel], pad_token: int | None
) -> int | None:
    """The token to put in front of prompts: that given, or the end of a text, or none."""
    if pad_token is None:
        eos_field = lm.hf_fields.get("eos_token_id")
        eos_tokens = np.ravel([] if eos_field is None else eos_field)
        return int(eos_tokens[0]) if len(eos_tokens) else None
    if np.ndim(pad_token):
        raise InputError(f"pad_token is {pad_token!r:.60}; it must be one token")
    check_integers("pad_token", pad_token, 0, lm.config.vocab_size)
    return pad_token


def _truncate_at_stop(
    tokens: np.ndarray, lengths: np.ndarray, stop: np.ndarray, max_length: int
) -> GeneratedTokens:
    """Rows of tokens up to and with their first stop token, wherever in a chunk it is."""
    tokens = tokens[:, :max_length].copy()
    lengths = np.minimum(lengths, max_length)
    is_stop = np.isin(tokens, stop)
    stop_lengths = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, max_length)
    lengths = np.minimum(lengths, stop_lengths).astype(np.int32)
    tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return GeneratedTokens(tokens, lengths)
