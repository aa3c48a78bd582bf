"""Shifting: the same sentence later, or slower. A rotary model should not mind the first.

    python -m continuous_lm shifting [--change=scaling] [--model=FOLDER]

A translation begins the sentence 0 to 10 tokens later: rotary models depend on differences of times
alone, so that nothing changes but rounding; a model with learned positions (GPT-2) reads other rows
of its table. A scaling makes every token last 0.01 to 1.5, to which no model is invariant (Marro et
al., arXiv:2504.03933).
"""

import numpy as np
from absl import flags

from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

PROMPTS = ("The capital of France is", "The Great Gatsby is my favourite")  # the paper's
EMBEDDED = 'Question: How many fruits are listed in the sentence "apple apple apple"? Reply with a'
EMBEDDED += " single-digit number\nAnswer: "

_CHANGE = flags.DEFINE_enum("change", "translation", ["translation", "scaling"], "Of all times.")


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("shifting")
    lm, tokenizer = pretrained.load()
    prompt = single_prompt.prompt() or (EMBEDDED if pretrained.is_bundled() else PROMPTS[0])
    if _CHANGE.value == "translation":
        trial = prompt_sweeps.moving(tokenizer, prompt, single_prompt.points(0.0, 10.0))
        xlabel = "shift in tokens"
    else:
        trial = prompt_sweeps.stretching(
            tokenizer, prompt, single_prompt.points(0.01, 1.5), single_prompt.vary()
        )
        xlabel = "duration of every token"
    answers = single_prompt.reached(lm, tokenizer, trial)
    result = single_prompt.run(lm, trial, answers, _CHANGE.value)
    single_prompt.write(
        folder, "shifting", tokenizer, trial, answers, result, xlabel=xlabel, point=xlabel
    )
    moved = np.abs(result.probabilities - result.probabilities[:1]).max()
    print(f"largest change of a tracked probability along the sweep: {moved:.2g}")


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
