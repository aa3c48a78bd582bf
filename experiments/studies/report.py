"""The report: every experiment on one model, on one page to read.

    make report          # or python -m continuous_lm report [--model=FOLDER]

Runs the experiments and the studies, and writes report.html (one file, pictures inside), report.md
and every figure, table and number beside them. What each section shows stands next to what the
paper claims (Marro et al., arXiv:2504.03933). What could not be run says why. Studies that were
stopped go on where they were.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import tokenizers
import tqdm
from absl import flags

import continuous_lm as clm
from continuous_lm.analysis import attribution, duration_search
from continuous_lm.analysis.attribution import next_token_logits
from continuous_lm.analysis.deletion import deletion_curve
from continuous_lm.analysis.pruning import prune
from continuous_lm.experiments.common import (
    absl_pretrained as pretrained,
)
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.common import (
    plots,
    prompt,
    tables,
)
from continuous_lm.experiments.durations import (
    absl_single_prompt as single_prompt,
)
from continuous_lm.experiments.durations import (
    boolean,
    counting,
    events,
    interpolation,
    prompt_sweeps,
    shifting,
    sums,
)
from continuous_lm.experiments.studies import (
    analysis,
    datasets,
    report_page,
    study,
    study_tables,
)
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

# Flags of single experiments that the report does not take.
REFUSED_FLAGS = ("prompt", "path", "change")
_PROMPTS_PER_STUDY = flags.DEFINE_integer(
    "prompts_per_study", 200, "Prompts of each study.", lower_bound=1
)

SectionWriter = Callable[[clm.LanguageModel, tokenizers.Tokenizer], report_page.Section]


def sweep_section(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    title: str,
    claim: str,
    prompt_sweep: prompt_sweeps.PromptSweep,
    answer_tokens,
    xlabel: str,
    num_repetitions: int = 0,
) -> report_page.Section:
    """The section of one sweep."""
    if answer_tokens is None:
        answer_tokens = single_prompt.find_tokens_above_threshold(
            lm, tokenizer, prompt_sweep
        )
    answer_curves = single_prompt.run_sweep(lm, prompt_sweep, answer_tokens, None)
    marks = single_prompt.transition_points(num_repetitions, prompt_sweep.points)
    figure = plots.answer_curves(
        answer_curves, xlabel=xlabel, title=prompt_sweep.prompt, marks=marks
    )
    rows: list[list[tables.Cell]] = [
        [f"{r.first:.3f} to {r.last:.3f}", r.answer, r.peak]
        for r in answer_curves.ranges
    ]
    columns = (
        tables.Column(xlabel),
        tables.Column("answer"),
        tables.Column("at most", format=".3f"),
    )
    table = tables.Table(
        report_page.slug(title),
        "The most probable of the tracked answers",
        columns,
        rows,
    )
    largest_change = np.abs(
        answer_curves.probabilities - answer_curves.probabilities[-1:]
    ).max()
    answer_sequence = " > ".join(r.answer for r in answer_curves.ranges)
    text = f"Shown: {answer_sequence}. The tracked probabilities move by at most"
    text += f" {largest_change:.2g}."
    return report_page.Section(
        title, claim, text, [table], {report_page.slug(title): figure}
    )


def counting_section(lm, tokenizer) -> report_page.Section:
    """Four apples."""
    prompt, character_span = counting.make_prompt(counting.Config())
    prompt_sweep = prompt_sweeps.shrink_span(
        tokenizer, prompt, character_span, single_prompt.sweep_points()
    )
    answer_tokens = single_prompt.find_answer_tokens(tokenizer, clm.tokenization.DIGITS)
    claim = "As four apples last less, models answer 3, 2 and 1, each where so many are left."
    return sweep_section(
        lm,
        tokenizer,
        "Counting",
        claim,
        prompt_sweep,
        answer_tokens,
        "duration of each repeated token",
        4,
    )


def events_section(lm, tokenizer) -> report_page.Section:
    """Four things bought."""
    prompt, character_span = events.prompt_and_span("shop")
    prompt_sweep = prompt_sweeps.shrink_span(
        tokenizer, prompt, character_span, single_prompt.sweep_points()
    )
    answer_tokens = single_prompt.find_answer_tokens(tokenizer, clm.tokenization.DIGITS)
    claim = (
        "Events are counted in the same way, although no word is repeated four times."
    )
    label = "duration of each token of the events"
    return sweep_section(
        lm,
        tokenizer,
        "Events",
        claim,
        prompt_sweep,
        answer_tokens,
        label,
        events.NUM_EVENTS,
    )


def sums_section(lm, tokenizer) -> report_page.Section:
    """One number of a sum."""
    is_bundled = pretrained.is_bundled()
    numbers = ("4", "3") if is_bundled else ("24", "13")
    prompt, character_span = sums.prompt_and_span(numbers, 2, spaced=False)
    prompt_sweep = prompt_sweeps.shrink_span(
        tokenizer, prompt, character_span, single_prompt.sweep_points()
    )
    answer_tokens = study.study_answer_tokens("sums", tokenizer, is_bundled)
    claim = "A number that lasts less is read as one of its digits. (The embedded model knows"
    claim += " one-digit numbers alone, to which this does not apply.)"
    label = f"duration of each token of {numbers[1]}"
    return sweep_section(
        lm, tokenizer, "Sums", claim, prompt_sweep, answer_tokens, label
    )


def make_interpolation_section(path: str) -> SectionWriter:
    """Apples to bananas."""

    def write_section(lm, tokenizer) -> report_page.Section:
        template, points = (
            interpolation.TEMPLATES["question"],
            single_prompt.sweep_points(0.0),
        )
        words = ("apples", "bananas")
        prompt_sweep = prompt_sweeps.interpolate_phrases(
            lm, tokenizer, template, words, points, path
        )
        answer_tokens = single_prompt.find_answer_tokens(
            tokenizer, interpolation.YES_NO_SPELLINGS
        )
        claim = "Between two words lie others, of which the model says what is true of either end."
        label = "from apples (0) to bananas (1)"
        return sweep_section(
            lm,
            tokenizer,
            f"Interpolation, {path}",
            claim,
            prompt_sweep,
            answer_tokens,
            label,
        )

    return write_section


def usage_section(lm, tokenizer) -> report_page.Section:
    """What follows, between two words."""
    template = interpolation.TEMPLATES["usage"]
    prompt_sweep = prompt_sweeps.interpolate_phrases(
        lm, tokenizer, template, ("cats", "dogs"), single_prompt.sweep_points(0.0)
    )
    claim = "Without answers to choose from, the output distribution moves smoothly as well."
    return sweep_section(
        lm, tokenizer, "Usage", claim, prompt_sweep, None, "from cats (0) to dogs (1)"
    )


def boolean_section(lm, tokenizer) -> report_page.Section:
    """Forty Boolean sweeps."""
    prompt_sweeps = boolean.make_operator_sweeps(
        lm, tokenizer, single_prompt.sweep_points(0.0), "linear"
    )
    curves_by_cell = single_prompt.run_sweeps(
        lm, prompt_sweeps, single_prompt.find_answer_tokens(tokenizer, ("0", "1"))
    )
    figure = plots.curve_grid(
        curves_by_cell, xlabel="from the first operator (0) to the second (1)"
    )
    columns = [
        tables.Column("operators"),
        *(tables.Column(f"{a} {b}") for a, b in _BOOLEAN_INPUTS),
    ]
    rows = [
        [
            pair,
            *(
                " > ".join(r.answer for r in answer_curves.ranges)
                for _, answer_curves in group
            ),
        ]
        for pair, group in itertools.groupby(
            curves_by_cell.items(), key=lambda item: item[0][0]
        )
    ]
    table = tables.Table(
        "boolean", "Answers from the first operator to the second", columns, rows
    )
    claim = "Between two operators the answer goes from one truth table to the other, and at times"
    claim += " through neither."
    return report_page.Section(
        "Boolean operators", claim, "", [table], {"boolean": figure}
    )


_BOOLEAN_INPUTS = tuple(itertools.product("01", repeat=2))


def make_shifting_section(transform: str) -> SectionWriter:
    """Later, or slower."""

    def write_section(lm, tokenizer) -> report_page.Section:
        prompt = (
            shifting.BUNDLED_PROMPT if pretrained.is_bundled() else shifting.PROMPTS[0]
        )
        if transform == "translation":
            prompt_sweep = prompt_sweeps.shift_prompt(
                tokenizer, prompt, single_prompt.sweep_points(0.0, 10.0)
            )
            claim = "Rotary models do not mind when a sentence begins; GPT-2 does."
            label = "shift in tokens"
        else:
            prompt_sweep = prompt_sweeps.stretch_prompt(
                tokenizer, prompt, single_prompt.sweep_points(0.01, 1.5)
            )
            claim = "Models bear a change of the pace of all tokens, but not any."
            label = "duration of every token"
        return sweep_section(
            lm, tokenizer, transform.capitalize(), claim, prompt_sweep, None, label
        )

    return write_section


def attribution_section(lm, tokenizer) -> report_page.Section:
    """Which moments of four apples argue for the answer."""
    answered_prompt = prompt.encode_prompt(lm, tokenizer, prompt.DEFAULT_PROMPT, None)
    objective = attribution.log_probability(
        lm, answered_prompt.answer_tokens, tokens=answered_prompt.tokens
    )
    ordinary_durations = jnp.ones(len(answered_prompt.tokens))
    methods = {
        "integrated gradients": attribution.integrated_gradients(
            objective, ordinary_durations
        ),
        "gradient times input": attribution.gradient_times_input(
            objective, ordinary_durations
        ),
        "leave one out": attribution.leave_one_out(objective, ordinary_durations),
    }
    deletions = {
        n: deletion_curve(objective, ordinary_durations, method_result.contributions)
        for n, method_result in methods.items()
    }
    integrated = methods["integrated gradients"]
    values = f"{integrated.baseline_value:.2f} to {integrated.end_value:.2f}"
    title = f"{answered_prompt.answer!r}: log probability {values}"
    columns = [tables.Column("method"), tables.Column("sum", format=".3f")]
    columns += [
        tables.Column(h, format=".3f")
        for h in ("residual", "area of deletion (lower: better)")
    ]
    rows: list[list[tables.Cell]] = [
        [
            name,
            float(method_result.contributions.sum()),
            method_result.residual,
            deletions[name].area,
        ]
        for name, method_result in methods.items()
    ]
    text = f"The answer is {answered_prompt.answer!r}. Integrated gradients along the durations,"
    text += (
        " from absent to present, add up to the change of its log probability within"
    )
    text += f" {integrated.relative_residual():.2%}."
    return report_page.Section(
        "Duration attribution",
        "",
        text,
        [
            tables.Table(
                "attribution", "Contributions to the answer, in nats", columns, rows
            )
        ],
        {
            "attribution": plots.heat_maps(
                answered_prompt.token_texts,
                answered_prompt.separators,
                {
                    n: method_result.contributions
                    for n, method_result in methods.items()
                },
                title=title,
            ),
            "deletion": plots.deletion_curves(
                {n: d.values for n, d in deletions.items()}
            ),
        },
    )


def inverse_section(lm, tokenizer) -> report_page.Section:
    """Durations that make the model give other answers."""
    ordinary_durations, drawn_durations = None, {}
    columns = [
        tables.Column("answer"),
        tables.Column("holds"),
        tables.Column("tokens changed"),
    ]
    columns += [
        tables.Column(h, format=".3f") for h in ("total change", "by random search")
    ]
    rows: list[list[tables.Cell]] = []
    for answer in TARGET_ANSWERS:
        answered_prompt = prompt.encode_prompt(
            lm, tokenizer, prompt.DEFAULT_PROMPT, answer
        )
        ordinary_durations = jnp.ones(len(answered_prompt.tokens))
        logits = next_token_logits(lm, tokens=answered_prompt.tokens)
        constraint = duration_search.Margin(
            logits, jnp.array(answered_prompt.answer_tokens), LOG_ODDS_MARGIN
        )
        by_gradients = duration_search.find_durations(constraint, ordinary_durations)
        by_random_search = duration_search.random_search(
            constraint, ordinary_durations, evaluations=by_gradients.evaluations
        )
        top_token = int(
            np.asarray(
                lm(
                    answered_prompt.tokens,
                    durations=by_gradients.durations,
                    position=-1,
                )
            ).argmax()
        )
        is_target = top_token in answered_prompt.answer_tokens
        num_changed = int((np.abs(by_gradients.durations - 1.0) > 1e-3).sum())
        random_search_change = (
            by_random_search.total if by_random_search.slack >= 0 else None
        )
        rows.append(
            [
                answer,
                "yes" if is_target else "no",
                num_changed,
                by_gradients.total,
                random_search_change,
            ]
        )
        if is_target:
            drawn_durations[f"{answer}: total change {by_gradients.total:.3f}"] = (
                by_gradients.durations
            )
    title = "durations that make it say so"
    figure = plots.durations_over_text(
        answered_prompt.token_texts,
        answered_prompt.separators,
        drawn_durations or {"ordinary": np.ones(len(answered_prompt.token_texts))},
        title=title,
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


def pruning_section(lm, tokenizer) -> report_page.Section:
    """The least time that keeps the answer."""
    answered_prompt = prompt.encode_prompt(lm, tokenizer, prompt.DEFAULT_PROMPT, None)
    objective = attribution.log_probability(
        lm, answered_prompt.answer_tokens, tokens=answered_prompt.tokens
    )
    ordinary_durations = np.ones(len(answered_prompt.tokens), np.float32)
    pruned_durations = prune(
        objective, ordinary_durations, tolerance=LOG_PROB_TOLERANCE
    ).durations
    log_prob_before, log_prob_after = (
        float(objective(jnp.asarray(x))) for x in (ordinary_durations, pruned_durations)
    )
    text = f"The smallest durations at which {answered_prompt.answer!r} loses at most"
    text += f" {LOG_PROB_TOLERANCE} nat: of"
    num_kept = int((pruned_durations[1:] > 0).sum())
    text += f" {len(pruned_durations) - 1} tokens after the first, {num_kept} are left, which last"
    text += f" {pruned_durations[1:].sum():.2f} together; log probability {log_prob_before:.3f} to"
    text += f" {log_prob_after:.3f}."
    figure = plots.durations_over_text(
        answered_prompt.token_texts,
        answered_prompt.separators,
        {"pruned": pruned_durations},
        title="what is left",
    )
    return report_page.Section("Prompt pruning", "", text, [], {"pruning": figure})


TARGET_ANSWERS = ("3", "2", "1", "5")
LOG_ODDS_MARGIN = 0.1  # of the answer's log-odds
LOG_PROB_TOLERANCE = 0.1  # nat
SWEEP_SECTIONS: tuple[tuple[str, SectionWriter], ...] = (
    ("Counting", counting_section),
    ("Events", events_section),
    ("Sums", sums_section),
    ("Interpolation, linear", make_interpolation_section("linear")),
    ("Interpolation, spherical", make_interpolation_section("spherical")),
    ("Usage", usage_section),
    ("Boolean operators", boolean_section),
    ("Translation", make_shifting_section("translation")),
    ("Scaling", make_shifting_section("scaling")),
)
STUDY_CLAIMS = {
    "counting": "On 200 prompts, shrinking brings out counts that the ordinary prompt does not"
    " (observed above counterfactual).",
    "tutorials": "The same holds of steps of tutorials, which are longer and differ.",
    "sums": "A shrunk number is often read as one of its digits.",
    "words": "Interpolations are smooth (Lipschitz estimates), and in part leave the interval"
    " between their two ends.",
}


def study_section(
    name: str,
    folder: pathlib.Path,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
) -> report_page.Section:
    """A study with its tables and figures, as `study` and `analysis` make them."""
    tasks = datasets.generate_tasks(name)[: _PROMPTS_PER_STUDY.value]
    answer_tokens = study.study_answer_tokens(name, tokenizer, pretrained.is_bundled())
    points = np.linspace(0, 1, 40) if name == "words" else single_prompt.sweep_points()
    records = study.run_study(
        folder,
        lm,
        tokenizer,
        tasks,
        answer_tokens,
        points,
        progress_label=name,
        use_pmap=program.uses_pmap(),
    )
    study.write_study(folder, name, pretrained.model_name(), records)
    processes.wait_for_all("study")
    studies = [analysis.read_study(folder)]
    metrics_by_model = analysis.compute_model_metrics(studies)
    study_figures = analysis.STUDY_SPECS[name].make_figures(metrics_by_model)
    return report_page.Section(
        f"Study: {name}",
        STUDY_CLAIMS[name],
        f"{len(records)} prompts, of which {len(studies[0].failed)} could not be run.",
        study_tables.make_tables(name, metrics_by_model),
        {
            f"{name}_{figure_name}": study_figure
            for figure_name, study_figure in study_figures.items()
        },
    )


def generate_sections(folder: pathlib.Path) -> Iterator[report_page.Section]:
    """All of them, one after the other; one that cannot be run says why."""
    lm, tokenizer = pretrained.load()
    section_writers: list[tuple[str, SectionWriter]] = [
        *SWEEP_SECTIONS,
        *(
            (
                f"Study: {name}",
                lambda lm, tok, name=name: study_section(name, folder / name, lm, tok),
            )
            for name in datasets.STUDIES
        ),
        ("Duration attribution", attribution_section),
        ("Inverse problem", inverse_section),
        ("Prompt pruning", pruning_section),
    ]
    progress_bar = tqdm.tqdm(section_writers, unit="section", desc="report")
    for title, write_section in progress_bar:
        try:
            yield write_section(lm, tokenizer)
        except clm.InputError as error:
            yield report_page.Section(
                title, "", f"Not run: {error}", [], {}, failed=True
            )


def main() -> None:
    """Sections, pages, figures, tables."""
    for name in REFUSED_FLAGS:
        if flags.FLAGS[name].present:
            raise clm.InputError(
                f"--{name}: the report has its own; run an experiment's program"
            )
    folder = program.output_dir("report")
    report_sections = list(generate_sections(folder / "studies"))
    run_record = program.record()
    title = f"How continuous is {pretrained.model_name()}?"
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        for section in report_sections:
            for name, figure in section.figures.items():
                plots.save(figure, staging_folder, name)
            for table in section.tables:
                table.write(staging_folder)
        report_page.write_report(staging_folder, title, report_sections, run_record)
        write_json(
            staging_folder / "report.json",
            {"sections": [s.as_json() for s in report_sections], "run": run_record},
        )
    failed = [section.title for section in report_sections if section.failed]
    print(
        f"{len(report_sections)} sections, {len(failed)} of which could not be run:"
        f" {', '.join(failed)}"
    )
    print(f"{folder}/report.html, report.md")


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
