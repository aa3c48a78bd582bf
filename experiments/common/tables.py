"""The tables of the studies, in every form that they are read in.

Terminal, CSV, Markdown and LaTeX (booktabs) hold the same cells, formatted once.
"""

import csv
import dataclasses
import io
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from continuous_lm.experiments.studies import metrics

Cell = str | int | float | None

_LATEX_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its name.
        path: Where its numbers are among those of a model, "peaks.pure".
        format: How they are written, as of `format`; percentages carry their sign in the head.
    """

    title: str
    path: str = ""
    format: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells below heads; None is a number that there is not.

    Attributes:
        name: Of its files and its label.
        caption: What it shows, one line of plain text.
        columns: The first names the rows and is flush left.
        rows: One cell a column.
        has_summary_row: Whether a line sets off the last row.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    has_summary_row: bool = False

    @property
    def cells(self) -> list[list[str]]:
        """Every cell as text, heads first; "" where there is no number."""
        body = [
            [
                _format_cell(cell, column)
                for cell, column in zip(row, self.columns, strict=True)
            ]
            for row in self.rows
        ]
        titles = [c.title + " (%)" * c.format.endswith("%") for c in self.columns]
        return [titles, *body]

    def as_text(self) -> str:
        """For the terminal."""
        titles, *body = _dash_empty_cells(self.cells)
        widths = [max(map(len, column)) for column in zip(titles, *body, strict=True)]
        header, *lines = (_align_row(row, widths) for row in (titles, *body))
        separator = "-" * len(header)
        if self.has_summary_row:
            lines.insert(-1, separator)
        caption = textwrap.wrap(self.caption, max(len(header), 60))
        return "\n".join([*caption, "", header, separator, *lines])

    def as_csv(self) -> str:
        """Comma-separated, with an empty field where there is no number."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self.cells)
        return buffer.getvalue()

    def as_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        escaped = [
            [c.replace("\\", "\\\\").replace("|", "\\|") for c in r] for r in self.cells
        ]
        header, *lines = (
            f"| {' | '.join(row)} |" for row in _dash_empty_cells(escaped)
        )
        separator = "|---|" + "---:|" * (len(self.columns) - 1)
        return "\n".join([self.caption, "", header, separator, *lines]) + "\n"

    def as_latex(self) -> str:
        """A table for a paper that uses the package booktabs."""
        escaped = [
            [cell.translate(_LATEX_ESCAPES) for cell in row] for row in self.cells
        ]
        header, *lines = (
            " & ".join(row) + r" \\" for row in _dash_empty_cells(escaped)
        )
        if self.has_summary_row:
            lines.insert(-1, r"\midrule")
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{self.caption.translate(_LATEX_ESCAPES)}}}",
                rf"\label{{tab:{self.name.replace('_', '-')}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                header,
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def write(self, folder: pathlib.Path) -> None:
        """The three files of the table."""
        text_by_suffix = {
            "csv": self.as_csv(),
            "md": self.as_markdown(),
            "tex": self.as_latex(),
        }
        for suffix, text in text_by_suffix.items():
            (folder / f"{self.name}.{suffix}").write_text(
                text, encoding="utf-8", newline="\n"
            )


def _format_cell(cell: Cell, column: Column) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return " ".join(cell.split())
    return format(cell, column.format).removesuffix("%")


def _dash_empty_cells(cells: list[list[str]]) -> list[list[str]]:
    return [[cell or "-" for cell in row] for row in cells]


def _align_row(row: list[str], widths: list[int]) -> str:
    row_name, *values = row
    return "  ".join([row_name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])


# --- The studies' tables ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A table before it has rows; columns for the model, records and failed come first."""

    name: str
    caption: str
    columns: tuple[Column, ...]


def study_tables(
    study: str, metrics_by_model: Mapping[str, Any], *, has_summary_row: bool = False
) -> list[Table]:
    """The tables of a study, one row a model, from model -> numbers as `metrics` gives them."""
    return [
        Table(
            name=f"{study}_{table_spec.name}",
            caption=f"{study.capitalize()}. {table_spec.caption}.",
            columns=(Column("model"), *_SHARED_COLUMNS, *table_spec.columns),
            rows=[
                [
                    model,
                    *(
                        _lookup(metric_values, c.path)
                        for c in (*_SHARED_COLUMNS, *table_spec.columns)
                    ),
                ]
                for model, metric_values in metrics_by_model.items()
            ],
            has_summary_row=has_summary_row,
        )
        for table_spec in TABLE_SPECS[study]
    ]


def _lookup(metric_values: Any, path: str) -> Cell:
    """What the path leads to; None where a step is missing, as for kinds that no record is of."""
    for name in path.split("."):
        metric_values = metric_values.get(name)
    return metric_values


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
