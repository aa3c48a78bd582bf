"""A small run of every program of next-vector models: K = 4 tokens a vector.

    python -m continuous_lm recipe --name=next_vectors  # or: make next-vector

An autoencoder, a model of its vectors, a baseline of equal size, samples, evaluation, and the ways
from a vector to tokens. Time: 8 min beside three other jobs, 4 min 35 s of CPU (2026-11-22).
Numbers: none are kept of this size; it shows that everything runs. `next_vectors_full` makes the
tables.
"""

from continuous_lm.experiments.calm import sample_calm, train_autoencoder, train_calm
from continuous_lm.experiments.densities import train_lm
from continuous_lm.experiments.recipes.steps import Recipe, Settings, Step
from continuous_lm.experiments.text_models import compare_quantizers, evaluate

BETWEEN = ("the name of the file", "a list of numbers")
TOKENS = 64  # in a sequence, of which a vector holds 4


def make_recipe(settings: Settings) -> Recipe:
    """The steps."""
    codec = str(settings.folder / "codec")
    model = str(settings.folder / "calm")
    baseline = str(settings.folder / "baseline")
    codec_config = train_autoencoder.Config(
        data=settings.data,
        vocab_size=1024,
        hidden_size=64,
        latent_size=32,
        batch_size=16,
        steps=300,
        output_dir=codec,
    )
    model_config = train_calm.Config(
        data=settings.data,
        codec=codec,
        hidden_size=64,
        num_layers=2,
        length=TOKENS // 4,
        batch_size=16,
        steps=200,
        output_dir=model,
    )
    baseline_config = train_lm.Config(
        data=settings.data,
        tokenizer=codec,
        hidden_size=64,
        num_layers=2,
        length=TOKENS,
        batch_size=16,
        steps=200,
        output_dir=baseline,
    )
    sample_config = sample_calm.Config(
        model=model,
        samples=2,
        between=BETWEEN,
        output_dir=str(settings.folder / "sample"),
    )
    evaluate_config = evaluate.Config(
        data=settings.data,
        models=(baseline, model),
        output_dir=str(settings.folder / "eval"),
    )
    ablation_config = compare_quantizers.Config(
        data=settings.data,
        model=(model,),
        length=TOKENS,
        output_dir=str(settings.folder / "ablation"),
    )
    return Recipe(
        [
            Step("train_autoencoder", codec_config),
            Step("train_calm", model_config),
            Step("train_lm", baseline_config),
            Step("sample_calm", sample_config),
            Step("evaluate", evaluate_config),
            Step("compare_quantizers", ablation_config),
        ]
    )
