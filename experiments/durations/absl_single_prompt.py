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
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
)
from continuous_lm.experiments.durations.prompt_sweeps import PromptSweep
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

MAX_TRACKED_TOKENS = 20  # tokens that are tracked because they reach a threshold

_PROMPT = flags.DEFINE_string(
    "prompt", None, "A prompt of your own, instead of the paper's."
)
_PATH = flags.DEFINE_enum(
    "path", "linear", ["linear", "spherical"], "Of an interpolation between embeddings."
)
_POINTS = flags.DEFINE_integer("points", 100, "Points of the sweep.", lower_bound=2)
_MIN_FACTOR = flags.DEFINE_float(
    "min_factor", 0.1, "The smallest duration factor.", lower_bound=0.0, upper_bound=1.0
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    0.05,
    "Where no answers are given, tokens that reach this anywhere are tracked.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_CHANGE = flags.DEFINE_enum(
    "change",
    "both",
    ["both", "mass", "times"],
    "Change the weights of keys, their rotary times, or both.",
)
_ANSWER_TOKENS = flags.DEFINE_enum(
    "answer_tokens",
    "exact",
    list(answer_curves.ANSWER_TOKEN_RULES),
    "Tokens of an answer: its spellings, or all that contain it.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Points computed at once.", lower_bound=1
)


def sweep_points(start: float | None = None, stop: float = 1.0) -> np.ndarray:
    """What the sweep runs over; from --min_factor if `start` is left out."""
    return np.linspace(
        _MIN_FACTOR.value if start is None else start, stop, _POINTS.value
    )


def prompt() -> str | None:
    """--prompt."""
    return _PROMPT.value


def path() -> str:
    """--path."""
    return _PATH.value


def duration_change() -> str:
    """--change."""
    return _CHANGE.value


def batch_size() -> int:
    """--batch_size."""
    return _BATCH_SIZE.value


def find_answer_tokens(
    tokenizer: tokenizers.Tokenizer,
    answer_texts: Sequence[str] | Mapping[str, Sequence[str]],
) -> dict[str, list[int]]:
    """Answer -> the tokens that count for it, as --answer_tokens says."""
    return answer_curves.find_answer_tokens(
        tokenizer, answer_texts, _ANSWER_TOKENS.value
    )


def find_tokens_above_threshold(
    lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer, prompt_sweep: PromptSweep
) -> dict[str, list[int]]:
    """Every token whose probability reaches --threshold anywhere on the sweep, by its text.

    Raises:
      clm.InputError: if no token does.
    """
    threshold = _THRESHOLD.value
    tokens = clm.sweep.tokens_above(
        lm,
        threshold,
        batch_size=_BATCH_SIZE.value,
        **prompt_sweep.sweep.make_arguments(),
    )
    if not tokens:
        raise clm.InputError(
            f"no token reaches a probability of {threshold:g}; lower --threshold"
        )
    tokens_by_text: dict[str, list[int]] = {}
    for token in tokens[:MAX_TRACKED_TOKENS]:
        text = tokenizer.decode([token], skip_special_tokens=False).strip()
        is_whole_text = text and "\ufffd" not in text  # not a part of a character
        tokens_by_text.setdefault(
            text if is_whole_text else _token_name(tokenizer, token), []
        ).append(token)
    return tokens_by_text


def _token_name(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    """As the tokenizer names it; a model may have more tokens than its tokenizer."""
    return tokenizer.id_to_token(token) or f"token {token}"


def transition_points(count: int, factors: np.ndarray) -> dict[str, float]:
    """Where a count of mass would change its answer, (k + 1/2) / count, if the sweep gets there."""
    points_by_label = {
        f"{k + 0.5:g}/{count}": (k + 0.5) / count for k in range(1, count)
    }
    return {
        label: point for label, point in points_by_label.items() if point >= factors[0]
    }


def run_sweep(
    lm: clm.LanguageModel,
    prompt_sweep: PromptSweep,
    answer_tokens: Mapping[str, Sequence[int]],
    progress_label: str | None,
) -> answer_curves.Curves:
    """The sweep of one prompt, with a progress bar if it has a label."""
    groups = list(answer_tokens.values())
    if program.uses_pmap():
        probabilities = pmap_sweep(
            lm, groups, devices=None, **prompt_sweep.sweep.make_arguments()
        )
    else:
        probabilities = clm.sweep.probabilities(
            lm,
            groups,
            batch_size=_BATCH_SIZE.value,
            progress=progress_label if processes.is_first_process() else None,
            **prompt_sweep.sweep.make_arguments(),
        )
    return answer_curves.Curves(
        prompt_sweep.points, tuple(answer_tokens), probabilities
    )


def run_group(
    lm: clm.LanguageModel,
    groups: Sequence[Sequence[int]],
    sweeps: Sequence[clm.sweep.Sweep],
    batch_size: int,
    use_pmap: bool,
) -> list[np.ndarray]:
    """The probabilities of a set of sweeps that `clm.sweep.group_by_program` has put together."""
    if use_pmap:
        return [
            pmap_sweep(lm, groups, devices=None, **sweep.make_arguments())
            for sweep in sweeps
        ]
    return clm.sweep.run_group(lm, groups, sweeps, batch_size)


def run_sweeps(
    lm: clm.LanguageModel,
    prompt_sweeps: Mapping[Any, PromptSweep],
    answer_tokens: Mapping[str, Sequence[int]],
) -> dict[Any, answer_curves.Curves]:
    """The sweeps of many prompts, several at once."""
    keys = list(prompt_sweeps)
    sweeps = [prompt_sweep.sweep for prompt_sweep in prompt_sweeps.values()]
    probabilities_by_index: dict[int, np.ndarray] = {}
    for indices in tqdm.tqdm(
        clm.sweep.group_by_program(lm, sweeps, _BATCH_SIZE.value), unit="batch"
    ):
        group_sweeps = [sweeps[i] for i in indices]
        rows = run_group(
            lm,
            list(answer_tokens.values()),
            group_sweeps,
            _BATCH_SIZE.value,
            program.uses_pmap(),
        )
        probabilities_by_index |= zip(indices, rows, strict=True)
    answer_texts = tuple(answer_tokens)
    return {
        key: answer_curves.Curves(
            prompt_sweeps[key].points, answer_texts, probabilities_by_index[i]
        )
        for i, key in enumerate(keys)
    }


def write_results(
    folder: pathlib.Path,
    name: str,
    tokenizer: tokenizers.Tokenizer,
    prompt_sweep: PromptSweep,
    answer_tokens: Mapping[str, Sequence[int]],
    answer_curves: answer_curves.Curves,
    *,
    xlabel: str,
    point_name: str = "duration factor",
    marks: Mapping[str, float] | None = None,
) -> None:
    """Writes the figure and every number of a sweep, and prints its table; process 0 alone."""
    if not processes.is_first_process():
        return
    figure = plots.answer_curves(
        answer_curves, xlabel=xlabel, title=prompt_sweep.prompt, marks=dict(marks or {})
    )
    token_names = {
        a: [_token_name(tokenizer, t) for t in ids] for a, ids in answer_tokens.items()
    }
    with write_atomically(folder) as staging_folder:
        plots.save(figure, staging_folder, name)
        write_json(
            staging_folder / f"{name}.json",
            {
                **prompt_sweep.as_json(),
                "tracked": token_names,
                "curves": answer_curves.as_json(),
                "run": program.record(),
            },
        )
    print(f"{prompt_sweep.prompt}\n\n{answer_curves.as_table(point_name)}\n")
    if answer_curves.probabilities.sum(axis=1).max() < 0.5:
        print(
            "What is tracked never gets half of the probability: this model answers otherwise.\n"
        )
    print(f"{folder}/{name}.json, .png, .pdf")
