"""Tables of results, in every form that they are read in.

Terminal, CSV, Markdown and LaTeX (booktabs) hold the same cells, formatted once.
"""

import csv
import dataclasses
import io
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

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
        format: How they are written, as in `format`; percentages carry their sign in the head.
    """

    title: str
    path: str = ""
    format: str = ""

    @property
    def heading(self) -> str:
        """The title, with the unit of percentages."""
        return f"{self.title} (%)" if self.format.endswith("%") else self.title


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells below column heads; None is a missing number.

    Attributes:
        name: Name of its files and its LaTeX label.
        caption: One line of plain text.
        columns: Column heads. The first column names the rows and is left-aligned.
        rows: Rows, with one cell for each column.
        has_summary_row: Whether a line separates the last row.
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
        return [[column.heading for column in self.columns], *body]

    def as_text(self) -> str:
        """For the terminal."""
        cells = _dash_empty_cells(self.cells)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [_align_row(row, widths) for row in cells]
        separator = "-" * len(lines[0])
        lines.insert(1, separator)
        if self.has_summary_row:
            lines.insert(-1, separator)
        caption = textwrap.wrap(self.caption, max(len(separator), 60))
        return "\n".join([*caption, "", *lines])

    def as_csv(self) -> str:
        """Comma-separated, with an empty field where there is no number."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self.cells)
        return buffer.getvalue()

    def as_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [
            f"| {' | '.join(map(_escape_markdown, row))} |"
            for row in _dash_empty_cells(self.cells)
        ]
        lines.insert(1, "|---|" + "---:|" * (len(self.columns) - 1))
        return "\n".join([self.caption, "", *lines, ""])

    def as_latex(self) -> str:
        """A table for a paper that uses the package booktabs."""
        lines = [
            " & ".join(map(_escape_latex, row)) + r" \\"
            for row in _dash_empty_cells(self.cells)
        ]
        lines.insert(1, r"\midrule")
        if self.has_summary_row:
            lines.insert(-1, r"\midrule")
        alignment = "l" + "r" * (len(self.columns) - 1)
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_escape_latex(self.caption)}}}",
                rf"\label{{tab:{self.name.replace('_', '-')}}}",
                rf"\begin{{tabular}}{{{alignment}}}",
                r"\toprule",
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


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A table before it has rows.

    Attributes:
        name: Name of its files and its LaTeX label.
        caption: One line of plain text.
        columns: Columns after the first, which names the rows; each has the path of its numbers.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]

    def fill(
        self,
        numbers_by_model: Mapping[str, Mapping[str, Any]],
        *,
        has_summary_row: bool = False,
    ) -> Table:
        """The table with a row for each model."""
        rows = [
            [model, *(_look_up(numbers, column.path) for column in self.columns)]
            for model, numbers in numbers_by_model.items()
        ]
        columns = (Column("model"), *self.columns)
        return Table(self.name, self.caption, columns, rows, has_summary_row)


def _look_up(numbers: Mapping[str, Any], path: str) -> Cell:
    """The number at "peaks.pure"; None if a step of the path is missing."""
    value: Any = numbers
    for name in path.split("."):
        if value is None:
            return None
        value = value.get(name)
    return value


def _format_cell(cell: Cell, column: Column) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return " ".join(cell.split())
    return format(cell, column.format).removesuffix("%")


def _escape_markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _escape_latex(text: str) -> str:
    return text.translate(_LATEX_ESCAPES)


def _dash_empty_cells(cells: list[list[str]]) -> list[list[str]]:
    return [[cell or "-" for cell in row] for row in cells]


def _align_row(row: list[str], widths: list[int]) -> str:
    row_name, *values = row
    return "  ".join([row_name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])
