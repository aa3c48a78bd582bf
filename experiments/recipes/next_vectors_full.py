"""The tables of next-vector models: K = 1, 2, 4, 8 tokens a vector, and a baseline of like time.

    python -m continuous_lm recipe --name=next_vectors_full # or: make next-vector-full

Autoencoders of 600 steps, models of 500 steps of 512 vectors, K = 4 for 2000 steps, the baseline of
600. Time: under an hour; of it 133 s (K = 1) and 42 s (K = 4) for autoencoders, 144 to 184 s for
500 steps, 720 s for 2000, 618 s for the baseline, on two cores beside other work (2026-11-22).
Expected, on the documentation that Python 3.11.7 carries (share of tokens that come back from
draws; Brier-1 and its 95 % interval, with other contexts):

    softmax                              0.159 (0.143 to 0.177)   -0.126 (-0.137 to -0.114)
    K = 1                     99.97 %    0.034 (0.026 to 0.042)   -0.017 (-0.023 to -0.010)
    K = 2                     99.89 %    0.026 (0.018 to 0.034)   -0.010 (-0.017 to -0.002)
    K = 4                     99.88 %    0.032 (0.024 to 0.040)   -0.003 (-0.011 to 0.003)
    K = 4, four times as long 99.88 %    0.044 (0.036 to 0.053)   -0.010 (-0.016 to -0.004)
    K = 8                     90.76 %    0.021 (0.014 to 0.028)   -0.000 (-0.006 to 0.007)
"""

from continuous_lm.experiments.calm import (
    compare_heads,
    sample_calm,
    train_autoencoder,
    train_calm,
)
from continuous_lm.experiments.densities import train_lm
from continuous_lm.experiments.recipes.next_vectors import BETWEEN
from continuous_lm.experiments.recipes.steps import Recipe, Settings, Step
from continuous_lm.experiments.text_models import compare_quantizers, evaluate

CHUNK_SIZES = (1, 2, 4, 8)


def make_recipe(settings: Settings) -> Recipe:
    """The steps."""
    codec_steps = [codec_step(settings, chunk_size) for chunk_size in CHUNK_SIZES]
    model_steps = [
        model_step(settings, f"calm-{chunk_size}", chunk_size, steps=500)
        for chunk_size in CHUNK_SIZES
    ]
    long_step = model_step(settings, "calm-4-long", 4, steps=2000)
    baseline = baseline_step(settings)
    evaluate_config = evaluate.Config(
        data=settings.data,
        positions=4096,
        stride=8,
        context=32,
        models=tuple(str(step.folder) for step in [baseline, *model_steps, long_step]),
        output_dir=str(settings.folder / "eval"),
    )
    ablation_config = compare_quantizers.Config(
        data=settings.data,
        model=tuple(str(step.folder) for step in model_steps),
        output_dir=str(settings.folder / "ablation"),
    )
    sample_config = sample_calm.Config(
        model=str(long_step.folder),
        between=BETWEEN,
        output_dir=str(settings.folder / "sample"),
    )
    heads_config = compare_heads.Config(output_dir=str(settings.folder / "heads"))
    return Recipe(
        [
            *codec_steps,
            baseline,
            *model_steps,
            long_step,
            Step("evaluate", evaluate_config),
            Step("compare_quantizers", ablation_config),
            Step("sample_calm", sample_config),
            Step("compare_heads", heads_config),
        ]
    )


def codec_folder(settings: Settings, chunk_size: int) -> str:
    """Return the folder of the autoencoder with this chunk size."""
    return str(settings.folder / f"codec-{chunk_size}")


def codec_step(settings: Settings, chunk_size: int) -> Step:
    """An autoencoder; all have the tokenizer that the first one trains."""
    is_first = chunk_size == CHUNK_SIZES[0]
    config = train_autoencoder.Config(
        data=settings.data,
        vocab_size=1024 if is_first else None,
        tokenizer=None if is_first else codec_folder(settings, CHUNK_SIZES[0]),
        chunk_size=chunk_size,
        latent_size=64,
        codec_settings=("kl_weight=0.03",),
        batch_size=16,
        steps=600,
        output_dir=codec_folder(settings, chunk_size),
    )
    return Step("train_autoencoder", config)


def model_step(settings: Settings, name: str, chunk_size: int, steps: int) -> Step:
    """A model of an autoencoder's vectors, of sequences of 32."""
    config = train_calm.Config(
        data=settings.data,
        codec=codec_folder(settings, chunk_size),
        length=32,
        batch_size=16,
        steps=steps,
        output_dir=str(settings.folder / name),
    )
    return Step("train_calm", config)


def baseline_step(settings: Settings) -> Step:
    """The softmax baseline."""
    config = train_lm.Config(
        data=settings.data,
        tokenizer=codec_folder(settings, CHUNK_SIZES[0]),
        length=128,
        batch_size=16,
        steps=600,
        output_dir=str(settings.folder / "baseline"),
    )
    return Step("train_lm", config)
