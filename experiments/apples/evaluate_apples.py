"""Evaluates embedded models: held-out accuracy, and counting while what is counted shrinks.

    python -m continuous_lm evaluate_apples [--models=FOLDER,FOLDER,...]

Each sweep shrinks a counted span of n words or events by 100 factors from 0.1 to 1, as the paper
does, and asks whether every count 1..n is in turn the most probable token, and how far the factors
at which the answer changes from k to k + 1 are from (k + 1/2) / n. Exits with status 1, naming
them, if a model misses one of the bars.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import flags

import continuous_lm as clm
from continuous_lm.errors import about
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.apples.language import (
    SCENES,
    UNSEEN_FILLER,
    UNSEEN_SEPARATORS,
    UNSEEN_WORDS,
)
from continuous_lm.experiments.common import program
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

MIN_ACCURACY = 0.97  # on held-out prompts, of each task
MAX_ERROR = 0.08  # between a transition and (k + 1/2) / n
BARRED = ("paper", "unseen words", "unseen separators", "unseen filler")  # events are told alone
REPETITIONS = range(2, 7)
SEED = 0  # of the held-out prompts and of irregular filler
FACTORS = np.linspace(0.1, 1.0, 100)  # the paper's
PAPER_WORDS = {"apple": "fruit", "cat": "animal", "rose": "flower"}

_MODELS = flags.DEFINE_list("models", ["apples"], "Checkpoint folders or bundled models.")
_PROMPTS = flags.DEFINE_integer(
    "held_out_prompts", 1000, "How many to ask of each task.", lower_bound=1
)


@dataclasses.dataclass(frozen=True)
class Counted:
    """One sweep, read off.

    Attributes:
        kind: What it tests.
        count: n, how many words or events are in the span.
        text: The prompt.
        answers: The most probable token at each of `FACTORS`.
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
    def in_order(self) -> bool:
        """Whether they are 1..n in this order, and nothing else."""
        return self.peaks == [str(k) for k in range(1, self.count + 1)]

    @property
    def transitions(self) -> list[float]:
        """The factors at which the answer changes, halfway between two points of the sweep."""
        changes = [i for i, (a, b) in enumerate(itertools.pairwise(self.answers)) if a != b]
        return [float(FACTORS[i] + FACTORS[i + 1]) / 2 for i in changes]

    @property
    def error(self) -> float | None:
        """The largest distance of a transition from (k + 1/2) / n; None if not in order."""
        if not self.in_order:
            return None
        ideal = (np.arange(1, self.count) + 0.5) / self.count
        return float(np.abs(np.array(self.transitions) - ideal).max())

    @property
    def passes(self) -> bool:
        """Whether the sweep meets the bar."""
        return self.error is not None and self.error <= MAX_ERROR


def sweep_prompts(rng: np.random.Generator, n: int) -> Iterator[tuple[str, prompts.Prompt]]:
    """The prompts whose spans of `n` are swept, with what each tests."""
    for word, category in PAPER_WORDS.items():
        for wording in ("times", "listed"):
            yield "paper", prompts.counting(category, word, [" "] * (n - 1), wording=wording)
        for separator in UNSEEN_SEPARATORS:
            yield "unseen separators", prompts.counting(category, word, [separator] * (n - 1))
        for style, separators in (("filler", ()), ("both", UNSEEN_SEPARATORS)):
            gaps = prompts.gaps(rng, style, n, separators, UNSEEN_FILLER)
            yield "unseen filler", prompts.counting(category, word, gaps)
    for category, words in UNSEEN_WORDS.items():
        for word in words:
            yield "unseen words", prompts.counting(category, word, [" "] * (n - 1))
    for scene, subject in (("shop", "Alice"), ("zoo", "the class"), ("beach", "Emily")):
        yield "events", prompts.events(scene, subject, list(SCENES[scene].objects[:n]))
    steps = list(SCENES["tutorial"].objects[:n])
    yield "tutorials", prompts.events("tutorial", "make a cake", steps)


def count(lm: clm.LanguageModel, kind: str, prompt: prompts.Prompt, n: int) -> Counted:
    """Sweeps the span of a prompt that counts `n`."""
    tokenizer = _tokenizer(lm)
    encoding = clm.tokenization.encode(tokenizer, prompt.text)
    if prompt.span is None:
        raise clm.InputError(f"nothing is counted in {prompt.text!r}; give a prompt with a span")
    span = clm.tokenization.token_span(encoding, *prompt.span)
    length = len(encoding.ids)
    padded = np.zeros(-(-length // 16) * 16, np.int32)  # few shapes; what follows can't matter
    padded[:length] = encoding.ids
    probabilities = clm.sweep.probabilities(
        lm,
        [[token] for token in range(lm.config.vocab_size)],
        tokens=padded,
        durations=clm.durations.scale(jnp.ones(len(padded)), FACTORS, span),
        at=length - 1,
        batch_size=len(FACTORS),
    )
    best = tuple(
        tokenizer.id_to_token(int(token)) or f"token {token}"
        for token in probabilities.argmax(axis=1)
    )
    return Counted(kind, n, prompt.text, best)


def accuracy(lm: clm.LanguageModel, asked: Sequence[prompts.Prompt], batch: int = 100) -> float:
    """The share of prompts whose answer is the most probable token, at durations of 1."""
    tokenizer = _tokenizer(lm)
    encodings = [clm.tokenization.encode(tokenizer, prompt.text) for prompt in asked]
    missing = {p.answer for p in asked if tokenizer.token_to_id(p.answer) is None}
    if missing:
        named = ", ".join(map(repr, sorted(missing)))
        raise clm.InputError(f"no token is {named}; give a model of this language")
    answers = np.array([tokenizer.token_to_id(p.answer) for p in asked])
    at = np.array([len(encoding.ids) - 1 for encoding in encodings])
    tokens = np.zeros((len(asked), -(-(at.max() + 1) // 16) * 16), np.int32)
    for row, encoding in zip(tokens, encodings, strict=True):
        row[: len(encoding.ids)] = encoding.ids
    best = [
        np.asarray(lm(tokens[i : i + batch], at=at[i : i + batch])).argmax(axis=-1)
        for i in range(0, len(asked), batch)
    ]
    return float(np.mean(np.concatenate(best) == answers))


def evaluate(lm: clm.LanguageModel, num_prompts: int) -> tuple[dict[str, float], list[Counted]]:
    """Held-out accuracy of each task, and every sweep."""
    rng = np.random.default_rng(SEED)
    accuracies = {
        task: accuracy(lm, [prompts.sample(rng, task, True) for _ in range(num_prompts)])
        for task in prompts.MIXTURE
    }
    sweeps = [count(lm, kind, p, n) for n in REPETITIONS for kind, p in sweep_prompts(rng, n)]
    return accuracies, sweeps


def failures(accuracies: dict[str, float], sweeps: Sequence[Counted]) -> list[str]:
    """What misses its bar, in words."""
    low = [
        f"held-out accuracy of {task} is {share:.1%}, below {MIN_ACCURACY:.0%}"
        for task, share in accuracies.items()
        if share < MIN_ACCURACY
    ]
    return low + [
        f"{s.kind}, n = {s.count}: "
        + (f"a transition is {s.error:.3f} off" if s.in_order else f"answers {' '.join(s.peaks)}")
        + f" in {s.text!r}"
        for s in sweeps
        if s.kind in BARRED and not s.passes
    ]


def table(accuracies: dict[str, float], sweeps: Sequence[Counted]) -> str:
    """Both results, for the terminal."""
    lines = ["held-out accuracy   " + "   ".join(f"{t} {a:.1%}" for t, a in accuracies.items()), ""]
    lines.append(
        f"{'sweep':<20}{'n':>2}  {'1..n in order':>14}  {'worst error':>11}  transitions (mean)"
    )
    for kind, n in dict.fromkeys((s.kind, s.count) for s in sweeps):
        group = [s for s in sweeps if (s.kind, s.count) == (kind, n)]
        good = [s for s in group if s.in_order]
        worst = f"{max(s.error or 0.0 for s in good):.3f}" if good else "-"
        means = np.mean([s.transitions for s in good], axis=0) if good else []
        shown = " ".join(f"{mean:.3f}" for mean in means)
        lines.append(
            f"{kind:<20}{n:>2}  {f'{len(good)} of {len(group)}':>14}  {worst:>11}  {shown}"
        )
    return "\n".join(lines)


def _tokenizer(lm: clm.LanguageModel) -> tokenizers.Tokenizer:
    if lm.tokenizer is None:
        raise clm.InputError("there is no tokenizer.json; give a model that has one")
    return lm.tokenizer


def main() -> None:
    """Tables, files, bars."""
    folder = program.output_dir("evaluate_apples")
    models = _MODELS.value
    results, missed = {}, []
    for name in models:
        lm = clm.load(name, dtype=jnp.float32, mesh=program.mesh())
        with about(name):
            accuracies, sweeps = evaluate(lm, _PROMPTS.value)
        print(f"\n{name}\n\n{table(accuracies, sweeps)}", flush=True)
        missed += [f"{name}: {failure}" for failure in failures(accuracies, sweeps)]
        results[name] = {
            "accuracies": accuracies,
            "sweeps": [
                dataclasses.asdict(s)
                | dict(in_order=s.in_order, transitions=s.transitions, error=s.error)
                for s in sweeps
            ],
        }
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        write_json(
            aside / "evaluate_apples.json",
            {
                "factors": FACTORS.tolist(),
                "models": results,
                "missed": missed,
                "run": program.record(),
            },
        )
    print(f"\n{folder}/evaluate_apples.json")
    if missed:
        sys.exit("\n".join(["missed:", *missed]))
    print("every bar is met")


if __name__ == "__main__":
    program.run(main, meshes=True)
