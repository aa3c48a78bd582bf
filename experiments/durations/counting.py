"""Counting: as repeated words last less, does the model count fewer of them?

    python -m continuous_lm counting [--model=FOLDER] [--word=cat --category=animal]

The durations of "apple apple apple apple" shrink together from 1 to 0.1 of a token each (Marro et
al., arXiv:2504.03933, section 4.1). A model that counts by mass answers k where the words last for
about k tokens in all, so that its answer changes near factors (k + 1/2) / n. On the embedded model
this takes about ten seconds and gives 4, 3, 2, 1.
"""

import dataclasses

import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

CATEGORY_OF_WORD = {"apple": "fruit", "cat": "animal", "rose": "flower"}  # the paper's
PROMPT_TEMPLATE = (
    'Question: In the sentence "{words}", how many times is {category} mentioned?'
    " Reply with a single-digit number\nAnswer: "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(single_prompt.ShrinkConfig):
    """Flags of counting."""

    word: str = program.flag("apple", help="The word that is repeated.")
    category: str | None = program.flag(
        None, help="Category of the word; known for apple, cat and rose."
    )
    repetitions: int = program.flag(
        4, help="Number of repetitions.", lower_bound=1, upper_bound=9
    )
    prompt: str | None = program.flag(
        None, help="A prompt of your own, instead of the paper's."
    )
    span: str | None = program.flag(
        None,
        help="The piece of --prompt that shrinks.  [default: from the first --word to the last]",
    )


def make_prompt(config: Config) -> tuple[str, tuple[int, int]]:
    """The prompt, and the first character of its shrinking span and the one after its last."""
    word = config.word
    if config.prompt is not None:
        span_text = word if config.span is None else config.span
        return config.prompt, clm.tokenization.find_characters(config.prompt, span_text)
    if config.span is not None:
        raise clm.InputError("--span is a piece of --prompt; give both")
    category = config.category or CATEGORY_OF_WORD.get(word)
    if category is None:
        raise clm.InputError(
            f"set --category for {word!r}; known words are {', '.join(CATEGORY_OF_WORD)}"
        )
    article = "an" if category[0] in "aeiou" else "a"
    words = " ".join([word] * config.repetitions)
    words_begin = PROMPT_TEMPLATE.index("{words}")
    prompt = PROMPT_TEMPLATE.format(words=words, category=f"{article} {category}")
    return prompt, (words_begin, words_begin + len(words))


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> single_prompt.SweepResult:
    """The digits along the sweep."""
    prompt, character_span = make_prompt(config)
    num_repetitions = config.repetitions if config.prompt is None else 0
    marks = single_prompt.transition_points(num_repetitions, config.factors())
    labels = single_prompt.Labels(
        "counting", "duration of each repeated token", marks=marks
    )
    return prompt_sweeps.shrink_prompt(
        config,
        lm,
        tokenizer,
        prompt,
        character_span,
        clm.tokenization.DIGITS,
        labels,
    )


def run(config: Config) -> single_prompt.SweepResult:
    """Load the model, shrink the words, and write the answers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
