"""Counting: as repeated words last less, does the model count fewer of them?

    python -m continuous_lm.experiments.counting [--model=FOLDER] [--word=cat --category=animal]

The durations of "apple apple apple apple" shrink together from 1 to 0.1 of a token each (Marro et
al., arXiv:2504.03933, section 4.1). A model that counts by mass answers k where the words last for
about k tokens in all, so that its answer changes near factors (k + 1/2) / n. On the embedded model
this takes about ten seconds and gives 4, 3, 2, 1.
"""

import jax.numpy as jnp
import numpy as np
from absl import flags

import continuous_lm as clm
from continuous_lm.experiments import curves, plots, program
from continuous_lm.files import write_json, written_aside

CATEGORIES = {"apple": "fruit", "cat": "animal", "rose": "flower"}  # the paper's
PROMPT = (
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
_PROMPT = flags.DEFINE_string("prompt", None, "A prompt of your own, instead of the paper's.")
_SPAN = flags.DEFINE_string(
    "span",
    None,
    "The piece of --prompt that shrinks.  [default: from the first --word to the last]",
)
_POINTS = flags.DEFINE_integer("points", 100, "Points of the sweep.", lower_bound=2)
_LEAST = flags.DEFINE_float(
    "least", 0.1, "The smallest duration factor.", lower_bound=0.0, upper_bound=1.0
)
_VARY = flags.DEFINE_enum(
    "vary",
    "both",
    ["both", "mass", "times"],
    "Change the weights of keys, their rotary times, or both.",
)
_TRACKING = flags.DEFINE_enum(
    "tracking",
    "exact",
    list(curves.TRACKING),
    "Tokens of a digit: its spellings, or all that contain it.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Points computed at once.", lower_bound=1)


def prompt_and_span() -> tuple[str, tuple[int, int]]:
    """The prompt, and the first character of its shrinking span and the one after its last."""
    word = _WORD.value
    if _PROMPT.value is not None:
        piece = word if _SPAN.value is None else _SPAN.value
        return _PROMPT.value, clm.tokenization.find(_PROMPT.value, piece)
    if _SPAN.value is not None:
        raise clm.InputError("--span is a piece of --prompt; give both")
    category = _CATEGORY.value or CATEGORIES.get(word)
    if category is None:
        raise clm.InputError(
            f"say what {word!r} is with --category; known are {', '.join(CATEGORIES)}"
        )
    article = "an" if category[0] in "aeiou" else "a"
    words = " ".join([word] * _REPETITIONS.value)
    begin = PROMPT.index("{words}")
    prompt = PROMPT.format(words=words, category=f"{article} {category}")
    return prompt, (begin, begin + len(words))


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("counting")
    prompt, (begin, end) = prompt_and_span()
    lm, tokenizer = program.load_model()
    encoding = clm.tokenization.encode(tokenizer, prompt)
    span = clm.tokenization.token_span(encoding, begin, end)
    digits = curves.tracked(tokenizer, clm.tokenization.DIGITS, _TRACKING.value)

    factors = np.linspace(_LEAST.value, 1.0, _POINTS.value)
    durations = clm.durations.scale(jnp.ones(len(encoding.ids)), factors, span)
    probabilities = clm.sweep.probabilities(
        lm,
        list(digits.values()),
        tokens=jnp.array(encoding.ids),
        batch_size=_BATCH_SIZE.value,
        progress="counting",
        **clm.sweep.vary(durations, _VARY.value),
    )
    result = curves.Curves(factors, tuple(digits), probabilities)

    count = _REPETITIONS.value if _PROMPT.value is None else None
    ideal = {f"{k + 0.5:g}/{count}": (k + 0.5) / count for k in range(1, count)} if count else {}
    figure = plots.answer_curves(
        result,
        xlabel="duration of each repeated token",
        title=prompt,
        marks={label: point for label, point in ideal.items() if point >= _LEAST.value},
    )
    with written_aside(folder) as aside:
        plots.save(figure, aside, "counting")
        write_json(
            aside / "counting.json",
            {
                "prompt": prompt,
                "tokens": encoding.tokens,
                "span": list(span),
                "tracked": {
                    a: [tokenizer.id_to_token(t) for t in ids] for a, ids in digits.items()
                },
                "curves": result.as_json(),
                "run": program.record(),
            },
        )
    print(f"{prompt}\n\n{result.as_table('duration factor')}\n")
    if result.probabilities.sum(axis=1).max() < 0.5:
        print("Digits never get half of the probability: no number is this model's answer here.\n")
    print(f"{folder}/counting.json, .png, .pdf")


if __name__ == "__main__":
    program.run(main)
