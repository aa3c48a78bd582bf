"""The tables of each study: their columns, and where the numbers are among a model's metrics."""

from collections.abc import Mapping
from typing import Any

from continuous_lm.experiments.common.tables import Column, Table, TableSpec
from continuous_lm.experiments.studies import metrics


def make_tables(
    study: str, metrics_by_model: Mapping[str, Any], *, has_summary_row: bool = False
) -> list[Table]:
    """The tables of a study, one row a model, from model -> numbers as `metrics` gives them."""
    result_tables = []
    for table_spec in TABLE_SPECS[study]:
        study_spec = TableSpec(
            name=f"{study}_{table_spec.name}",
            caption=f"{study.capitalize()}. {table_spec.caption}.",
            columns=(*_SHARED_COLUMNS, *table_spec.columns),
        )
        result_tables.append(
            study_spec.fill(metrics_by_model, has_summary_row=has_summary_row)
        )
    return result_tables


_SHARED_COLUMNS = (Column("records", "records", "d"), Column("failed", "failed", "d"))
_COUNTING_TABLES = (
    TableSpec(
        "sensitivity",
        "Areas over thresholds of probability: share of the expected peaks found, and intersection"
        " over union (IoU) of found and expected peaks",
        (
            Column("observed", "sensitivity.observed area", ".4f"),
            Column("counterfactual", "sensitivity.counterfactual area", ".4f"),
            Column("IoU observed", "iou.observed area", ".4f"),
            Column("IoU counterfactual", "iou.counterfactual area", ".4f"),
        ),
    ),
    TableSpec(
        "peaks",
        "Found-peak rates: pure counts the peaks among 1..n, impure those of all digits;"
        " the ordinary sentence has one peak",
        (
            Column("counterfactual", "peaks.counterfactual", ".4f"),
            Column("pure", "peaks.pure", ".4f"),
            Column("improvement", "peaks.pure improvement", ".3f"),
            Column("impure", "peaks.impure", ".4f"),
            Column("impure improvement", "peaks.impure improvement", ".3f"),
        ),
    ),
    TableSpec(
        "order",
        "Order along the sweep: shares of records whose most probable digits are 1..n in turn, and"
        " never fall; mean number of digits that lead; mean trend of the expected count, its net"
        " change over its total variation",
        (
            Column("1..n in turn", "order.in order", ".1%"),
            Column("never falls", "order.never falls", ".1%"),
            Column("digits", "order.digits", ".2f"),
            Column("trend", "order.trend", ".3f"),
        ),
    ),
)
TABLE_SPECS = {
    "counting": _COUNTING_TABLES,
    "tutorials": _COUNTING_TABLES,
    "sums": (
        TableSpec(
            "tiers",
            "Success of sums: valid among those with tiers, the others among the valid. There are"
            " no tiers where the number that shrinks has no two digits (not defined) or the"
            " unshrunk answer is also a shrunk one (ambiguous)",
            (
                Column("not defined", "not defined", "d"),
                Column("ambiguous", "ambiguous", "d"),
                Column("with tiers", "defined", "d"),
                *(
                    Column(tier, f"shares.{tier}", ".1%")
                    for tier in ("valid", "successful", "strongly", "completely")
                ),
            ),
        ),
    ),
    "words": (
        TableSpec(
            "lipschitz",
            "Mean Lipschitz estimates of normalised interpolation curves, by kind of question and"
            " answer; constant curves have none",
            (
                *(
                    Column(f"{kind} {answer}", f"lipschitz.{kind} {answer}", ".3f")
                    for kind in ("neither", "one", "both")
                    for answer in ("Yes", "No")
                ),
                Column("all", "lipschitz.all", ".3f"),
                Column("constant", "constant", "d"),
            ),
        ),
        TableSpec(
            "variation",
            "Variation beyond the two end points: mean, largest, and share of records with"
            f" {metrics.LARGE_VARIATION} or more; share of curves that are monotone to"
            f" within {metrics.MONOTONE_TOLERANCE} of probability, and mean size of their trend",
            (
                Column("mean", "variation.mean", ".4f"),
                Column("largest", "variation.largest", ".4f"),
                Column(f"{metrics.LARGE_VARIATION} or more", "variation.large", ".1%"),
                Column("monotone", "monotone.share", ".1%"),
                Column("trend", "monotone.trend", ".3f"),
            ),
        ),
    ),
}
