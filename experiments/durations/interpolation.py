"""Interpolation: what does the model say of a thing between two words?

    python -m continuous_lm interpolation
    python -m continuous_lm interpolation --template="We bought two [] at the"

The embeddings of one phrase turn into those of another (Marro et al., arXiv:2504.03933, section
4.3), along a line or, with --path=spherical, an arc. --answers says what is tracked; without it,
yes and no for a question that asks for them, and otherwise every token whose probability reaches
--threshold anywhere: the paper's linearity in the output space. Words of different numbers of
tokens are aligned in time (see `trials.interpolating`).
"""

from absl import flags

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

TEMPLATES = {  # the paper's
    "question": "Question: Are [] red? (yes/no)\nAnswer:",
    "usage": "We bought two [] at the",
    "repetition": "Question: Repeat the word []. Answer:",
}
YES_NO = {"Yes": ("Yes", "yes", "YES"), "No": ("No", "no", "NO")}

_TEMPLATE = flags.DEFINE_string(
    "template", TEMPLATES["question"], "A prompt with [] in the place of the words."
)
_WORDS = flags.DEFINE_list("words", ["apples", "bananas"], "From which word to which.")
_ANSWERS = flags.DEFINE_list("answers", None, "What is tracked, separated by commas.")


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("interpolation")
    if len(_WORDS.value) != 2:
        raise clm.InputError(f"--words is {','.join(_WORDS.value)}; give two, as apples,bananas")
    lm, tokenizer = pretrained.load()
    first, second = _WORDS.value
    template, points = _TEMPLATE.value, single_prompt.points(0.0)
    trial = prompt_sweeps.interpolating(
        lm, tokenizer, template, (first, second), points, single_prompt.path()
    )
    if _ANSWERS.value:
        answers = single_prompt.tracked(tokenizer, _ANSWERS.value)
    elif "(yes/no)" in template:
        answers = single_prompt.tracked(tokenizer, YES_NO)
    else:
        answers = single_prompt.reached(lm, tokenizer, trial)
    single_prompt.write(
        folder,
        "interpolation",
        tokenizer,
        trial,
        answers,
        single_prompt.run(lm, trial, answers, "interpolation"),
        xlabel=f"from {first} (0) to {second} (1)",
        point="point",
    )


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
