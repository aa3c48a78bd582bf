"""Events: as the sentences that tell of four things last less, does the model count fewer of them?

    python -m continuous_lm events [--scene=shop|zoo|beach] [--model=FOLDER]

"She buys a carton of milk. She buys an apple. ..." shrinks as a whole, from the first event to the
last (Marro et al., arXiv:2504.03933): unlike in `counting`, no word is repeated four
times that the model could count instead.
"""

from absl import flags

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

QUESTION = "Reply with a single-digit number\nAnswer: "
SCENES = {  # the paper's: what comes before the events, the events, what comes after
    "shop": (
        "Question: Alice goes to the shop. ",
        "She buys a carton of milk. She buys an apple. She buys a potato."
        " She buys a loaf of bread.",
        f" How many items did Alice buy? {QUESTION}",
    ),
    "zoo": (
        "Question: the class went to the zoo. ",
        "They saw a lion. They saw an elephant. They saw a giraffe. They saw a penguin.",
        f" How many animals did the class see? {QUESTION}",
    ),
    "beach": (
        "Question: Emily went to the beach. ",
        "She found a seashell. She found a starfish. She found a smooth stone."
        " She found a piece of seaweed.",
        f" How many things did Emily find? {QUESTION}",
    ),
}
EVENTS = 4

_SCENE = flags.DEFINE_enum("scene", "shop", list(SCENES), "Which story is told.")


def prompt_and_span(scene: str) -> tuple[str, tuple[int, int]]:
    """The prompt, and the characters of its events."""
    before, events, after = SCENES[scene]
    return before + events + after, (len(before), len(before) + len(events))


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("events")
    prompt, characters = prompt_and_span(_SCENE.value)
    lm, tokenizer = pretrained.load()
    factors, answers = (
        single_prompt.points(),
        single_prompt.tracked(tokenizer, clm.tokenization.DIGITS),
    )
    trial = prompt_sweeps.shrinking(tokenizer, prompt, characters, factors, single_prompt.vary())
    single_prompt.write(
        folder,
        "events",
        tokenizer,
        trial,
        answers,
        single_prompt.run(lm, trial, answers, "events"),
        xlabel="duration of each token of the events",
        marks=single_prompt.ideal(EVENTS, factors),
    )


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
