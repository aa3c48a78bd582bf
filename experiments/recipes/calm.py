"""A small run of every program of density models of text.

    python -m continuous_lm recipe --name=calm          # or: make calm

A baseline of 64 channels and 2 layers, a mixture on its rows, samples, evaluation, and the ways
from a vector to a token. Time: 2 min 43 s on two quiet cores (2026-11-22). Numbers: none are kept
of this size; it shows that everything runs. `calm_full` makes the tables.
"""

from continuous_lm.experiments.densities import (
    sample_density,
    train_density,
    train_lm,
)
from continuous_lm.experiments.recipes.steps import Recipe, Settings, Step
from continuous_lm.experiments.text_models import compare_quantizers, evaluate

LENGTH = 64


def make_recipe(settings: Settings) -> Recipe:
    """The steps."""
    baseline = str(settings.folder / "baseline")
    mixture = str(settings.folder / "mixture")
    baseline_config = train_lm.Config(
        data=settings.data,
        vocab_size=1024,
        hidden_size=64,
        num_layers=2,
        length=LENGTH,
        batch_size=16,
        steps=300,
        output_dir=baseline,
    )
    mixture_config = train_density.Config(
        data=settings.data,
        head="mixture",
        table_from=baseline,
        hidden_size=64,
        num_layers=2,
        length=LENGTH,
        batch_size=16,
        steps=300,
        output_dir=mixture,
    )
    sample_config = sample_density.Config(
        model=mixture, samples=2, output_dir=str(settings.folder / "sample")
    )
    evaluate_config = evaluate.Config(
        data=settings.data,
        length=LENGTH,
        models=(baseline, mixture),
        output_dir=str(settings.folder / "eval"),
    )
    ablation_config = compare_quantizers.Config(
        data=settings.data,
        length=LENGTH,
        model=(mixture,),
        codes=256,
        output_dir=str(settings.folder / "ablation"),
    )
    return Recipe(
        [
            Step("train_lm", baseline_config),
            Step("train_density", mixture_config),
            Step("sample_density", sample_config),
            Step("evaluate", evaluate_config),
            Step("compare_quantizers", ablation_config),
        ]
    )
