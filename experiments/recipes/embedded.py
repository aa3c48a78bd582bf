"""Train the embedded model again with three seeds, check their bars, and install seed 0.

    python -m continuous_lm recipe --name=embedded      # or: make embedded

Time: 641 s of one core for each seed (2026-11-22, two shared cores). Expected, over the paper's
prompts and unseen words, separators and filler, n = 2..6 (the bars are 0.08 and 97 %):

    seed   worst error of a transition   least held-out accuracy of a task
    0      0.073 (n = 2)                  99.8 %
    1      0.073 (n = 2)                 100.0 %
    2      0.056 (n = 3)                  99.3 %

A seed that misses a bar ends the recipe, and nothing is installed.
"""

import shutil

from continuous_lm.experiments.apples import evaluate_apples, train_apples
from continuous_lm.experiments.recipes.steps import Recipe, Settings, Step
from continuous_lm.models.checkpoints.hf_folder import BUNDLED_FOLDER

SEEDS = (0, 1, 2)
INSTALLED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def make_recipe(settings: Settings) -> Recipe:
    """The steps, and the installation of seed 0."""
    train_steps = [
        Step(
            "train_apples",
            train_apples.Config(seed=seed, output_dir=str(settings.folder / str(seed))),
        )
        for seed in SEEDS
    ]
    evaluate_config = evaluate_apples.Config(
        models=tuple(str(step.folder) for step in train_steps),
        output_dir=str(settings.folder),
    )

    def install() -> None:
        for name in INSTALLED_FILES:
            shutil.copy(settings.folder / "0" / name, BUNDLED_FOLDER / "apples" / name)

    return Recipe([*train_steps, Step("evaluate_apples", evaluate_config)], install)
