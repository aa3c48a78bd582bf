"""Shifting: the same sentence later, or slower. A rotary model is invariant to the first.

    python -m continuous_lm shifting [--transform=scaling] [--model=FOLDER]

A translation starts the sentence 0 to 10 tokens later. Rotary models depend only on differences of
times, so they change only by rounding. A model with learned positions (GPT-2) reads other rows of
its table. A scaling makes every token last 0.01 to 1.5; no model is invariant to it (Marro et al.,
arXiv:2504.03933).
"""

import dataclasses
from typing import Literal

import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

PROMPTS = (
    "The capital of France is",
    "The Great Gatsby is my favourite",
)  # the paper's
BUNDLED_PROMPT = (
    'Question: How many fruits are listed in the sentence "apple apple apple"?'
)
BUNDLED_PROMPT += " Reply with a single-digit number\nAnswer: "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    single_prompt.SweepConfig,
    single_prompt.ChangeConfig,
    single_prompt.ThresholdConfig,
):
    """Flags of shifting."""

    transform: Literal["translation", "scaling"] = program.flag(
        "translation", help="Transform of all times."
    )
    prompt: str | None = program.flag(
        None, help="A prompt of your own, instead of the paper's."
    )


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> single_prompt.SweepResult:
    """The answers as the prompt comes later, or takes longer."""
    prompt = config.prompt or (BUNDLED_PROMPT if config.is_bundled else PROMPTS[0])
    if config.transform == "translation":
        xlabel = "shift in tokens"
        prompt_sweep = prompt_sweeps.shift_prompt(
            tokenizer, prompt, config.even_points(0.0, 10.0)
        )
    else:
        xlabel = "duration of every token"
        prompt_sweep = prompt_sweeps.stretch_prompt(
            tokenizer, prompt, config.even_points(0.01, 1.5), config.change
        )
    answer_tokens = prompt_sweeps.find_tokens_above_threshold(
        lm, tokenizer, prompt_sweep, config.threshold, config.batch_size
    )
    labels = single_prompt.Labels("shifting", xlabel, xlabel, shows_change=True)
    return prompt_sweeps.sweep_prompt(
        config, lm, tokenizer, prompt_sweep, answer_tokens, labels
    )


def run(config: Config) -> single_prompt.SweepResult:
    """Load the model, move the prompt in time, and write the answers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
