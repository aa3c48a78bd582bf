"""What a density model of text is worth, in numbers that a discrete model can be held against.

    nll                nats a vector: the negative log-density of held-out tokens' rows
    perplexity         of tokens, when the density is renormalised over the table's rows
    shuffled           the same with the contexts of other windows: what is left without a context
    unigram            of the training tokens' frequencies: what no context is worth
    accuracy           of the token whose row is nearest to the mean, and to a draw
    noise, margin      squared distance of a draw from its row, and how much farther the second is
    collapse           variance and effective rank of the rows; scales that are at their bound

Intervals are 95 %, by bootstrap over windows.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize
from continuous_lm.experiments.common import tables
from continuous_lm.experiments.training import window_batches
from continuous_lm.models.density import distributions
from continuous_lm.models.density.heads import ExpertsHead
from continuous_lm.models.density.model import DensityLM, DensityModel
from continuous_lm.models.density.samplers import token_rows

ROWS = 8  # windows judged at once
RESAMPLES = 1000


def judge(
    lm: DensityLM,
    held_out: np.ndarray,
    train: np.ndarray,
    *,
    length: int,
    windows: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All the numbers above.

    Args:
      lm: a model that reads tokens.
      held_out: tokens int [m].
      train: tokens int [n], for the unigram.
      length: of the windows, in inputs.
      windows: at most so many, spread over the text.
      seed: of draws, of the order of the windows and of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(window_batches.consecutive(held_out, length=length, limit=windows))
    table = None
    if not lm.model.speaks:
        rows = token_rows(lm)
        table = {"rows": rows, "norms": quantize.squared_norms(rows)}
    found: dict[str, list[np.ndarray]] = {}
    size = min(ROWS, len(tokens))
    for i in range(0, len(tokens) - size + 1, size):  # a rest is left out
        key = jax.random.fold_in(jax.random.key(seed), i)
        part = _judged(lm.model, lm.params, table, tokens[i : i + size], key)
        for name, values in part.items():
            found.setdefault(name, []).append(np.asarray(values))
    joined = {name: np.concatenate(values) for name, values in found.items()}
    targets = tokens[: len(joined["nats"]), 1:]
    frequencies = np.bincount(train, minlength=lm.config.vocab_size) + 1.0
    unigram = -np.log(frequencies / frequencies.sum())[targets]

    def interval(values, of=lambda x: x):
        means = values.reshape(len(values), -1).mean(axis=1)
        drawn = means[rng.integers(len(means), size=(RESAMPLES, len(means)))].mean(axis=1)
        points = {"value": means.mean()} | dict(
            zip(("low", "high"), np.quantile(drawn, [0.025, 0.975]), strict=True)
        )
        with np.errstate(over="ignore"):  # more than a float holds is no number
            numbers = {name: float(of(x)) for name, x in points.items()}
        return {name: x if np.isfinite(x) else None for name, x in numbers.items()}

    result = {
        "tokens": int(targets.size),
        "nats": interval(joined["nats"]),
        "perplexity": interval(joined["nats"], np.exp),
        "shuffled": interval(joined["shuffled"], np.exp),
        "unigram": interval(unigram, np.exp),
        "context_nats": interval(joined["shuffled"] - joined["nats"]),
    }
    rest = ("nll", "accuracy_mean", "accuracy_draw", "noise", "margin", "at_bound")
    result |= {name: interval(joined[name]) for name in rest if name in joined}
    if table is not None:
        spread = quantize.spread(table["rows"])
        result["width"] = lm.model.head.width
        result["effective_rank"] = float(spread.effective_rank)
        result["least_variance"] = float(jnp.min(spread.variances))
    if "weights" in joined:  # exp of the entropy of the mean weights: X if all are used alike
        weights = joined["weights"].reshape(-1, joined["weights"].shape[-1]).mean(axis=0)
        result["use"] = float(np.exp(-np.sum(weights * np.log(np.maximum(weights, 1e-30)))))
    return result


@functools.partial(jax.jit, static_argnums=0)
def _judged(model: DensityModel, params: Any, table: Any, tokens: jax.Array, key: jax.Array):
    """Numbers of each target, [B, T] each, of windows int [B, T + 1]."""

    def call(method, *arguments):
        return cast(Any, model.apply({"params": params}, *arguments, method=method))

    targets = tokens[:, 1:]
    hidden = call("predictions", tokens)
    logits = call("logits_of", hidden)

    def nats_of(logits):
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    found = {
        "nats": nats_of(logits),
        # Windows come in an order of chance: the one before is not the text before.
        "shuffled": nats_of(jnp.roll(logits, 1, axis=0)),
    }
    density = call("distribution", hidden)
    if table is None:
        found["accuracy_mean"] = jnp.argmax(logits, axis=-1) == targets
        return found | {"accuracy_draw": density.sample(key) == targets}
    draw = density.sample(key)
    near = quantize.k_nearest(draw, table["rows"], 2, norms=table["norms"])
    middle = quantize.nearest(density.mean, table["rows"], norms=table["norms"]).indices
    found |= {
        "nll": -density.log_prob(table["rows"][targets]),
        "accuracy_mean": middle == targets,
        "accuracy_draw": near.indices[..., 0] == targets,
        "noise": near.distances[..., 0],
        "margin": near.distances[..., 1] - near.distances[..., 0],
        "at_bound": jnp.mean(_scales(density) < 1.1 * model.head.min_scale, axis=-1),  # type: ignore[attr-defined]
    }
    if isinstance(density, distributions.Mixture):
        found["weights"] = density.weights
        if isinstance(model.head, ExpertsHead):
            chosen = jax.nn.one_hot(call("routes", hidden)[1], model.head.experts)
            found["weights"] = jnp.einsum("...k,...kx->...x", density.weights, chosen)
    return found


def _scales(density: Any) -> jax.Array:
    """The scales that `min_scale` bounds, [..., any number]."""
    match density:
        case distributions.FullGaussian():
            return jnp.diagonal(density.cholesky, axis1=-2, axis2=-1)
        case distributions.Mixture():
            return density.scales.reshape(*density.scales.shape[:-2], -1)
    return cast(jax.Array, density.scale)


def bits_per_byte(judged: dict[str, Any], bytes_per_token: float) -> float:
    """The token's information as bits for each byte of text, whatever the tokenizer."""
    return float(judged["nats"]["value"] / np.log(2.0) / bytes_per_token)


def tables_of(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """What is worth comparing, one row a model, from model -> numbers of `judging.judge`."""

    def at(numbers: dict[str, Any], name: str) -> float | None:
        return cast(float | None, numbers[name]["value"])

    def interval(numbers: dict[str, Any], name: str) -> str | None:
        low, high = (numbers[name][end] for end in ("low", "high"))
        return None if high is None else f"{low:.4g} to {high:.4g}"

    perplexity = tables.Table(
        "perplexity",
        "Perplexity of held-out tokens (95 % interval), densities renormalised over the table; with"
        " the contexts of other windows; of the unigram. Accuracy of the token nearest to the mean",
        [
            tables.Column("model"),
            tables.Column("parameters", format=",d"),
            tables.Column("perplexity", format=".4g"),
            tables.Column("95 %"),
            tables.Column("bits a byte", format=".3f"),
            tables.Column("shuffled", format=".4g"),
            tables.Column("unigram", format=".1f"),
            tables.Column("accuracy", format=".1%"),
        ],
        [
            [
                model,
                numbers["parameters"],
                at(numbers, "perplexity"),
                interval(numbers, "perplexity"),
                numbers["bits_per_byte"],
                at(numbers, "shuffled"),
                at(numbers, "unigram"),
                at(numbers, "accuracy_mean"),
            ]
            for model, numbers in results.items()
        ],
    )
    vectors = tables.Table(
        "vectors",
        "Densities: nats a dimension of held-out rows; accuracy of the token nearest to a draw;"
        " a draw's squared distance from it a dimension, and how much farther the second is; scales"
        " at their bound; effective rank of the table; components or experts in use",
        [
            tables.Column("model"),
            tables.Column("width", format="d"),
            tables.Column("nats", format=".4f"),
            tables.Column("accuracy", format=".1%"),
            tables.Column("noise", format=".4f"),
            tables.Column("margin", format=".4f"),
            tables.Column("at bound", format=".1%"),
            tables.Column("rank", format=".1f"),
            tables.Column("use", format=".1f"),
        ],
        [
            [
                model,
                numbers["width"],
                numbers["nll"]["value"] / numbers["width"],
                at(numbers, "accuracy_draw"),
                numbers["noise"]["value"] / numbers["width"],
                numbers["margin"]["value"] / numbers["width"],
                at(numbers, "at_bound"),
                numbers["effective_rank"],
                numbers.get("use"),
            ]
            for model, numbers in results.items()
            if "nll" in numbers
        ],
    )
    return [perplexity, vectors] if vectors.rows else [perplexity]
