"""Interpolation: what does the model say of a thing between two words?

    python -m continuous_lm interpolation
    python -m continuous_lm interpolation --template="We bought two [] at the"

The embeddings of one phrase turn into those of another (Marro et al., arXiv:2504.03933, section
4.3), along a line or, with --path=spherical, an arc. --answers says what is tracked; without it,
yes and no for a question that asks for them, and otherwise every token whose probability reaches
--threshold anywhere: the paper's linearity in the output space. Words of different numbers of
tokens are aligned in time (see `prompt_sweeps.interpolate_phrases`).
"""

from absl import flags

import continuous_lm as clm
from continuous_lm.experiments.common import (
    absl_pretrained as pretrained,
)
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.durations import absl_single_prompt as single_prompt
from continuous_lm.experiments.durations import prompt_sweeps

TEMPLATES = {  # the paper's
    "question": "Question: Are [] red? (yes/no)\nAnswer:",
    "usage": "We bought two [] at the",
    "repetition": "Question: Repeat the word []. Answer:",
}
YES_NO_SPELLINGS = {"Yes": ("Yes", "yes", "YES"), "No": ("No", "no", "NO")}

_TEMPLATE = flags.DEFINE_string(
    "template", TEMPLATES["question"], "A prompt with [] in the place of the words."
)
_WORDS = flags.DEFINE_list("words", ["apples", "bananas"], "From which word to which.")
_ANSWERS = flags.DEFINE_list("answers", None, "What is tracked, separated by commas.")


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("interpolation")
    if len(_WORDS.value) != 2:
        raise clm.InputError(
            f"--words is {','.join(_WORDS.value)}; give two, as apples,bananas"
        )
    lm, tokenizer = pretrained.load()
    first, second = _WORDS.value
    template, sweep_points = _TEMPLATE.value, single_prompt.sweep_points(0.0)
    prompt_sweep = prompt_sweeps.interpolate_phrases(
        lm, tokenizer, template, (first, second), sweep_points, single_prompt.path()
    )
    if _ANSWERS.value:
        answer_tokens = single_prompt.find_answer_tokens(tokenizer, _ANSWERS.value)
    elif "(yes/no)" in template:
        answer_tokens = single_prompt.find_answer_tokens(tokenizer, YES_NO_SPELLINGS)
    else:
        answer_tokens = single_prompt.find_tokens_above_threshold(
            lm, tokenizer, prompt_sweep
        )
    single_prompt.write_results(
        folder,
        "interpolation",
        tokenizer,
        prompt_sweep,
        answer_tokens,
        single_prompt.run_sweep(lm, prompt_sweep, answer_tokens, "interpolation"),
        xlabel=f"from {first} (0) to {second} (1)",
        point_name="point",
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
