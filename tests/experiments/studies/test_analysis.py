"""The program on hand-made studies: its numbers, its files, and its errors."""

import csv
import json
import re

import matplotlib.image
import numpy as np
import pytest

from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.studies import analysis, metrics, study_tables
from tests.fixtures.programs import call_program

PROGRAM = "analysis"
DIGITS = "0123456789"
SWEEP = np.linspace(0.1, 1.0, 10)


def run(cwd, *arguments):
    return call_program(cwd, PROGRAM, *arguments)


# --- Hand-made studies ------------------------------------------------------------------------


def record(index, about, points, curves):
    return {
        "index": index,
        "prompt": "...",
        "about": about,
        "curves": {
            "points": list(points),
            "probabilities": {answer: list(curve) for answer, curve in curves.items()},
            "other": [],
            "ranges": [],
        },
    }


def answering(leaders, seconds=()):
    """Curves of ten digits: who is ahead at each point of `SWEEP`, and who second at the first."""
    p = np.full((len(SWEEP), 10), 0.02)
    p[np.arange(len(seconds)), seconds] = 0.1
    p[np.arange(len(SWEEP)), leaders] = 0.8
    return dict(zip(DIGITS, p.T.tolist(), strict=True))


def counted(index, field, n, leaders=None):
    if leaders is None:  # a perfect counter
        leaders = 1 + np.arange(len(SWEEP)) * n // len(SWEEP)
    return record(index, {field: n}, SWEEP, answering(leaders))


def summed(index, item_1, item_2, shrink_1, leaders, seconds=()):
    about = {"item_1": item_1, "item_2": item_2, "shrink_1": shrink_1}
    return record(index, about, SWEEP, answering(leaders, seconds))


def word_record(index, kind, yes):
    about = {"options": ["apples", "bananas"], "kind": kind, "question": "Are {} red?"}
    yes = np.array(yes)
    return record(
        index, about, np.linspace(0, 1, len(yes)), {"Yes": yes, "No": 0.9 - yes}
    )


def failed(index):
    return {
        "index": index,
        "prompt": "...",
        "about": {},
        "failed": "the word is not in the prompt",
    }


LATE = [1] * 5 + [4] * 5
# 82 + 38 is 120; 8 + 38 and 2 + 38 begin with 4; other x + 38 with 3.
ROSES, BETWEEN = [4] * 5 + [1] * 5, [3] * 5 + [1] * 5
STUDIES = {
    "counting": [
        counted(0, "repetitions", 4),
        counted(1, "repetitions", 4, LATE),
        failed(2),
    ],
    "counting_b": [
        counted(5, "repetitions", 2, [3] * 5 + [2] * 5),
        failed(1),
        failed(2),
    ],
    "tutorials": [counted(0, "num_sentences", 7)],
    "sums": [
        summed(0, 82, 38, True, ROSES),  # completely
        summed(1, 38, 82, False, [4, 4, 3, 3, 3, 1, 1, 1, 1, 1], [4] * 5),  # strongly
        summed(2, 82, 38, True, BETWEEN, [4] * 5),  # successful
        summed(10, 82, 38, True, BETWEEN),  # valid: 4 and 1 are as probable there
        summed(3, 82, 38, True, [4] * 10),  # invalid
        summed(4, 10, 5, True, [1] * 10),  # valid
        summed(5, 20, 105, True, ROSES),  # ambiguous: 125, 107, 105
        summed(6, 12, 6, True, [1] * 10),  # 18, 7, 8: valid
        summed(7, 30, 101, True, ROSES),  # ambiguous: 131, 104, 101
        summed(8, 5, 7, True, ROSES),  # not defined
        failed(9),
    ],
    "words": [
        word_record(0, "neither", np.linspace(0.1, 0.5, 21)),
        word_record(1, "first", [0.1, 0.1, 0.6, 0.6, 0.6]),
        word_record(2, "second", [0.5, 0.8, 0.5, 0.5, 0.5]),
        word_record(3, "both", [0.3, 0.3, 0.3]),
    ],
}


def write(folder, study, model, records, **more):
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "study": study,
        "model": model,
        "records": records,
        "run": {"date": "a day"},
    } | more
    (folder / "study.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("studies")
    models = {"counting_b": "org/model_b & 100%"}
    return [
        write(root / name, name.split("_")[0], models.get(name, "apples"), records)
        for name, records in STUDIES.items()
    ]


def analysed(folders, output):
    config = analysis.Config(studies=list(map(str, folders)), output_dir=output)
    return analysis.run(config).summary()


@pytest.fixture(scope="module")
def output(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "deep" / "analysis"
    (folder.parent / "terminal").write_text(analysed(folders, folder))
    return folder


@pytest.fixture(scope="module")
def result(output):
    return json.loads((output / "analysis.json").read_text())


# --- Numbers ----------------------------------------------------------------------------------


def test_counting(result):
    models = result["studies"]["counting"]
    assert list(models) == ["apples", "org/model_b & 100%", "Global"]
    assert [(m["records"], m["failed"]) for m in models.values()] == [
        (3, 1),
        (3, 2),
        (6, 3),
    ]
    ours, other, every = models.values()
    digits = np.stack(list(answering([3] * 5 + [2] * 5).values()), axis=1)
    assert ours["peaks"]["pure"] == pytest.approx((1 + 1 / 2) / 2)
    assert other["peaks"]["pure"] == 0.5
    assert every["peaks"]["pure"] == pytest.approx(
        (1 + 1 / 2 + 1 / 2) / 3
    )  # records, not models
    assert every["peaks"]["counterfactual"] == pytest.approx(
        (1 / 4 + 1 / 4 + 1 / 2) / 3
    )
    assert every["peaks"]["pure improvement"] == pytest.approx((4 + 2 + 1) / 3)
    assert ours["order"]["in order"] == 0.5
    assert ours["order"]["never falls"] == 1.0
    again = metrics.counting_metrics([digits], [2])
    assert {name: other[name] for name in again} == again
    for model in models.values():
        share = model["sensitivity"]
        assert (
            len(share["observed"])
            == len(share["counterfactual"])
            == len(model["thresholds"])
        )
        assert share["observed area"] >= share["counterfactual area"]


def test_tutorials_with_one_model_have_no_global_row(result):
    models = result["studies"]["tutorials"]
    assert list(models) == ["apples"]
    assert models["apples"]["order"]["in order"] == 1.0
    assert models["apples"]["peaks"]["pure"] == 1.0
    assert models["apples"]["peaks"]["counterfactual"] == 1 / 7


def test_sums(result):
    sums = result["studies"]["sums"]["apples"]
    assert (sums["records"], sums["failed"]) == (11, 1)
    assert (sums["not defined"], sums["ambiguous"], sums["defined"]) == (1, 2, 7)
    assert sums["counts"] == {
        "valid": 6,
        "successful": 3,
        "strongly": 2,
        "completely": 1,
    }
    assert sums["shares"] == {
        "valid": 6 / 7,
        "successful": 3 / 6,
        "strongly": 2 / 6,
        "completely": 1 / 6,
    }


def test_words(result):
    words = result["studies"]["words"]["apples"]
    assert words["lipschitz"] == {
        "neither Yes": pytest.approx(1.0),
        "neither No": pytest.approx(1.0),
        "one Yes": pytest.approx((2 + 4) / 2),
        "one No": pytest.approx((2 + 4) / 2),
        "both Yes": None,
        "both No": None,
        "all": pytest.approx((1 + 2 + 4) / 3),
    }
    assert words["constant"] == 2
    assert words["variation"]["largest"] == pytest.approx(0.3)
    assert words["variation"]["large"] == 0.25
    assert words["monotone"]["share"] == pytest.approx(2 / 3)


def test_json_says_where_the_numbers_come_from(result, folders, output):
    assert result["sources"]["sums"]["apples"] == {
        "folder": str(folders[3]),
        "run": {"date": "a day"},
    }
    assert result["run"]["flags"] == {
        "studies": list(map(str, folders)),
        "output_dir": str(output),
        "compilation_cache": None,
    }
    assert {"continuous_lm", "numpy"} <= result["run"]["versions"].keys()


def test_whole_sums_of_one_digit_have_no_tiers(tmp_path):
    answers = {str(i): [0.01] * 10 for i in range(19)} | {"12": [0.5] * 10}
    about = {"item_1": 5, "item_2": 7, "shrink_1": True}
    records = [record(0, about, SWEEP, answers)]
    records.append(
        record(1, about | {"item_1": 15}, SWEEP, answers)
    )  # not first digits
    folder = write(tmp_path / "sums", "sums", "apples", records)
    table = analysed([folder], tmp_path / "out")
    sums = json.loads((tmp_path / "out" / "analysis.json").read_text())["studies"][
        "sums"
    ]["apples"]
    assert (sums["not defined"], sums["ambiguous"], sums["defined"]) == (2, 0, 0)
    assert set(sums["shares"].values()) == {None}
    assert re.search(r"apples +2 +0 +2 +0 +0 +- +- +- +-$", table)


def test_the_order_of_records_and_of_folders_does_not_matter(folders, result, tmp_path):
    turned = []
    for folder in reversed(folders):
        values = json.loads((folder / "study.json").read_text())
        values["records"].reverse()
        turned.append(write(tmp_path / folder.name, **values))
    analysed(turned, tmp_path / "out")
    other = json.loads((tmp_path / "out" / "analysis.json").read_text())["studies"]
    for study, models in result["studies"].items():
        assert set(other[study]) == set(models)
        for form in (models, other[study]):
            assert list(form)[-1] == ("Global" if study == "counting" else "apples")
        for model, numbers in models.items():
            assert_close(other[study][model], numbers)


def assert_close(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name])
    elif one is None:
        assert other is None
    else:
        np.testing.assert_allclose(one, other, atol=1e-12)


# --- Files ------------------------------------------------------------------------------------

TABLES = {
    "counting": ["sensitivity", "peaks", "order"],
    "tutorials": ["sensitivity", "peaks", "order"],
    "sums": ["tiers"],
    "words": ["lipschitz", "variation"],
}
FIGURES = {
    "counting": ["sensitivity", "iou"],
    "tutorials": ["sensitivity", "iou"],
    "words": ["variation"],
}


def names(of, endings):
    return [
        f"{s}_{name}.{e}" for s, all_ in of.items() for name in all_ for e in endings
    ]


def test_files_are_those_and_no_others(output):
    expected = [*names(TABLES, ("csv", "md", "tex")), *names(FIGURES, ("png", "pdf"))]
    assert sorted(p.name for p in output.iterdir()) == sorted(
        [*expected, "analysis.json"]
    )


def latex_cells(text):
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [
        line.removesuffix(r" \\") for line in body.splitlines() if line.endswith(r"\\")
    ]
    return [
        [re.sub(r"\\([&%_])", r"\1", c) for c in re.split(r" (?<!\\)& ", row)]
        for row in rows
    ]


def markdown_cells(text):
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in (head, *rows)]


@pytest.mark.parametrize("name", [name[:-4] for name in names(TABLES, ("csv",))])
def test_every_form_of_a_table_has_the_same_cells(output, name):
    with open(output / f"{name}.csv", newline="") as file:
        cells = [[cell or "-" for cell in row] for row in csv.reader(file)]
    assert markdown_cells((output / f"{name}.md").read_text()) == cells
    assert latex_cells((output / f"{name}.tex").read_text()) == cells
    terminal = (output.parent / "terminal").read_text().splitlines()
    for row in cells:
        assert any(re.split(r" {2,}", line.strip()) == row for line in terminal)
    assert cells[0][:3] == ["model", "records", "failed"]
    assert len(cells) == (4 if name.startswith("counting") else 2)
    for row in cells[1:]:
        assert all(np.isfinite(float(cell)) for cell in row[1:] if cell != "-")


def test_cells_are_the_numbers_of_the_json(output, result):
    actual = 0
    for study, models in result["studies"].items():
        for layout in study_tables.TABLE_SPECS[study]:
            with open(output / f"{study}_{layout.name}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            for row, numbers in zip(rows, models.values(), strict=True):
                for column in layout.columns:
                    value = numbers
                    for step in column.path.split("."):
                        value = value[step]  # every path leads somewhere
                    percent = column.format.endswith("%")
                    cell = row[column.title + " (%)" * percent]
                    if value is None:
                        assert cell == ""
                    else:
                        places = len(cell.partition(".")[2])
                        expected = value * 100**percent
                        assert float(cell) == pytest.approx(
                            expected, abs=0.51 * 10**-places
                        )
                    actual += 1
    assert actual > 50


ROWS = {
    "counting_sensitivity": {"records": "3", "failed": "2"},
    "counting_peaks": {
        "counterfactual": "0.5000",
        "pure": "0.5000",
        "improvement": "1.000",
        "impure": "1.0000",
        "impure improvement": "2.000",
    },
    "counting_order": {
        "1..n in turn (%)": "0.0",
        "never falls (%)": "0.0",
        "digits": "2.00",
        "trend": "-1.000",
    },
    "sums_tiers": {
        "records": "11",
        "failed": "1",
        "not defined": "1",
        "ambiguous": "2",
        "with tiers": "7",
        "valid (%)": "85.7",
        "successful (%)": "50.0",
        "strongly (%)": "33.3",
        "completely (%)": "16.7",
    },
    "words_lipschitz": {
        "neither Yes": "1.000",
        "one No": "3.000",
        "both Yes": "",
        "all": "2.333",
        "constant": "2",
    },
    "words_variation": {
        "mean": "0.0750",
        "largest": "0.3000",
        "0.05 or more (%)": "25.0",
        "monotone (%)": "66.7",
        "trend": "0.667",
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_tables(output, name):
    """The second model's in counting, where pure and impure differ; the only one's elsewhere."""
    with open(output / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    row = rows[1 if name.startswith("counting") else 0]
    assert {head: row[head] for head in ROWS[name]} == ROWS[name]


def test_latex_is_booktabs_and_escaped(output):
    text = (output / "counting_peaks.tex").read_text()
    assert [
        text.count(f"\\{rule}") for rule in ("toprule", "midrule", "bottomrule")
    ] == [1, 2, 1]
    assert r"org/model\_b \& 100\% & 3 & 2 & 0.5000" in text
    assert text.count("{") == text.count("}")
    assert r"\label{tab:counting-peaks}" in text
    lines = text.splitlines()
    assert lines[lines.index(r"\midrule", lines.index(r"\midrule") + 1) + 1].startswith(
        "Global &"
    )
    assert (output / "sums_tiers.tex").read_text().count(r"\midrule") == 1


def test_signs_in_cells():
    signs = "a\\b{c}$d#e_f^g~h|i\nj,k"
    table = tables.Table("t", "A caption.", [tables.Column("model")], [[signs]])
    assert latex_row(table) == (
        r"a\textbackslash{}b\{c\}\$d\#e\_f\textasciicircum{}g\textasciitilde{}h|i j,k \\"
    )
    assert "| a\\\\b{c}$d#e_f^g~h\\|i j,k |" in table.as_markdown()
    assert next(csv.reader(table.as_csv().splitlines()[1:])) == [
        signs.replace("\n", " ")
    ]


def latex_row(table):
    return table.as_latex().splitlines()[-4]


def test_figures_are_real(output):
    for name in names(FIGURES, ("png",)):
        image = matplotlib.image.imread(output / name)
        assert min(image.shape[:2]) > 400
        assert len(np.unique(image[..., :3] @ [1, 7, 49])) > 50
    for name in names(FIGURES, ("pdf",)):
        pdf = (output / name).read_bytes()
        assert pdf.startswith(b"%PDF-")
        assert pdf.rstrip().endswith(b"%%EOF")


def test_again_and_with_fewer_studies(folders, output, tmp_path):
    """The same numbers give the same files; those of studies left out go, and only those."""
    out = tmp_path / "out"
    first = analysed(folders, out)
    assert first == (output.parent / "terminal").read_text().replace(
        str(output), str(out)
    )
    for path in output.iterdir():
        if path.name != "analysis.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    (out / "counting.png").write_text("of a study")
    (out / "sums_tiers_of_mine.csv").write_text("mine")
    analysed(folders[2:3], out)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [
            "analysis.json",
            "counting.png",
            "sums_tiers_of_mine.csv",
            *names({"tutorials": TABLES["tutorials"]}, ("csv", "md", "tex")),
            *names({"tutorials": FIGURES["tutorials"]}, ("png", "pdf")),
        ]
    )


def test_names_that_plots_could_trip_over(tmp_path):
    folders = [
        write(tmp_path / str(i), "words", model, STUDIES["words"])
        for i, model in enumerate(["_hidden", "$x_{1$", "a" * 200])
    ]
    analysed(folders, tmp_path / "out")


def test_models_in_the_legend():
    """A label with a _ in front is not hidden."""
    half = np.full(101, 0.5)
    figures = [
        plots.threshold_curves(
            metrics.THRESHOLDS, {"_a": (half, half), "b": (half, half)}, ylabel=""
        ),
        plots.histograms(
            np.linspace(0, 1, 3), {"_a": [1, 2], "b": [3, 0]}, xlabel="", bound=0.1
        ),
    ]
    for figure in figures:
        labels = [text.get_text().strip() for text in figure.legends[0].get_texts()]
        assert labels[:2] == ["_a", "b"]
        plots.plt.close(figure)


# --- Refused input ----------------------------------------------------------------------------

COUNTED, SUMMED, WORDS = (
    STUDIES["counting"][:1], STUDIES["sums"][:1], STUDIES["words"][:1],
)  # fmt: skip


def changed(records, path, value):
    """The first record with the value at `path` replaced, or removed if it is Ellipsis."""
    copy = json.loads(json.dumps(records))
    place = copy[0]
    *steps, last = path.split(".")
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


P = "curves.probabilities"
BAD_RECORDS = {
    "no index": ("counting", COUNTED, "index", ..., ["records[0]", "index is missing"]),
    "index": ("counting", COUNTED, "index", "0", ["records[0]", "index must be an integer"]),
    "boolean index": ("counting", COUNTED, "index", True, ["index must be an integer"]),
    "no about": ("counting", COUNTED, "about", ..., ["record 0", "about is missing"]),
    "about": ("counting", COUNTED, "about", [4], ["record 0", "about must be an object"]),
    "no repetitions": (
        "counting", COUNTED, "about.repetitions", ..., ["record 0: about: repetitions is missing"],
    ),
    "repetitions": ("counting", COUNTED, "about.repetitions", 4.0, ["repetitions", "integer"]),
    "many repetitions": ("counting", COUNTED, "about.repetitions", 10, ["repetitions is 10"]),
    "no num_sentences": ("tutorials", COUNTED, "index", 3, ["record 3", "num_sentences"]),
    "no curves": ("counting", COUNTED, "curves", ..., ["record 0", "curves is missing"]),
    "no points": ("counting", COUNTED, "curves.points", ..., ["curves: points is missing"]),
    "text points": ("counting", COUNTED, "curves.points", ["a"] * 10, ["points", "numbers"]),
    "one point": ("counting", COUNTED, "curves.points", [1.0], ["points must be two or more"]),
    "falling points": ("counting", COUNTED, "curves.points", [1.0, 0.5], ["ascend"]),
    "no factor 1": ("counting", COUNTED, "curves.points", [0.1, 0.9], ["0.1 to 0.9", "to 1"]),
    "no factor 0": ("words", WORDS, "curves.points", [0.1, 1.0], ["0.1 to 1", "from 0 to 1"]),
    "fewer points": ("counting", COUNTED, "curves.points", [0.1, 1.0], ["10 values for 2 points"]),
    "no probabilities": ("counting", COUNTED, P, ..., ["probabilities is missing"]),
    "no digit": ("counting", COUNTED, f"{P}.7", ..., ["record 0: curves: probabilities: 7 is"]),
    "no No": ("words", WORDS, f"{P}.No", ..., ["No is missing"]),
    "infinity": ("counting", COUNTED, f"{P}.7", [1e400] * 10, ["not valid JSON"]),
    "nested": ("counting", COUNTED, f"{P}.7", [[0.1]] * 10, ["7 must be a list of finite"]),
    "ragged": ("counting", COUNTED, f"{P}.7", [[0.1], 0.2] * 5, ["7 must be a list of finite"]),
    "null": ("counting", COUNTED, f"{P}.7", [None] * 10, ["7 must be a list of finite"]),
    "number": ("counting", COUNTED, f"{P}.7", 0.5, ["7 must be a list, not 0.5"]),
    "short": ("counting", COUNTED, f"{P}.7", [0.1] * 9, ["7 has 9 values for 10 points"]),
    "above 1": ("counting", COUNTED, f"{P}.7", [0.1] * 9 + [1.1], ["7 leaves [0, 1]"]),
    "below 0": ("counting", COUNTED, f"{P}.7", [0.1] * 9 + [-0.1], ["7 leaves [0, 1]"]),
    "extra answer": ("counting", COUNTED, f"{P}.x", [0.1], ["x has 1 values for 10 points"]),
    "no item": ("sums", SUMMED, "about.item_2", ..., ["item_2 is missing"]),
    "negative item": ("sums", SUMMED, "about.item_2", -3, ["item_2 is -3"]),
    "shrink_1": ("sums", SUMMED, "about.shrink_1", 1, ["shrink_1 must be a boolean, not 1"]),
    "kind": ("words", WORDS, "about.kind", "none", ["kind is 'none'", "neither"]),
    "failed": ("words", WORDS, "failed", 3, ["record 0", "failed must be text"]),
    "all failed": ("words", WORDS, "failed", "why", ["no record could be analysed: 1 of 1", "why"]),
}  # fmt: skip


def assert_refused(outcome, *culprits):
    status, stdout, stderr = outcome
    last = stderr.splitlines()[-1]
    assert status == 1
    assert last.startswith("error: "), stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    for culprit in culprits:
        assert culprit in last


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_records(tmp_path, case):
    study, records, path, value, culprits = BAD_RECORDS[case]
    folder = write(tmp_path / "bad", study, "apples", changed(records, path, value))
    outcome = run(tmp_path, f"--studies={folder}", f"--output_dir={tmp_path / 'out'}")
    assert_refused(outcome, str(folder), *culprits)
    assert not (tmp_path / "out").exists()


BAD_STUDIES = {
    "unknown study": (
        {"study": "colours"},
        ["study is 'colours'", "counting, tutorials, sums"],
    ),
    "study": ({"study": 3}, ["study must be text, not 3"]),
    "model": ({"model": None}, ["model must be text"]),
    "blank model": ({"model": " "}, ["model is ' '"]),
    "model called Global": ({"model": "Global"}, ["model is 'Global'"]),
    "records": ({"records": {}}, ["records must be a list"]),
    "no records": ({"records": []}, ["no record could be analysed: 0 of 0"]),
    "record": ({"records": [3]}, ["records[0] must be an object"]),
    "twice": ({"records": COUNTED * 2}, ["record 0", "occurs twice"]),
    "twice, failed": ({"records": [*COUNTED, failed(0)]}, ["record 0", "occurs twice"]),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_bad_studies(tmp_path, case):
    changes, culprits = BAD_STUDIES[case]
    good = {"study": "counting", "model": "apples", "records": COUNTED}
    folder = write(tmp_path / "bad", **(good | changes))
    outcome = run(tmp_path, f"--studies={folder}", f"--output_dir={tmp_path / 'out'}")
    assert_refused(outcome, str(folder), *culprits)


def test_bad_folders(tmp_path, folders):
    assert_refused(run(tmp_path), "--studies")
    assert_refused(run(tmp_path, "--studies="), "--studies")
    assert_refused(run(tmp_path, "--studies=nowhere"), "nowhere/study.json is missing")
    both = f"--studies={folders[0]},{folders[0]}"
    assert_refused(
        run(tmp_path, both), str(folders[0]), "both hold counting with apples"
    )
    copy = write(tmp_path / "copy", "counting", "apples", COUNTED)
    both = f"--studies={folders[0]},{copy}"
    assert_refused(
        run(tmp_path, both), str(folders[0]), str(copy), "both hold counting"
    )
    (copy / "study.json").write_text('{"study": "counting", "records": [NaN]}')
    assert_refused(
        run(tmp_path, f"--studies={copy}"), "study.json is not valid JSON", "NaN"
    )
    (copy / "study.json").write_text("{")
    assert_refused(run(tmp_path, f"--studies={copy}"), "study.json is not valid JSON")
    text = json.dumps({"study": "counting", "model": "apples", "records": COUNTED})
    (copy / "study.json").write_text(
        text.replace("0.8", "1e999", 1)
    )  # infinity in disguise
    assert_refused(
        run(tmp_path, f"--studies={copy}"),
        "record 0",
        "points must be a list of finite",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_an_output_folder_that_cannot_be(tmp_path, folders):
    (tmp_path / "file").write_text("")
    outcome = run(tmp_path, f"--studies={folders[2]}", "--output_dir=file/out")
    assert_refused(outcome, "file/out")
