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
from continuous_lm.analysis.attribution import next_token
from continuous_lm.analysis.deletion import deletion_curve
from continuous_lm.analysis.pruning import prune
from continuous_lm.experiments.common import plots, pretrained, program, prompt, tables
from continuous_lm.experiments.durations import (
    boolean,
    counting,
    events,
    interpolation,
    prompt_sweeps,
    shifting,
    single_prompt,
    sums,
)
from continuous_lm.experiments.studies import analysis, datasets, report_page, study
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

CHOSEN = ("prompt", "path", "vary")  # flags of single experiments that the report does not take
_STUDIED = flags.DEFINE_integer("studied", 200, "Prompts of each study.", lower_bound=1)

Write = Callable[[clm.LanguageModel, tokenizers.Tokenizer], report_page.Section]


def curve(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    title: str,
    claim: str,
    trial: prompt_sweeps.Trial,
    answers,
    xlabel: str,
    count: int = 0,
) -> report_page.Section:
    """The section of one sweep."""
    if answers is None:
        answers = single_prompt.reached(lm, tokenizer, trial)
    result = single_prompt.run(lm, trial, answers, None)
    marks = single_prompt.ideal(count, trial.points)
    figure = plots.answer_curves(result, xlabel=xlabel, title=trial.prompt, marks=marks)
    rows: list[list[tables.Cell]] = [
        [f"{r.first:.3f} to {r.last:.3f}", r.answer, r.peak] for r in result.ranges
    ]
    heads = (tables.Column(xlabel), tables.Column("answer"), tables.Column("at most", format=".3f"))
    table = tables.Table(
        report_page.slug(title), "The most probable of the tracked answers", heads, rows
    )
    moved = np.abs(result.probabilities - result.probabilities[-1:]).max()
    shown = " > ".join(r.answer for r in result.ranges)
    text = f"Shown: {shown}. The tracked probabilities move by at most {moved:.2g}."
    return report_page.Section(title, claim, text, [table], {report_page.slug(title): figure})


def counted(lm, tokenizer) -> report_page.Section:
    """Four apples."""
    prompt, characters = counting.prompt_and_span()
    trial = prompt_sweeps.shrinking(tokenizer, prompt, characters, single_prompt.points())
    answers = single_prompt.tracked(tokenizer, clm.tokenization.DIGITS)
    claim = "As four apples last less, models answer 3, 2 and 1, each where so many are left."
    return curve(
        lm, tokenizer, "Counting", claim, trial, answers, "duration of each repeated token", 4
    )


def told(lm, tokenizer) -> report_page.Section:
    """Four things bought."""
    prompt, characters = events.prompt_and_span("shop")
    trial = prompt_sweeps.shrinking(tokenizer, prompt, characters, single_prompt.points())
    answers = single_prompt.tracked(tokenizer, clm.tokenization.DIGITS)
    claim = "Events are counted in the same way, although no word is repeated four times."
    label = "duration of each token of the events"
    return curve(lm, tokenizer, "Events", claim, trial, answers, label, events.EVENTS)


def summed(lm, tokenizer) -> report_page.Section:
    """One number of a sum."""
    small = pretrained.is_bundled()
    numbers = ("4", "3") if small else ("24", "13")
    prompt, characters = sums.prompt_and_span(numbers, 2, spaced=False)
    trial = prompt_sweeps.shrinking(tokenizer, prompt, characters, single_prompt.points())
    answers = study.answers("sums", tokenizer, small)
    claim = "A number that lasts less is read as one of its digits. (The embedded model knows"
    claim += " one-digit numbers alone, to which this does not apply.)"
    label = f"duration of each token of {numbers[1]}"
    return curve(lm, tokenizer, "Sums", claim, trial, answers, label)


def between(how: str) -> Write:
    """Apples to bananas."""

    def section(lm, tokenizer) -> report_page.Section:
        template, points = interpolation.TEMPLATES["question"], single_prompt.points(0.0)
        words = ("apples", "bananas")
        trial = prompt_sweeps.interpolating(lm, tokenizer, template, words, points, how)
        answers = single_prompt.tracked(tokenizer, interpolation.YES_NO)
        claim = "Between two words lie others, of which the model says what is true of either end."
        label = "from apples (0) to bananas (1)"
        return curve(lm, tokenizer, f"Interpolation, {how}", claim, trial, answers, label)

    return section


def used(lm, tokenizer) -> report_page.Section:
    """What follows, between two words."""
    template = interpolation.TEMPLATES["usage"]
    trial = prompt_sweeps.interpolating(
        lm, tokenizer, template, ("cats", "dogs"), single_prompt.points(0.0)
    )
    claim = "Without answers to choose from, the output distribution moves smoothly as well."
    return curve(lm, tokenizer, "Usage", claim, trial, None, "from cats (0) to dogs (1)")


def operators(lm, tokenizer) -> report_page.Section:
    """Forty Boolean sweeps."""
    cells = boolean.made(lm, tokenizer, single_prompt.points(0.0), "linear")
    results = single_prompt.run_all(lm, cells, single_prompt.tracked(tokenizer, ("0", "1")))
    figure = plots.grid(results, xlabel="from the first operator (0) to the second (1)")
    heads = [tables.Column("operators"), *(tables.Column(f"{a} {b}") for a, b in _INPUTS)]
    rows = [
        [pair, *(" > ".join(r.answer for r in result.ranges) for _, result in group)]
        for pair, group in itertools.groupby(results.items(), key=lambda item: item[0][0])
    ]
    table = tables.Table("boolean", "Answers from the first operator to the second", heads, rows)
    claim = "Between two operators the answer goes from one truth table to the other, and at times"
    claim += " through neither."
    return report_page.Section("Boolean operators", claim, "", [table], {"boolean": figure})


_INPUTS = tuple(itertools.product("01", repeat=2))


def moved(change: str) -> Write:
    """Later, or slower."""

    def section(lm, tokenizer) -> report_page.Section:
        prompt = shifting.EMBEDDED if pretrained.is_bundled() else shifting.PROMPTS[0]
        if change == "translation":
            trial = prompt_sweeps.moving(tokenizer, prompt, single_prompt.points(0.0, 10.0))
            claim = "Rotary models do not mind when a sentence begins; GPT-2 does."
            label = "shift in tokens"
        else:
            trial = prompt_sweeps.stretching(tokenizer, prompt, single_prompt.points(0.01, 1.5))
            claim = "Models bear a change of the pace of all tokens, but not any."
            label = "duration of every token"
        return curve(lm, tokenizer, change.capitalize(), claim, trial, None, label)

    return section


def attributed(lm, tokenizer) -> report_page.Section:
    """Which moments of four apples argue for the answer."""
    read = prompt.read(lm, tokenizer, prompt.PROMPT, None)
    value = attribution.log_probability(lm, read.group, tokens=read.tokens)
    ones = jnp.ones(len(read.tokens))
    methods = {
        "integrated gradients": attribution.integrated(value, ones),
        "gradient times input": attribution.gradient_times_input(value, ones),
        "leave one out": attribution.leave_one_out(value, ones),
    }
    deleted = {n: deletion_curve(value, ones, found.tokens) for n, found in methods.items()}
    exact = methods["integrated gradients"]
    title = f"{read.answer!r}: log probability {exact.base:.2f} to {exact.end:.2f}"
    heads = [tables.Column("method"), tables.Column("sum", format=".3f")]
    heads += [
        tables.Column(h, format=".3f") for h in ("residual", "area of deletion (lower: better)")
    ]
    rows: list[list[tables.Cell]] = [
        [name, float(found.tokens.sum()), found.residual, deleted[name].area]
        for name, found in methods.items()
    ]
    text = (
        f"The answer is {read.answer!r}. Integrated gradients along the durations, from absent to"
    )
    text += " present, add up to the change of its log probability within"
    text += f" {exact.relative_residual():.2%}."
    return report_page.Section(
        "Duration attribution",
        "",
        text,
        [tables.Table("attribution", "Contributions to the answer, in nats", heads, rows)],
        {
            "attribution": plots.heat_maps(
                read.pieces,
                read.gaps,
                {n: found.tokens for n, found in methods.items()},
                title=title,
            ),
            "deletion": plots.deletion_curves({n: d.values for n, d in deleted.items()}),
        },
    )


def steered(lm, tokenizer) -> report_page.Section:
    """Durations that make the model give other answers."""
    ones, drawn = None, {}
    heads = [tables.Column("answer"), tables.Column("holds"), tables.Column("tokens changed")]
    heads += [tables.Column(h, format=".3f") for h in ("total change", "by random search")]
    rows: list[list[tables.Cell]] = []
    for answer in TARGETS:
        read = prompt.read(lm, tokenizer, prompt.PROMPT, answer)
        ones = jnp.ones(len(read.tokens))
        logits = next_token(lm, tokens=read.tokens)
        slack = duration_search.Margin(logits, jnp.array(read.group), MARGIN)
        found = duration_search.steer(slack, ones)
        chance = duration_search.random_search(slack, ones, evaluations=found.evaluations)
        said = int(np.asarray(lm(read.tokens, durations=found.durations, at=-1)).argmax())
        holds = said in read.group
        changed = int((np.abs(found.durations - 1.0) > 1e-3).sum())
        by_chance = chance.total if chance.slack >= 0 else None
        rows.append([answer, "yes" if holds else "no", changed, found.total, by_chance])
        if holds:
            drawn[f"{answer}: total change {found.total:.3f}"] = found.durations
    title = "durations that make it say so"
    figure = plots.durations_over_text(
        read.pieces, read.gaps, drawn or {"ordinary": np.ones(len(read.pieces))}, title=title
    )
    caption = "Total change of durations, sum |d - 1|, at which the answer leads"
    return report_page.Section(
        "Inverse problem",
        "",
        "Durations near 1, mostly equal to 1, that make the model give another answer to the prompt"
        " of four apples, found by gradients; random search had as many evaluations.",
        [tables.Table("inverse", caption, heads, rows)],
        {"inverse": figure},
    )


def pruned(lm, tokenizer) -> report_page.Section:
    """The least time that keeps the answer."""
    read = prompt.read(lm, tokenizer, prompt.PROMPT, None)
    value = attribution.log_probability(lm, read.group, tokens=read.tokens)
    ones = np.ones(len(read.tokens), np.float32)
    d = prune(value, ones, tolerance=TOLERANCE).durations
    before, after = (float(value(jnp.asarray(x))) for x in (ones, d))
    text = f"The smallest durations at which {read.answer!r} loses at most {TOLERANCE} nat: of"
    text += f" {len(d) - 1} tokens after the first, {int((d[1:] > 0).sum())} are left, which last"
    text += f" {d[1:].sum():.2f} together; log probability {before:.3f} to {after:.3f}."
    figure = plots.durations_over_text(read.pieces, read.gaps, {"pruned": d}, title="what is left")
    return report_page.Section("Prompt pruning", "", text, [], {"pruning": figure})


TARGETS = ("3", "2", "1", "5")
MARGIN = 0.1  # of the answer's log-odds
TOLERANCE = 0.1  # nat
SWEEPS: tuple[tuple[str, Write], ...] = (
    ("Counting", counted),
    ("Events", told),
    ("Sums", summed),
    ("Interpolation, linear", between("linear")),
    ("Interpolation, spherical", between("spherical")),
    ("Usage", used),
    ("Boolean operators", operators),
    ("Translation", moved("translation")),
    ("Scaling", moved("scaling")),
)
CLAIMS = {
    "counting": "On 200 prompts, shrinking brings out counts that the ordinary prompt does not"
    " (observed above counterfactual).",
    "tutorials": "The same holds of steps of tutorials, which are longer and differ.",
    "sums": "A shrunk number is often read as one of its digits.",
    "words": "Interpolations are smooth (Lipschitz estimates), and in part leave the interval"
    " between their two ends.",
}


def studied(
    name: str, folder: pathlib.Path, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> report_page.Section:
    """A study with its tables and figures, as `study` and `analysis` make them."""
    tasks = datasets.made(name)[: _STUDIED.value]
    tracked = study.answers(name, tokenizer, pretrained.is_bundled())
    points = np.linspace(0, 1, 40) if name == "words" else single_prompt.points()
    records = study.run(
        folder, lm, tokenizer, tasks, tracked, points, label=name, pmap=program.pmap()
    )
    study.write(folder, name, pretrained.name(), records)
    processes.wait_for_all("study")
    found = [analysis.read(folder)]
    numbers = analysis.analyse(found)
    figures = analysis.STUDIES[name].figures(numbers)
    return report_page.Section(
        f"Study: {name}",
        CLAIMS[name],
        f"{len(records)} prompts, of which {len(found[0].failed)} could not be run.",
        tables.laid_out(name, numbers),
        {f"{name}_{figure}": drawn for figure, drawn in figures.items()},
    )


def sections(folder: pathlib.Path) -> Iterator[report_page.Section]:
    """All of them, one after the other; one that cannot be run says why."""
    lm, tokenizer = pretrained.load()
    writers: list[tuple[str, Write]] = [
        *SWEEPS,
        *(
            (f"Study: {name}", lambda lm, tok, name=name: studied(name, folder / name, lm, tok))
            for name in datasets.STUDIES
        ),
        ("Duration attribution", attributed),
        ("Inverse problem", steered),
        ("Prompt pruning", pruned),
    ]
    bar = tqdm.tqdm(writers, unit="section", desc="report")
    for title, write in bar:
        try:
            yield write(lm, tokenizer)
        except clm.InputError as error:
            yield report_page.Section(title, "", f"Not run: {error}", [], {}, failed=True)


def main() -> None:
    """Sections, pages, figures, tables."""
    for name in CHOSEN:
        if flags.FLAGS[name].present:
            raise clm.InputError(f"--{name}: the report has its own; run an experiment's program")
    folder = program.output_dir("report")
    made = list(sections(folder / "studies"))
    run = program.record()
    title = f"How continuous is {pretrained.name()}?"
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        for section in made:
            for name, figure in section.figures.items():
                plots.save(figure, aside, name)
            for table in section.tables:
                table.write(aside)
        report_page.write(aside, title, made, run)
        write_json(aside / "report.json", {"sections": [s.as_json() for s in made], "run": run})
    failed = [section.title for section in made if section.failed]
    print(f"{len(made)} sections, {len(failed)} of which could not be run: {', '.join(failed)}")
    print(f"{folder}/report.html, report.md")


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
