"""Metrics of hand-made curves whose answers are known, and what holds for any."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest

from continuous_lm.experiments.studies import metrics


def counter(leaders, high=1.0):
    """[P, 10]: at each point one digit has probability `high`, and the others share the rest."""
    actual = np.full((len(leaders), 10), (1 - high) / 9)
    actual[np.arange(len(leaders)), leaders] = high
    return actual


def expected(n):
    return np.arange(1, n + 1)


@st.composite
def sweeps(draw):
    """[P, 10] with rows that sum to at most 1, ties among them."""
    rows = draw(
        arrays.arrays(
            float, (draw(st.integers(2, 8)), 10), elements=st.integers(0, 9).map(float)
        )
    )
    return rows / np.maximum(
        rows.sum(axis=1, keepdims=True), draw(st.sampled_from([1.0, 20.0]))
    )


# --- Time sensitivity -------------------------------------------------------------------------


def test_a_perfect_counter_is_sensitive_up_to_its_peaks():
    top = counter([1, 2, 3, 4], high=0.755).max(axis=0)
    share = metrics.sensitivity(top, expected(4))
    assert share.tolist() == [1.0] * 76 + [0.0] * 25  # thresholds 0 to 0.75
    # The trapezoid from 0.75 to 0.76 is half.
    assert metrics.area_under_curve(share) == pytest.approx(0.755)
    perfect = metrics.sensitivity(np.eye(10)[[1, 2, 3]].max(axis=0), expected(3))
    assert metrics.area_under_curve(perfect) == pytest.approx(1.0)


def test_the_ordinary_sentence_has_one_peak():
    last = counter([1, 2, 3, 4])[-1]
    assert metrics.sensitivity(last, expected(4)).tolist() == [1.0] + [0.25] * 100
    assert (
        metrics.intersection_over_union(last, expected(4)).tolist()
        == [0.4] + [0.25] * 100
    )


def test_iou_counts_what_was_not_expected_against():
    top = counter([0, 1, 2, 9]).max(axis=0)  # 0 and 9 are wrong, 3 is missing
    assert metrics.sensitivity(top, expected(3))[50] == pytest.approx(2 / 3)
    assert metrics.intersection_over_union(top, expected(3))[50] == pytest.approx(2 / 5)


def test_a_value_at_a_threshold_reaches_it():
    for i, threshold in enumerate(metrics.THRESHOLDS):
        values = np.zeros(10)
        values[1] = threshold
        assert metrics.sensitivity(values, expected(1)).sum() == i + 1


@hypothesis.given(sweeps(), st.integers(1, 9))
def test_bounds_and_observed_over_counterfactual(p, n):
    for share in (metrics.sensitivity, metrics.intersection_over_union):
        observed, ordinary = (
            share(p.max(axis=0), expected(n)),
            share(p[-1], expected(n)),
        )
        for values in (observed, ordinary):
            assert values.shape == (101,)
            assert values.min() >= 0
            assert values.max() <= 1
            assert 0 <= metrics.area_under_curve(values) <= 1 + 1e-12
        if share is metrics.sensitivity:
            assert (observed >= ordinary).all()
            assert (np.diff(observed) <= 0).all()
    actual = metrics.peak_rates(p, n)
    assert 0 <= actual.pure <= min(1, actual.impure)
    assert actual.impure <= 10 / n
    assert actual.impure >= actual.counterfactual == 1 / n


# --- Peaks and their order --------------------------------------------------------------------


def test_two_peaks_of_three():
    p = counter([1, 1, 3, 3, 0], high=0.6)
    assert metrics.peaks(p).tolist() == [0, 1, 3]
    assert metrics.peak_rates(p, 3) == metrics.PeakRates(2 / 3, 1.0, 1 / 3)


def test_a_constant_answer_is_the_counterfactual():
    actual = metrics.peak_rates(counter([4] * 5, high=0.3), 4)
    assert actual.pure == actual.impure == actual.counterfactual == 0.25


def test_ties_are_peaks():
    p = np.zeros((1, 10))
    p[0, [2, 5]] = 0.5
    assert metrics.peaks(p).tolist() == [2, 5]


def test_a_peak_need_not_be_high():
    assert metrics.peaks(counter([7, 2], high=0.11)).tolist() == [2, 7]


def test_order_of_answers():
    assert metrics.leading_digits(counter([1, 1, 2, 4, 4])) == [1, 2, 4]
    assert metrics.is_never_falling(counter([1, 1, 2, 4, 4]))
    assert metrics.is_never_falling(counter([3, 3]))
    assert not metrics.is_never_falling(counter([1, 2, 1, 3]))
    assert metrics.leading_digits(counter([1, 2, 1, 3])) == [1, 2, 1, 3]


def test_expected_count():
    half = np.zeros((3, 10))
    half[0, [2, 4]] = 0.25, 0.25  # digits have but half of the probability
    half[2, 9] = 0.1
    assert metrics.expected_count(half).tolist() == [
        3.0,
        9.0,
    ]  # nothing to say in the middle
    assert metrics.trend(metrics.expected_count(np.zeros((4, 10)))) is None


@pytest.mark.parametrize(
    ("values", "trend", "monotone"),
    [
        ([0.0, 0.2, 0.2, 1.0], 1.0, True),
        ([1.0, 0.5, 0.0], -1.0, True),
        ([0.0, 1.0, 0.0], 0.0, False),
        ([0.0, 0.75, 0.5], 0.5, False),
        ([0.0, 0.5, 0.4993, 1.0], 1 / 1.0014, True),  # back by less than 0.001
        ([0.0, 0.5, 0.4985, 1.0], 1 / 1.003, False),
        ([0.3, 0.3 + 1e-9, 0.3], None, True),
    ],
)
def test_trend_and_monotone(values, trend, monotone):
    assert metrics.trend(np.array(values)) == (
        trend if trend is None else pytest.approx(trend)
    )
    assert metrics.is_monotone(np.array(values)) is monotone


# --- Sums -------------------------------------------------------------------------------------


def test_answers_of_a_sum():
    # 38 + 82: 120. Shrunk 82: 46 or 40. 38 + x: 38 to 47, of which 4 is a shrunk answer.
    assert metrics.sum_answers(82, 38) == metrics.SumAnswers(
        "1", frozenset("4"), frozenset("3")
    )
    # 82 + 38 with 38 shrunk: 85 or 90. 82 + x: 82 to 91.
    assert metrics.sum_answers(38, 82) == metrics.SumAnswers(
        "1", frozenset("89"), frozenset()
    )
    # 5 + 10: 15. Shrunk: 6 or 5. 5 + x: 5 to 14, of which 1 is the unshrunk answer.
    assert metrics.sum_answers(10, 5) == metrics.SumAnswers(
        "1", frozenset("56"), frozenset("789")
    )
    for shrunk in (0, 9, 100):
        assert metrics.sum_answers(shrunk, 5) is None


def tier(unshrunk, shrunk, others=()):
    """The tier of a sweep whose shrunk answers, two, share each probability unequally."""
    curves = {
        "1": unshrunk,
        "8": np.multiply(shrunk, 0.75),
        "9": np.multiply(shrunk, 0.25),
    }
    curves |= {str(i): other for i, other in enumerate(others, start=2)}
    named = {answer: np.array(curve, float) for answer, curve in curves.items()}
    return metrics.success_tier(
        named, unshrunk="1", shrunk={"8", "9"}, others=named.keys() - {"1", "8", "9"}
    )


@pytest.mark.parametrize(
    ("target", "unshrunk", "shrunk", "others"),
    [
        ("completely", [0.2, 0.3, 0.9], [0.7, 0.5, 0.0], [[0.1, 0.1, 0.0]]),
        ("completely", [0.2, 0.3, 0.9], [0.7, 0.5, 0.0], []),
        # Another is ahead only where the shrunk answers are not ahead of the unshrunk.
        ("completely", [0.2, 0.2, 0.9], [0.7, 0.1, 0.0], [[0.1, 0.7, 0.0]]),
        # Two others are ahead together, but each counts by itself.
        ("completely", [0.1, 0.9], [0.4, 0.0], [[0.3, 0.0], [0.2, 0.0]]),
        # A tie with another is not defeat.
        ("completely", [0.1, 0.1, 0.9], [0.4, 0.5, 0.0], [[0.4, 0.3, 0.0]]),
        ("strongly", [0.2, 0.2, 0.9], [0.7, 0.3, 0.0], [[0.1, 0.5, 0.0]]),
        ("successful", [0.2, 0.2, 0.9], [0.3, 0.3, 0.0], [[0.5, 0.5, 0.0]]),
        # It beats the other, but not where it beats the unshrunk answer.
        ("successful", [0.1, 0.6, 0.9], [0.3, 0.3, 0.0], [[0.5, 0.0, 0.0]]),
        (
            "valid",
            [0.5, 0.6, 0.9],
            [0.5, 0.3, 0.0],
            [[0.0, 0.0, 0.0]],
        ),  # a tie is no success
        ("invalid", [0.1, 0.6, 0.4], [0.9, 0.3, 0.4], []),  # ties at the end
        ("invalid", [0.1, 0.6, 0.3], [0.9, 0.3, 0.1], [[0.0, 0.0, 0.3]]),
        # The shrunk answers count together: 0.3 and 0.1 against 0.35.
        ("invalid", [0.1, 0.6, 0.35], [0.9, 0.3, 0.4], []),
    ],
)
def test_tiers_of_sums(target, unshrunk, shrunk, others):
    assert tier(unshrunk, shrunk, others) == target


def test_no_tier_where_the_unshrunk_answer_is_a_shrunk_one():
    curves = {"1": np.array([0.4, 0.9]), "2": np.array([0.4, 0.0])}
    assert metrics.success_tier(curves, unshrunk="1", shrunk="12", others=()) is None


def test_tiers_of_whole_sums():
    curves = {
        "12": np.array([0.1, 0.9]),
        "10": np.array([0.8, 0.0]),
        "11": np.array([0.1, 0.0]),
    }
    actual = metrics.success_tier(curves, unshrunk="12", shrunk=["10"], others=["11"])
    assert actual == "completely"


def test_shares_of_tiers():
    actual = metrics.tier_shares(
        {"invalid": 2, "valid": 1, "strongly": 4, "completely": 1}
    )
    assert actual["defined"] == 8
    assert actual["counts"] == {
        "valid": 6,
        "successful": 5,
        "strongly": 5,
        "completely": 1,
    }
    assert actual["shares"]["valid"] == 6 / 8
    assert actual["shares"]["completely"] == 1 / 6
    assert set(metrics.tier_shares({"invalid": 1})["shares"].values()) == {0.0, None}
    assert set(metrics.tier_shares({})["shares"].values()) == {None}


# --- Interpolation ----------------------------------------------------------------------------

EVEN = np.linspace(0, 1, 41)


def test_lipschitz_of_a_line_is_one():
    assert metrics.lipschitz(EVEN, 0.2 + 0.3 * EVEN) == pytest.approx(1.0)
    assert metrics.lipschitz(EVEN, 0.9 - 0.5 * EVEN) == pytest.approx(1.0)
    uneven = np.array([0.0, 0.1, 0.5, 1.0])
    assert metrics.lipschitz(uneven, uneven) == pytest.approx(1.0)


def test_lipschitz_of_a_step():
    assert metrics.lipschitz(EVEN, 0.7 * (EVEN > 0.51)) == pytest.approx(
        20
    )  # over two intervals
    assert metrics.lipschitz(EVEN, np.eye(41)[0]) == pytest.approx(
        40
    )  # one-sided at the end
    assert metrics.lipschitz(EVEN, np.eye(41)[-1]) == pytest.approx(40)


def test_lipschitz_takes_central_differences():
    assert metrics.lipschitz(np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.0, 1.0])) == (
        pytest.approx(1 / 0.9)
    )
    # The largest slope is inside, over the two intervals beside a point.
    points, values = (
        np.array([0.0, 0.3, 0.4, 0.6, 1.0]),
        np.array([0.0, 0.0, 0.2, 1.0, 1.0]),
    )
    assert metrics.lipschitz(points, values) == pytest.approx(1.0 / 0.3)


def test_a_constant_curve_has_no_lipschitz_estimate():
    assert metrics.lipschitz(EVEN, np.full(41, 0.25)) is None
    assert metrics.lipschitz(EVEN, np.full(41, 0.25) + 1e-8 * (EVEN > 0.5)) is None
    assert metrics.lipschitz(EVEN, np.zeros(41)) is None
    assert metrics.lipschitz(EVEN, 1e-5 * EVEN) == pytest.approx(
        1.0
    )  # small is not constant


@pytest.mark.parametrize(
    ("values", "target"),
    [
        ([0.1, 0.3, 0.8], 0.0),
        ([0.2, 0.9, 0.5], 0.4),
        ([0.5, 0.1, 0.2], 0.1),
        ([0.5, 0.1, 0.95, 0.6], 0.4),  # below by 0.4, above by 0.35
        ([0.4, 0.4, 0.4], 0.0),
    ],
)
def test_variation(values, target):
    assert metrics.variation(np.array(values)) == pytest.approx(target)


@hypothesis.given(
    arrays.arrays(float, st.integers(2, 12), elements=st.floats(0, 1, width=32)),
    st.floats(0.5, 1),
)
def test_bounds_of_interpolation(values, scale):
    points = np.linspace(0, 1, len(values))
    assert 0 <= metrics.variation(values) <= np.ptp(values)
    actual, trend = metrics.lipschitz(points, values), metrics.trend(values)
    assert (actual is None) == (trend is None)
    if actual is not None:
        assert 0 < actual <= (len(values) - 1) * (1 + 1e-9)
        assert metrics.lipschitz(points, scale * values) == pytest.approx(
            actual, rel=1e-6
        )
        assert metrics.lipschitz(points, values[::-1]) == pytest.approx(
            actual, rel=1e-6
        )
        assert abs(trend) <= 1 + 1e-12
        if metrics.variation(values) > metrics.MONOTONE_TOLERANCE:
            assert not metrics.is_monotone(values)


# --- Over the records of a study ----------------------------------------------------------------


def test_counting_is_the_mean_over_records():
    perfect, constant = counter([1, 2, 3, 4]), counter([2, 2])
    actual = metrics.counting_metrics([perfect, constant], [4, 2])
    assert actual["sensitivity"]["observed area"] == pytest.approx((1 + 0.5025) / 2)
    assert actual["sensitivity"]["observed"][100] == 0.75
    assert actual["sensitivity"]["counterfactual"][100] == 0.375
    assert actual["iou"]["observed"][100] == 0.75
    assert actual["peaks"] == {
        "counterfactual": 0.375,
        "pure": 0.75,
        "pure improvement": 2.5,
        "impure": 0.75,
        "impure improvement": 2.5,
    }
    assert actual["order"] == {
        "in order": 0.5,
        "never falls": 1.0,
        "digits": 2.5,
        "trend": 1.0,
    }


def test_the_counterfactual_is_the_last_point():
    for leaders, share in (([7, 1], 1.0), ([1, 7], 0.0)):
        actual = metrics.counting_metrics([counter(leaders)], [1])
        assert actual["sensitivity"]["observed"][50] == 1.0
        assert actual["sensitivity"]["counterfactual"][50] == share
        assert actual["iou"]["counterfactual"][50] == share


@hypothesis.given(
    st.lists(st.tuples(sweeps(), st.integers(1, 9)), min_size=1, max_size=5), st.data()
)
def test_the_order_of_records_does_not_matter(records, data):
    shuffled = data.draw(st.permutations(records))
    one, other = (
        metrics.counting_metrics(*zip(*r, strict=True)) for r in (records, shuffled)
    )
    for group in ("sensitivity", "iou", "peaks", "order"):
        for name, value in one[group].items():
            if value is None:
                assert other[group][name] is None
            else:
                np.testing.assert_allclose(other[group][name], value, atol=1e-12)


def test_interpolation_over_records():
    line, bump, flat = (
        EVEN / 2,
        np.where(abs(EVEN - 0.5) < 0.01, 0.3, 0.0),
        np.zeros(41),
    )
    actual = metrics.interpolation_metrics(
        [EVEN] * 3,
        [
            {"Yes": line, "No": bump},
            {"Yes": flat, "No": line[::-1]},
            {"Yes": flat, "No": flat},
        ],
        ["one", "one", "both"],
    )
    assert actual["lipschitz"] == {
        "one Yes": pytest.approx(1.0),
        "one No": pytest.approx((1 + 20) / 2),
        "both Yes": None,
        "both No": None,
        "all": pytest.approx(22 / 3),
    }
    assert actual["constant"] == 3
    variation = actual["variation"]
    assert variation["mean"] == pytest.approx(
        0.1
    )  # the bump alone, the larger of Yes and No
    assert variation["largest"] == pytest.approx(0.3)
    assert variation["large"] == pytest.approx(1 / 3)
    assert sum(variation["counts"]) == 3
    assert variation["counts"][0] == 2
    assert len(variation["edges"]) == len(variation["counts"]) + 1
    assert actual["monotone"]["share"] == pytest.approx(2 / 3)
    assert actual["monotone"]["trend"] == pytest.approx(2 / 3)


def test_the_bound_of_variation_is_an_edge_and_counts_as_large():
    at = np.array([0.0, 0.05, 0.0])
    actual = metrics.interpolation_metrics(
        [np.linspace(0, 1, 3)], [{"Yes": at}], ["one"]
    )
    assert actual["variation"]["large"] == 1.0
    assert metrics.LARGE_VARIATION in metrics.VARIATION_BINS
