"""A page to read: sections of text, tables and figures, as one HTML file and as Markdown."""

import base64
import dataclasses
import html
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from continuous_lm.experiments.common.tables import Table


@dataclasses.dataclass(frozen=True)
class Section:
    """What was done, claimed and found.

    Attributes:
      title: of the section.
      claim: what the paper says, one sentence; "" for none.
      text: what this model shows.
      tables: in their order.
      figures: file name without its ending -> figure.
      failed: whether it could not be run.
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
    (folder / "report.html").write_text(
        _render_html(folder, title, sections, run_record), encoding="utf-8"
    )
    (folder / "report.md").write_text(
        _render_markdown(title, sections, run_record), encoding="utf-8"
    )


def _run_summary(run_record: Mapping, sections: Sequence[Section]) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in run_record["versions"].items()
    )
    num_failed = sum(section.failed for section in sections)
    place = f"{run_record['date']}, {run_record['device']}; {versions}"
    return f"{len(sections)} sections, {num_failed} not run. {place}."


def _format_flags(run_record: Mapping) -> str:
    return " ".join(
        f"--{k}={v}" for k, v in run_record["flags"].items() if v not in (None, [])
    )


def _render_markdown(
    title: str, sections: Sequence[Section], run_record: Mapping
) -> str:
    parts = [f"# {title}", _run_summary(run_record, sections)]
    for section in sections:
        parts += [f"## {section.title}"]
        parts += [f"*The paper:* {section.claim}"] if section.claim else []
        parts += [_escape_markdown(section.text)] if section.text else []
        parts += [f"![{section.title}]({name}.png)" for name in section.figures]
        parts += [table.as_markdown().rstrip() for table in section.tables]
    return "\n\n".join([*parts, f"`{_format_flags(run_record)}`"]) + "\n"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_<>#|])", r"\\\1", text)


_STYLESHEET = """
:root { color-scheme: light; }
body { font: 16px/1.5 Georgia, 'STIX Two Text', serif; color: #222; background: #fff;
       max-width: 46rem; margin: 3rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
p { margin: .5rem 0; }
.about, .flags { color: #666; font-size: .85rem; }
.flags { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.claim { color: #555; font-style: italic; }
.failed { color: #a33; }
img { max-width: 100%; display: block; margin: 1rem auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .85rem; width: 100%; }
caption { text-align: left; color: #555; padding-bottom: .4rem; }
thead { border-top: 1.5px solid #222; border-bottom: 1px solid #222; }
tbody { border-bottom: 1.5px solid #222; }
th, td { text-align: right; padding: .2rem .5rem; font-weight: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
nav { font-size: .9rem; columns: 2; margin: 1.2rem 0; }
nav a { display: block; color: #0072B2; text-decoration: none; }
"""


def _render_html(
    folder: pathlib.Path, title: str, sections: Sequence[Section], run_record: Mapping
) -> str:
    escape = html.escape
    navigation_links = "".join(
        f'<a href="#{slug(s.title)}">{escape(s.title)}</a>' for s in sections
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(_run_summary(run_record, sections))}</p>',
    ]
    body.append(f"<nav>{navigation_links}</nav>")
    for section in sections:
        body.append(f'<h2 id="{slug(section.title)}">{escape(section.title)}</h2>')
        if section.claim:
            body.append(f'<p class="claim">The paper: {escape(section.claim)}</p>')
        if section.text:
            class_attribute = ' class="failed"' if section.failed else ""
            body.append(f"<p{class_attribute}>{escape(section.text)}</p>")
        for name in section.figures:
            encoded_image = base64.b64encode(
                (folder / f"{name}.png").read_bytes()
            ).decode()
            alt_text = escape(f"{section.title}: {name}")
            body.append(
                f'<img alt="{alt_text}" src="data:image/png;base64,{encoded_image}">'
            )
        body += map(_render_html_table, section.tables)
    body.append(
        f'<h2>Flags</h2><p class="flags">{escape(_format_flags(run_record))}</p>'
    )
    meta_tags = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    )
    head_tags = f"{meta_tags}<title>{escape(title)}</title><style>{_STYLESHEET}</style>"
    head_element = f"<head>{head_tags}</head>"
    body_html = "\n".join(body)
    return f'<!doctype html>\n<html lang="en">{head_element}\n<body>\n{body_html}\n</body></html>\n'


def _render_html_table(table: Table) -> str:
    titles, *rows = ([html.escape(cell or "-") for cell in row] for row in table.cells)
    header = "".join(f"<th>{cell}</th>" for cell in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{html.escape(table.caption)}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )
