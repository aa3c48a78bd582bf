"""Draws text from a density or next-vector model, and steers it.

    python -m continuous_lm sample --model=results/mixture --prompt="Return the"
    python -m continuous_lm sample --model=results/mixture \
        --towards=file,path,directory --strengths=0,0.5,1,2
    python -m continuous_lm sample --model=results/calm --temperature=0.5
    python -m continuous_lm sample --model=results/calm \
        --between="Return the name." --between="Raise an error."

Steering shifts the mean of each density along a direction: the mean of the rows of the words in
--towards, less that of the words in --away (of all rows, if there are none). What is measured is
the share of new tokens near the list: those among the --near_k rows nearest to one of its words.

A next-vector model has no rows to steer by. It takes a --temperature of 1, 1/2, 1/3 ... or 0, any
up to 1 with --method=exact, and shows what its autoencoder decodes --between two texts.
"""

from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from continuous_lm import quantize
from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import text
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import calm, density
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.density.model import DensityLM
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes

_MODEL = flags.DEFINE_string(
    "model", None, "Folder that the program train wrote.", required=True
)
_CODEC = flags.DEFINE_string(
    "codec", None, "Folder of the autoencoder, for a next-vector model without its own."
)
_PROMPT = flags.DEFINE_string(
    "prompt", "", "Text to go on from.  [default: the end of a text]"
)
_SAMPLES = flags.DEFINE_integer(
    "samples", 4, "How many texts, of each strength.", lower_bound=1
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Of each.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "0: the mean, or the most frequent chunk.  [default: 0.7; 0.5 for next vectors]",
    lower_bound=0.0,
)
_QUANTIZE = flags.DEFINE_enum(
    "quantize", "rerank", list(density.QUANTIZE_METHODS), "From vectors to tokens."
)
_TOWARDS = flags.DEFINE_list("towards", [], "Words to steer towards.")
_AWAY = flags.DEFINE_list("away", [], "Words to steer away from.")
_STRENGTHS = flags.DEFINE_list("strengths", ["0"], "Of steering, in units of the rows.")
_NEAR_K = flags.DEFINE_integer(
    "near_k", 16, "Rows that are near a word.", lower_bound=1
)
_METHOD = flags.DEFINE_enum(
    "method",
    "batch",
    list(calm.SAMPLING_METHODS),
    "How next vectors are drawn at a temperature.",
)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 128, "Of --method=batch.", lower_bound=1
)
_MAX_ROUNDS = flags.DEFINE_integer(
    "max_rounds", 10_000, "Of --method=exact.", lower_bound=1
)
_BETWEEN = flags.DEFINE_multi_string(
    "between", [], "Twice: two texts, and what lies between."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)

_DENSITY_FLAGS = ("quantize", "towards", "away", "strengths", "near_k")
_NEXT_VECTOR_FLAGS = ("method", "candidates", "max_rounds", "between")


def read_strengths() -> list[float]:
    """Those of the flag."""
    try:
        values = [float(value) for value in _STRENGTHS.value]
    except ValueError:
        raise InputError(
            f"--strengths: {_STRENGTHS.value} are not all numbers"
        ) from None
    if not values or not np.isfinite(values).all():
        raise InputError("--strengths: give at least one finite number")
    return values


def word_tokens(lm: DensityLM, words: list[str], flag_name: str) -> list[int]:
    """The tokens of words that are one token each, with a space before them or without."""
    tokenizer: Any = lm.tokenizer
    single_tokens = []
    for word in words:
        spellings = [
            tokenizer.encode(spelling, add_special_tokens=False).ids
            for spelling in (f" {word}", word)
        ]
        single = [ids[0] for ids in spellings if len(ids) == 1]
        if not single:
            raise InputError(
                f"--{flag_name}: {word!r} is {len(spellings[0])} tokens; give words of one token"
            )
        single_tokens += single
    return sorted(set(single_tokens))


def nearest_tokens(lm: DensityLM, tokens: list[int], num_nearest: int) -> np.ndarray:
    """The tokens whose rows are among the `num_nearest` nearest to one of these, by cosine."""
    rows = density.get_token_table(lm)
    num_nearest = min(num_nearest, len(rows))
    nearest_indices = quantize.k_nearest(
        rows[np.asarray(tokens)], rows, num_nearest, metric="cosine"
    ).indices
    return np.unique(np.asarray(nearest_indices))


def sample_steered(
    lm: DensityLM,
    prompts: Any,
    towards: list[int],
    away: list[int],
    strength_values: list[float],
    *,
    num_nearest: int = 16,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Samples of each strength, with the share of tokens near the list and its 95 % interval.

    Args:
      lm: the model.
      prompts: tokens of each.
      towards: tokens to steer towards; none for no steering.
      away: tokens to steer away from.
      strength_values: the strengths.
      num_nearest: how many rows are near a token.
      seed: of the draws, the same for each strength, and of the bootstrap over samples.
      **options: of `density.sample`.
    """
    direction, listed_tokens = None, np.zeros(0, int)
    if towards:
        direction, listed_tokens = (
            density.steering_direction(lm, towards, away),
            nearest_tokens(lm, towards, num_nearest),
        )
    rng, results = np.random.default_rng(seed), []
    for strength in strength_values:
        generated: Any = density.sample(
            lm,
            prompts,
            key=jax.random.key(seed),
            direction=direction,
            strength=strength,
            **options,
        )
        token_rows = generated.token_lists()
        num_listed = np.array([np.isin(row, listed_tokens).sum() for row in token_rows])
        num_tokens = np.array([len(row) for row in token_rows])
        low, high = bootstrap_interval(num_listed, num_tokens, seed=rng)
        share = {
            "value": float(num_listed.sum() / num_tokens.sum()),
            "low": low,
            "high": high,
        }
        results.append({"strength": strength, "share": share, "tokens": token_rows})
    return results


def plot_steering(results: list[dict[str, Any]], xlabel: str) -> Figure:
    """The share of words near the list against the strength."""
    strength_values = [result["strength"] for result in results]
    low, estimate, high = (
        np.array([result["share"][name] for result in results])
        for name in ("low", "value", "high")
    )
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        steering_figure, axes = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
        axes.fill_between(
            strength_values, low, high, color=plots.COLOURS[3], alpha=0.2, lw=0
        )
        axes.plot(strength_values, estimate, color=plots.COLOURS[3], marker="o", ms=3.5)
        axes.set(xlabel=xlabel, ylabel="share of tokens near the list", ylim=(0, None))
    return steering_figure


def sample_next_vectors(lm: LanguageModel[NextVectorModel]) -> dict[str, Any]:
    """Texts from a next-vector model, and between two."""
    tokenizer: Any = lm.tokenizer
    end_tokens = [
        tokenizer.encode(end_text, add_special_tokens=False).ids
        for end_text in _BETWEEN.value
    ]
    if len(end_tokens) not in (0, 2):
        raise InputError(
            f"--between is given {len(end_tokens)} times; give it twice, or not at all"
        )
    unused_flag = "candidates" if _METHOD.value == "exact" else "max_rounds"
    if flags.FLAGS[unused_flag].present:
        raise InputError(
            f"--{unused_flag} is not of --method={_METHOD.value}; leave it out"
        )
    prompt = tokenizer.encode(_PROMPT.value, add_special_tokens=False).ids
    end_token = text.end_of_text_id(tokenizer)
    generated = calm.sample(
        lm,
        np.tile(prompt or [end_token], (_SAMPLES.value, 1)),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=0.5 if _TEMPERATURE.value is None else _TEMPERATURE.value,
        method=_METHOD.value,
        num_candidates=_CANDIDATES.value,
        max_rounds=_MAX_ROUNDS.value,
        pad_token=end_token,
        stop=None if "eos_token_id" in lm.hf_fields else end_token,
        key=jax.random.key(_SEED.value),
    )
    results: dict[str, Any] = {
        "texts": [tokenizer.decode(row) for row in generated.token_lists()]
    }
    for sample_text in results["texts"]:
        print(f"---\n{_PROMPT.value}{sample_text}")
    if end_tokens:
        with about("--between"):
            results["between"] = [
                tokenizer.decode(tokens)
                for tokens in calm_training.interpolate_texts(
                    calm.autoencoder_of(lm), *end_tokens
                )
            ]
        print("--- between", *results["between"], sep="\n")
    return results


def main() -> None:
    """Texts, shares, a figure."""
    folder = program.output_dir("sample")
    strength_values = read_strengths()
    lm = density_training.load_text_model(_MODEL.value, _CODEC.value, program.mesh())
    excluded_flags = (
        _DENSITY_FLAGS if isinstance(lm.model, NextVectorModel) else _NEXT_VECTOR_FLAGS
    )
    for name in excluded_flags:
        if flags.FLAGS[name].present:
            kind = "next-vector" if isinstance(lm.model, NextVectorModel) else "density"
            raise InputError(f"--{name} is not for a {kind} model; leave it out")
    if isinstance(lm.model, NextVectorModel):
        next_vector_results = sample_next_vectors(lm)
        if not processes.is_first_process():
            return
        with write_atomically(folder) as staging_folder:
            write_json(
                staging_folder / "sample.json",
                {"run": program.record(), **next_vector_results},
            )
        print(f"\n{folder}/sample.json")
        return
    tokenizer: Any = lm.tokenizer
    towards, away = (
        word_tokens(lm, words, name)
        for words, name in ((_TOWARDS.value, "towards"), (_AWAY.value, "away"))
    )
    if not towards and (away or strength_values != [0.0]):
        raise InputError(
            "--away and --strengths need --towards, the words to steer towards"
        )
    prompt = tokenizer.encode(_PROMPT.value, add_special_tokens=False).ids
    results = sample_steered(
        lm,
        [prompt or [text.end_of_text_id(tokenizer)]] * _SAMPLES.value,
        towards,
        away,
        strength_values,
        num_nearest=_NEAR_K.value,
        seed=_SEED.value,
        max_new_items=_MAX_NEW_TOKENS.value,
        temperature=0.7 if _TEMPERATURE.value is None else _TEMPERATURE.value,
        quantize=_QUANTIZE.value,
    )
    if not processes.is_first_process():
        return
    for result in results:
        result["texts"] = [tokenizer.decode(row) for row in result["tokens"]]
        strength_label = (
            f" strength {result['strength']:g}, {result['share']['value']:.1%} near"
            if towards
            else ""
        )
        for sample_text in result["texts"]:
            print(f"---{strength_label}\n{_PROMPT.value}{sample_text}")
    with write_atomically(folder) as staging_folder:
        write_json(
            staging_folder / "sample.json",
            {"run": program.record(), "samples": results},
        )
        if towards:
            steering_figure = plot_steering(
                results, f"strength towards {', '.join(_TOWARDS.value)}"
            )
            plots.save(steering_figure, staging_folder, "steering")
            rows = [
                [sample_record["strength"], *sample_record["share"].values()]
                for sample_record in results
            ]
            columns = [tables.Column("strength", format="g")]
            columns += [
                tables.Column(column_name, format=".1%")
                for column_name in ("share near", "low", "high")
            ]
            table = tables.Table(
                "steering", "Share of new tokens near the list", columns, rows
            )
            table.write(staging_folder)
            print(f"\n{table.as_text()}")
    print(f"\n{folder}/sample.json")


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
