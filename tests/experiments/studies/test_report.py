"""The report: one page that holds every section, with the numbers of the stored results."""

import html.parser
import json
import pathlib
import re

import matplotlib.image
import pytest
from matplotlib.figure import Figure

import continuous_lm as clm
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.common import program, tables
from continuous_lm.experiments.studies import (
    analysis,
    datasets,
    report,
    report_page,
    study_tables,
)
from tests.fixtures import tiny
from tests.fixtures.programs import call_program

STORIES = pathlib.Path(__file__).parents[4] / "shared" / "data" / "stories260k"
SMALL = {"prompts_per_study": 4, "points": 5}
STUDIES = [f"Study: {name}" for name in datasets.STUDIES]


class Page(html.parser.HTMLParser):
    """Visible text and references of an HTML file."""

    def __init__(self, text):
        super().__init__()
        self.heads, self.tables, self.links, self.tags, self.ids = [], [], [], set(), []
        self._into = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        names = ("src", "href", "srcset", "data", "action", "poster")
        self.links += [values[name] for name in names if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "h2":
            self.heads.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._into = tag

    def handle_endtag(self, tag):
        self._into = None

    def handle_data(self, data):
        if self._into == "h2":
            self.heads[-1] += data
        elif self._into in ("td", "th"):
            self.tables[-1][-1][-1] += data


def read(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), json.loads((folder / "report.json").read_text())


def assert_whole(folder):
    """One file that refers to itself alone, with every section and table of report.json."""
    actual, stored = read(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not actual.tags & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in text
    assert "url(" not in text
    for link in actual.links:
        assert (
            link.startswith("data:image/png;base64,")
            or link.removeprefix("#") in actual.ids
        )
    assert len(set(actual.ids)) == len(actual.ids)
    assert actual.heads[: len(stored["sections"])] == [
        s["title"] for s in stored["sections"]
    ]
    expected = [table for s in stored["sections"] for table in s["tables"].values()]
    assert actual.tables == [
        [[c or "-" for c in row] for row in table] for table in expected
    ]
    pictures = [name for s in stored["sections"] for name in s["figures"]]
    assert sum(link.startswith("data:") for link in actual.links) == len(pictures)
    assert_markdown(folder, stored, pictures)


def assert_markdown(folder, stored, pictures):
    """report.md has the same sections, and its pictures lie beside it."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert shown == [f"{name}.png" for name in pictures]
    for name in shown:
        assert matplotlib.image.imread(folder / name).ndim == 3
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[: len(stored["sections"])] == [s["title"] for s in stored["sections"]]


# --- The page ---------------------------------------------------------------------------------

NASTY = '<script>alert("a & b")</script>'
RUN = {
    "versions": {"jax": "1"},
    "date": "a day",
    "device": "<b>cpu</b>",
    "flags": {"prompt": NASTY, "data": None, "ignore_config_fields": [], "points": 5},
}


def written(folder, sections):
    """The page as the program writes it, figures beside it."""
    for name in [name for section in sections for name in section.figures]:
        figure = Figure()
        figure.subplots().plot([0, 1])
        figure.savefig(folder / f"{name}.png", dpi=20)
    report_page.write_report(folder, f"How continuous is {NASTY}?", sections, RUN)
    values = {"sections": [section.as_json() for section in sections], "run": RUN}
    (folder / "report.json").write_text(json.dumps(values))
    return folder


def table(name, *cells):
    heads = [tables.Column("answer"), tables.Column(NASTY, format=".3f")]
    return tables.Table(name, f"Caption {NASTY}", heads, [list(row) for row in cells])


def test_text_of_prompts_and_models_is_no_html(tmp_path):
    sections = [
        report_page.Section(
            "One", NASTY, f"Shown: {NASTY}", [table("one", [NASTY, 0.5])], {"one": None}
        ),
        report_page.Section(
            f"Two {NASTY}", "", f"Not run: {NASTY}", [], {}, failed=True
        ),
    ]
    written(tmp_path, sections)
    assert_whole(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "<b>cpu" not in text
    actual, _ = read(tmp_path)
    assert actual.tables == [[["answer", NASTY], [NASTY, "0.500"]]]
    body = (tmp_path / "report.md").read_text().split("## One")[1]
    assert f"Shown: {NASTY}" not in body


def test_a_page_says_what_was_not_run(tmp_path):
    sections = [
        report_page.Section("One", "", "", [table("one", ["3", None])], {}),
        report_page.Section(
            "Two", "", "Not run: the vocabulary cannot spell 'a'", [], {}, failed=True
        ),
    ]
    written(tmp_path, sections)
    assert_whole(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "2 sections, 1 not run" in text
        assert "cannot spell" in text
    assert '<p class="failed">' in (tmp_path / "report.html").read_text()


def test_every_section_has_an_address_of_its_own():
    titles = [section.title for section in report.SECTIONS]
    assert set(STUDIES) < set(titles)
    assert len({report_page.slug(title) for title in titles}) == len(titles)


# --- The program ------------------------------------------------------------------------------

SEARCHES = ("Duration attribution", "Inverse problem", "Prompt pruning")


@pytest.fixture
def short(monkeypatch):
    """The report without the slow sections of searches; a note replaces each."""

    def left_out(inputs):
        raise clm.InputError("left out")

    sections = [
        report.OtherSection(section.title, left_out)
        if section.title in SEARCHES
        else section
        for section in report.SECTIONS
    ]
    monkeypatch.setattr(report, "SECTIONS", sections)

    def run(folder, **values):
        """Runs it, and gives its summary."""
        config = report.Config(output_dir=folder, **SMALL, **values)
        return report.run(config).summary()

    return run


def comparable(folder):
    """Return the parts that every run must repeat."""
    _, stored = read(folder)
    remaining = [s for s in stored["sections"] if s["title"] not in SEARCHES]
    assert len(remaining) == len(report.SECTIONS) - len(SEARCHES)
    return remaining


def assert_analysed(folder):
    """Assert that the tables of studies equal the analysis of their stored results."""
    _, stored = read(folder)
    sections = {section["title"]: section for section in stored["sections"]}
    for name in datasets.STUDIES:
        actual = analysis.read_study(folder / "studies" / name)
        assert len(actual.records) + len(actual.failed) == 4
        numbers = analysis.compute_model_metrics([actual])
        expected = {
            table.name: table.cells for table in study_tables.make_tables(name, numbers)
        }
        assert sections[f"Study: {name}"]["tables"] == expected
        assert any(any(row) for cells in expected.values() for row in cells[1:])


@pytest.mark.slow
def test_the_embedded_model_from_end_to_end_twice(short, tmp_path):
    short(tmp_path / "report")
    assert_whole(tmp_path / "report")
    assert_analysed(tmp_path / "report")
    assert not any(section["failed"] for section in comparable(tmp_path / "report"))
    before = comparable(tmp_path / "report")
    (tmp_path / "report" / "old.txt").write_text("mine")
    short(tmp_path / "report")  # into the same folder
    assert comparable(tmp_path / "report") == before
    assert (tmp_path / "report" / "old.txt").exists()


def assert_reasons(folder, summary):
    """Each section that was not run gives its reason, and all are counted."""
    _, stored = read(folder)
    failed = [section for section in stored["sections"] if section["failed"]]
    for section in failed:
        assert section["text"].startswith("Not run: ")
        assert not section["tables"]
    assert (
        f"{len(stored['sections'])} sections, {len(failed)} of which could not"
        in summary
    )
    for name in ("report.html", "report.md"):
        about = f"{len(stored['sections'])} sections, {len(failed)} not run"
        assert about in (folder / name).read_text(encoding="utf-8")
    return {section["title"]: section["text"] for section in failed}


@pytest.mark.slow
def test_a_model_of_few_words_says_what_it_cannot_read(short, tmp_path):
    words = tiny.word_tokenizer(tiny.COUNTING_TEXT)
    model = tiny.save(tmp_path / "model", tokenizer=words, num_hidden_layers=1)
    summary = short(tmp_path / "out", model=model)
    assert_whole(tmp_path / "out")
    reasons = assert_reasons(tmp_path / "out", summary)
    assert "Counting" not in reasons
    assert "cannot spell" in reasons["Events"]
    for title in STUDIES:
        assert (
            "no record could be analysed: 4 of 4" in reasons[title]
            or "spells" in reasons[title]
        )


@pytest.mark.slow
def test_a_model_of_another_language(short, tmp_path):
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is not there")
    summary = short(tmp_path / "out", model=STORIES)
    assert_whole(tmp_path / "out")
    reasons = assert_reasons(tmp_path / "out", summary)
    assert {"Counting", "Events"}.isdisjoint(reasons)


@pytest.mark.slow
def test_a_nasty_vocabulary_reaches_the_page_as_text(short, tmp_path):
    """Tracked tokens are named after the model's vocabulary, whatever that holds."""
    vocabulary = [*prompts.make_vocabulary()[2:], "<script>", "</script>", "|", "`"]
    words = tiny.word_tokenizer(dict.fromkeys(vocabulary))
    model = tiny.save(tmp_path / "model", tokenizer=words, num_hidden_layers=1)
    short(tmp_path / "out", model=model, threshold=0.0)
    assert_whole(tmp_path / "out")


def test_flags_of_single_experiments_are_not_of_the_report(tmp_path):
    for flag in ("--change=mass", "--path=spherical", "--prompt=Hello"):
        status, _, stderr = call_program(tmp_path, "report", flag, "--output_dir=out")
        assert status == 1
        name = flag.partition("=")[0].removeprefix("--")
        assert stderr.startswith(f"error: Unknown command line flag '{name}'")
    assert not (tmp_path / "out").exists()


def test_sections_take_the_flags_that_their_programs_have():
    config = report.Config(points=7, threshold=0.2, min_factor=0.3, dtype="bfloat16")
    for section in report.SECTIONS:
        if isinstance(section, report.SweepSection):
            selected = program.with_values_of(section.config, config)
            assert (selected.points, selected.dtype) == (7, "bfloat16")
            assert getattr(selected, "min_factor", 0.3) == 0.3
            assert getattr(selected, "threshold", 0.2) == 0.2
            assert selected.output_dir is None
