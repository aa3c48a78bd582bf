"""Curves: how probable each answer is along a sweep. What is tracked, read off, and stored."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from continuous_lm import tokenization
from continuous_lm.errors import InputError

TRACKING = {"exact": tokenization.spellings, "paper": tokenization.containing}


def tracked(
    tokenizer: tokenizers.Tokenizer, answers: Sequence[str] | Mapping[str, Sequence[str]], how: str
) -> dict[str, list[int]]:
    """Answer -> the tokens that count for it, as `TRACKING` says.

    Args:
      tokenizer: of the model.
      answers: what is tracked; or each answer with the ways to write it, whose tokens are summed.
      how: a key of `TRACKING`.

    Raises:
      InputError: if an answer has no token of its own.
    """
    written = answers if isinstance(answers, Mapping) else {answer: (answer,) for answer in answers}
    by_text = TRACKING[how](tokenizer, tuple(dict.fromkeys(itertools.chain(*written.values()))))
    found = {a: [i for text in texts for i in by_text[text]] for a, texts in written.items()}
    missing = [answer for answer, tokens in found.items() if not tokens]
    if missing:
        named = ", ".join(map(repr, missing))
        raise InputError(
            f"no single token spells {named}; choose answers that are one token of this model"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Range:
    """A stretch of the sweep on which one answer is the most probable of those tracked."""

    first: float
    last: float
    answer: str
    peak: float  # its largest probability there


@dataclasses.dataclass(frozen=True)
class Curves:
    """Probabilities [P, C] of C answers at the P points of a sweep."""

    points: np.ndarray
    answers: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def other(self) -> np.ndarray:
        """[P]: what is left for all other tokens."""
        return np.clip(1.0 - self.probabilities.sum(axis=1), 0.0, 1.0)

    @property
    def ranges(self) -> list[Range]:
        """The most probable answer along the sweep, in stretches."""
        best = self.probabilities.argmax(axis=1)
        edges = [0, *(np.flatnonzero(np.diff(best)) + 1), len(best)]
        return [
            Range(
                first=float(self.points[a]),
                last=float(self.points[b - 1]),
                answer=self.answers[best[a]],
                peak=float(self.probabilities[a:b, best[a]].max()),
            )
            for a, b in itertools.pairwise(edges)
        ]

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            "points": self.points.tolist(),
            "probabilities": dict(zip(self.answers, self.probabilities.T.tolist(), strict=True)),
            "other": self.other.tolist(),
            "ranges": [dataclasses.asdict(r) for r in self.ranges],
        }

    def as_table(self, point_name: str) -> str:
        """The ranges, for the terminal."""
        rows = [
            f"{r.first:6.3f} - {r.last:5.3f}   {r.answer:<8} {r.peak:8.4f}" for r in self.ranges
        ]
        head = f"{point_name:<16} answer    highest probability"
        return "\n".join([head, "-" * len(head), *rows])
