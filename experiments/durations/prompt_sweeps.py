"""Trials: a prompt and what is varied about it, made ready for a sweep.

shrinking      a span of the prompt lasts less (or more)
interpolating  one phrase of the prompt turns into another
moving         the whole prompt begins later
stretching     the whole prompt lasts less or more
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
class Trial:
    """A prompt with the sweep over it.

    Attributes:
      prompt: the text.
      tokens: of the text, as the tokenizer names them.
      span: the tokens that are varied.
      points: what the sweep runs over, [P].
      sweep: the model's arguments at those points.
    """

    prompt: str
    tokens: list[str]
    span: tuple[int, int]
    points: np.ndarray
    sweep: Sweep

    def as_json(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "tokens": self.tokens, "span": list(self.span)}


def shrinking(
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    characters: tuple[int, int],
    factors: np.ndarray,
    vary: str = "both",
) -> Trial:
    """The tokens that overlap the characters [begin, end) last `factors` [P] of a token each."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    span = clm.tokenization.token_span(encoding, *characters)
    n = len(encoding.ids)

    def arguments():
        durations = clm.durations.scale(np.ones(n, np.float32), factors, span)
        return {"tokens": np.array(encoding.ids), **clm.sweep.vary(durations, vary)}

    sweep = Sweep(len(factors), n, arguments)
    return Trial(prompt, encoding.tokens, span, factors, sweep)


def moving(tokenizer: tokenizers.Tokenizer, prompt: str, shifts: np.ndarray) -> Trial:
    """The whole prompt begins at the times `shifts` [P] instead of 0."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    ids = np.array(encoding.ids)
    sweep = Sweep(len(shifts), len(ids), lambda: {"tokens": ids, "start": shifts})
    return Trial(prompt, encoding.tokens, (0, len(ids)), shifts, sweep)


def stretching(
    tokenizer: tokenizers.Tokenizer, prompt: str, factors: np.ndarray, vary: str = "both"
) -> Trial:
    """Every token of the prompt lasts `factors` [P]."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    n = len(encoding.ids)
    whole = np.asarray(factors, np.float32)[:, None] * np.ones(n, np.float32)
    arguments = {"tokens": np.array(encoding.ids), **clm.sweep.vary(whole, vary)}
    sweep = Sweep(len(factors), n, lambda: arguments)
    return Trial(prompt, encoding.tokens, (0, n), factors, sweep)


def interpolating(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    template: str,
    phrases: tuple[str, str],
    points: np.ndarray,
    how: str = "linear",
) -> Trial:
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
        raise clm.InputError(f"of {phrases[0]!r} and {phrases[1]!r} one is empty; give two words")
    begin, rest = template.index(SLOT), len(template) - template.index(SLOT) - len(SLOT)
    texts = [template.replace(SLOT, phrase) for phrase in phrases]
    encodings = [clm.tokenization.encode(tokenizer, text) for text in texts]
    spans = [
        clm.tokenization.token_span(encoding, begin, len(text) - rest)
        for encoding, text in zip(encodings, texts, strict=True)
    ]
    ids = [np.array(encoding.ids) for encoding in encodings]
    before, after = (
        [np.split(row, span)[part] for row, span in zip(ids, spans, strict=True)] for part in (0, 2)
    )
    if not all(np.array_equal(first, second) for first, second in (before, after)):
        raise clm.InputError(
            f"{phrases[0]!r} and {phrases[1]!r} cannot be aligned: the prompt around them is not"
            " split into the same tokens; choose other words"
        )
    phrase_ids = [row[slice(*span)] for row, span in zip(ids, spans, strict=True)]
    aligned = align(*map(len, phrase_ids))
    n = len(before[0]) + len(aligned.ends) + len(after[0])

    def arguments():
        def rows(ids):
            return np.asarray(lm.params["embedding"][ids], np.float32)

        first, second = (
            rows(row[index]) for row, index in zip(phrase_ids, aligned.tokens, strict=True)
        )
        mixed = mix(first, second, points, how)
        left, right = (np.repeat(rows(x[0])[None], len(points), axis=0) for x in (before, after))
        embeddings = np.concatenate([left, mixed, right], axis=1)
        return {"embeddings": embeddings, **aligned.timed(points, len(before[0]), len(after[0]))}

    begin, end = spans[0]
    names = [np.array(e.tokens)[slice(*s)] for e, s in zip(encodings, spans, strict=True)]
    around = encodings[0].tokens
    tokens = [*around[:begin], *aligned.names(*names), *around[end:]]
    span = (begin, begin + len(aligned.ends))
    return Trial(template, tokens, span, points, Sweep(len(points), n, arguments))


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Two phrases in one span, sampled where a token of either ends.

    Attributes:
      ends: when, as shares of the span, ascending [M].
      tokens: which token of each phrase holds that moment, int [M] each.
      weights: of the samples in each phrase, in its own tokens, [M] each; 0 where none of its ends.
    """

    ends: np.ndarray
    tokens: tuple[np.ndarray, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]

    def timed(self, points: np.ndarray, before: int, after: int) -> dict[str, np.ndarray]:
        """durations and times [P, T] of the whole prompt: tokens before, samples, tokens after."""
        share = np.asarray(points, np.float64)[:, None]
        weights = (1 - share) * self.weights[0] + share * self.weights[1]
        length = weights.sum(axis=1, keepdims=True)
        ones = np.ones((len(points), 1))
        durations = np.concatenate([ones * np.ones(before), weights, ones * np.ones(after)], axis=1)
        times = [ones * np.arange(1, before + 1), before + length * self.ends]
        times.append(before + length + np.arange(1, after + 1))
        return {
            "durations": durations.astype(np.float32),
            "times": np.concatenate(times, axis=1).astype(np.float32),
        }

    def names(self, first: np.ndarray, second: np.ndarray) -> list[str]:
        """The samples, named by the tokens of both phrases."""
        pairs = zip(first[self.tokens[0]], second[self.tokens[1]], strict=True)
        return [f"{a}|{b}" for a, b in pairs]


def align(first: int, second: int) -> Alignment:
    """The alignment of phrases of so many tokens."""
    # In parts of the span, of which there are first times second.
    ticks = np.union1d(second * np.arange(1, first + 1), first * np.arange(1, second + 1))
    tokens = (-(-ticks // second) - 1, -(-ticks // first) - 1)
    weights = ((ticks % second == 0) * 1.0, (ticks % first == 0) * 1.0)
    return Alignment(ticks / (first * second), tokens, weights)


def mix(first: np.ndarray, second: np.ndarray, points: ArrayLike, how: str) -> np.ndarray:
    """Vectors [P, M, D] between `first` and `second` [M, D].

    "linear": along the straight line. "spherical": at constant angular speed in the plane of the
    two (Shoemake, SIGGRAPH 1985), the straight line where they are parallel.
    """
    share = np.asarray(points, np.float32)[:, None, None]
    if how == "linear":
        return (1 - share) * first + share * second
    if how != "spherical":
        raise clm.InputError(f"interpolation is {how!r}; it must be 'linear' or 'spherical'")
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = np.clip(np.sum(first * second, axis=-1) / np.maximum(norms, 1e-30), -1, 1)
    angle = np.arccos(cosine)[:, None]
    sine = np.sin(angle)
    flat = sine < 1e-4
    safe = np.where(flat, 1.0, sine)
    a = np.where(flat, 1 - share, np.sin((1 - share) * angle) / safe)
    b = np.where(flat, share, np.sin(share * angle) / safe)
    return (a * first + b * second).astype(np.float32)
