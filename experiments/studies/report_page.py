"""A page to read: sections of text, tables and figures, as one HTML file and as Markdown."""

import base64
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from matplotlib.figure import Figure

from continuous_lm.experiments.common.tables import Table

TEMPLATE_FOLDER = pathlib.Path(__file__).with_name("templates")


@dataclasses.dataclass(frozen=True)
class Section:
    """One experiment: the paper's claim and this model's results.

    Attributes:
      title: title of the section.
      claim: the paper's claim, one sentence; "" for none.
      text: results of this model.
      tables: tables in order.
      figures: file name without suffix -> figure.
      failed: whether the experiment could not run.
    """

    title: str
    claim: str
    text: str
    tables: Sequence[Table]
    figures: Mapping[str, Figure]
    failed: bool = False

    def as_json(self) -> dict[str, Any]:
        cells = {table.name: table.cells for table in self.tables}
        return {
            "title": self.title,
            "claim": self.claim,
            "text": self.text,
            "failed": self.failed,
            "tables": cells,
            "figures": list(self.figures),
        }


def slug(title: str) -> str:
    """A file name of a title."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def write_report(
    folder: pathlib.Path, title: str, sections: Sequence[Section], run_record: Mapping
) -> None:
    """report.html and report.md; the figures' PNG files are in the folder already."""
    pictures = {
        name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        for section in sections
        for name in section.figures
    }
    for file_name in ("report.html", "report.md"):
        template = _TEMPLATES.get_template(f"{file_name}.jinja")
        text = template.render(
            title=title,
            summary=_run_summary(run_record, sections),
            sections=sections,
            pictures=pictures,
            flags=_format_flags(run_record),
        )
        (folder / file_name).write_text(text, encoding="utf-8")


def _run_summary(run_record: Mapping, sections: Sequence[Section]) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in run_record["versions"].items()
    )
    num_failed = sum(section.failed for section in sections)
    place = f"{run_record['date']}, {run_record['device']}; {versions}"
    return f"{len(sections)} sections, {num_failed} not run. {place}."


def _format_flags(run_record: Mapping) -> str:
    return " ".join(
        f"--{name}={value}"
        for name, value in run_record["flags"].items()
        if value not in (None, [])
    )


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_<>#|])", r"\\\1", text)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
    autoescape=jinja2.select_autoescape(["html.jinja"]),  # Markdown has its own rules
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"slug": slug, "escape_markdown": _escape_markdown}
