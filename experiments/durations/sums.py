"""Sums: as one number of a sum lasts less, which sum does the model give?

    python -m continuous_lm sums [--numbers=24,13 --shrink=2 --model=FOLDER] [--spaced]

The prompt is "The sum of 24 and 13 is", and the tokens of one number shrink (Marro et al.,
arXiv:2504.03933). Where the model reads "13" as one digit, the answer begins like 24 + 1 or 24 + 3.
Some tokenizers make one token of a number; --spaced writes "1 3", as in the paper. The embedded
model knows one-digit numbers, whose sums are one token each; its default is 4 + 3.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(single_prompt.ShrinkConfig):
    """Flags of sums."""

    numbers: tuple[str, ...] | None = program.flag(
        None, help="The two numbers.  [default: 24,13; for the embedded model 4,3]"
    )
    shrink: Literal["1", "2"] = program.flag(
        "2", help="Number that shrinks, the first or the second."
    )
    spaced: bool = program.flag(False, help="Write a number's digits apart.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.numbers is not None and not _are_two_numbers(self.numbers):
            raise clm.InputError(
                f"--numbers is {','.join(self.numbers)}; give two whole numbers, as 24,13"
            )

    def both_numbers(self) -> tuple[str, ...]:
        """The two numbers, as digits."""
        return self.numbers or (("4", "3") if self.is_bundled else ("24", "13"))


def _are_two_numbers(texts: tuple[str, ...]) -> bool:
    return len(texts) == 2 and all(
        text.isdecimal() and text.isascii() for text in texts
    )


def make_prompt(config: Config) -> tuple[str, tuple[int, int]]:
    """The prompt, and the characters of the number that shrinks."""
    numbers = config.both_numbers()
    if config.spaced:
        numbers = tuple(" ".join(number) for number in numbers)
    first, second = numbers
    prompt = f"The sum of {first} and {second} is "
    if config.shrink == "1":
        begin = len("The sum of ")
        return prompt, (begin, begin + len(first))
    begin = len(f"The sum of {first} and ")
    return prompt, (begin, begin + len(second))


def possible_answers(is_bundled: bool) -> Sequence[str]:
    """The embedded model gives whole sums, others their first digit."""
    return [str(i) for i in range(19)] if is_bundled else clm.tokenization.DIGITS


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> single_prompt.SweepResult:
    """The sums along the sweep."""
    prompt, character_span = make_prompt(config)
    shrinking_number = config.both_numbers()[int(config.shrink) - 1]
    labels = single_prompt.Labels(
        "sums", f"duration of each token of {shrinking_number}"
    )
    answers = possible_answers(config.is_bundled)
    return prompt_sweeps.shrink_prompt(
        config, lm, tokenizer, prompt, character_span, answers, labels
    )


def run(config: Config) -> single_prompt.SweepResult:
    """Load the model, shrink a number, and write the answers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
