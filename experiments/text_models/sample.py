"""Draws text from a density or next-vector model, and steers it.

    python -m continuous_lm sample --model=results/mixture --prompt="Return the"
    python -m continuous_lm sample --model=results/mixture \
        --towards=file,path,directory --strengths=0,0.5,1,2
    python -m continuous_lm sample --model=results/calm --temperature=0.5
    python -m continuous_lm sample --model=results/calm \
        --between="Return the name." --between="Raise an error."

Steering shifts the mean of each density along a direction: the mean of the rows of the words in
--towards, less that of the words in --away (of all rows, if there are none). What is measured is
the share of new tokens near the list: those among the --near rows nearest to one of its words.

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
from continuous_lm.experiments.common import plots, program, tables
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import text
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.models import calm, density
from continuous_lm.models.calm.checkpoint import NextVectorLM
from continuous_lm.models.density.model import DensityLM
from continuous_lm.parallel import processes

_MODEL = flags.DEFINE_string("model", None, "Folder that the program train wrote.", required=True)
_CODEC = flags.DEFINE_string(
    "codec", None, "Folder of the autoencoder, for a next-vector model without its own."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from.  [default: the end of a text]")
_SAMPLES = flags.DEFINE_integer("samples", 4, "How many texts, of each strength.", lower_bound=1)
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", 64, "Of each.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "0: the mean, or the most frequent chunk.  [default: 0.7; 0.5 for next vectors]",
    lower_bound=0.0,
)
_QUANTIZE = flags.DEFINE_enum("quantize", "rerank", list(density.WAYS), "From vectors to tokens.")
_TOWARDS = flags.DEFINE_list("towards", [], "Words to steer towards.")
_AWAY = flags.DEFINE_list("away", [], "Words to steer away from.")
_STRENGTHS = flags.DEFINE_list("strengths", ["0"], "Of steering, in units of the rows.")
_NEAR = flags.DEFINE_integer("near", 16, "Rows that are near a word.", lower_bound=1)
_METHOD = flags.DEFINE_enum(
    "method", "batch", list(calm.METHODS), "How next vectors are drawn at a temperature."
)
_CANDIDATES = flags.DEFINE_integer("candidates", 128, "Of --method=batch.", lower_bound=1)
_MAX_ROUNDS = flags.DEFINE_integer("max_rounds", 10_000, "Of --method=exact.", lower_bound=1)
_BETWEEN = flags.DEFINE_multi_string("between", [], "Twice: two texts, and what lies between.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)

_OF_DENSITIES = ("quantize", "towards", "away", "strengths", "near")
_OF_NEXT_VECTORS = ("method", "candidates", "max_rounds", "between")


def strengths() -> list[float]:
    """Those of the flag."""
    try:
        values = [float(value) for value in _STRENGTHS.value]
    except ValueError:
        raise InputError(f"--strengths: {_STRENGTHS.value} are not all numbers") from None
    if not values or not np.isfinite(values).all():
        raise InputError("--strengths: give at least one finite number")
    return values


def tokens_of(lm: DensityLM, words: list[str], flag: str) -> list[int]:
    """The tokens of words that are one token each, with a space before them or without."""
    tokenizer: Any = lm.tokenizer
    found = []
    for word in words:
        spellings = [tokenizer.encode(s, add_special_tokens=False).ids for s in (f" {word}", word)]
        single = [ids[0] for ids in spellings if len(ids) == 1]
        if not single:
            raise InputError(
                f"--{flag}: {word!r} is {len(spellings[0])} tokens; give words of one token"
            )
        found += single
    return sorted(set(found))


def near(lm: DensityLM, tokens: list[int], count: int) -> np.ndarray:
    """The tokens whose rows are among the `count` nearest to one of these, by cosine."""
    rows = density.token_rows(lm)
    count = min(count, len(rows))
    found = quantize.k_nearest(rows[np.asarray(tokens)], rows, count, metric="cosine").indices
    return np.unique(np.asarray(found))


def steered(
    lm: DensityLM,
    prompts: Any,
    towards: list[int],
    away: list[int],
    values: list[float],
    *,
    close: int = 16,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Samples of each strength, with the share of tokens near the list and its 95 % interval.

    Args:
      lm: the model.
      prompts: tokens of each.
      towards: tokens to steer towards; none for no steering.
      away: tokens to steer away from.
      values: the strengths.
      close: how many rows are near a token.
      seed: of the draws, the same for each strength, and of the bootstrap over samples.
      **options: of `sampling.sample`.
    """
    direction, wanted = None, np.zeros(0, int)
    if towards:
        direction, wanted = density.steering_direction(lm, towards, away), near(lm, towards, close)
    rng, results = np.random.default_rng(seed), []
    for strength in values:
        new: Any = density.sample(
            lm, prompts, key=jax.random.key(seed), direction=direction, strength=strength, **options
        )
        rows = new.rows()
        hits = np.array([np.isin(row, wanted).sum() for row in rows])
        sizes = np.array([len(row) for row in rows])
        picked = rng.integers(len(rows), size=(1000, len(rows)))
        shares = hits[picked].sum(axis=1) / sizes[picked].sum(axis=1)
        low, high = np.quantile(shares, [0.025, 0.975])
        share = {"value": float(hits.sum() / sizes.sum()), "low": float(low), "high": float(high)}
        results.append({"strength": strength, "share": share, "tokens": rows})
    return results


def figure(results: list[dict[str, Any]], xlabel: str) -> Figure:
    """The share of words near the list against the strength."""
    points = [r["strength"] for r in results]
    low, middle, high = (
        np.array([r["share"][name] for r in results]) for name in ("low", "value", "high")
    )
    with plt.rc_context(plots.STYLE):
        made, axes = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
        axes.fill_between(points, low, high, color=plots.COLOURS[3], alpha=0.2, lw=0)
        axes.plot(points, middle, color=plots.COLOURS[3], marker="o", ms=3.5)
        axes.set(xlabel=xlabel, ylabel="share of tokens near the list", ylim=(0, None))
    return made


def of_next_vectors(lm: NextVectorLM) -> dict[str, Any]:
    """Texts from a next-vector model, and between two."""
    tokenizer: Any = lm.tokenizer
    ends = [tokenizer.encode(s, add_special_tokens=False).ids for s in _BETWEEN.value]
    if len(ends) not in (0, 2):
        raise InputError(f"--between is given {len(ends)} times; give it twice, or not at all")
    idle = "candidates" if _METHOD.value == "exact" else "max_rounds"
    if flags.FLAGS[idle].present:
        raise InputError(f"--{idle} is not of --method={_METHOD.value}; leave it out")
    prompt = tokenizer.encode(_PROMPT.value, add_special_tokens=False).ids
    end = text.end_of_text(tokenizer)
    new = calm.sample(
        lm,
        np.tile(prompt or [end], (_SAMPLES.value, 1)),
        max_new_tokens=_MAX_NEW.value,
        temperature=0.5 if _TEMPERATURE.value is None else _TEMPERATURE.value,
        method=_METHOD.value,
        candidates=_CANDIDATES.value,
        max_rounds=_MAX_ROUNDS.value,
        fill=end,
        stop=None if "eos_token_id" in lm.notes else end,
        key=jax.random.key(_SEED.value),
    )
    found: dict[str, Any] = {"texts": [tokenizer.decode(row) for row in new.rows()]}
    for drawn in found["texts"]:
        print(f"---\n{_PROMPT.value}{drawn}")
    if ends:
        with about("--between"):
            found["between"] = [tokenizer.decode(t) for t in calm_training.between(lm.codec, *ends)]
        print("--- between", *found["between"], sep="\n")
    return found


def main() -> None:
    """Texts, shares, a figure."""
    folder = program.output_dir("sample")
    values = strengths()
    lm = density_training.load_any(_MODEL.value, _CODEC.value, program.mesh())
    wrong = _OF_DENSITIES if isinstance(lm, NextVectorLM) else _OF_NEXT_VECTORS
    for name in wrong:
        if flags.FLAGS[name].present:
            kind = "next-vector" if isinstance(lm, NextVectorLM) else "density"
            raise InputError(f"--{name} is not for a {kind} model; leave it out")
    if isinstance(lm, NextVectorLM):
        found = of_next_vectors(lm)
        if not processes.is_first():
            return
        with written_aside(folder) as aside:
            write_json(aside / "sample.json", {"run": program.record(), **found})
        print(f"\n{folder}/sample.json")
        return
    tokenizer: Any = lm.tokenizer
    towards, away = (
        tokens_of(lm, words, name)
        for words, name in ((_TOWARDS.value, "towards"), (_AWAY.value, "away"))
    )
    if not towards and (away or values != [0.0]):
        raise InputError("--away and --strengths need --towards, the words to steer towards")
    prompt = tokenizer.encode(_PROMPT.value, add_special_tokens=False).ids
    results = steered(
        lm,
        [prompt or [text.end_of_text(tokenizer)]] * _SAMPLES.value,
        towards,
        away,
        values,
        close=_NEAR.value,
        seed=_SEED.value,
        max_new=_MAX_NEW.value,
        temperature=0.7 if _TEMPERATURE.value is None else _TEMPERATURE.value,
        quantize=_QUANTIZE.value,
    )
    if not processes.is_first():
        return
    for result in results:
        result["texts"] = [tokenizer.decode(row) for row in result["tokens"]]
        told = f" strength {result['strength']:g}, {result['share']['value']:.1%} near" * bool(
            towards
        )
        for drawn in result["texts"]:
            print(f"---{told}\n{_PROMPT.value}{drawn}")
    with written_aside(folder) as aside:
        write_json(aside / "sample.json", {"run": program.record(), "samples": results})
        if towards:
            drawn_figure = figure(results, f"strength towards {', '.join(_TOWARDS.value)}")
            plots.save(drawn_figure, aside, "steering")
            rows = [[r["strength"], *r["share"].values()] for r in results]
            columns = [tables.Column("strength", format="g")]
            columns += [tables.Column(n, format=".1%") for n in ("share near", "low", "high")]
            table = tables.Table("steering", "Share of new tokens near the list", columns, rows)
            table.write(aside)
            print(f"\n{table.as_text()}")
    print(f"\n{folder}/sample.json")


if __name__ == "__main__":
    program.run(main, meshes=True)
