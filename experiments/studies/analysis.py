"""Analysis: the paper's tables and figures from the stored results of studies, without a model.

    python -m continuous_lm analysis --studies=FOLDER,FOLDER [--output_dir=FOLDER]

Each folder holds the study.json of one study with one model. Models of the same study are the rows
of its tables, with a row "Global" over the records of all models (Marro et al., arXiv:2504.03933,
section 4). `metrics` defines the numbers. Failed records are only counted.
"""

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.common import plots, program, results, tables
from continuous_lm.experiments.studies import metrics, study_tables
from continuous_lm.io.json_files import read_json

DIGITS = tuple("0123456789")
YES_NO = ("Yes", "No")
QUESTION_KIND_GROUPS = {
    "neither": "neither",
    "first": "one",
    "second": "one",
    "both": "both",
}
GLOBAL_ROW = "Global"

MetricValues = dict[str, Any]  # of one model, or of all: what analysis.json holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of analysis."""

    studies: tuple[str, ...] = program.flag((), help="Folders with a study.json each.")


# --- Reading ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """One sweep of a study: answer -> probabilities [P] at `points` [P]; `fields` is its prompt."""

    fields: Mapping[str, Any]
    points: np.ndarray
    curves: Mapping[str, np.ndarray]

    def answer_matrix(self, answers: Sequence[str]) -> np.ndarray:
        """[P, A]: the curves of `answers`."""
        return np.stack([self.curves[answer] for answer in answers], axis=1)


@dataclasses.dataclass(frozen=True)
class Study:
    """The stored results of one study with one model.

    Attributes:
        name: Kind of the study, a key of `STUDY_SPECS`.
        model: Name of the model in the study.
        records: Records that were computed.
        failed: Indices of the failed records, with the reasons.
        source: Path of the file, and the study's record of its run.
    """

    name: str
    model: str
    records: tuple[Record, ...]
    failed: Mapping[int, str]
    source: Mapping[str, Any]


def read_study(folder: str | pathlib.Path) -> Study:
    """The study.json in `folder`.

    Raises:
      InputError: naming the folder, the record and the field that is not as it must be.
    """
    path = pathlib.Path(folder) / "study.json"
    stored_study = read_json(path)
    with about(str(path)):
        source = {"folder": str(folder), "run": stored_study.get("run")}
        return parse_study(stored_study, source)


def parse_study(stored_study: Mapping[str, Any], source: Mapping[str, Any]) -> Study:
    """Parse the contents of a study.json, as `study` writes them.

    Raises:
      InputError: naming the record and the field that is not as it must be.
    """
    name = _get_text(stored_study, "study")
    model = _get_text(stored_study, "model")
    if name not in STUDY_SPECS:
        raise InputError(f"study is {name!r}; known are {', '.join(STUDY_SPECS)}")
    if not model.strip() or model == GLOBAL_ROW:
        raise InputError(f"model is {model!r}; give it a name of its own")
    records: dict[int, Record] = {}
    failed: dict[int, str] = {}
    for position, stored_record in enumerate(_get_list(stored_study, "records")):
        if not isinstance(stored_record, dict):
            raise InputError(
                f"records[{position}] must be an object; run the study again"
            )
        with about(f"records[{position}]"):
            index = _get_integer(stored_record, "index")
        with about(f"record {index}"):
            if index in records or index in failed:
                raise InputError("its index occurs twice; keep one of the two records")
            if "failed" in stored_record:
                failed[index] = _get_text(stored_record, "failed")
            else:
                records[index] = _parse_record(stored_record, STUDY_SPECS[name])
    if not records:
        reason = f", the first since {next(iter(failed.values()))}" if failed else ""
        raise InputError(
            f"no record could be analysed: {len(failed)} of {len(failed)} failed{reason};"
            " run the study on prompts that this model can read"
        )
    return Study(name, model, tuple(records.values()), failed, source)


def read_studies(folders: Iterable[str]) -> dict[str, list[Study]]:
    """Study name -> its studies, one a model, both in the order given."""
    studies_by_name: dict[str, list[Study]] = {}
    for folder in folders:
        study = read_study(folder)
        same_name_studies = studies_by_name.setdefault(study.name, [])
        for earlier_study in same_name_studies:
            if earlier_study.model == study.model:
                raise InputError(
                    f"{earlier_study.source['folder']} and {folder} both hold {study.name} with"
                    f" {study.model}; give one of them"
                )
        same_name_studies.append(study)
    return studies_by_name


def _parse_record(stored_record: Mapping[str, Any], study_spec: "StudySpec") -> Record:
    fields = _get_object(stored_record, "about")
    with about("about"):
        study_spec.check_fields(fields)
    stored_curves = _get_object(stored_record, "curves")
    with about("curves"):
        points = _parse_points(stored_curves, study_spec.starts_at_zero)
        curves = _parse_curves(stored_curves, study_spec.answers, len(points))
    return Record(fields, points, curves)


def _parse_points(stored_curves: Mapping[str, Any], starts_at_zero: bool) -> np.ndarray:
    """The points of a sweep, [P], which ascend to 1."""
    points = _as_float_array(_get_list(stored_curves, "points"), "points")
    if len(points) < 2 or not (np.diff(points) > 0).all():
        raise InputError("points must be two or more that ascend; run the study again")
    starts_wrong = starts_at_zero and abs(points[0]) > 1e-6
    if abs(points[-1] - 1) > 1e-6 or starts_wrong:
        raise InputError(
            f"points go from {points[0]:g} to {points[-1]:g}, not"
            f" {'from 0 ' if starts_at_zero else ''}to 1; run the study on a whole sweep"
        )
    return points


def _parse_curves(
    stored_curves: Mapping[str, Any], answers: Sequence[str], num_points: int
) -> dict[str, np.ndarray]:
    """Answer -> probabilities [P]: of those that the study needs, and of all others stored."""
    probability_lists = _get_object(stored_curves, "probabilities")
    curves: dict[str, np.ndarray] = {}
    with about("probabilities"):
        for answer in dict.fromkeys([*answers, *probability_lists]):
            curve = _as_float_array(_get_list(probability_lists, answer), answer)
            if len(curve) != num_points:
                raise InputError(
                    f"{answer} has {len(curve)} values for {num_points} points; they must"
                    " be as many"
                )
            if curve.min() < -1e-6 or curve.max() > 1 + 1e-6:
                raise InputError(f"{answer} leaves [0, 1]; store probabilities")
            curves[answer] = np.clip(curve, 0, 1)
    return curves


def _get_text(stored_object: Mapping[str, Any], name: str) -> str:
    value = _get_field(stored_object, name)
    if not isinstance(value, str):
        raise _wrong_type(name, "text", value)
    return value


def _get_integer(stored_object: Mapping[str, Any], name: str) -> int:
    value = _get_field(stored_object, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(name, "an integer", value)
    return value


def _get_boolean(stored_object: Mapping[str, Any], name: str) -> bool:
    value = _get_field(stored_object, name)
    if not isinstance(value, bool):
        raise _wrong_type(name, "a boolean", value)
    return value


def _get_list(stored_object: Mapping[str, Any], name: str) -> list[Any]:
    value = _get_field(stored_object, name)
    if not isinstance(value, list):
        raise _wrong_type(name, "a list", value)
    return value


def _get_object(stored_object: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = _get_field(stored_object, name)
    if not isinstance(value, dict):
        raise _wrong_type(name, "an object", value)
    return value


def _get_field(stored_object: Mapping[str, Any], name: str) -> object:
    if name not in stored_object:
        raise InputError(f"{name} is missing; run the study again or add it")
    return stored_object[name]


def _wrong_type(name: str, expected: str, value: object) -> InputError:
    return InputError(f"{name} must be {expected}, not {value!r:.40}")


def _as_float_array(values: list, name: str) -> np.ndarray:
    """[P], finite."""
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(
            f"{name} must be a list of finite numbers; run the study again"
        )
    return array.astype(float)


# --- Numbers ----------------------------------------------------------------------------------


def sum_metrics(records: Sequence[Record]) -> MetricValues:
    """Tiers of sums, and how many records have none.

    Not defined: the number that shrinks has no two digits, or the answers tracked are more than the
    ten first digits. Ambiguous: the unshrunk answer is also a shrunk one.
    """
    tier_counts = Counter(map(_sum_success_tier, records))
    excluded_counts = {
        tier: tier_counts.pop(tier, 0) for tier in ("not defined", "ambiguous")
    }
    return excluded_counts | metrics.tier_shares(tier_counts)


def _sum_success_tier(record: Record) -> str:
    shrunk_number = record.fields["item_2"]
    other_number = record.fields["item_1"]
    if record.fields["shrink_1"]:
        shrunk_number, other_number = other_number, shrunk_number
    sum_answers = metrics.sum_answers(shrunk_number, other_number)
    if sum_answers is None or set(record.curves) != set(DIGITS):
        return "not defined"
    return (
        metrics.success_tier(record.curves, **dataclasses.asdict(sum_answers))
        or "ambiguous"
    )


def word_metrics(records: Sequence[Record]) -> MetricValues:
    """Words, by `QUESTION_KIND_GROUPS` of question."""
    kinds = [QUESTION_KIND_GROUPS[record.fields["kind"]] for record in records]
    curves = [
        {answer: record.curves[answer] for answer in YES_NO} for record in records
    ]
    return metrics.interpolation_metrics(
        [record.points for record in records], curves, kinds
    )


# --- Studies ----------------------------------------------------------------------------------


def make_threshold_figures(
    metrics_by_model: Mapping[str, MetricValues],
) -> dict[str, Figure]:
    """Time sensitivity and intersection over union, observed and counterfactual."""
    axis_labels = {
        "sensitivity": "share of expected peaks found",
        "iou": "intersection over union",
    }
    return {
        metric_name: plots.threshold_curves(
            metrics.THRESHOLDS,
            {
                m: (n[metric_name]["observed"], n[metric_name]["counterfactual"])
                for m, n in metrics_by_model.items()
            },
            ylabel=axis_label,
        )
        for metric_name, axis_label in axis_labels.items()
    }


def make_variation_figure(
    metrics_by_model: Mapping[str, MetricValues],
) -> dict[str, Figure]:
    """The histogram of variation."""
    counts = {
        model: numbers["variation"]["counts"]
        for model, numbers in metrics_by_model.items()
    }
    label = "variation beyond the two end points"
    bound = metrics.LARGE_VARIATION
    return {
        "variation": plots.histograms(
            metrics.VARIATION_BINS, counts, xlabel=label, bound=bound
        )
    }


def _integer_check(
    name: str, minimum: int, maximum: int
) -> Callable[[Mapping[str, Any]], None]:
    def check_fields(fields: Mapping[str, Any]) -> None:
        if not minimum <= _get_integer(fields, name) <= maximum:
            raise InputError(
                f"{name} is {fields[name]}; it must be from {minimum} to {maximum}"
            )

    return check_fields


def _check_sum(fields: Mapping[str, Any]) -> None:
    for name in ("item_1", "item_2"):
        _integer_check(name, 0, 10**9)(fields)
    _get_boolean(fields, "shrink_1")


def _check_words(fields: Mapping[str, Any]) -> None:
    if _get_text(fields, "kind") not in QUESTION_KIND_GROUPS:
        raise InputError(
            f"kind is {fields['kind']!r}; known are {', '.join(QUESTION_KIND_GROUPS)}"
        )


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """Properties of a kind of study.

    Attributes:
        answers: Answers whose curves every record must have.
        check_fields: Raises an `InputError` for an invalid `about`.
        compute_metrics: Function from records to metrics, ready for JSON.
        make_figures: Function from model -> numbers to name -> figure.
        starts_at_zero: Whether the points start at 0.
    """

    answers: tuple[str, ...]
    check_fields: Callable[[Mapping[str, Any]], None]
    compute_metrics: Callable[[Sequence[Record]], MetricValues]
    make_figures: Callable[[Mapping[str, MetricValues]], dict[str, Figure]] = (
        lambda models: {}
    )
    starts_at_zero: bool = False


def _counting_spec(field: str) -> StudySpec:
    def compute_metrics(records: Sequence[Record]) -> MetricValues:
        digit_curves = [record.answer_matrix(DIGITS) for record in records]
        counts = [record.fields[field] for record in records]
        return metrics.counting_metrics(digit_curves, counts)

    return StudySpec(
        DIGITS, _integer_check(field, 1, 9), compute_metrics, make_threshold_figures
    )


STUDY_SPECS = {
    "counting": _counting_spec("repetitions"),
    "tutorials": _counting_spec("num_sentences"),
    "sums": StudySpec(DIGITS, _check_sum, sum_metrics),
    "words": StudySpec(
        YES_NO, _check_words, word_metrics, make_variation_figure, starts_at_zero=True
    ),
}
# Files of an earlier run in the same folder, which go when this one does not write them.
_OUTPUT_FILES = re.compile(
    rf"({'|'.join(STUDY_SPECS)})_(sensitivity|iou|peaks|order|tiers|lipschitz|variation)"
    r"\.(csv|md|tex|png|pdf)"
)


# --- Program ----------------------------------------------------------------------------------


def compute_model_metrics(studies: Sequence[Study]) -> dict[str, MetricValues]:
    """Model -> its numbers, for one study; with several models also `GLOBAL_ROW`, of all."""
    study_spec = STUDY_SPECS[studies[0].name]

    def group_metrics(group: Sequence[Study]) -> MetricValues:
        records = [record for study in group for record in study.records]
        num_failed = sum(len(study.failed) for study in group)
        return {
            "records": len(records) + num_failed,
            "failed": num_failed,
        } | study_spec.compute_metrics(records)

    metrics_by_model = {study.model: group_metrics([study]) for study in studies}
    return metrics_by_model | (
        {GLOBAL_ROW: group_metrics(studies)} if len(studies) > 1 else {}
    )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The numbers of several studies, with their tables and figures.

    Attributes:
      metrics: study -> model -> its numbers, and those of all models as `GLOBAL_ROW`.
      sources: study -> model -> where it was read.
    """

    metrics: Mapping[str, Mapping[str, MetricValues]]
    sources: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def all_tables(self) -> list[tables.Table]:
        """Return the tables of all studies."""
        return [
            table
            for study_name, metrics_by_model in self.metrics.items()
            for table in study_tables.make_tables(
                study_name,
                metrics_by_model,
                has_summary_row=GLOBAL_ROW in metrics_by_model,
            )
        ]

    def figures(self) -> dict[str, Figure]:
        """File name without its ending -> figure, of every study."""
        figures_by_name = {}
        for study_name, metrics_by_model in self.metrics.items():
            single_models = {
                model: values
                for model, values in metrics_by_model.items()
                if model != GLOBAL_ROW
            }
            figures = STUDY_SPECS[study_name].make_figures(single_models)
            for figure_name, figure in figures.items():
                figures_by_name[f"{study_name}_{figure_name}"] = figure
        return figures_by_name

    def summary(self) -> str:
        texts = [table.as_text() for table in self.all_tables()]
        return "\n\n".join(texts)

    def write(self, config: Config, folder: pathlib.Path) -> None:
        """Tables, figures and numbers; those of an earlier run that are not written now go."""
        values = {"studies": self.metrics, "sources": self.sources}
        results.write(
            config,
            folder,
            "analysis",
            values,
            self.figures(),
            tables=self.all_tables(),
            stale_pattern=_OUTPUT_FILES,
        )


def run(config: Config) -> Result:
    """Read the studies, compute their numbers, and write tables and figures."""
    folder = program.output_folder(config)
    if not config.studies:
        raise InputError("--studies must name folders with a study.json each")
    studies = read_studies(config.studies)
    result = Result(
        metrics={
            study_name: compute_model_metrics(same_name_studies)
            for study_name, same_name_studies in studies.items()
        },
        sources={
            study_name: {study.model: study.source for study in same_name_studies}
            for study_name, same_name_studies in studies.items()
        },
    )
    if folder is not None:
        result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
