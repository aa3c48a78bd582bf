"""Interpolation: the model's answers about embeddings between two words.

    python -m continuous_lm interpolation
    python -m continuous_lm interpolation --template="We bought two [] at the"

The embeddings of one phrase are interpolated to those of another (Marro et al., arXiv:2504.03933,
section 4.3), along a line or, with --path=spherical, an arc. --answers sets the tracked answers. By
default these are yes and no for a yes/no question. For other prompts they are all tokens whose
probability reaches --threshold at some point: the paper's linearity in the output space. Words with
different numbers of tokens are aligned in time (see `prompt_sweeps.interpolate_phrases`).
"""

import dataclasses

import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.common import answer_curves, pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

TEMPLATES = {  # the paper's
    "question": "Question: Are [] red? (yes/no)\nAnswer:",
    "usage": "We bought two [] at the",
    "repetition": "Question: Repeat the word []. Answer:",
}
YES_NO_SPELLINGS: answer_curves.Answers = {
    "Yes": ("Yes", "yes", "YES"),
    "No": ("No", "no", "NO"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    single_prompt.SweepConfig,
    single_prompt.PathConfig,
    single_prompt.AnswerConfig,
    single_prompt.ThresholdConfig,
):
    """Flags of interpolation."""

    template: str = program.flag(
        TEMPLATES["question"], help="A prompt with [] in the place of the words."
    )
    words: tuple[str, ...] = program.flag(
        ("apples", "bananas"), help="From which word to which."
    )
    answers: tuple[str, ...] | None = program.flag(
        None, help="Answers to track, separated by commas."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.words) != 2:
            raise clm.InputError(
                f"--words is {','.join(self.words)}; give two, as apples,bananas"
            )


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> single_prompt.SweepResult:
    """The answers from the first word to the second."""
    first, second = config.words
    prompt_sweep = prompt_sweeps.interpolate_phrases(
        lm,
        tokenizer,
        config.template,
        (first, second),
        config.even_points(0.0),
        config.path,
    )
    answers: answer_curves.Answers | None = config.answers
    if not answers and "(yes/no)" in config.template:
        answers = YES_NO_SPELLINGS
    if answers:
        answer_tokens = answer_curves.find_answer_tokens(
            tokenizer, answers, config.answer_tokens
        )
    else:
        answer_tokens = prompt_sweeps.find_tokens_above_threshold(
            lm, tokenizer, prompt_sweep, config.threshold, config.batch_size
        )
    labels = single_prompt.Labels(
        "interpolation", f"from {first} (0) to {second} (1)", "point"
    )
    return prompt_sweeps.sweep_prompt(
        config, lm, tokenizer, prompt_sweep, answer_tokens, labels
    )


def run(config: Config) -> single_prompt.SweepResult:
    """Load the model, interpolate between the words, and write the answers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
