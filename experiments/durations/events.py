"""Events: as the sentences that tell of four things last less, does the model count fewer of them?

    python -m continuous_lm events [--scene=shop|zoo|beach] [--model=FOLDER]

"She buys a carton of milk. She buys an apple. ..." shrinks as a whole, from the first event to the
last (Marro et al., arXiv:2504.03933): unlike in `counting`, no word is repeated four
times that the model could count instead.
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

_SCENE = flags.DEFINE_enum("scene", "shop", list(SCENES), "Which story is told.")


def prompt_and_span(scene: str) -> tuple[str, tuple[int, int]]:
    """The prompt, and the characters of its events."""
    prefix, events, suffix = SCENES[scene]
    return prefix + events + suffix, (len(prefix), len(prefix) + len(events))


def main() -> None:
    """Sweep, table, files."""
    folder = program.output_dir("events")
    prompt, character_span = prompt_and_span(_SCENE.value)
    lm, tokenizer = pretrained.load()
    factors, answer_tokens = (
        single_prompt.sweep_points(),
        single_prompt.find_answer_tokens(tokenizer, clm.tokenization.DIGITS),
    )
    prompt_sweep = prompt_sweeps.shrink_span(
        tokenizer, prompt, character_span, factors, single_prompt.duration_change()
    )
    single_prompt.write_results(
        folder,
        "events",
        tokenizer,
        prompt_sweep,
        answer_tokens,
        single_prompt.run_sweep(lm, prompt_sweep, answer_tokens, "events"),
        xlabel="duration of each token of the events",
        marks=single_prompt.transition_points(NUM_EVENTS, factors),
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
