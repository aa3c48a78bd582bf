"""Evaluate embedded models: held-out accuracy, and counting along a shrinking span.

    python -m continuous_lm evaluate_apples [--models=FOLDER,FOLDER,...]

Each sweep shrinks a counted span of n words or events by 100 factors from 0.1 to 1, as in the
paper. It checks whether the most probable token runs through the counts 1..n in order. It measures
how far the factors where the answer changes from k to k + 1 are from (k + 1/2) / n. The exit status
is 1 if a model misses a bar; the missed bars are printed.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

import continuous_lm as clm
from continuous_lm.errors import about
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.apples.language import (
    SCENES,
    UNSEEN_FILLER_WORDS,
    UNSEEN_SEPARATORS,
    UNSEEN_WORDS,
)
from continuous_lm.experiments.common import program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

MIN_ACCURACY = 0.97  # on held-out prompts, of each task
MAX_TRANSITION_ERROR = 0.08  # between a transition and (k + 1/2) / n
REQUIRED_KINDS = (
    "paper",
    "unseen words",
    "unseen separators",
    "unseen filler",
)  # events have no surrounding text
SWEPT_COUNTS = range(2, 7)
PROMPT_SEED = 0  # of the held-out prompts and of irregular filler
DURATION_FACTORS = np.linspace(0.1, 1.0, 100)  # the paper's
PAPER_WORDS = {"apple": "fruit", "cat": "animal", "rose": "flower"}


@dataclasses.dataclass(frozen=True)
class CountingSweep:
    """Most probable answers along one sweep.

    Attributes:
        kind: Kind of prompt.
        count: Number n of words or events in the span.
        text: The prompt.
        answers: The most probable token at each of `DURATION_FACTORS`.
    """

    kind: str
    count: int
    text: str
    answers: tuple[str, ...]

    @property
    def peaks(self) -> list[str]:
        """The most probable tokens along the sweep, each as often as it takes over."""
        return [answer for answer, _ in itertools.groupby(self.answers)]

    @property
    def is_in_order(self) -> bool:
        """Return whether they are 1..n in this order, and nothing else."""
        return self.peaks == [str(k) for k in range(1, self.count + 1)]

    @property
    def transitions(self) -> list[float]:
        """The factors at which the answer changes, halfway between two points of the sweep."""
        change_indices = [
            i
            for i, (answer, next_answer) in enumerate(itertools.pairwise(self.answers))
            if answer != next_answer
        ]
        return [
            float(DURATION_FACTORS[i] + DURATION_FACTORS[i + 1]) / 2
            for i in change_indices
        ]

    @property
    def error(self) -> float | None:
        """The largest distance of a transition from (k + 1/2) / n; None if not in order."""
        if not self.is_in_order:
            return None
        ideal_transitions = (np.arange(1, self.count) + 0.5) / self.count
        return float(np.abs(np.array(self.transitions) - ideal_transitions).max())

    @property
    def meets_bar(self) -> bool:
        """Return whether the sweep meets the bar."""
        return self.error is not None and self.error <= MAX_TRANSITION_ERROR


def sweep_prompts(
    rng: np.random.Generator, n: int
) -> Iterator[tuple[str, prompts.Prompt]]:
    """Yield the prompts with spans of `n` words or events, each with its kind."""
    for word, category in PAPER_WORDS.items():
        for wording in ("times", "listed"):
            yield (
                "paper",
                prompts.counting_prompt(
                    category, word, [" "] * (n - 1), wording=wording
                ),
            )
        for separator in UNSEEN_SEPARATORS:
            yield (
                "unseen separators",
                prompts.counting_prompt(category, word, [separator] * (n - 1)),
            )
        for style, separators in (("filler", ()), ("both", UNSEEN_SEPARATORS)):
            gaps = prompts.sample_gaps(rng, style, n, separators, UNSEEN_FILLER_WORDS)
            yield "unseen filler", prompts.counting_prompt(category, word, gaps)
    for category, words in UNSEEN_WORDS.items():
        for word in words:
            yield (
                "unseen words",
                prompts.counting_prompt(category, word, [" "] * (n - 1)),
            )
    for scene, subject in (("shop", "Alice"), ("zoo", "the class"), ("beach", "Emily")):
        yield (
            "events",
            prompts.events_prompt(scene, subject, list(SCENES[scene].objects[:n])),
        )
    steps = list(SCENES["tutorial"].objects[:n])
    yield "tutorials", prompts.events_prompt("tutorial", "make a cake", steps)


def run_counting_sweep(
    lm: clm.LanguageModel, kind: str, prompt: prompts.Prompt, n: int
) -> CountingSweep:
    """Sweeps the span of a prompt that counts `n`."""
    tokenizer = _require_tokenizer(lm)
    encoding = clm.tokenization.encode(tokenizer, prompt.text)
    if prompt.span is None:
        raise clm.InputError(
            f"nothing is counted in {prompt.text!r}; give a prompt with a span"
        )
    span = clm.tokenization.token_span(encoding, *prompt.span)
    length = len(encoding.ids)
    padded_tokens = np.zeros(
        -(-length // 16) * 16, np.int32
    )  # few shapes; what follows can't matter
    padded_tokens[:length] = encoding.ids
    probabilities = clm.sweep.probabilities(
        lm,
        [[token] for token in range(lm.config.vocab_size)],
        tokens=padded_tokens,
        durations=clm.durations.scale(
            jnp.ones(len(padded_tokens)), DURATION_FACTORS, span
        ),
        position=length - 1,
        batch_size=len(DURATION_FACTORS),
    )
    likeliest_tokens = tuple(
        tokenizer.id_to_token(int(token)) or f"token {token}"
        for token in probabilities.argmax(axis=1)
    )
    return CountingSweep(kind, n, prompt.text, likeliest_tokens)


def accuracy(
    lm: clm.LanguageModel, questions: Sequence[prompts.Prompt], batch_size: int = 100
) -> float:
    """The share of prompts whose answer is the most probable token, at durations of 1."""
    tokenizer = _require_tokenizer(lm)
    encodings = [
        clm.tokenization.encode(tokenizer, prompt.text) for prompt in questions
    ]
    missing = {p.answer for p in questions if tokenizer.token_to_id(p.answer) is None}
    if missing:
        missing_names = ", ".join(map(repr, sorted(missing)))
        raise clm.InputError(
            f"no token is {missing_names}; give a model of this language"
        )
    answers = np.array([tokenizer.token_to_id(p.answer) for p in questions])
    answer_positions = np.array([len(encoding.ids) - 1 for encoding in encodings])
    tokens = np.zeros(
        (len(questions), -(-(answer_positions.max() + 1) // 16) * 16), np.int32
    )
    for row, encoding in zip(tokens, encodings, strict=True):
        row[: len(encoding.ids)] = encoding.ids
    likeliest_tokens = [
        np.asarray(
            lm(
                tokens[i : i + batch_size],
                position=answer_positions[i : i + batch_size],
            )
        ).argmax(axis=-1)
        for i in range(0, len(questions), batch_size)
    ]
    return float(np.mean(np.concatenate(likeliest_tokens) == answers))


def evaluate_model(
    lm: clm.LanguageModel, num_prompts: int
) -> tuple[dict[str, float], list[CountingSweep]]:
    """Held-out accuracy of each task, and every sweep."""
    rng = np.random.default_rng(PROMPT_SEED)
    accuracies = {
        task: accuracy(
            lm, [prompts.sample_prompt(rng, task, True) for _ in range(num_prompts)]
        )
        for task in prompts.TASK_WEIGHTS
    }
    sweeps = [
        run_counting_sweep(lm, kind, prompt, n)
        for n in SWEPT_COUNTS
        for kind, prompt in sweep_prompts(rng, n)
    ]
    return accuracies, sweeps


def describe_failures(
    accuracies: dict[str, float], sweeps: Sequence[CountingSweep]
) -> list[str]:
    """Describe the bars that were missed."""
    accuracy_failures = [
        f"held-out accuracy of {task} is {share:.1%}, below {MIN_ACCURACY:.0%}"
        for task, share in accuracies.items()
        if share < MIN_ACCURACY
    ]
    return accuracy_failures + [
        f"{sweep.kind}, n = {sweep.count}: "
        + (
            f"a transition is {sweep.error:.3f} off"
            if sweep.is_in_order
            else f"answers {' '.join(sweep.peaks)}"
        )
        + f" in {sweep.text!r}"
        for sweep in sweeps
        if sweep.kind in REQUIRED_KINDS and not sweep.meets_bar
    ]


def format_table(accuracies: dict[str, float], sweeps: Sequence[CountingSweep]) -> str:
    """Both results, for the terminal."""
    lines = [
        "held-out accuracy   "
        + "   ".join(
            f"{task} {accuracy_value:.1%}"
            for task, accuracy_value in accuracies.items()
        ),
        "",
    ]
    lines.append(
        f"{'sweep':<20}{'n':>2}  {'1..n in order':>14}  {'worst error':>11}  transitions (mean)"
    )
    for kind, n in dict.fromkeys((sweep.kind, sweep.count) for sweep in sweeps):
        group = [sweep for sweep in sweeps if (sweep.kind, sweep.count) == (kind, n)]
        ordered_sweeps = [sweep for sweep in group if sweep.is_in_order]
        worst_error = (
            f"{max(sweep.error or 0.0 for sweep in ordered_sweeps):.3f}"
            if ordered_sweeps
            else "-"
        )
        means = (
            np.mean([sweep.transitions for sweep in ordered_sweeps], axis=0)
            if ordered_sweeps
            else []
        )
        transition_text = " ".join(f"{mean:.3f}" for mean in means)
        lines.append(
            f"{kind:<20}{n:>2}  {f'{len(ordered_sweeps)} of {len(group)}':>14} "
            f" {worst_error:>11}  {transition_text}"
        )
    return "\n".join(lines)


def _require_tokenizer(lm: clm.LanguageModel) -> tokenizers.Tokenizer:
    if lm.tokenizer is None:
        raise clm.InputError("there is no tokenizer.json; give a model that has one")
    return lm.tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.DeviceConfig):
    """Flags of evaluate_apples."""

    models: tuple[str, ...] = program.flag(
        ("apples",), help="Checkpoint folders or bundled models."
    )
    held_out_prompts: int = program.flag(
        1000, help="Number of held-out prompts of each task.", lower_bound=1
    )


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """Held-out accuracy of each task, and every sweep."""

    accuracies: dict[str, float]
    sweeps: list[CountingSweep]

    def as_json(self) -> dict[str, Any]:
        """The numbers, as the results file has them."""
        sweep_records = [
            dataclasses.asdict(sweep)
            | {
                "in_order": sweep.is_in_order,
                "transitions": sweep.transitions,
                "error": sweep.error,
            }
            for sweep in self.sweeps
        ]
        return {"accuracies": self.accuracies, "sweeps": sweep_records}


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The results of each model, and the bars that they miss, in words."""

    models: dict[str, ModelResult]
    missed: list[str]

    def summary(self) -> str:
        lines = [
            f"{name}\n\n{format_table(result.accuracies, result.sweeps)}\n"
            for name, result in self.models.items()
        ]
        verdict = ["missed:", *self.missed] if self.missed else ["every bar is met"]
        return "\n".join([*lines, *verdict])

    @property
    def exit_status(self) -> int:
        return 1 if self.missed else 0


def run(config: Config) -> Result:
    """Load the models, evaluate them, and write the numbers."""
    folder = program.output_folder(config)
    mesh = program.make_mesh(config)
    results: dict[str, ModelResult] = {}
    missed: list[str] = []
    for name in config.models:
        lm = clm.load(name, dtype=jnp.float32, mesh=mesh)
        with about(name):
            accuracies, sweeps = evaluate_model(lm, config.held_out_prompts)
        results[name] = ModelResult(accuracies, sweeps)
        failures = describe_failures(accuracies, sweeps)
        missed += [f"{name}: {failure}" for failure in failures]
    if folder is not None and processes.is_first_process():
        values = {
            "factors": DURATION_FACTORS.tolist(),
            "models": {name: result.as_json() for name, result in results.items()},
            "missed": missed,
            "run": program.record(config),
        }
        with write_atomically(folder) as staging_folder:
            write_json(staging_folder / "evaluate_apples.json", values)
    return Result(results, missed)


if __name__ == "__main__":
    program.main(Config, run)
