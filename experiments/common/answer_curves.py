"""Probability curves of answers along a sweep: tracked tokens, readings and storage."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from continuous_lm import tokenization
from continuous_lm.errors import InputError

Answers = Sequence[str] | Mapping[str, Sequence[str]]  # or each with its spellings

ANSWER_TOKEN_RULES = {
    "exact": tokenization.tokens_spelling,
    "paper": tokenization.tokens_containing,
}


def find_answer_tokens(
    tokenizer: tokenizers.Tokenizer,
    answers: Answers,
    rule: str,
) -> dict[str, list[int]]:
    """Return answer -> the tokens that count for it, by a rule of `ANSWER_TOKEN_RULES`.

    Args:
      tokenizer: tokenizer of the model.
      answers: the tracked answers; or answer -> its spellings, whose tokens are summed.
      rule: a key of `ANSWER_TOKEN_RULES`.

    Raises:
      InputError: if an answer has no token of its own.
    """
    spellings = answers if isinstance(answers, Mapping) else {a: (a,) for a in answers}
    texts = tuple(dict.fromkeys(itertools.chain(*spellings.values())))
    tokens_by_text = ANSWER_TOKEN_RULES[rule](tokenizer, texts)
    answer_tokens = {
        answer: [token_id for text in texts for token_id in tokens_by_text[text]]
        for answer, texts in spellings.items()
    }
    missing = [answer for answer, tokens in answer_tokens.items() if not tokens]
    if missing:
        missing_names = ", ".join(map(repr, missing))
        raise InputError(
            f"no single token spells {missing_names}; choose answers that are one token of this"
            " model"
        )
    return answer_tokens


def token_name(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    """Return the tokenizer's name of a token; a model may have more tokens than its tokenizer."""
    return tokenizer.id_to_token(token) or f"token {token}"


@dataclasses.dataclass(frozen=True)
class AnswerRange:
    """A stretch of the sweep on which one answer is the most probable of those tracked."""

    first: float
    last: float
    answer: str
    peak: float  # its largest probability there


@dataclasses.dataclass(frozen=True)
class Curves:
    """Probabilities [P, A] of A answers at the P points of a sweep."""

    points: np.ndarray
    answers: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def other_probabilities(self) -> np.ndarray:
        """Total probability of all other tokens, [P]."""
        return np.clip(1.0 - self.probabilities.sum(axis=1), 0.0, 1.0)

    @property
    def ranges(self) -> list[AnswerRange]:
        """The most probable answer along the sweep, in stretches."""
        most_probable = self.probabilities.argmax(axis=1)
        boundaries = [
            0,
            *(np.flatnonzero(np.diff(most_probable)) + 1),
            len(most_probable),
        ]
        return [
            AnswerRange(
                first=float(self.points[range_begin]),
                last=float(self.points[range_end - 1]),
                answer=self.answers[most_probable[range_begin]],
                peak=float(
                    self.probabilities[
                        range_begin:range_end, most_probable[range_begin]
                    ].max()
                ),
            )
            for range_begin, range_end in itertools.pairwise(boundaries)
        ]

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            "points": self.points.tolist(),
            "probabilities": dict(
                zip(self.answers, self.probabilities.T.tolist(), strict=True)
            ),
            "other": self.other_probabilities.tolist(),
            "ranges": [dataclasses.asdict(r) for r in self.ranges],
        }

    def as_table(self, point_name: str) -> str:
        """The ranges, for the terminal."""
        rows = [
            f"{r.first:6.3f} - {r.last:5.3f}   {r.answer:<8} {r.peak:8.4f}"
            for r in self.ranges
        ]
        header = f"{point_name:<16} answer    highest probability"
        return "\n".join([header, "-" * len(header), *rows])
