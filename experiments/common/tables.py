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

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: Its name.
        path: Where its numbers are among those of a model, "peaks.pure".
        format: How they are written, as of `format`; percentages carry their sign in the head.
    """

    head: str
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
        last_apart: Whether a line sets off the last row.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    last_apart: bool = False

    @property
    def cells(self) -> list[list[str]]:
        """Every cell as text, heads first; "" where there is no number."""
        body = [
            [_text(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]
        heads = [c.head + " (%)" * c.format.endswith("%") for c in self.columns]
        return [heads, *body]

    def as_text(self) -> str:
        """For the terminal."""
        heads, *body = _dashed(self.cells)
        widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
        head, *lines = (_aligned(row, widths) for row in (heads, *body))
        rule = "-" * len(head)
        if self.last_apart:
            lines.insert(-1, rule)
        caption = textwrap.wrap(self.caption, max(len(head), 60))
        return "\n".join([*caption, "", head, rule, *lines])

    def as_csv(self) -> str:
        """Comma-separated, with an empty field where there is no number."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.cells)
        return text.getvalue()

    def as_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        escaped = [[c.replace("\\", "\\\\").replace("|", "\\|") for c in r] for r in self.cells]
        head, *lines = (f"| {' | '.join(row)} |" for row in _dashed(escaped))
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        return "\n".join([self.caption, "", head, rule, *lines]) + "\n"

    def as_latex(self) -> str:
        """A table for a paper that uses the package booktabs."""
        escaped = [[cell.translate(_LATEX) for cell in row] for row in self.cells]
        head, *lines = (" & ".join(row) + r" \\" for row in _dashed(escaped))
        if self.last_apart:
            lines.insert(-1, r"\midrule")
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{self.caption.translate(_LATEX)}}}",
                rf"\label{{tab:{self.name.replace('_', '-')}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                head,
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
        forms = {"csv": self.as_csv(), "md": self.as_markdown(), "tex": self.as_latex()}
        for ending, text in forms.items():
            (folder / f"{self.name}.{ending}").write_text(text, encoding="utf-8", newline="\n")


def _text(cell: Cell, column: Column) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return " ".join(cell.split())
    return format(cell, column.format).removesuffix("%")


def _dashed(cells: list[list[str]]) -> list[list[str]]:
    return [[cell or "-" for cell in row] for row in cells]


def _aligned(row: list[str], widths: list[int]) -> str:
    first, *rest = row
    return "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])


# --- The studies' tables ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table before it has rows; columns for the model, records and failed come first."""

    name: str
    caption: str
    columns: tuple[Column, ...]


def laid_out(study: str, models: Mapping[str, Any], *, last_apart: bool = False) -> list[Table]:
    """The tables of a study, one row a model, from model -> numbers as `metrics` gives them."""
    return [
        Table(
            name=f"{study}_{layout.name}",
            caption=f"{study.capitalize()}. {layout.caption}.",
            columns=(Column("model"), *_SHARED, *layout.columns),
            rows=[
                [model, *(_at(numbers, c.path) for c in (*_SHARED, *layout.columns))]
                for model, numbers in models.items()
            ],
            last_apart=last_apart,
        )
        for layout in LAYOUTS[study]
    ]


def _at(numbers: Any, path: str) -> Cell:
    """What the path leads to; None where a step is missing, as for kinds that no record is of."""
    for name in path.split("."):
        numbers = numbers.get(name)
    return numbers


_SHARED = (Column("records", "records", "d"), Column("failed", "failed", "d"))
_COUNTING = (
    Layout(
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
    Layout(
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
    Layout(
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
LAYOUTS = {
    "counting": _COUNTING,
    "tutorials": _COUNTING,
    "sums": (
        Layout(
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
        Layout(
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
        Layout(
            "variation",
            "Variation beyond the two end points: mean, largest, and share of records with"
            f" {metrics.LARGE_VARIATION} or more; share of curves that are monotone to"
            f" within {metrics.MONOTONE} of probability, and mean size of their trend",
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
