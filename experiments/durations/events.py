"""Events: as the sentences about four events get shorter, does the model count fewer events?

    python -m continuous_lm events [--scene=shop|zoo|beach] [--model=FOLDER]

"She buys a carton of milk. She buys an apple ..." shrinks as a whole, from the first event to the
last (Marro et al., arXiv:2504.03933). Unlike in `counting`, no noun is repeated, so the model
cannot count a word instead.
"""

import dataclasses

import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import prompt_sweeps, single_prompt

ANSWER_INSTRUCTION = "Reply with a single-digit number\nAnswer: "
SCENES = {  # the paper's: what comes before the events, the events, what comes after
    "shop": (
        "Question: Alice goes to the shop. ",
        "She buys a carton of milk. She buys an apple. She buys a potato."
        " She buys a loaf of bread.",
        f" How many items did Alice buy? {ANSWER_INSTRUCTION}",
    ),
    "zoo": (
        "Question: the class went to the zoo. ",
        "They saw a lion. They saw an elephant. They saw a giraffe. They saw a penguin.",
        f" How many animals did the class see? {ANSWER_INSTRUCTION}",
    ),
    "beach": (
        "Question: Emily went to the beach. ",
        "She found a seashell. She found a starfish. She found a smooth stone."
        " She found a piece of seaweed.",
        f" How many things did Emily find? {ANSWER_INSTRUCTION}",
    ),
}
NUM_EVENTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(single_prompt.ShrinkConfig):
    """Flags of events."""

    scene: str = program.flag("shop", help="Story of the events.", choices=list(SCENES))


def make_prompt(config: Config) -> tuple[str, tuple[int, int]]:
    """The prompt, and the characters of its events."""
    prefix, events, suffix = SCENES[config.scene]
    return prefix + events + suffix, (len(prefix), len(prefix) + len(events))


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> single_prompt.SweepResult:
    """The digits along the sweep."""
    prompt, character_span = make_prompt(config)
    marks = single_prompt.transition_points(NUM_EVENTS, config.factors())
    labels = single_prompt.Labels(
        "events", "duration of each token of the events", marks=marks
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
    """Load the model, shrink the events, and write the answers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    result.write(config, folder)
    return result


if __name__ == "__main__":
    program.main(Config, run)
