"""Metrics of sweeps: what the paper's studies measure, as functions of arrays.

Marro et al., arXiv:2504.03933, section 4, as their published analysis has them. P is the
number of points of a sweep, D that of the answers; digits are columns, so that column k is digit k.
The last point of a sweep of durations is the ordinary sentence, the counterfactual.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

THRESHOLDS = np.linspace(0.0, 1.0, 101)  # of probability, at which a peak counts as found
TIERS = ("invalid", "valid", "successful", "strongly", "completely")  # from low to high
LARGE_VARIATION = 0.05  # the paper's
BINS = np.linspace(0.0, 1.0, 41)  # of variation; LARGE_VARIATION is an edge
MONOTONE = 1e-3  # probability that a curve may go back in all and still be called monotone
_CONSTANT = 1e-6  # of the largest value: a range of this size is rounding of float32


# --- Time sensitivity -------------------------------------------------------------------------


def sensitivity(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Share of the expected answers that reach each of `THRESHOLDS`.

    Args:
      values: [D], probabilities: the largest along the sweep, or those at its last point.
      expected: [n], columns.

    Returns:
      [101], in [0, 1], falling.
    """
    return _reached(values)[:, expected].mean(axis=1)


def intersection_over_union(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of the answers that reach each of `THRESHOLDS` with those expected; as `sensitivity`."""
    reached = _reached(values)
    wanted = np.isin(np.arange(len(values)), expected)
    return (reached & wanted).sum(axis=1) / (reached | wanted).sum(axis=1)


def area(heights: np.ndarray) -> float:
    """Under a curve [101] over `THRESHOLDS`, by the trapezoid rule."""
    return float(np.trapezoid(heights, THRESHOLDS))


def _reached(values: np.ndarray) -> np.ndarray:
    """[101, D]: which of the values [D] are at or above each threshold."""
    return values >= THRESHOLDS[:, None]


# --- Peaks and their order --------------------------------------------------------------------


def peaks(probabilities: np.ndarray) -> np.ndarray:
    """The columns of [P, D] that at some point are at or above all others: ties are peaks."""
    leads = probabilities >= probabilities.max(axis=1, keepdims=True)
    return np.flatnonzero(leads.any(axis=0))


@dataclasses.dataclass(frozen=True)
class FoundPeaks:
    """How many of n expected peaks there are, as rates.

    Attributes:
        pure: Share of the digits 1..n that are peaks.
        impure: Number of all digits that are peaks, over n; it may exceed 1.
        counterfactual: 1 / n: the ordinary sentence alone has one peak.
    """

    pure: float
    impure: float
    counterfactual: float


def found_peaks(probabilities: np.ndarray, n: int) -> FoundPeaks:
    """Rates of peaks among ten digits, [P, 10], where 1..n are expected."""
    found = peaks(probabilities)
    return FoundPeaks(int(np.isin(found, np.arange(1, n + 1)).sum()) / n, len(found) / n, 1 / n)


def most_probable(probabilities: np.ndarray) -> list[int]:
    """The column that leads along the sweep, each as often as it takes over; ties go to the left.

    A perfect counter of n gives 1, 2, ..., n.
    """
    return [int(best) for best, _ in itertools.groupby(probabilities.argmax(axis=1))]


def never_falls(probabilities: np.ndarray) -> bool:
    """Whether the most probable digit never falls along the sweep; a constant one does not."""
    leaders = most_probable(probabilities)
    return leaders == sorted(leaders)


def expected_count(probabilities: np.ndarray) -> np.ndarray:
    """Mean digit, sum_k k p_k / sum_k p_k, at those points of [P, 10] where digits have any p."""
    some = probabilities[probabilities.sum(axis=1) > 0]
    return some @ np.arange(some.shape[1]) / some.sum(axis=1)


def trend(values: np.ndarray) -> float | None:
    """Net change of a curve [P] over its total variation; None if it is constant.

    1 if it never falls, -1 if it never rises, near 0 if it comes back to where it began.
    """
    if _is_constant(values):
        return None
    return float((values[-1] - values[0]) / np.abs(np.diff(values)).sum())


def is_monotone(values: np.ndarray) -> bool:
    """Whether a curve [P] goes back by no more than `MONOTONE` in all."""
    back = (np.abs(np.diff(values)).sum() - abs(values[-1] - values[0])) / 2
    return bool(back <= MONOTONE)


# --- Sums -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SumAnswers:
    """First digits that a sum m + ab may be answered with.

    Attributes:
        unshrunk: Of m + ab.
        shrunk: Of m + a and of m + b.
        others: Of m + x, x = 0..9, that are none of these.
    """

    unshrunk: str
    shrunk: frozenset[str]
    others: frozenset[str]


def sum_answers(shrunk_number: int, other_number: int) -> SumAnswers | None:
    """The answers when the two digits of `shrunk_number` shrink; None unless it has two."""
    if not 10 <= shrunk_number <= 99:
        return None

    def first(x: int) -> str:
        return str(other_number + x)[0]

    unshrunk, shrunk = first(shrunk_number), frozenset(map(first, divmod(shrunk_number, 10)))
    return SumAnswers(unshrunk, shrunk, frozenset(map(first, range(10))) - shrunk - {unshrunk})


def success_tier(
    curves: Mapping[str, np.ndarray],
    *,
    unshrunk: str,
    shrunk: Collection[str],
    others: Collection[str],
) -> str | None:
    """How far a sweep goes from the answer to the unshrunk sum to that of a shrunk one.

    valid: at the last point the unshrunk answer beats the shrunk ones together, and each other.
    successful: and at some point the shrunk ones together beat the unshrunk.
    strongly: and at such a point they beat each other answer too.
    completely: and at no such point does any other answer beat them.

    Args:
      curves: answer -> probabilities [P].
      unshrunk: the answer to the ordinary sentence.
      shrunk: the answers whose probabilities are summed.
      others: answers that count each by itself.

    Returns:
      The highest of `TIERS` reached. None if the unshrunk answer is one of the shrunk, when the
      tiers mean nothing: sum and part would be compared, and 'successful' would be automatic.
    """
    if unshrunk in shrunk:
        return None
    base = curves[unshrunk]
    parts = np.sum([curves[a] for a in sorted(shrunk)], axis=0)
    rivals = np.max([np.zeros_like(base), *(curves[a] for a in others)], axis=0)
    if not base[-1] > max(parts[-1], rivals[-1]):
        return "invalid"
    turned = parts > base
    if not turned.any():
        return "valid"
    if not (turned & (parts > rivals)).any():
        return "successful"
    return "strongly" if (turned & (parts < rivals)).any() else "completely"


# --- Interpolation ----------------------------------------------------------------------------


def lipschitz(points: np.ndarray, values: np.ndarray) -> float | None:
    """max |dy/dx| of a curve [P] over its range, max y - min y; None for a constant one.

    Differences are central, and one-sided at the two ends. Over [0, 1] a straight line has 1, and
    a step between two of P evenly spaced points (P - 1) / 2, or P - 1 if it is at an end.
    """
    if _is_constant(values):
        return None
    left, right = np.arange(-1, len(points) - 1), np.arange(1, len(points) + 1)
    left[0], right[-1] = 0, len(points) - 1
    slopes = (values[right] - values[left]) / (points[right] - points[left])
    return float(np.abs(slopes).max() / np.ptp(values))


def variation(values: np.ndarray) -> float:
    """How far a curve [P] leaves the interval between its two end points, at most."""
    ends = values[[0, -1]]
    return float(max(values.max() - ends.max(), ends.min() - values.min()))


def _is_constant(values: np.ndarray) -> bool:
    """Whether there are no two values apart by more than rounding."""
    return len(values) < 2 or bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())


# --- Over the records of a study ----------------------------------------------------------------


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None if there are none."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def counting(digits: Sequence[np.ndarray], counts: Sequence[int]) -> dict[str, Any]:
    """Time sensitivity, peaks and their order, in the mean over records, ready for JSON.

    Args:
      digits: of each record, the probabilities [P, 10] of the digits; P may differ.
      counts: of each record, n: 1..n are expected.
    """
    expected = [np.arange(1, n + 1) for n in counts]
    pairs = list(zip(digits, expected, strict=True))

    def over_thresholds(share: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> dict[str, Any]:
        observed = np.mean([share(p.max(axis=0), wanted) for p, wanted in pairs], axis=0)
        ordinary = np.mean([share(p[-1], wanted) for p, wanted in pairs], axis=0)
        return {
            "observed": observed.tolist(),
            "counterfactual": ordinary.tolist(),
            "observed area": area(observed),
            "counterfactual area": area(ordinary),
        }

    found = [found_peaks(p, n) for p, n in zip(digits, counts, strict=True)]
    return {
        "thresholds": THRESHOLDS.tolist(),
        "sensitivity": over_thresholds(sensitivity),
        "iou": over_thresholds(intersection_over_union),
        "peaks": {
            "counterfactual": mean(f.counterfactual for f in found),
            "pure": mean(f.pure for f in found),
            "pure improvement": mean(f.pure / f.counterfactual for f in found),
            "impure": mean(f.impure for f in found),
            "impure improvement": mean(f.impure / f.counterfactual for f in found),
        },
        "order": {
            "in order": mean(most_probable(p) == wanted.tolist() for p, wanted in pairs),
            "never falls": mean(never_falls(p) for p in digits),
            "digits": mean(len(peaks(p)) for p in digits),
            "trend": mean(trend(expected_count(p)) for p in digits),
        },
    }


def tier_shares(reached: Mapping[str, int]) -> dict[str, Any]:
    """Records that reach each of `TIERS` or a higher one, ready for JSON.

    Args:
      reached: tier -> records whose highest it is.

    Returns:
      `defined`, their number; `counts` of each tier but the first; `shares`, of valid ones among
      all, and of the higher tiers among the valid; None where there is nothing to share.
    """
    numbers = [reached.get(tier, 0) for tier in TIERS]
    counts = {tier: sum(numbers[i:]) for i, tier in enumerate(TIERS)}
    defined = counts.pop("invalid")
    bases = dict.fromkeys(counts, counts["valid"]) | {"valid": defined}
    shares = {tier: counts[tier] / bases[tier] if bases[tier] else None for tier in counts}
    return {"defined": defined, "counts": counts, "shares": shares}


def interpolation(
    points: Sequence[np.ndarray], curves: Sequence[Mapping[str, np.ndarray]], kinds: Sequence[str]
) -> dict[str, Any]:
    """Lipschitz estimates, variation and monotonicity over records, ready for JSON.

    Args:
      points: of each record, [P].
      curves: of each record, answer -> probabilities [P]; the same answers in all.
      kinds: of each record, the kind of its question.
    """
    whole = list(zip(points, curves, kinds, strict=True))
    estimates = [(k, a, lipschitz(x, y)) for x, ys, k in whole for a, y in ys.items()]
    moving = [y for ys in curves for y in ys.values() if not _is_constant(y)]
    variations = [max(map(variation, ys.values())) for ys in curves]
    return {
        "lipschitz": {
            f"{kind} {answer}": mean(e for k, a, e in estimates if (k, a) == (kind, answer))
            for kind, answer in sorted({(k, a) for k, a, _ in estimates})
        }
        | {"all": mean(e for _, _, e in estimates)},
        "constant": sum(e is None for _, _, e in estimates),
        "variation": {
            "mean": mean(variations),
            "largest": max(variations),
            "large": mean(v >= LARGE_VARIATION for v in variations),
            "edges": BINS.tolist(),
            "counts": np.histogram(variations, BINS)[0].tolist(),
        },
        "monotone": {
            "share": mean(map(is_monotone, moving)),
            "trend": mean(abs(trend(y) or 0.0) for y in moving),
        },
    }
