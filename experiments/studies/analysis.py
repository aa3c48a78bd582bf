"""Analysis: the paper's tables and figures from the stored results of studies, without a model.

    python -m continuous_lm analysis --studies=FOLDER,FOLDER [--output_dir=FOLDER]

Each folder holds the study.json of one study with one model. Models of the same study make the rows
of its tables, with a row "Global" over the records of all of them (Marro et al., arXiv:2504.03933,
section 4; `metrics` says what each number is). Records that failed are counted, no more.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.common import plots, program, tables
from continuous_lm.experiments.studies import metrics
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import read_json, write_json

_STUDIES = flags.DEFINE_list("studies", None, "Folders with a study.json each.")

DIGITS = tuple("0123456789")
YES_NO = ("Yes", "No")
KINDS = {"neither": "neither", "first": "one", "second": "one", "both": "both"}
GLOBAL = "Global"

Numbers = dict[str, Any]  # of one model, or of all: what analysis.json holds


# --- Reading ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """One sweep of a study: answer -> probabilities [P] at `points` [P]; `about` is its prompt."""

    about: Mapping[str, Any]
    points: np.ndarray
    curves: Mapping[str, np.ndarray]

    def table(self, answers: Sequence[str]) -> np.ndarray:
        """[P, C]: the curves of `answers`."""
        return np.stack([self.curves[answer] for answer in answers], axis=1)


@dataclasses.dataclass(frozen=True)
class Study:
    """The stored results of one study with one model.

    Attributes:
        name: Which of `STUDIES`.
        model: Whatever the study calls it.
        records: Those that could be computed.
        failed: The other records' indices, with the reasons.
        source: Where this was read, and what the study says about its own run.
    """

    name: str
    model: str
    records: tuple[Record, ...]
    failed: Mapping[int, str]
    source: Mapping[str, Any]


def read(folder: str | pathlib.Path) -> Study:
    """The study.json in `folder`.

    Raises:
      InputError: naming the folder, the record and the field that is not as it must be.
    """
    path = pathlib.Path(folder) / "study.json"
    values = read_json(path)
    with about(str(path)):
        name, model = _get(values, "study", str), _get(values, "model", str)
        if name not in STUDIES:
            raise InputError(f"study is {name!r}; known are {', '.join(STUDIES)}")
        if not model.strip() or model == GLOBAL:
            raise InputError(f"model is {model!r}; give it a name of its own")
        records: dict[int, Record] = {}
        failed: dict[int, str] = {}
        for place, value in enumerate(_get(values, "records", list)):
            if not isinstance(value, dict):
                raise InputError(f"records[{place}] must be an object; run the study again")
            with about(f"records[{place}]"):
                index = _get(value, "index", int)
            with about(f"record {index}"):
                if index in records or index in failed:
                    raise InputError("its index occurs twice; keep one of the two records")
                if "failed" in value:
                    failed[index] = _get(value, "failed", str)
                else:
                    records[index] = _record(value, STUDIES[name])
        if not records:
            reason = f", the first since {next(iter(failed.values()))}" if failed else ""
            raise InputError(
                f"no record could be analysed: {len(failed)} of {len(failed)} failed{reason};"
                " run the study on prompts that this model can read"
            )
    source = {"folder": str(folder), "run": values.get("run")}
    return Study(name, model, tuple(records.values()), failed, source)


def read_all(folders: Iterable[str]) -> dict[str, list[Study]]:
    """Study name -> its studies, one a model, both in the order given."""
    found: dict[str, list[Study]] = {}
    for folder in folders:
        study = read(folder)
        others = found.setdefault(study.name, [])
        for other in others:
            if other.model == study.model:
                raise InputError(
                    f"{other.source['folder']} and {folder} both hold {study.name} with"
                    f" {study.model}; give one of them"
                )
        others.append(study)
    return found


def _record(value: Mapping[str, Any], kind: "Kind") -> Record:
    fields = _get(value, "about", dict)
    with about("about"):
        kind.check(fields)
    stored = _get(value, "curves", dict)
    with about("curves"):
        points = _floats(_get(stored, "points", list), "points")
        if len(points) < 2 or not (np.diff(points) > 0).all():
            raise InputError("points must be two or more that ascend; run the study again")
        if abs(points[-1] - 1) > 1e-6 or (kind.from_zero and abs(points[0]) > 1e-6):
            raise InputError(
                f"points go from {points[0]:g} to {points[-1]:g}, not"
                f" {'from 0 ' if kind.from_zero else ''}to 1; run the study on a whole sweep"
            )
        lists = _get(stored, "probabilities", dict)
        with about("probabilities"):
            answers = [*kind.answers, *(a for a in lists if a not in kind.answers)]
            curves = {a: _floats(_get(lists, a, list), a) for a in answers}
            for answer, curve in curves.items():
                if len(curve) != len(points):
                    raise InputError(
                        f"{answer} has {len(curve)} values for {len(points)} points; they must"
                        " be as many"
                    )
                if curve.min() < -1e-6 or curve.max() > 1 + 1e-6:
                    raise InputError(f"{answer} leaves [0, 1]; store probabilities")
    return Record(fields, points, {a: np.clip(c, 0, 1) for a, c in curves.items()})


def _get(values: Mapping[str, Any], name: str, kind: type) -> Any:
    """values[name], which must be of that kind."""
    words = {str: "text", int: "an integer", list: "a list", dict: "an object", bool: "a boolean"}
    if name not in values:
        raise InputError(f"{name} is missing; run the study again or add it")
    value = values[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} must be {words[kind]}, not {value!r:.40}")
    return value


def _floats(values: list, name: str) -> np.ndarray:
    """[P], finite."""
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"{name} must be a list of finite numbers; run the study again")
    return array.astype(float)


# --- Numbers ----------------------------------------------------------------------------------


def summed(records: Sequence[Record]) -> Numbers:
    """Tiers of sums, and how many records have none.

    Not defined: the number that shrinks has no two digits, or the answers tracked are more than the
    ten first digits. Ambiguous: the unshrunk answer is also a shrunk one.
    """
    reached = Counter(map(_tier, records))
    without = {name: reached.pop(name, 0) for name in ("not defined", "ambiguous")}
    return without | metrics.tier_shares(reached)


def _tier(record: Record) -> str:
    items = record.about["item_1"], record.about["item_2"]
    shrunk, other = items if record.about["shrink_1"] else items[::-1]
    answers = metrics.sum_answers(shrunk, other)
    if answers is None or set(record.curves) != set(DIGITS):
        return "not defined"
    return metrics.success_tier(record.curves, **dataclasses.asdict(answers)) or "ambiguous"


def interpolated(records: Sequence[Record]) -> Numbers:
    """Words, by `KINDS` of question."""
    kinds = [KINDS[record.about["kind"]] for record in records]
    curves = [{answer: record.curves[answer] for answer in YES_NO} for record in records]
    return metrics.interpolation([record.points for record in records], curves, kinds)


# --- Studies ----------------------------------------------------------------------------------


def threshold_figures(models: Mapping[str, Numbers]) -> dict[str, Figure]:
    """Time sensitivity and intersection over union, observed and counterfactual."""
    labels = {"sensitivity": "share of expected peaks found", "iou": "intersection over union"}
    return {
        name: plots.threshold_curves(
            metrics.THRESHOLDS,
            {m: (n[name]["observed"], n[name]["counterfactual"]) for m, n in models.items()},
            ylabel=label,
        )
        for name, label in labels.items()
    }


def variation_figure(models: Mapping[str, Numbers]) -> dict[str, Figure]:
    """The histogram of variation."""
    counts = {model: numbers["variation"]["counts"] for model, numbers in models.items()}
    label = "variation beyond the two end points"
    bound = metrics.LARGE_VARIATION
    return {"variation": plots.histograms(metrics.BINS, counts, xlabel=label, mark=bound)}


def _integer(name: str, least: int, most: int) -> Callable[[Mapping[str, Any]], None]:
    def check(fields: Mapping[str, Any]) -> None:
        if not least <= _get(fields, name, int) <= most:
            raise InputError(f"{name} is {fields[name]}; it must be from {least} to {most}")

    return check


def _check_sum(fields: Mapping[str, Any]) -> None:
    for name in ("item_1", "item_2"):
        _integer(name, 0, 10**9)(fields)
    _get(fields, "shrink_1", bool)


def _check_words(fields: Mapping[str, Any]) -> None:
    if _get(fields, "kind", str) not in KINDS:
        raise InputError(f"kind is {fields['kind']!r}; known are {', '.join(KINDS)}")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a study.

    Attributes:
        answers: Whose curves every record must have.
        check: Raises an `InputError` for an `about` that cannot be used.
        numbers: Of records, ready for JSON.
        figures: Model -> numbers to name -> figure.
        from_zero: Whether the points begin at 0.
    """

    answers: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None]
    numbers: Callable[[Sequence[Record]], Numbers]
    figures: Callable[[Mapping[str, Numbers]], dict[str, Figure]] = lambda models: {}
    from_zero: bool = False


def _counting(field: str) -> Kind:
    def numbers(records: Sequence[Record]) -> Numbers:
        digits, counts = [r.table(DIGITS) for r in records], [r.about[field] for r in records]
        return metrics.counting(digits, counts)

    return Kind(DIGITS, _integer(field, 1, 9), numbers, threshold_figures)


STUDIES = {
    "counting": _counting("repetitions"),
    "tutorials": _counting("num_sentences"),
    "sums": Kind(DIGITS, _check_sum, summed),
    "words": Kind(YES_NO, _check_words, interpolated, variation_figure, from_zero=True),
}
# Files of an earlier run in the same folder, which go when this one does not write them.
_OWN_FILES = re.compile(
    rf"({'|'.join(STUDIES)})_(sensitivity|iou|peaks|order|tiers|lipschitz|variation)"
    r"\.(csv|md|tex|png|pdf)"
)


# --- Program ----------------------------------------------------------------------------------


def analyse(studies: Sequence[Study]) -> dict[str, Numbers]:
    """Model -> its numbers, for one study; with several models also `GLOBAL`, over all records."""
    kind = STUDIES[studies[0].name]

    def numbers(group: Sequence[Study]) -> Numbers:
        good = [record for study in group for record in study.records]
        failed = sum(len(study.failed) for study in group)
        return {"records": len(good) + failed, "failed": failed} | kind.numbers(good)

    found = {study.model: numbers([study]) for study in studies}
    return found | ({GLOBAL: numbers(studies)} if len(studies) > 1 else {})


def main() -> None:
    """Tables, figures, numbers."""
    folder = program.output_dir("analysis")
    if not _STUDIES.value:
        raise InputError("--studies must name folders with a study.json each")
    studies = read_all(_STUDIES.value)
    numbers = {name: analyse(group) for name, group in studies.items()}
    run = program.record()
    run["flags"] = {name: run["flags"][name] for name in ("studies", "output_dir")}  # no model's
    shown: list[str] = []
    with written_aside(folder, replaces=_OWN_FILES) as aside:
        for name, models in numbers.items():
            for table in tables.laid_out(name, models, last_apart=GLOBAL in models):
                table.write(aside)
                shown.append(table.as_text())
            own = {model: values for model, values in models.items() if model != GLOBAL}
            for figure_name, figure in STUDIES[name].figures(own).items():
                plots.save(figure, aside, f"{name}_{figure_name}")
        sources = {n: {s.model: s.source for s in group} for n, group in studies.items()}
        write_json(aside / "analysis.json", {"studies": numbers, "sources": sources, "run": run})
    print(
        "\n\n".join(
            [*shown, f"{folder}/analysis.json, tables (.csv, .md, .tex), figures (.png, .pdf)"]
        )
    )


if __name__ == "__main__":
    program.run(main)
