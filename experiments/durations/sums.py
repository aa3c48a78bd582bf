"""Sums: as one number of a sum lasts less, which sum does the model give?

    python -m continuous_lm sums [--numbers=24,13 --shrink=2 --model=FOLDER] [--spaced]

"The sum of 24 and 13 is" with the tokens of one number shrinking (Marro et al., arXiv:2504.03933):
where "13" is read as one digit, the answer begins like 24 + 1 or 24 + 3. Some tokenizers make one
token of a number; --spaced writes its digits apart, "1 3", as the paper does for those. The
embedded model knows one-digit numbers, of which every sum is one token: by default it is asked for
4 + 3.
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

_NUMBERS = flags.DEFINE_list(
    "numbers", None, "The two numbers.  [default: 24,13; for the embedded model 4,3]"
)
_SHRINK = flags.DEFINE_enum("shrink", "2", ["1", "2"], "Which of them shrinks.")
_SPACED = flags.DEFINE_bool("spaced", False, "Write a number's digits apart.")


def prompt_and_span(
    numbers: tuple[str, str], shrink: int, spaced: bool
) -> tuple[str, tuple[int, int]]:
    """The prompt, and the characters of the number that shrinks (1 or 2)."""
    first, second = (" ".join(number) if spaced else number for number in numbers)
    prefix = f"The sum of {first} and " if shrink == 2 else "The sum of "
    shrinking_number = second if shrink == 2 else first
    return f"The sum of {first} and {second} is ", (
        len(prefix),
        len(prefix) + len(shrinking_number),
    )


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("sums")
    lm, tokenizer = pretrained.load()
    is_bundled = pretrained.is_bundled()
    numbers = _NUMBERS.value or (["4", "3"] if is_bundled else ["24", "13"])
    if len(numbers) != 2 or not all(n.isdecimal() and n.isascii() for n in numbers):
        raise clm.InputError(
            f"--numbers is {','.join(numbers)}; give two whole numbers, as 24,13"
        )
    first, second = numbers
    prompt, character_span = prompt_and_span(
        (first, second), int(_SHRINK.value), _SPACED.value
    )
    possible_sums = (
        [str(i) for i in range(19)] if is_bundled else clm.tokenization.DIGITS
    )
    factors, answer_tokens = (
        single_prompt.sweep_points(),
        single_prompt.find_answer_tokens(tokenizer, possible_sums),
    )
    prompt_sweep = prompt_sweeps.shrink_span(
        tokenizer, prompt, character_span, factors, single_prompt.duration_change()
    )
    single_prompt.write_results(
        folder,
        "sums",
        tokenizer,
        prompt_sweep,
        answer_tokens,
        single_prompt.run_sweep(lm, prompt_sweep, answer_tokens, "sums"),
        xlabel=f"duration of each token of {numbers[int(_SHRINK.value) - 1]}",
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
