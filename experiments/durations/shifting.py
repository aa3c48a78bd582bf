"""Shifting: the same sentence later, or slower. A rotary model should not mind the first.

    python -m continuous_lm shifting [--transform=scaling] [--model=FOLDER]

A translation begins the sentence 0 to 10 tokens later: rotary models depend on differences of times
alone, so that nothing changes but rounding; a model with learned positions (GPT-2) reads other rows
of its table. A scaling makes every token last 0.01 to 1.5, to which no model is invariant (Marro et
al., arXiv:2504.03933).
"""

import numpy as np
from absl import flags

from continuous_lm.experiments.common import (
    absl_pretrained as pretrained,
)
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.durations import absl_single_prompt as single_prompt
from continuous_lm.experiments.durations import prompt_sweeps

PROMPTS = (
    "The capital of France is",
    "The Great Gatsby is my favourite",
)  # the paper's
BUNDLED_PROMPT = (
    'Question: How many fruits are listed in the sentence "apple apple apple"?'
)
BUNDLED_PROMPT += " Reply with a single-digit number\nAnswer: "

_TRANSFORM = flags.DEFINE_enum(
    "transform", "translation", ["translation", "scaling"], "Of all times."
)


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("shifting")
    lm, tokenizer = pretrained.load()
    prompt = single_prompt.prompt() or (
        BUNDLED_PROMPT if pretrained.is_bundled() else PROMPTS[0]
    )
    if _TRANSFORM.value == "translation":
        prompt_sweep = prompt_sweeps.shift_prompt(
            tokenizer, prompt, single_prompt.sweep_points(0.0, 10.0)
        )
        xlabel = "shift in tokens"
    else:
        prompt_sweep = prompt_sweeps.stretch_prompt(
            tokenizer,
            prompt,
            single_prompt.sweep_points(0.01, 1.5),
            single_prompt.duration_change(),
        )
        xlabel = "duration of every token"
    answer_tokens = single_prompt.find_tokens_above_threshold(
        lm, tokenizer, prompt_sweep
    )
    answer_curves = single_prompt.run_sweep(
        lm, prompt_sweep, answer_tokens, _TRANSFORM.value
    )
    single_prompt.write_results(
        folder,
        "shifting",
        tokenizer,
        prompt_sweep,
        answer_tokens,
        answer_curves,
        xlabel=xlabel,
        point_name=xlabel,
    )
    largest_change = np.abs(
        answer_curves.probabilities - answer_curves.probabilities[:1]
    ).max()
    print(
        f"largest change of a tracked probability along the sweep: {largest_change:.2g}"
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
