"""Counting: as repeated words last less, does the model count fewer of them?

    python -m continuous_lm counting [--model=FOLDER] [--word=cat --category=animal]

The durations of "apple apple apple apple" shrink together from 1 to 0.1 of a token each (Marro et
al., arXiv:2504.03933, section 4.1). A model that counts by mass answers k where the words last for
about k tokens in all, so that its answer changes near factors (k + 1/2) / n. On the embedded model
this takes about ten seconds and gives 4, 3, 2, 1.
"""

from absl import flags

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

CATEGORY_OF_WORD = {"apple": "fruit", "cat": "animal", "rose": "flower"}  # the paper's
PROMPT_TEMPLATE = (
    'Question: In the sentence "{words}", how many times is {category} mentioned?'
    " Reply with a single-digit number\nAnswer: "
)

_WORD = flags.DEFINE_string("word", "apple", "The word that is repeated.")
_CATEGORY = flags.DEFINE_string(
    "category", None, "What the word is; known for apple, cat and rose."
)
_REPETITIONS = flags.DEFINE_integer(
    "repetitions", 4, "How many times.", lower_bound=1, upper_bound=9
)
_SPAN = flags.DEFINE_string(
    "span",
    None,
    "The piece of --prompt that shrinks.  [default: from the first --word to the last]",
)


def prompt_and_span() -> tuple[str, tuple[int, int]]:
    """The prompt, and the first character of its shrinking span and the one after its last."""
    word, custom_prompt = _WORD.value, single_prompt.prompt()
    if custom_prompt is not None:
        span_text = word if _SPAN.value is None else _SPAN.value
        return custom_prompt, clm.tokenization.find_characters(custom_prompt, span_text)
    if _SPAN.value is not None:
        raise clm.InputError("--span is a piece of --prompt; give both")
    category = _CATEGORY.value or CATEGORY_OF_WORD.get(word)
    if category is None:
        raise clm.InputError(
            f"say what {word!r} is with --category; known are {', '.join(CATEGORY_OF_WORD)}"
        )
    article = "an" if category[0] in "aeiou" else "a"
    words = " ".join([word] * _REPETITIONS.value)
    words_begin = PROMPT_TEMPLATE.index("{words}")
    prompt = PROMPT_TEMPLATE.format(words=words, category=f"{article} {category}")
    return prompt, (words_begin, words_begin + len(words))


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("counting")
    prompt, character_span = prompt_and_span()
    lm, tokenizer = pretrained.load()
    factors, answer_tokens = (
        single_prompt.sweep_points(),
        single_prompt.find_answer_tokens(tokenizer, clm.tokenization.DIGITS),
    )
    prompt_sweep = prompt_sweeps.shrink_span(
        tokenizer, prompt, character_span, factors, single_prompt.duration_change()
    )
    answer_curves = single_prompt.run_sweep(lm, prompt_sweep, answer_tokens, "counting")

    num_repetitions = _REPETITIONS.value if single_prompt.prompt() is None else 0
    single_prompt.write_results(
        folder,
        "counting",
        tokenizer,
        prompt_sweep,
        answer_tokens,
        answer_curves,
        xlabel="duration of each repeated token",
        marks=single_prompt.transition_points(num_repetitions, factors),
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
