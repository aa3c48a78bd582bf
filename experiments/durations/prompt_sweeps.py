"""Sweeps of a prompt: what is changed about it, made ready to be computed.

shrink_span          a span of the prompt lasts less (or more)
interpolate_phrases  one phrase of the prompt turns into another
shift_prompt         the whole prompt begins later
stretch_prompt       the whole prompt lasts less or more
"""

import dataclasses
from typing import Any

import numpy as np
import tokenizers
from jax.typing import ArrayLike

import continuous_lm as clm
from continuous_lm.analysis.sweep import Sweep

SLOT = "[]"  # where a template of an interpolation holds its phrase


@dataclasses.dataclass(frozen=True)
class PromptSweep:
    """A prompt with the sweep over it.

    Attributes:
      prompt: the text.
      token_names: of the text, as the tokenizer names them.
      token_span: the tokens that are changed.
      points: what the sweep runs over, [P].
      sweep: the model's arguments at those points.
    """

    prompt: str
    token_names: list[str]
    token_span: tuple[int, int]
    points: np.ndarray
    sweep: Sweep

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "tokens": self.token_names,
            "span": list(self.token_span),
        }


def shrink_span(
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    character_span: tuple[int, int],
    factors: np.ndarray,
    change: str = "both",
) -> PromptSweep:
    """The tokens that overlap the characters [begin, end) last `factors` [P] of a token each."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    token_span = clm.tokenization.token_span(encoding, *character_span)
    num_tokens = len(encoding.ids)

    def make_arguments():
        durations = clm.durations.scale(
            np.ones(num_tokens, np.float32), factors, token_span
        )
        return {
            "tokens": np.array(encoding.ids),
            **clm.sweep.change_durations(durations, change),
        }

    sweep = Sweep(len(factors), num_tokens, make_arguments)
    return PromptSweep(prompt, encoding.tokens, token_span, factors, sweep)


def shift_prompt(
    tokenizer: tokenizers.Tokenizer, prompt: str, shifts: np.ndarray
) -> PromptSweep:
    """The whole prompt begins at the times `shifts` [P] instead of 0."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    token_ids = np.array(encoding.ids)
    sweep = Sweep(
        len(shifts), len(token_ids), lambda: {"tokens": token_ids, "start": shifts}
    )
    return PromptSweep(prompt, encoding.tokens, (0, len(token_ids)), shifts, sweep)


def stretch_prompt(
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    factors: np.ndarray,
    change: str = "both",
) -> PromptSweep:
    """Every token of the prompt lasts `factors` [P]."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    num_tokens = len(encoding.ids)
    durations = np.asarray(factors, np.float32)[:, None] * np.ones(
        num_tokens, np.float32
    )
    arguments = {
        "tokens": np.array(encoding.ids),
        **clm.sweep.change_durations(durations, change),
    }
    sweep = Sweep(len(factors), num_tokens, lambda: arguments)
    return PromptSweep(prompt, encoding.tokens, (0, num_tokens), factors, sweep)


def interpolate_phrases(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    template: str,
    phrases: tuple[str, str],
    points: np.ndarray,
    path: str = "linear",
) -> PromptSweep:
    """The phrase in the template's slot turns from the first (at 0) into the second (at 1).

    Phrases of the same number of tokens turn into each other token by token. Others are aligned in
    time: both fill the same span, whose length goes from the first's to the second's. It is sampled
    where a token of either ends; there the signal is the mixture of the two tokens that hold that
    moment, and its weight goes from what the first phrase has there to what the second has. So the
    ends of the sweep are the two ordinary prompts, exactly.

    Raises:
      clm.InputError: if the template has not one slot, a phrase is empty, or the rest of the prompt
        is not split into the same tokens around both phrases.
    """
    if template.count(SLOT) != 1:
        raise clm.InputError(f"the template {template!r} must hold {SLOT} once")
    if not all(phrase.strip() for phrase in phrases):
        raise clm.InputError(
            f"of {phrases[0]!r} and {phrases[1]!r} one is empty; give two words"
        )
    slot_begin = template.index(SLOT)
    suffix_length = len(template) - slot_begin - len(SLOT)
    texts = [template.replace(SLOT, phrase) for phrase in phrases]
    encodings = [clm.tokenization.encode(tokenizer, text) for text in texts]
    spans = [
        clm.tokenization.token_span(encoding, slot_begin, len(text) - suffix_length)
        for encoding, text in zip(encodings, texts, strict=True)
    ]
    token_ids = [np.array(encoding.ids) for encoding in encodings]
    prefix_ids, suffix_ids = (
        [np.split(row, span)[part] for row, span in zip(token_ids, spans, strict=True)]
        for part in (0, 2)
    )
    if not all(
        np.array_equal(first, second) for first, second in (prefix_ids, suffix_ids)
    ):
        raise clm.InputError(
            f"{phrases[0]!r} and {phrases[1]!r} cannot be aligned: the prompt around them is not"
            " split into the same tokens; choose other words"
        )
    phrase_ids = [row[slice(*span)] for row, span in zip(token_ids, spans, strict=True)]
    alignment = align_phrases(*map(len, phrase_ids))
    num_tokens = len(prefix_ids[0]) + len(alignment.end_shares) + len(suffix_ids[0])

    def make_arguments():
        def embed(ids):
            return np.asarray(lm.params["embedding"][ids], np.float32)

        first, second = (
            embed(row[index])
            for row, index in zip(phrase_ids, alignment.token_indices, strict=True)
        )
        interpolated = interpolate_vectors(first, second, points, path)
        prefix_embeddings, suffix_embeddings = (
            np.repeat(embed(x[0])[None], len(points), axis=0)
            for x in (prefix_ids, suffix_ids)
        )
        embeddings = np.concatenate(
            [prefix_embeddings, interpolated, suffix_embeddings], axis=1
        )
        return {
            "embeddings": embeddings,
            **alignment.durations_and_times(
                points, len(prefix_ids[0]), len(suffix_ids[0])
            ),
        }

    begin, end = spans[0]
    phrase_tokens = [
        np.array(e.tokens)[slice(*s)] for e, s in zip(encodings, spans, strict=True)
    ]
    first_prompt_tokens = encodings[0].tokens
    token_names = [
        *first_prompt_tokens[:begin],
        *alignment.sample_names(*phrase_tokens),
        *first_prompt_tokens[end:],
    ]
    span = (begin, begin + len(alignment.end_shares))
    return PromptSweep(
        template,
        token_names,
        span,
        points,
        Sweep(len(points), num_tokens, make_arguments),
    )


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Two phrases in one span, sampled where a token of either ends.

    Attributes:
      end_shares: when, as shares of the span, ascending [num_samples].
      token_indices: which token of each phrase holds that moment, int [num_samples] each.
      sample_durations: of the samples in each phrase, in its own tokens, [num_samples] each; 0
        where none of its ends.
    """

    end_shares: np.ndarray
    token_indices: tuple[np.ndarray, np.ndarray]
    sample_durations: tuple[np.ndarray, np.ndarray]

    def durations_and_times(
        self, points: np.ndarray, num_before: int, num_after: int
    ) -> dict[str, np.ndarray]:
        """durations and times [P, T] of the whole prompt: tokens before, samples, tokens after."""
        fraction = np.asarray(points, np.float64)[:, None]
        first, second = self.sample_durations
        sample_durations = (1 - fraction) * first + fraction * second
        span_length = sample_durations.sum(axis=1, keepdims=True)
        ones = np.ones((len(points), 1))
        durations = np.concatenate(
            [ones * np.ones(num_before), sample_durations, ones * np.ones(num_after)],
            axis=1,
        )
        times = [
            ones * np.arange(1, num_before + 1),
            num_before + span_length * self.end_shares,
        ]
        times.append(num_before + span_length + np.arange(1, num_after + 1))
        return {
            "durations": durations.astype(np.float32),
            "times": np.concatenate(times, axis=1).astype(np.float32),
        }

    def sample_names(
        self, first_tokens: np.ndarray, second_tokens: np.ndarray
    ) -> list[str]:
        """The samples, named by the tokens of both phrases."""
        pairs = zip(
            first_tokens[self.token_indices[0]],
            second_tokens[self.token_indices[1]],
            strict=True,
        )
        return [f"{a}|{b}" for a, b in pairs]


def align_phrases(num_first: int, num_second: int) -> Alignment:
    """The alignment of phrases of so many tokens."""
    # In parts of the span, of which there are num_first times num_second.
    ticks = np.union1d(
        num_second * np.arange(1, num_first + 1),
        num_first * np.arange(1, num_second + 1),
    )
    token_indices = (-(-ticks // num_second) - 1, -(-ticks // num_first) - 1)
    sample_durations = ((ticks % num_second == 0) * 1.0, (ticks % num_first == 0) * 1.0)
    return Alignment(ticks / (num_first * num_second), token_indices, sample_durations)


def interpolate_vectors(
    first: np.ndarray, second: np.ndarray, points: ArrayLike, path: str
) -> np.ndarray:
    """Vectors [P, num_samples, D] between `first` and `second` [num_samples, D].

    "linear": along the straight line. "spherical": at constant angular speed in the plane of the
    two (Shoemake, SIGGRAPH 1985), the straight line where they are parallel.
    """
    fraction = np.asarray(points, np.float32)[:, None, None]
    if path == "linear":
        return (1 - fraction) * first + fraction * second
    if path != "spherical":
        raise clm.InputError(
            f"interpolation is {path!r}; it must be 'linear' or 'spherical'"
        )
    norm_products = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = np.clip(
        np.sum(first * second, axis=-1) / np.maximum(norm_products, 1e-30), -1, 1
    )
    angle = np.arccos(cosine)[:, None]
    sine = np.sin(angle)
    is_parallel = sine < 1e-4
    safe_sine = np.where(is_parallel, 1.0, sine)
    first_weight = np.where(
        is_parallel, 1 - fraction, np.sin((1 - fraction) * angle) / safe_sine
    )
    second_weight = np.where(
        is_parallel, fraction, np.sin(fraction * angle) / safe_sine
    )
    return (first_weight * first + second_weight * second).astype(np.float32)
