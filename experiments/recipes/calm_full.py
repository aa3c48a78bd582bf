"""The tables of density models of text: a baseline, and densities on its rows.

    python -m continuous_lm recipe --name=calm_full     # or: make calm-full

Time: 37 min on two cores beside other work, 32 min of CPU (2026-11-22). Expected, on the
documentation that Python 3.11.7 carries (perplexity of held-out tokens and its 95 % interval):

    baseline      94.2   (90.65 to 97.92)
    gaussian     109.4   (104.3 to 114.9)
    mixture      110.4   (105.1 to 116.2)
    experts      142.2   (135.6 to 148.8)
    likelihood   1.3e16  (the Gaussian without the tokens' cross-entropy)
    learned       88.62  (83 to 95.35; a table of its own)

Steering towards file, path, directory: 6.3, 12.2, 14.7, 17.6, 21.5, 24.1, 40.3 % of the tokens near
the list at strengths 0, 0.25, 0.5, 0.75, 1, 1.5, 2.
"""

from continuous_lm.experiments.densities import (
    sample_density,
    train_density,
    train_lm,
)
from continuous_lm.experiments.recipes.steps import Recipe, Settings, Step
from continuous_lm.experiments.text_models import compare_quantizers, evaluate

STEPS = 400
LENGTH = 128
BATCH_SIZE = 16
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def make_recipe(settings: Settings) -> Recipe:
    """The steps."""
    baseline = str(settings.folder / "baseline")
    mixture = str(settings.folder / "mixture")
    train_steps = [baseline_step(settings), *density_steps(settings, baseline)]
    evaluate_config = evaluate.Config(
        data=settings.data,
        models=tuple(str(step.folder) for step in train_steps),
        output_dir=str(settings.folder / "eval"),
    )
    ablation_config = compare_quantizers.Config(
        data=settings.data,
        model=(mixture,),
        output_dir=str(settings.folder / "ablation"),
    )
    steering_config = sample_density.Config(
        model=mixture,
        samples=32,
        towards=settings.words,
        strengths=STRENGTHS,
        output_dir=str(settings.folder / "steering"),
    )
    return Recipe(
        [
            *train_steps,
            Step("evaluate", evaluate_config),
            Step("compare_quantizers", ablation_config),
            Step("sample_density", steering_config),
        ]
    )


def baseline_step(settings: Settings) -> Step:
    """The softmax baseline, whose rows the densities are over."""
    config = train_lm.Config(
        data=settings.data,
        steps=STEPS,
        length=LENGTH,
        batch_size=BATCH_SIZE,
        output_dir=str(settings.folder / "baseline"),
    )
    return Step("train_lm", config)


def density_steps(settings: Settings, baseline: str) -> list[Step]:
    """The densities; `learned` has a table of its own."""

    def step(
        name: str,
        head: str,
        head_settings: tuple[str, ...] = (),
        token_loss_weight: float = 1.0,
        table_from: str | None = baseline,
    ) -> Step:
        config = train_density.Config(
            data=settings.data,
            head=head,
            head_settings=head_settings,
            table_from=table_from,
            token_loss_weight=token_loss_weight,
            steps=STEPS,
            length=LENGTH,
            batch_size=BATCH_SIZE,
            output_dir=str(settings.folder / name),
        )
        return Step("train_density", config)

    return [
        step("gaussian", "gaussian"),
        step("mixture", "mixture", ("components=4",)),
        step("experts", "experts", ("experts=4",)),
        step("likelihood", "gaussian", token_loss_weight=0.0),
        step("learned", "gaussian", table_from=None),
    ]
