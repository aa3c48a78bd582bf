"""The report: every experiment on one model, on one page to read.

    make report          # or python -m continuous_lm report [--model=FOLDER]

It runs the experiments and the studies, and writes report.html (one file with its pictures),
report.md, and all figures, tables and numbers. Each section has the paper's claim (Marro et al.,
arXiv:2504.03933) and the model's result. A section that cannot run has the reason. Stopped studies
are resumed.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import tokenizers
import tqdm

import continuous_lm as clm
from continuous_lm.experiments.common import plots, pretrained, program, tables
from continuous_lm.experiments.durations import (
    attribution,
    boolean,
    counting,
    events,
    interpolation,
    inverse,
    pruning,
    shifting,
    single_prompt,
    sums,
)
from continuous_lm.experiments.studies import (
    analysis,
    report_page,
    study,
    study_tables,
)
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

TARGET_ANSWERS = ("3", "2", "1", "5")  # of the inverse problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    single_prompt.FactorConfig,
    single_prompt.AnswerConfig,
    single_prompt.ThresholdConfig,
):
    """Flags of the report."""

    prompts_per_study: int = program.flag(
        200, help="Prompts of each study.", lower_bound=1
    )


class Inputs(NamedTuple):
    """Inputs of every section."""

    config: Config
    lm: clm.LanguageModel
    tokenizer: tokenizers.Tokenizer
    studies_folder: pathlib.Path | None  # where studies keep their records


class Section(Protocol):
    """A section that can be written."""

    @property
    def title(self) -> str: ...

    def write(self, inputs: Inputs) -> report_page.Section: ...


# --- Sweeps of one prompt ---------------------------------------------------------------------

SweepConfig = TypeVar("SweepConfig", bound=single_prompt.SweepConfig)


@dataclasses.dataclass(frozen=True)
class SweepSection(Generic[SweepConfig]):
    """A section that shows one sweep.

    Attributes:
      title: title of the section.
      claim: the paper's claim.
      compute: function of the program that makes the sweep.
      config: config of that program; the report's flags replace those of the same name.
    """

    title: str
    claim: str
    compute: Callable[
        [SweepConfig, clm.LanguageModel, tokenizers.Tokenizer],
        single_prompt.SweepResult,
    ]
    config: SweepConfig

    def write(self, inputs: Inputs) -> report_page.Section:
        """Compute the sweep; its section has a table and a figure."""
        sweep_config = program.with_values_of(self.config, inputs.config)
        result = self.compute(sweep_config, inputs.lm, inputs.tokenizer)
        ranges = result.curves.ranges
        columns = (
            tables.Column(result.labels.points),
            tables.Column("answer"),
            tables.Column("at most", format=".3f"),
        )
        rows: list[list[tables.Cell]] = [
            [f"{r.first:.3f} to {r.last:.3f}", r.answer, r.peak] for r in ranges
        ]
        name = report_page.slug(self.title)
        caption = "The most probable of the tracked answers"
        answer_sequence = " > ".join(r.answer for r in ranges)
        text = f"Shown: {answer_sequence}. The tracked probabilities move by at most"
        text += f" {result.largest_change(-1):.2g}."
        return report_page.Section(
            self.title,
            self.claim,
            text,
            [tables.Table(name, caption, columns, rows)],
            {name: result.figure()},
        )


# --- Studies ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StudySection:
    """A section that shows a study, with the tables and figures of `analysis`.

    Attributes:
      claim: the paper's claim.
      config: config of `study`; the report's flags replace those of the same name.
      fixed_points: number of points, if it differs from the report's.
    """

    claim: str
    config: study.Config
    fixed_points: int | None = None

    @property
    def title(self) -> str:
        return f"Study: {self.config.study}"

    def write(self, inputs: Inputs) -> report_page.Section:
        """Run or resume the study in the folder, and analyse it."""
        name = self.config.study
        study_config = dataclasses.replace(
            program.with_values_of(self.config, inputs.config),
            limit=inputs.config.prompts_per_study,
            batch_size=self.config.batch_size,
            points=self.fixed_points or inputs.config.points,
        )
        folder = inputs.studies_folder
        folder = None if folder is None else folder / name
        result = study.compute(study_config, inputs.lm, inputs.tokenizer, folder)
        analysed_study = analysis.parse_study(result.as_json(), {})
        metrics_by_model = analysis.compute_model_metrics([analysed_study])
        figures = analysis.STUDY_SPECS[name].make_figures(metrics_by_model)
        return report_page.Section(
            self.title,
            self.claim,
            f"{len(result.records)} prompts, of which {len(result.failed())} could not be run.",
            study_tables.make_tables(name, metrics_by_model),
            {
                f"{name}_{figure_name}": figure
                for figure_name, figure in figures.items()
            },
        )


# --- Other sections ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OtherSection:
    """A section that a function writes."""

    title: str
    write: Callable[[Inputs], report_page.Section]


def boolean_section(inputs: Inputs) -> report_page.Section:
    """Forty Boolean sweeps."""
    boolean_config = program.with_values_of(boolean.Config(), inputs.config)
    result = boolean.compute(boolean_config, inputs.lm, inputs.tokenizer)
    input_columns = [tables.Column(f"{a} {b}") for a, b in boolean.INPUTS]
    columns = [tables.Column("operators"), *input_columns]
    rows: list[list[tables.Cell]] = [
        [pair, *sequences] for pair, sequences in result.answer_sequences().items()
    ]
    caption = "Answers from the first operator to the second"
    return report_page.Section(
        "Boolean operators",
        "Between two operators the answer goes from one truth table to the other, and at times"
        " through neither.",
        "",
        [tables.Table("boolean", caption, columns, rows)],
        {"boolean": result.figure()},
    )


def attribution_section(inputs: Inputs) -> report_page.Section:
    """Make the section of the attribution of an answer to four apples' durations."""
    attribution_config = program.with_values_of(attribution.Config(), inputs.config)
    result = attribution.compute(attribution_config, inputs.lm, inputs.tokenizer)
    columns = [
        tables.Column("method"),
        tables.Column("sum", format=".3f"),
        tables.Column("residual", format=".3f"),
        tables.Column("area of deletion (lower: better)", format=".3f"),
    ]
    rows: list[list[tables.Cell]] = [
        [
            name,
            float(method.contributions.sum()),
            method.residual,
            result.deletions[name].area,
        ]
        for name, method in result.methods.items()
    ]
    text = f"The answer is {result.prompt.answer!r}. Integrated gradients along the durations,"
    text += (
        " from absent to present, add up to the change of its log probability within"
    )
    text += f" {result.integrated.relative_residual():.2%}."
    caption = "Contributions to the answer, in nats"
    return report_page.Section(
        "Duration attribution",
        "",
        text,
        [tables.Table("attribution", caption, columns, rows)],
        result.figures(),
    )


def inverse_section(inputs: Inputs) -> report_page.Section:
    """Durations that make the model give other answers."""
    drawn_durations = {}
    rows: list[list[tables.Cell]] = []
    for answer in TARGET_ANSWERS:
        inverse_config = program.with_values_of(
            inverse.Config(answer=answer), inputs.config
        )
        result = inverse.compute(inverse_config, inputs.lm, inputs.tokenizer)
        verified = result.by_gradients
        random_search = result.by_random_search.search
        total_change = verified.search.total
        rows.append(
            [
                answer,
                "yes" if verified.holds else "no",
                verified.num_changed,
                total_change,
                random_search.total if random_search.slack >= 0 else None,
            ]
        )
        if verified.holds:
            label = f"{answer}: total change {total_change:.3f}"
            drawn_durations[label] = verified.search.durations
    columns = [
        tables.Column("answer"),
        tables.Column("holds"),
        tables.Column("tokens changed"),
        tables.Column("total change", format=".3f"),
        tables.Column("by random search", format=".3f"),
    ]
    figure = inverse.durations_figure(
        result.prompt, drawn_durations, "durations that make it say so"
    )
    caption = "Total change of durations, sum |d - 1|, at which the answer leads"
    return report_page.Section(
        "Inverse problem",
        "",
        "Durations near 1, mostly equal to 1, that make the model give another answer to the prompt"
        " of four apples, found by gradients; random search had as many evaluations.",
        [tables.Table("inverse", caption, columns, rows)],
        {"inverse": figure},
    )


def pruning_section(inputs: Inputs) -> report_page.Section:
    """The least time that keeps the answer."""
    pruning_config = program.with_values_of(pruning.Config(), inputs.config)
    result = pruning.compute(pruning_config, inputs.lm, inputs.tokenizer)
    num_kept = int((result.durations[1:] > 0).sum())
    text = f"The smallest durations at which {result.prompt.answer!r} loses at most"
    text += f" {pruning_config.tolerance} nat: of"
    text += f" {result.total_before} tokens after the first, {num_kept} are left, which last"
    text += f" {result.total_after:.2f} together; log probability"
    text += f" {result.log_prob_before:.3f} to {result.log_prob_after:.3f}."
    figure = result.figure("what is left")
    return report_page.Section("Prompt pruning", "", text, [], {"pruning": figure})


# --- The report -------------------------------------------------------------------------------

INTERPOLATION_CLAIM = (
    "Between two words lie others, of which the model says what is true of either end."
)
SECTIONS: tuple[Section, ...] = (
    SweepSection(
        "Counting",
        "As four apples last less, models answer 3, 2 and 1, each where so many are left.",
        counting.compute,
        counting.Config(),
    ),
    SweepSection(
        "Events",
        "Events are counted in the same way, although no word is repeated four times.",
        events.compute,
        events.Config(),
    ),
    SweepSection(
        "Sums",
        "A number that lasts less is read as one of its digits. (The embedded model knows"
        " one-digit numbers alone, to which this does not apply.)",
        sums.compute,
        sums.Config(),
    ),
    SweepSection(
        "Interpolation, linear",
        INTERPOLATION_CLAIM,
        interpolation.compute,
        interpolation.Config(),
    ),
    SweepSection(
        "Interpolation, spherical",
        INTERPOLATION_CLAIM,
        interpolation.compute,
        interpolation.Config(path="spherical"),
    ),
    SweepSection(
        "Usage",
        "Without answers to choose from, the output distribution moves smoothly as well.",
        interpolation.compute,
        interpolation.Config(
            template=interpolation.TEMPLATES["usage"], words=("cats", "dogs")
        ),
    ),
    OtherSection("Boolean operators", boolean_section),
    SweepSection(
        "Translation",
        "Rotary models do not mind when a sentence begins; GPT-2 does.",
        shifting.compute,
        shifting.Config(),
    ),
    SweepSection(
        "Scaling",
        "Models bear a change of the pace of all tokens, but not any.",
        shifting.compute,
        shifting.Config(transform="scaling"),
    ),
    StudySection(
        "On 200 prompts, shrinking brings out counts that the ordinary prompt does not"
        " (observed above counterfactual).",
        study.Config(study="counting"),
    ),
    StudySection(
        "The same holds of steps of tutorials, which are longer and differ.",
        study.Config(study="tutorials"),
    ),
    StudySection(
        "A shrunk number is often read as one of its digits.",
        study.Config(study="sums"),
    ),
    StudySection(
        "Interpolations are smooth (Lipschitz estimates), and in part leave the interval"
        " between their two ends.",
        study.Config(study="words"),
        fixed_points=40,
    ),
    OtherSection("Duration attribution", attribution_section),
    OtherSection("Inverse problem", inverse_section),
    OtherSection("Prompt pruning", pruning_section),
)


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The report's title and sections."""

    title: str
    sections: Sequence[report_page.Section]

    def summary(self) -> str:
        failed = [section.title for section in self.sections if section.failed]
        return (
            f"{len(self.sections)} sections, {len(failed)} of which could not be run:"
            f" {', '.join(failed)}"
        )

    def write(self, config: Config, folder: pathlib.Path) -> None:
        """Write the pages, every figure, table and number."""
        run_record = program.record(config)
        with write_atomically(folder) as staging_folder:
            for section in self.sections:
                for name, figure in section.figures.items():
                    plots.save(figure, staging_folder, name)
                for table in section.tables:
                    table.write(staging_folder)
            report_page.write_report(
                staging_folder, self.title, self.sections, run_record
            )
            values = [section.as_json() for section in self.sections]
            write_json(
                staging_folder / "report.json", {"sections": values, "run": run_record}
            )


def write_section(section: Section, inputs: Inputs) -> report_page.Section:
    """The section, or the reason why it cannot be run."""
    try:
        return section.write(inputs)
    except clm.InputError as error:
        reason = f"Not run: {error}"
        return report_page.Section(section.title, "", reason, [], {}, failed=True)


def run(config: Config) -> Result:
    """Load the model, and write all sections on one page."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    studies_folder = None if folder is None else folder / "studies"
    inputs = Inputs(config, lm, tokenizer, studies_folder)
    progress_bar = tqdm.tqdm(SECTIONS, unit="section", desc="report")
    sections = [write_section(section, inputs) for section in progress_bar]
    result = Result(f"How continuous is {config.model_name}?", sections)
    if folder is not None and processes.is_first_process():
        result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
