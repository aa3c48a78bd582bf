"""Metrics of sweeps in the paper's studies, as functions of arrays.

They follow the published analysis (Marro et al., arXiv:2504.03933, section 4). P is the number of
points of a sweep, A the number of answers. Column k of digits is digit k. The last point of a sweep
of durations is the ordinary sentence, the counterfactual.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

THRESHOLDS = np.linspace(
    0.0, 1.0, 101
)  # of probability, at which a peak counts as found
TIERS = ("invalid", "valid", "successful", "strongly", "completely")  # from low to high
LARGE_VARIATION = 0.05  # the paper's
VARIATION_BINS = np.linspace(0.0, 1.0, 41)  # of variation; LARGE_VARIATION is an edge
# Probability that a curve may go back in all and still be called monotone.
MONOTONE_TOLERANCE = 1e-3
_CONSTANT_TOLERANCE = (
    1e-6  # of the largest value: a range of this size is rounding of float32
)


# --- Time sensitivity -------------------------------------------------------------------------


def sensitivity(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Share of the expected answers that reach each of `THRESHOLDS`.

    Args:
      values: [A], probabilities: the largest along the sweep, or those at its last point.
      expected: [num_expected], columns.

    Returns:
      [101], in [0, 1], falling.
    """
    return _reaches_thresholds(values)[:, expected].mean(axis=1)


def intersection_over_union(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Compute the IoU of reached and expected answers at each of `THRESHOLDS`."""
    is_reached = _reaches_thresholds(values)
    is_expected = np.isin(np.arange(len(values)), expected)
    return (is_reached & is_expected).sum(axis=1) / (is_reached | is_expected).sum(
        axis=1
    )


def area_under_curve(heights: np.ndarray) -> float:
    """Under a curve [101] over `THRESHOLDS`, by the trapezoid rule."""
    return float(np.trapezoid(heights, THRESHOLDS))


def _reaches_thresholds(values: np.ndarray) -> np.ndarray:
    """[101, A]: which of the values [A] are at or above each threshold."""
    return values >= THRESHOLDS[:, None]


# --- Peaks and their order --------------------------------------------------------------------


def peaks(probabilities: np.ndarray) -> np.ndarray:
    """The columns of [P, A] that at some point are at or above all others: ties are peaks."""
    is_leading = probabilities >= probabilities.max(axis=1, keepdims=True)
    return np.flatnonzero(is_leading.any(axis=0))


@dataclasses.dataclass(frozen=True)
class PeakRates:
    """Numbers of peaks over the number n of expected peaks.

    Attributes:
        pure: Share of the digits 1..n that are peaks.
        impure: Number of all digits that are peaks, over n; it may exceed 1.
        counterfactual: 1 / n, since the ordinary sentence has one peak.
    """

    pure: float
    impure: float
    counterfactual: float


def peak_rates(probabilities: np.ndarray, num_expected: int) -> PeakRates:
    """Rates of peaks among ten digits, [P, 10], where 1..n are expected."""
    peak_columns = peaks(probabilities)
    return PeakRates(
        int(np.isin(peak_columns, np.arange(1, num_expected + 1)).sum()) / num_expected,
        len(peak_columns) / num_expected,
        1 / num_expected,
    )


def leading_digits(probabilities: np.ndarray) -> list[int]:
    """The column that leads along the sweep, each as often as it takes over; ties go to the left.

    A perfect counter of n gives 1, 2, ..., n.
    """
    return [int(digit) for digit, _ in itertools.groupby(probabilities.argmax(axis=1))]


def is_never_falling(probabilities: np.ndarray) -> bool:
    """Return whether the most probable digit never falls along the sweep (True if constant)."""
    leaders = leading_digits(probabilities)
    return leaders == sorted(leaders)


def expected_count(probabilities: np.ndarray) -> np.ndarray:
    """Mean digit, sum_k k p_k / sum_k p_k, at those points of [P, 10] where digits have any p."""
    nonzero_rows = probabilities[probabilities.sum(axis=1) > 0]
    return nonzero_rows @ np.arange(nonzero_rows.shape[1]) / nonzero_rows.sum(axis=1)


def trend(values: np.ndarray) -> float | None:
    """Net change of a curve [P] over its total variation; None if it is constant.

    1 if it never falls, -1 if it never rises, near 0 if it comes back to where it began.
    """
    if _is_constant(values):
        return None
    return float((values[-1] - values[0]) / np.abs(np.diff(values)).sum())


def is_monotone(values: np.ndarray) -> bool:
    """Return whether a curve [P] goes back by no more than `MONOTONE_TOLERANCE` in all."""
    reversal = (np.abs(np.diff(values)).sum() - abs(values[-1] - values[0])) / 2
    return bool(reversal <= MONOTONE_TOLERANCE)


# --- Sums -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SumAnswers:
    """First digits that a sum m + ab may be answered with.

    Attributes:
        unshrunk: First digit of m + ab.
        shrunk: First digits of m + a and of m + b.
        others: First digits of m + x, x = 0..9, that are not among these.
    """

    unshrunk: str
    shrunk: frozenset[str]
    others: frozenset[str]


def sum_answers(shrunk_number: int, other_number: int) -> SumAnswers | None:
    """The answers when the two digits of `shrunk_number` shrink; None unless it has two."""
    if not 10 <= shrunk_number <= 99:
        return None

    def first_digit(x: int) -> str:
        return str(other_number + x)[0]

    unshrunk = first_digit(shrunk_number)
    shrunk = frozenset(map(first_digit, divmod(shrunk_number, 10)))
    single_digits = frozenset(map(first_digit, range(10)))
    return SumAnswers(unshrunk, shrunk, single_digits - shrunk - {unshrunk})


def success_tier(
    curves: Mapping[str, np.ndarray],
    *,
    unshrunk: str,
    shrunk: Collection[str],
    others: Collection[str],
) -> str | None:
    """Return the tier that a sweep reaches from the unshrunk sum's answer to a shrunk sum's.

    valid: at the last point the unshrunk answer beats the sum of the shrunk ones and each other
      one.
    successful: and at some point the sum of the shrunk answers beats the unshrunk one.
    strongly: and at such a point it beats each other answer too.
    completely: and at no such point does any other answer beat it.

    Args:
      curves: answer -> probabilities [P].
      unshrunk: the answer to the ordinary sentence.
      shrunk: answers whose probabilities are summed.
      others: answers that are compared one by one.

    Returns:
      The highest of `TIERS` reached. None if the unshrunk answer is one of the shrunk answers: a
      sum would be compared with its own part.
    """
    if unshrunk in shrunk:
        return None
    unshrunk_curve = curves[unshrunk]
    shrunk_total = np.sum([curves[a] for a in sorted(shrunk)], axis=0)
    strongest_other = np.max(
        [np.zeros_like(unshrunk_curve), *(curves[a] for a in others)], axis=0
    )
    if not unshrunk_curve[-1] > max(shrunk_total[-1], strongest_other[-1]):
        return "invalid"
    is_shrunk_ahead = shrunk_total > unshrunk_curve
    if not is_shrunk_ahead.any():
        return "valid"
    if not (is_shrunk_ahead & (shrunk_total > strongest_other)).any():
        return "successful"
    return (
        "strongly"
        if (is_shrunk_ahead & (shrunk_total < strongest_other)).any()
        else "completely"
    )


# --- Interpolation ----------------------------------------------------------------------------


def lipschitz(points: np.ndarray, values: np.ndarray) -> float | None:
    """max |dy/dx| of a curve [P] over its range, max y - min y; None for a constant one.

    Differences are central, and one-sided at the two ends. Over [0, 1] a straight line has 1, and
    a step between two of P evenly spaced points (P - 1) / 2, or P - 1 if it is at an end.
    """
    if _is_constant(values):
        return None
    last_point = len(points) - 1
    left_indices = np.maximum(np.arange(-1, last_point), 0)
    right_indices = np.minimum(np.arange(1, len(points) + 1), last_point)
    slopes = (values[right_indices] - values[left_indices]) / (
        points[right_indices] - points[left_indices]
    )
    return float(np.abs(slopes).max() / np.ptp(values))


def variation(values: np.ndarray) -> float:
    """Return the largest distance of a curve [P] from the interval between its end points."""
    end_values = values[[0, -1]]
    return float(max(values.max() - end_values.max(), end_values.min() - values.min()))


def _is_constant(values: np.ndarray) -> bool:
    """Return whether there are no two values apart by more than rounding."""
    return len(values) < 2 or bool(
        np.ptp(values) <= _CONSTANT_TOLERANCE * np.abs(values).max()
    )


# --- Over the records of a study ----------------------------------------------------------------


def mean_of_present(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    present_values = [value for value in values if value is not None]
    return float(np.mean(present_values)) if present_values else None


def counting_metrics(
    digits: Sequence[np.ndarray], counts: Sequence[int]
) -> dict[str, Any]:
    """Time sensitivity, peaks and their order, in the mean over records, ready for JSON.

    Args:
      digits: for each record, the probabilities [P, 10] of the digits; P may differ.
      counts: for each record, n; the digits 1..n are expected.
    """
    expected = [np.arange(1, n + 1) for n in counts]
    pairs = list(zip(digits, expected, strict=True))

    def over_thresholds(
        share: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> dict[str, Any]:
        observed = np.mean(
            [share(p.max(axis=0), expected_digits) for p, expected_digits in pairs],
            axis=0,
        )
        counterfactual = np.mean(
            [share(p[-1], expected_digits) for p, expected_digits in pairs], axis=0
        )
        return {
            "observed": observed.tolist(),
            "counterfactual": counterfactual.tolist(),
            "observed area": area_under_curve(observed),
            "counterfactual area": area_under_curve(counterfactual),
        }

    rates = [peak_rates(p, n) for p, n in zip(digits, counts, strict=True)]
    return {
        "thresholds": THRESHOLDS.tolist(),
        "sensitivity": over_thresholds(sensitivity),
        "iou": over_thresholds(intersection_over_union),
        "peaks": {
            "counterfactual": mean_of_present(
                record_rates.counterfactual for record_rates in rates
            ),
            "pure": mean_of_present(record_rates.pure for record_rates in rates),
            "pure improvement": mean_of_present(
                record_rates.pure / record_rates.counterfactual
                for record_rates in rates
            ),
            "impure": mean_of_present(record_rates.impure for record_rates in rates),
            "impure improvement": mean_of_present(
                record_rates.impure / record_rates.counterfactual
                for record_rates in rates
            ),
        },
        "order": {
            "in order": mean_of_present(
                leading_digits(p) == expected_digits.tolist()
                for p, expected_digits in pairs
            ),
            "never falls": mean_of_present(is_never_falling(p) for p in digits),
            "digits": mean_of_present(len(peaks(p)) for p in digits),
            "trend": mean_of_present(trend(expected_count(p)) for p in digits),
        },
    }


def tier_shares(tier_counts: Mapping[str, int]) -> dict[str, Any]:
    """Records that reach each of `TIERS` or a higher one, ready for JSON.

    Args:
      tier_counts: tier -> records whose highest it is.

    Returns:
      A dict with `defined`, the number of records, `counts` of each tier but the first, and
      `shares`. The share of valid records is among all records, shares of higher tiers are among
      the valid records. A share of no records is None.
    """
    ordered_counts = [tier_counts.get(tier, 0) for tier in TIERS]
    counts = {tier: sum(ordered_counts[i:]) for i, tier in enumerate(TIERS)}
    defined = counts.pop("invalid")
    denominators = dict.fromkeys(counts, counts["valid"]) | {"valid": defined}
    shares = {
        tier: counts[tier] / denominators[tier] if denominators[tier] else None
        for tier in counts
    }
    return {"defined": defined, "counts": counts, "shares": shares}


def interpolation_metrics(
    points: Sequence[np.ndarray],
    curves: Sequence[Mapping[str, np.ndarray]],
    kinds: Sequence[str],
) -> dict[str, Any]:
    """Lipschitz estimates, variation and monotonicity over records, ready for JSON.

    Args:
      points: for each record, its points [P].
      curves: for each record, answer -> probabilities [P]; the same answers in all.
      kinds: for each record, the kind of its question.
    """
    records = list(zip(points, curves, kinds, strict=True))
    estimates = [(k, a, lipschitz(x, y)) for x, ys, k in records for a, y in ys.items()]
    nonconstant_curves = [
        y for ys in curves for y in ys.values() if not _is_constant(y)
    ]
    variations = [max(map(variation, ys.values())) for ys in curves]
    return {
        "lipschitz": {
            f"{kind} {answer}": mean_of_present(
                e for k, a, e in estimates if (k, a) == (kind, answer)
            )
            for kind, answer in sorted({(k, a) for k, a, _ in estimates})
        }
        | {"all": mean_of_present(e for _, _, e in estimates)},
        "constant": sum(e is None for _, _, e in estimates),
        "variation": {
            "mean": mean_of_present(variations),
            "largest": max(variations),
            "large": mean_of_present(v >= LARGE_VARIATION for v in variations),
            "edges": VARIATION_BINS.tolist(),
            "counts": np.histogram(variations, VARIATION_BINS)[0].tolist(),
        },
        "monotone": {
            "share": mean_of_present(map(is_monotone, nonconstant_curves)),
            "trend": mean_of_present(abs(trend(y) or 0.0) for y in nonconstant_curves),
        },
    }
