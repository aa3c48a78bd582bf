"""What the programs of one prompt share: flags of a sweep, tracked answers, and what they write."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import tqdm
from absl import flags

import continuous_lm as clm
from continuous_lm.analysis.sweep import pmap_sweep
from continuous_lm.experiments.common import answer_curves, plots, program
from continuous_lm.experiments.durations.prompt_sweeps import Trial
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

MOST = 20  # tokens that are tracked because they reach a threshold

_PROMPT = flags.DEFINE_string("prompt", None, "A prompt of your own, instead of the paper's.")
_PATH = flags.DEFINE_enum(
    "path", "linear", ["linear", "spherical"], "Of an interpolation between embeddings."
)
_POINTS = flags.DEFINE_integer("points", 100, "Points of the sweep.", lower_bound=2)
_LEAST = flags.DEFINE_float(
    "least", 0.1, "The smallest duration factor.", lower_bound=0.0, upper_bound=1.0
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    0.05,
    "Where no answers are given, tokens that reach this anywhere are tracked.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_VARY = flags.DEFINE_enum(
    "vary",
    "both",
    ["both", "mass", "times"],
    "Change the weights of keys, their rotary times, or both.",
)
_TRACKING = flags.DEFINE_enum(
    "tracking",
    "exact",
    list(answer_curves.TRACKING),
    "Tokens of an answer: its spellings, or all that contain it.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Points computed at once.", lower_bound=1)


def points(least: float | None = None, most: float = 1.0) -> np.ndarray:
    """What the sweep runs over; from --least if `least` is left out."""
    return np.linspace(_LEAST.value if least is None else least, most, _POINTS.value)


def prompt() -> str | None:
    """--prompt."""
    return _PROMPT.value


def path() -> str:
    """--path."""
    return _PATH.value


def vary() -> str:
    """--vary."""
    return _VARY.value


def batch_size() -> int:
    """--batch_size."""
    return _BATCH_SIZE.value


def tracked(
    tokenizer: tokenizers.Tokenizer, answers: Sequence[str] | Mapping[str, Sequence[str]]
) -> dict[str, list[int]]:
    """Answer -> the tokens that count for it, as --tracking says."""
    return answer_curves.tracked(tokenizer, answers, _TRACKING.value)


def reached(
    lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer, trial: Trial
) -> dict[str, list[int]]:
    """Every token whose probability reaches --threshold anywhere on the sweep, by its text.

    Raises:
      clm.InputError: if no token does.
    """
    threshold = _THRESHOLD.value
    tokens = clm.sweep.reached(
        lm, threshold, batch_size=_BATCH_SIZE.value, **trial.sweep.arguments()
    )
    if not tokens:
        raise clm.InputError(f"no token reaches a probability of {threshold:g}; lower --threshold")
    found: dict[str, list[int]] = {}
    for token in tokens[:MOST]:
        text = tokenizer.decode([token], skip_special_tokens=False).strip()
        whole = text and "\ufffd" not in text  # not a part of a character
        found.setdefault(text if whole else _name(tokenizer, token), []).append(token)
    return found


def _name(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    """As the tokenizer names it; a model may have more tokens than its tokenizer."""
    return tokenizer.id_to_token(token) or f"token {token}"


def ideal(count: int, factors: np.ndarray) -> dict[str, float]:
    """Where a count of mass would change its answer, (k + 1/2) / count, if the sweep gets there."""
    found = {f"{k + 0.5:g}/{count}": (k + 0.5) / count for k in range(1, count)}
    return {label: point for label, point in found.items() if point >= factors[0]}


def run(
    lm: clm.LanguageModel, trial: Trial, answers: Mapping[str, Sequence[int]], label: str | None
) -> answer_curves.Curves:
    """The sweep of one trial, with a progress bar if it has a label."""
    groups = list(answers.values())
    if program.pmap():
        probabilities = pmap_sweep(lm, groups, devices=None, **trial.sweep.arguments())
    else:
        probabilities = clm.sweep.probabilities(
            lm,
            groups,
            batch_size=_BATCH_SIZE.value,
            progress=label if processes.is_first() else None,
            **trial.sweep.arguments(),
        )
    return answer_curves.Curves(trial.points, tuple(answers), probabilities)


def together(
    lm: clm.LanguageModel,
    groups: Sequence[Sequence[int]],
    sweeps: Sequence[clm.sweep.Sweep],
    batch_size: int,
    pmap: bool,
) -> list[np.ndarray]:
    """The probabilities of a set of sweeps that `clm.sweep.plan` has made."""
    if pmap:
        return [pmap_sweep(lm, groups, devices=None, **swept.arguments()) for swept in sweeps]
    return clm.sweep.together(lm, groups, sweeps, batch_size)


def run_all(
    lm: clm.LanguageModel, all_trials: Mapping[Any, Trial], answers: Mapping[str, Sequence[int]]
) -> dict[Any, answer_curves.Curves]:
    """The sweeps of many trials, several at once."""
    keys = list(all_trials)
    sweeps = [trial.sweep for trial in all_trials.values()]
    found: dict[int, np.ndarray] = {}
    for indices in tqdm.tqdm(clm.sweep.plan(lm, sweeps, _BATCH_SIZE.value), unit="batch"):
        chosen = [sweeps[i] for i in indices]
        rows = together(lm, list(answers.values()), chosen, _BATCH_SIZE.value, program.pmap())
        found |= zip(indices, rows, strict=True)
    names = tuple(answers)
    return {
        key: answer_curves.Curves(all_trials[key].points, names, found[i])
        for i, key in enumerate(keys)
    }


def write(
    folder: pathlib.Path,
    name: str,
    tokenizer: tokenizers.Tokenizer,
    trial: Trial,
    answers: Mapping[str, Sequence[int]],
    result: answer_curves.Curves,
    *,
    xlabel: str,
    point: str = "duration factor",
    marks: Mapping[str, float] | None = None,
) -> None:
    """Writes the figure and every number of a trial, and prints its table; process 0 alone."""
    if not processes.is_first():
        return
    figure = plots.answer_curves(result, xlabel=xlabel, title=trial.prompt, marks=dict(marks or {}))
    spelled = {a: [_name(tokenizer, t) for t in ids] for a, ids in answers.items()}
    with written_aside(folder) as aside:
        plots.save(figure, aside, name)
        write_json(
            aside / f"{name}.json",
            {
                **trial.as_json(),
                "tracked": spelled,
                "curves": result.as_json(),
                "run": program.record(),
            },
        )
    print(f"{trial.prompt}\n\n{result.as_table(point)}\n")
    if result.probabilities.sum(axis=1).max() < 0.5:
        print("What is tracked never gets half of the probability: this model answers otherwise.\n")
    print(f"{folder}/{name}.json, .png, .pdf")
