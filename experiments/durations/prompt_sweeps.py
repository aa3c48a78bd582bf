"""Sweeps of a prompt: the changes of its inputs, and the answers at every point.

shrink_span          a span of the prompt gets shorter (or longer)
interpolate_phrases  one phrase of the prompt is interpolated to another
shift_prompt         the whole prompt starts later
stretch_prompt       the whole prompt gets shorter or longer
sweep_prompt         probabilities of answers along the sweep of one prompt
sweep_prompts        the same for many prompts, batched
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tokenizers
import tqdm

import continuous_lm as clm
from continuous_lm.analysis.sweep import Sweep, pmap_sweep
from continuous_lm.experiments.common import answer_curves
from continuous_lm.experiments.durations import single_prompt
from continuous_lm.experiments.durations.alignment import (
    Alignment,
    align_phrases,
    interpolate_vectors,
)
from continuous_lm.inputs import Inputs
from continuous_lm.parallel import processes

SLOT = "[]"  # where a template of an interpolation holds its phrase
MAX_TRACKED_TOKENS = 20  # tokens that are tracked because they reach a threshold


@dataclasses.dataclass(frozen=True)
class PromptSweep:
    """A prompt with the sweep over it.

    Attributes:
      prompt: the text.
      token_names: the tokenizer's names of the text's tokens.
      token_span: the tokens that change.
      points: values of the sweep's parameter, [P].
      sweep: the model's inputs at those points.
    """

    prompt: str
    token_names: list[str]
    token_span: tuple[int, int]
    points: np.ndarray
    sweep: Sweep

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "tokens": self.token_names,
            "span": list(self.token_span),
        }


def shrink_span(
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    character_span: tuple[int, int],
    factors: np.ndarray,
    change: str = "both",
) -> PromptSweep:
    """The tokens that overlap the characters [begin, end) last `factors` [P] of a token each."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    token_span = clm.tokenization.token_span(encoding, *character_span)
    num_tokens = len(encoding.ids)

    def make_inputs() -> Inputs:
        ones = np.ones(num_tokens, np.float32)
        durations = clm.durations.scale(ones, factors, token_span)
        changed = clm.sweep.change_durations(durations, change)
        token_ids = np.array(encoding.ids)
        return Inputs(token_ids, durations=changed.durations, times=changed.times)

    sweep = Sweep(len(factors), num_tokens, make_inputs)
    return PromptSweep(prompt, encoding.tokens, token_span, factors, sweep)


def shift_prompt(
    tokenizer: tokenizers.Tokenizer, prompt: str, shifts: np.ndarray
) -> PromptSweep:
    """The whole prompt begins at the times `shifts` [P] instead of 0."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    token_ids = np.array(encoding.ids)
    inputs = Inputs(token_ids, start=shifts)
    sweep = Sweep(len(shifts), len(token_ids), lambda: inputs)
    return PromptSweep(prompt, encoding.tokens, (0, len(token_ids)), shifts, sweep)


def stretch_prompt(
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    factors: np.ndarray,
    change: str = "both",
) -> PromptSweep:
    """Every token of the prompt lasts `factors` [P]."""
    encoding = clm.tokenization.encode(tokenizer, prompt)
    num_tokens = len(encoding.ids)
    durations = np.asarray(factors, np.float32)[:, None] * np.ones(
        num_tokens, np.float32
    )
    changed = clm.sweep.change_durations(durations, change)
    token_ids = np.array(encoding.ids)
    inputs = Inputs(token_ids, durations=changed.durations, times=changed.times)
    sweep = Sweep(len(factors), num_tokens, lambda: inputs)
    return PromptSweep(prompt, encoding.tokens, (0, num_tokens), factors, sweep)


@dataclasses.dataclass(frozen=True)
class EncodedTemplate:
    """A template with a phrase in its slot, encoded.

    Attributes:
      token_ids: token ids of the text, int [T].
      token_names: as the tokenizer names them.
      token_span: the tokens of the phrase.
    """

    token_ids: np.ndarray
    token_names: list[str]
    token_span: tuple[int, int]

    @property
    def prefix_ids(self) -> np.ndarray:
        return self.token_ids[: self.token_span[0]]

    @property
    def phrase_ids(self) -> np.ndarray:
        return self.token_ids[slice(*self.token_span)]

    @property
    def suffix_ids(self) -> np.ndarray:
        return self.token_ids[self.token_span[1] :]


def encode_template(
    tokenizer: tokenizers.Tokenizer, template: str, phrase: str
) -> EncodedTemplate:
    """Put the phrase in the template's slot and encode the text."""
    begin = template.index(SLOT)
    encoding = clm.tokenization.encode(tokenizer, template.replace(SLOT, phrase))
    token_span = clm.tokenization.token_span(encoding, begin, begin + len(phrase))
    return EncodedTemplate(np.array(encoding.ids), encoding.tokens, token_span)


def interpolate_phrases(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    template: str,
    phrases: tuple[str, str],
    points: np.ndarray,
    path: str = "linear",
) -> PromptSweep:
    """Interpolate the phrase in the template's slot from the first (at 0) to the second (at 1).

    Phrases with the same number of tokens are interpolated token by token. Others are aligned in
    time: both fill the same span, whose length is interpolated too. The span is sampled at the end
    of each token of either phrase. A sample mixes the embeddings of the two tokens at that time,
    and its weight is interpolated between the weights in the two phrases. The two ends of the sweep
    are exactly the two ordinary prompts.

    Raises:
      clm.InputError: if the template has not one slot, a phrase is empty, or the rest of the prompt
        is not split into the same tokens around both phrases.
    """
    if template.count(SLOT) != 1:
        raise clm.InputError(f"the template {template!r} must hold {SLOT} once")
    if not all(phrase.strip() for phrase in phrases):
        raise clm.InputError(
            f"of {phrases[0]!r} and {phrases[1]!r} one is empty; give two words"
        )
    first = encode_template(tokenizer, template, phrases[0])
    second = encode_template(tokenizer, template, phrases[1])
    if not (
        np.array_equal(first.prefix_ids, second.prefix_ids)
        and np.array_equal(first.suffix_ids, second.suffix_ids)
    ):
        raise clm.InputError(
            f"{phrases[0]!r} and {phrases[1]!r} cannot be aligned: the prompt around them is not"
            " split into the same tokens; choose other words"
        )
    alignment = align_phrases(len(first.phrase_ids), len(second.phrase_ids))
    num_samples = len(alignment.end_shares)
    num_tokens = len(first.prefix_ids) + num_samples + len(first.suffix_ids)

    def make_inputs() -> Inputs:
        return _interpolation_inputs(lm, first, second, alignment, points, path)

    begin, end = first.token_span
    sample_names = alignment.sample_names(
        np.array(first.token_names)[begin:end],
        np.array(second.token_names)[slice(*second.token_span)],
    )
    token_names = [*first.token_names[:begin], *sample_names, *first.token_names[end:]]
    sweep = Sweep(len(points), num_tokens, make_inputs)
    token_span = (begin, begin + num_samples)
    return PromptSweep(template, token_names, token_span, points, sweep)


def _interpolation_inputs(
    lm: clm.LanguageModel,
    first: EncodedTemplate,
    second: EncodedTemplate,
    alignment: Alignment,
    points: np.ndarray,
    path: str,
) -> Inputs:
    """Embeddings [P, T, D], durations and times [P, T] of an interpolation."""
    table = lm.params["embedding"]

    def embed(token_ids: np.ndarray) -> np.ndarray:
        return np.asarray(table[token_ids], np.float32)

    def repeat(token_ids: np.ndarray) -> np.ndarray:
        return np.repeat(embed(token_ids)[None], len(points), axis=0)

    first_indices, second_indices = alignment.token_indices
    interpolated = interpolate_vectors(
        embed(first.phrase_ids[first_indices]),
        embed(second.phrase_ids[second_indices]),
        points,
        path,
    )
    embeddings = np.concatenate(
        [repeat(first.prefix_ids), interpolated, repeat(first.suffix_ids)], axis=1
    )
    num_before = len(first.prefix_ids)
    num_after = len(first.suffix_ids)
    durations, times = alignment.durations_and_times(points, num_before, num_after)
    return Inputs(embeddings=embeddings, durations=durations, times=times)


# --- The answers ------------------------------------------------------------------------------


def find_tokens_above_threshold(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompt_sweep: PromptSweep,
    threshold: float,
    batch_size: int,
) -> dict[str, list[int]]:
    """Every token whose probability reaches the threshold anywhere on the sweep, by its text.

    Raises:
      clm.InputError: if no token does.
    """
    token_ids = clm.sweep.tokens_above(
        lm,
        threshold,
        batch_size=batch_size,
        **prompt_sweep.sweep.make_inputs()._asdict(),
    )
    if not token_ids:
        raise clm.InputError(
            f"no token reaches a probability of {threshold:g}; lower --threshold"
        )
    tokens_by_text: dict[str, list[int]] = {}
    for token_id in token_ids[:MAX_TRACKED_TOKENS]:
        text = tokenizer.decode([token_id], skip_special_tokens=False).strip()
        if not text or "\ufffd" in text:  # a part of a character
            text = answer_curves.token_name(tokenizer, token_id)
        tokens_by_text.setdefault(text, []).append(token_id)
    return tokens_by_text


def shrink_prompt(
    config: single_prompt.ShrinkConfig,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    character_span: tuple[int, int],
    answers: answer_curves.Answers,
    labels: single_prompt.Labels,
) -> single_prompt.SweepResult:
    """The probabilities of the answers as a span of the prompt lasts less."""
    prompt_sweep = shrink_span(
        tokenizer, prompt, character_span, config.factors(), config.change
    )
    answer_tokens = answer_curves.find_answer_tokens(
        tokenizer, answers, config.answer_tokens
    )
    return sweep_prompt(config, lm, tokenizer, prompt_sweep, answer_tokens, labels)


def sweep_prompt(
    config: single_prompt.SweepConfig,
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompt_sweep: PromptSweep,
    answer_tokens: Mapping[str, Sequence[int]],
    labels: single_prompt.Labels,
) -> single_prompt.SweepResult:
    """The probabilities of the answers along the sweep of one prompt, with a progress bar."""
    groups = list(answer_tokens.values())
    arguments = prompt_sweep.sweep.make_inputs()._asdict()
    if config.pmap:
        probabilities = pmap_sweep(lm, groups, devices=None, **arguments)
    else:
        probabilities = clm.sweep.probabilities(
            lm,
            groups,
            batch_size=config.batch_size,
            progress=labels.name if processes.is_first_process() else None,
            **arguments,
        )
    tracked = {
        answer: tuple(
            answer_curves.token_name(tokenizer, token_id) for token_id in token_ids
        )
        for answer, token_ids in answer_tokens.items()
    }
    return single_prompt.SweepResult(
        prompt=prompt_sweep.prompt,
        token_names=tuple(prompt_sweep.token_names),
        token_span=prompt_sweep.token_span,
        tracked=tracked,
        curves=answer_curves.Curves(
            prompt_sweep.points, tuple(answer_tokens), probabilities
        ),
        labels=labels,
    )


Key = TypeVar("Key")


def sweep_prompts(
    config: single_prompt.SweepConfig,
    lm: clm.LanguageModel,
    prompt_sweeps: Mapping[Key, PromptSweep],
    answer_tokens: Mapping[str, Sequence[int]],
) -> dict[Key, answer_curves.Curves]:
    """The sweeps of many prompts, several at once."""
    keys = list(prompt_sweeps)
    sweeps = [prompt_sweep.sweep for prompt_sweep in prompt_sweeps.values()]
    groups = list(answer_tokens.values())
    curves_by_key: dict[Key, answer_curves.Curves] = {}
    sweep_groups = clm.sweep.group_by_program(lm, sweeps, config.batch_size)
    for indices in tqdm.tqdm(sweep_groups, unit="batch"):
        group_sweeps = [sweeps[i] for i in indices]
        group_probabilities = run_group(
            lm, groups, group_sweeps, config.batch_size, config.pmap
        )
        for index, probabilities in zip(indices, group_probabilities, strict=True):
            key = keys[index]
            curves_by_key[key] = answer_curves.Curves(
                prompt_sweeps[key].points, tuple(answer_tokens), probabilities
            )
    return {key: curves_by_key[key] for key in keys}


def run_group(
    lm: clm.LanguageModel,
    groups: Sequence[Sequence[int]],
    sweeps: Sequence[Sweep],
    batch_size: int,
    use_pmap: bool,
) -> list[np.ndarray]:
    """The probabilities of a set of sweeps that `clm.sweep.group_by_program` has put together."""
    if use_pmap:
        return [
            pmap_sweep(lm, groups, devices=None, **sweep.make_inputs()._asdict())
            for sweep in sweeps
        ]
    return clm.sweep.run_group(lm, groups, sweeps, batch_size)
