"""Steering of a density model: samples with shifted means, and their nearness to target words.

Steering shifts the mean of each density along a direction. The direction is the mean row of the
target words, minus the mean row of the words to steer away from (of all rows if there are none).
The measure is the share of new tokens among the rows nearest to a target word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import tokenizers
from matplotlib.figure import Figure

from continuous_lm import quantize
from continuous_lm.errors import InputError
from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.models import density
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.samplers import Temperature

QUANTIZE_METHODS = ("euclidean", "cosine", "rerank", "renormalised")


class SampleSettings(NamedTuple):
    """Settings of sampling.

    Attributes:
      max_new_tokens: largest number of new tokens of each sample.
      temperature: sampling temperature; 0 takes the mean.
      quantize: map from vectors to tokens, one of `QUANTIZE_METHODS`.
      seed: seed of the samples, the same for each strength, and of the bootstrap over samples.
    """

    max_new_tokens: int
    temperature: float
    quantize: str
    seed: int


class Steering(NamedTuple):
    """Direction of steering, and its measure.

    Attributes:
      towards: tokens to steer towards; none for no steering.
      away: tokens to steer away from.
      num_nearest: number of rows that count as near a token.
    """

    towards: list[int]
    away: list[int]
    num_nearest: int = 16


class Share(NamedTuple):
    """A share of the new tokens, with its 95 % interval."""

    value: float
    low: float
    high: float


class SteeredSamples(NamedTuple):
    """The samples of one strength.

    Attributes:
      strength: in units of the rows.
      share: share of new tokens near the list.
      tokens: the new tokens of each prompt.
    """

    strength: float
    share: Share
    tokens: list[list[int]]


def word_tokens(
    tokenizer: tokenizers.Tokenizer, words: Sequence[str], flag_name: str
) -> list[int]:
    """The tokens of words that are one token each, with a space before them or without.

    Raises:
      InputError: that names the flag, if a word is several tokens.
    """
    single_tokens: set[int] = set()
    for word in words:
        spellings = [
            tokenizer.encode(spelling, add_special_tokens=False).ids
            for spelling in (f" {word}", word)
        ]
        word_ids = [ids[0] for ids in spellings if len(ids) == 1]
        if not word_ids:
            raise InputError(
                f"--{flag_name}: {word!r} is {len(spellings[0])} tokens; give words of one token"
            )
        single_tokens.update(word_ids)
    return sorted(single_tokens)


def nearest_tokens(
    lm: LanguageModel[DensityModel], tokens: list[int], num_nearest: int
) -> np.ndarray:
    """The tokens whose rows are among the `num_nearest` nearest to one of these, by cosine."""
    rows = density.token_table(lm)
    nearest_indices = quantize.k_nearest(
        rows[np.asarray(tokens)], rows, min(num_nearest, len(rows)), metric="cosine"
    ).indices
    return np.unique(np.asarray(nearest_indices))


def make_sampler(
    model: DensityModel,
    settings: SampleSettings,
    direction: jax.Array | None,
    strength: float,
) -> density.DensitySampler | Temperature:
    """The sampler of the settings; a token head draws tokens themselves, whatever the way."""
    if model.predicts_tokens:
        return Temperature(settings.temperature)
    if settings.quantize == "rerank":
        return density.Rerank(
            temperature=settings.temperature, direction=direction, strength=strength
        )
    if settings.quantize == "renormalised":
        return density.Renormalized(
            temperature=settings.temperature, direction=direction, strength=strength
        )
    return density.NearestRow(
        settings.quantize,
        temperature=settings.temperature,
        direction=direction,
        strength=strength,
    )


def sample_steered(
    lm: LanguageModel[DensityModel],
    prompts: list[np.ndarray],
    steering: Steering,
    strengths: Sequence[float],
    settings: SampleSettings,
) -> list[SteeredSamples]:
    """Samples of each strength, with the share of tokens near the list."""
    direction = None
    listed_tokens = np.zeros(0, int)
    if steering.towards:
        direction = density.steering_direction(lm, steering.towards, steering.away)
        listed_tokens = nearest_tokens(lm, steering.towards, steering.num_nearest)
    bootstrap_generator = np.random.default_rng(settings.seed)
    results = []
    for strength in strengths:
        generated = generate(
            lm,
            prompts,
            sampler=make_sampler(lm.model, settings, direction, strength),
            max_new_tokens=settings.max_new_tokens,
            key=jax.random.key(settings.seed),
        )
        token_rows = generated.token_lists()
        share = _share_of(listed_tokens, token_rows, bootstrap_generator)
        results.append(SteeredSamples(strength, share, token_rows))
    return results


def _share_of(
    listed_tokens: np.ndarray,
    token_rows: list[list[int]],
    bootstrap_generator: np.random.Generator,
) -> Share:
    """The share of listed tokens in all rows; its interval is over rows."""
    num_listed = np.array([np.isin(row, listed_tokens).sum() for row in token_rows])
    num_tokens = np.array([len(row) for row in token_rows])
    low, high = bootstrap_interval(num_listed, num_tokens, seed=bootstrap_generator)
    return Share(float(num_listed.sum() / num_tokens.sum()), low, high)


def plot_steering(results: Sequence[SteeredSamples], xlabel: str) -> Figure:
    """The share of words near the list against the strength."""
    strengths = [result.strength for result in results]
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
        axes.fill_between(
            strengths,
            np.array([result.share.low for result in results]),
            np.array([result.share.high for result in results]),
            color=plots.COLOURS[3],
            alpha=0.2,
            lw=0,
        )
        estimates = [result.share.value for result in results]
        axes.plot(strengths, estimates, color=plots.COLOURS[3], marker="o", ms=3.5)
        axes.set(xlabel=xlabel, ylabel="share of tokens near the list", ylim=(0, None))
    return figure


def make_table(results: Sequence[SteeredSamples]) -> tables.Table:
    """The share of each strength."""
    columns = [
        tables.Column("strength", format="g"),
        tables.Column("share near", format=".1%"),
        tables.Column("low", format=".1%"),
        tables.Column("high", format=".1%"),
    ]
    rows = [[result.strength, *result.share] for result in results]
    return tables.Table("steering", "Share of new tokens near the list", columns, rows)
