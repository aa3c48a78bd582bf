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
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.experiments.training import window_batches
from continuous_lm.models.density import distributions
from continuous_lm.models.density.heads import ExpertsHead
from continuous_lm.models.density.model import DensityLM, DensityModel
from continuous_lm.models.density.samplers import get_token_table

WINDOWS_PER_BATCH = 8  # windows judged at once


def evaluate_density(
    lm: DensityLM,
    held_out: np.ndarray,
    train_tokens: np.ndarray,
    *,
    length: int,
    windows: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All the numbers above.

    Args:
      lm: a model that reads tokens.
      held_out: tokens int [m].
      train_tokens: tokens int [n], for the unigram.
      length: of the windows, in inputs.
      windows: at most so many, spread over the text.
      seed: of draws, of the order of the windows and of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(
        window_batches.consecutive_windows(held_out, length=length, max_windows=windows)
    )
    table = None
    if not lm.model.predicts_tokens:
        token_table = get_token_table(lm)
        table = {"rows": token_table, "norms": quantize.squared_norms(token_table)}
    metric_batches: dict[str, list[np.ndarray]] = {}
    batch_size = min(WINDOWS_PER_BATCH, len(tokens))
    for i in range(0, len(tokens) - batch_size + 1, batch_size):  # a rest is left out
        key = jax.random.fold_in(jax.random.key(seed), i)
        batch_metrics = _batch_metrics(
            lm.model, lm.params, table, tokens[i : i + batch_size], key
        )
        for name, values in batch_metrics.items():
            metric_batches.setdefault(name, []).append(np.asarray(values))
    metrics = {name: np.concatenate(values) for name, values in metric_batches.items()}
    targets = tokens[: len(metrics["nats"]), 1:]
    frequencies = np.bincount(train_tokens, minlength=lm.config.vocab_size) + 1.0
    unigram = -np.log(frequencies / frequencies.sum())[targets]

    def interval(values, of=lambda x: x):
        means = values.reshape(len(values), -1).mean(axis=1)
        low, high = bootstrap_interval(means, seed=rng)
        estimates = {"value": means.mean(), "low": low, "high": high}
        with np.errstate(over="ignore"):  # more than a float holds is no number
            transformed = {name: float(of(x)) for name, x in estimates.items()}
        return {name: x if np.isfinite(x) else None for name, x in transformed.items()}

    result = {
        "tokens": int(targets.size),
        "nats": interval(metrics["nats"]),
        "perplexity": interval(metrics["nats"], np.exp),
        "shuffled": interval(metrics["shuffled"], np.exp),
        "unigram": interval(unigram, np.exp),
        "context_nats": interval(metrics["shuffled"] - metrics["nats"]),
    }
    optional_metrics = (
        "nll",
        "accuracy_mean",
        "accuracy_draw",
        "noise",
        "margin",
        "at_bound",
    )
    result |= {
        name: interval(metrics[name]) for name in optional_metrics if name in metrics
    }
    if table is not None:
        row_spread = quantize.spread(table["rows"])
        result["width"] = lm.model.head.width
        result["effective_rank"] = float(row_spread.effective_rank)
        result["least_variance"] = float(jnp.min(row_spread.variances))
    if (
        "weights" in metrics
    ):  # exp of the entropy of the mean weights: X if all are used alike
        weights = (
            metrics["weights"].reshape(-1, metrics["weights"].shape[-1]).mean(axis=0)
        )
        result["use"] = float(
            np.exp(-np.sum(weights * np.log(np.maximum(weights, 1e-30))))
        )
    return result


@functools.partial(jax.jit, static_argnums=0)
def _batch_metrics(
    model: DensityModel, params: Any, table: Any, tokens: jax.Array, key: jax.Array
):
    """Numbers of each target, [B, T] each, of windows int [B, T + 1]."""

    def apply_method(method, *arguments):
        return cast(Any, model.apply({"params": params}, *arguments, method=method))

    targets = tokens[:, 1:]
    hidden = apply_method("context_states", tokens)
    logits = apply_method("logits_from_hidden", hidden)

    def nats_of(logits):
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - target_logits

    metrics = {
        "nats": nats_of(logits),
        # Windows come in an order of chance: the one before is not the text before.
        "shuffled": nats_of(jnp.roll(logits, 1, axis=0)),
    }
    density = apply_method("distribution", hidden)
    if table is None:
        metrics["accuracy_mean"] = jnp.argmax(logits, axis=-1) == targets
        return metrics | {"accuracy_draw": density.sample(key) == targets}
    drawn_vectors = density.sample(key)
    nearest_two = quantize.k_nearest(
        drawn_vectors, table["rows"], 2, norms=table["norms"]
    )
    nearest_to_mean = quantize.nearest(
        density.mean, table["rows"], norms=table["norms"]
    ).indices
    metrics |= {
        "nll": -density.log_prob(table["rows"][targets]),
        "accuracy_mean": nearest_to_mean == targets,
        "accuracy_draw": nearest_two.indices[..., 0] == targets,
        "noise": nearest_two.distances[..., 0],
        "margin": nearest_two.distances[..., 1] - nearest_two.distances[..., 0],
        "at_bound": jnp.mean(
            _bounded_scales(density) < 1.1 * model.head.min_scale, axis=-1
        ),  # type: ignore[attr-defined]
    }
    if isinstance(density, distributions.Mixture):
        metrics["weights"] = density.weights
        if isinstance(model.head, ExpertsHead):
            expert_one_hot = jax.nn.one_hot(
                apply_method("route", hidden)[1], model.head.experts
            )
            metrics["weights"] = jnp.einsum(
                "...x,...xX->...X", density.weights, expert_one_hot
            )
    return metrics


def _bounded_scales(density: Any) -> jax.Array:
    """The scales that `min_scale` bounds, [..., any number]."""
    match density:
        case distributions.FullGaussian():
            return jnp.diagonal(density.cholesky, axis1=-2, axis2=-1)
        case distributions.Mixture():
            return density.scales.reshape(*density.scales.shape[:-2], -1)
    return cast(jax.Array, density.scale)


def bits_per_byte(metrics: dict[str, Any], bytes_per_token: float) -> float:
    """The token's information as bits for each byte of text, whatever the tokenizer."""
    return float(metrics["nats"]["value"] / np.log(2.0) / bytes_per_token)


def make_tables(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """What is worth comparing, one row a model, from model -> `evaluate_density` of it."""

    def value_of(numbers: dict[str, Any], name: str) -> float | None:
        return cast(float | None, numbers[name]["value"])

    def format_interval(numbers: dict[str, Any], name: str) -> str | None:
        low, high = (numbers[name][endpoint] for endpoint in ("low", "high"))
        return None if high is None else f"{low:.4g} to {high:.4g}"

    perplexity_table = tables.Table(
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
                metrics["parameters"],
                value_of(metrics, "perplexity"),
                format_interval(metrics, "perplexity"),
                metrics["bits_per_byte"],
                value_of(metrics, "shuffled"),
                value_of(metrics, "unigram"),
                value_of(metrics, "accuracy_mean"),
            ]
            for model, metrics in results.items()
        ],
    )
    vector_table = tables.Table(
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
                metrics["width"],
                metrics["nll"]["value"] / metrics["width"],
                value_of(metrics, "accuracy_draw"),
                metrics["noise"]["value"] / metrics["width"],
                metrics["margin"]["value"] / metrics["width"],
                value_of(metrics, "at_bound"),
                metrics["effective_rank"],
                metrics.get("use"),
            ]
            for model, metrics in results.items()
            if "nll" in metrics
        ],
    )
    return [perplexity_table, vector_table] if vector_table.rows else [perplexity_table]
