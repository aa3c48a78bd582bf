"""Metrics of density models of text, comparable with those of a softmax model.

    nll                nats a vector: the negative log-density of held-out tokens' rows
    perplexity         of tokens, when the density is renormalised over the table's rows
    shuffled           the same with the contexts of other windows
    unigram            perplexity of the training tokens' frequencies
    accuracy           of the token whose row is nearest to the mean, and to a draw
    noise, margin      squared distance of a draw from its row, and how much farther the second is
    collapse           variance and effective rank of the rows; scales that are at their bound

Intervals are 95 %, by bootstrap over windows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import quantize
from continuous_lm.experiments.common import tables
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.experiments.training import window_batches
from continuous_lm.models import density as density_lib
from continuous_lm.models.density import distributions
from continuous_lm.models.density.heads import DensityHead, ExpertsHead
from continuous_lm.models.density.model import HEAD, DensityModel
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params

WINDOWS_PER_BATCH = 8  # windows evaluated at once
OPTIONAL_METRICS = (  # of densities, but for accuracy_mean
    "nll",
    "accuracy_mean",
    "accuracy_draw",
    "noise",
    "margin",
    "at_bound",
)


def evaluate_density(
    lm: LanguageModel[DensityModel],
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
      length: length of the windows, in inputs.
      windows: at most so many, spread over the text.
      seed: seed of draws, of the order of the windows and of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    tokens = generator.permutation(
        window_batches.consecutive_windows(held_out, length=length, max_windows=windows)
    )
    table = None
    if not lm.model.predicts_tokens:
        token_table = density_lib.token_table(lm)
        table = {"rows": token_table, "norms": quantize.squared_norms(token_table)}
    metrics = _window_metrics(lm, table, tokens, seed)
    targets = tokens[: len(metrics["nats"]), 1:]
    unigram_nats = _unigram_nats(train_tokens, lm.config.vocab_size)[targets]
    context_nats = metrics["shuffled"] - metrics["nats"]
    result: dict[str, Any] = {
        "tokens": int(targets.size),
        "nats": _interval(metrics["nats"], generator),
        "perplexity": _perplexity_interval(metrics["nats"], generator),
        "shuffled": _perplexity_interval(metrics["shuffled"], generator),
        "unigram": _perplexity_interval(unigram_nats, generator),
        "context_nats": _interval(context_nats, generator),
    }
    for name in OPTIONAL_METRICS:
        if name in metrics:
            result[name] = _interval(metrics[name], generator)
    if table is not None:
        row_spread = quantize.spread(table["rows"])
        result["width"] = lm.model.head.width
        result["effective_rank"] = float(row_spread.effective_rank)
        result["least_variance"] = float(jnp.min(row_spread.variances))
    if "weights" in metrics:
        result["use"] = _effective_number(metrics["weights"])
    return result


def _window_metrics(
    lm: LanguageModel[DensityModel],
    table: dict[str, jax.Array] | None,
    tokens: np.ndarray,
    seed: int,
) -> dict[str, np.ndarray]:
    """The numbers of `_batch_metrics` for all windows; those beyond whole batches are left out."""
    metric_batches: dict[str, list[np.ndarray]] = {}
    batch_size = min(WINDOWS_PER_BATCH, len(tokens))
    for start in range(0, len(tokens) - batch_size + 1, batch_size):
        key = jax.random.fold_in(jax.random.key(seed), start)
        batch_metrics = _batch_metrics(
            lm.model, lm.params, table, tokens[start : start + batch_size], key
        )
        for name, values in batch_metrics.items():
            metric_batches.setdefault(name, []).append(np.asarray(values))
    return {name: np.concatenate(values) for name, values in metric_batches.items()}


def _unigram_nats(train_tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Negative log frequencies [V] of the training tokens, each counted once more."""
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return -np.log(counts / counts.sum())


def _interval(
    values: np.ndarray, generator: np.random.Generator
) -> dict[str, float | None]:
    """The mean of values [k, ...] and its 95 % interval over windows."""
    means = values.reshape(len(values), -1).mean(axis=1)
    low, high = bootstrap_interval(means, seed=generator)
    estimates = {"value": float(means.mean()), "low": low, "high": high}
    return {name: _finite_or_none(value) for name, value in estimates.items()}


def _perplexity_interval(
    nats: np.ndarray, generator: np.random.Generator
) -> dict[str, float | None]:
    """exp of the mean of nats [k, ...] and of its interval."""
    perplexities: dict[str, float | None] = {}
    for name, value in _interval(nats, generator).items():
        with np.errstate(over="ignore"):  # more than a float holds is no number
            perplexity = np.nan if value is None else float(np.exp(value))
        perplexities[name] = _finite_or_none(perplexity)
    return perplexities


def _finite_or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _effective_number(weights: np.ndarray) -> float:
    """exp of the entropy of the mean of weights [..., X]: X if all are used alike."""
    mean_weights = weights.reshape(-1, weights.shape[-1]).mean(axis=0)
    log_weights = np.log(np.maximum(mean_weights, 1e-30))
    return float(np.exp(-np.sum(mean_weights * log_weights)))


@functools.partial(jax.jit, static_argnums=0)
def _batch_metrics(
    model: DensityModel,
    params: Params,
    table: dict[str, jax.Array] | None,
    tokens: jax.Array,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Numbers of each target, [B, T] each, of windows int [B, T + 1]."""
    targets = tokens[:, 1:]
    hidden = model.context_states(params, model.make_inputs(tokens))
    logits = model.logits(params, hidden)

    def nats_of(logits):
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - target_logits

    metrics = {
        "nats": nats_of(logits),
        # Windows come in an order of chance: the one before is not the text before.
        "shuffled": nats_of(jnp.roll(logits, 1, axis=0)),
    }
    distribution = model.distribution(params, hidden)
    if table is None or isinstance(distribution, distributions.Categorical):
        metrics["accuracy_mean"] = jnp.argmax(logits, axis=-1) == targets
        return metrics | {"accuracy_draw": distribution.sample(key) == targets}
    metrics |= _density_metrics(distribution, table, targets, key)
    if isinstance(model.head, DensityHead):
        scales = _bounded_scales(distribution)
        metrics["at_bound"] = jnp.mean(scales < 1.1 * model.head.min_scale, axis=-1)
    if isinstance(distribution, distributions.Mixture):
        metrics["weights"] = distribution.weights
        if isinstance(model.head, ExpertsHead):
            expert_indices = model.head.route(params[HEAD], hidden).expert_indices
            expert_one_hot = jax.nn.one_hot(expert_indices, model.head.experts)
            metrics["weights"] = jnp.einsum(
                "...x,...xX->...X", distribution.weights, expert_one_hot
            )
    return metrics


def _density_metrics(
    density: distributions.Density,
    table: dict[str, jax.Array],
    targets: jax.Array,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Numbers [B, T] of a density at the rows of the targets, of its mean and of a draw."""
    rows = table["rows"]
    norms = table["norms"]
    drawn_vectors = density.sample(key)
    nearest_two = quantize.k_nearest(drawn_vectors, rows, 2, norms=norms)
    nearest_to_mean = quantize.nearest(density.mean, rows, norms=norms).indices
    return {
        "nll": -density.log_prob(rows[targets]),
        "accuracy_mean": nearest_to_mean == targets,
        "accuracy_draw": nearest_two.indices[..., 0] == targets,
        "noise": nearest_two.distances[..., 0],
        "margin": nearest_two.distances[..., 1] - nearest_two.distances[..., 0],
    }


def _bounded_scales(density: distributions.Density) -> jax.Array:
    """The scales that `min_scale` bounds, [..., any number]."""
    match density:
        case distributions.FullGaussian():
            return jnp.diagonal(density.cholesky, axis1=-2, axis2=-1)
        case distributions.Mixture():
            return density.scales.reshape(*density.scales.shape[:-2], -1)
    return density.scale


def bits_per_byte(metrics: dict[str, Any], bytes_per_token: float) -> float:
    """The token's information as bits for each byte of text, whatever the tokenizer."""
    return float(metrics["nats"]["value"] / np.log(2.0) / bytes_per_token)


PERPLEXITY_TABLE = tables.TableSpec(
    "perplexity",
    "Perplexity of held-out tokens (95 % interval), densities renormalised over the table; with"
    " the contexts of other windows; of the unigram. Accuracy of the token nearest to the mean",
    (
        tables.Column("parameters", "parameters", ",d"),
        tables.Column("perplexity", "perplexity.value", ".4g"),
        tables.Column("95 %", "perplexity.interval"),
        tables.Column("bits a byte", "bits_per_byte", ".3f"),
        tables.Column("shuffled", "shuffled.value", ".4g"),
        tables.Column("unigram", "unigram.value", ".1f"),
        tables.Column("accuracy", "accuracy_mean.value", ".1%"),
    ),
)
VECTOR_TABLE = tables.TableSpec(
    "vectors",
    "Densities: nats a dimension of held-out rows; accuracy of the token nearest to a draw;"
    " a draw's squared distance from it a dimension, and how much farther the second is; scales"
    " at their bound; effective rank of the table; components or experts in use",
    (
        tables.Column("width", "width", "d"),
        tables.Column("nats", "nll.per_dimension", ".4f"),
        tables.Column("accuracy", "accuracy_draw.value", ".1%"),
        tables.Column("noise", "noise.per_dimension", ".4f"),
        tables.Column("margin", "margin.per_dimension", ".4f"),
        tables.Column("at bound", "at_bound.value", ".1%"),
        tables.Column("rank", "effective_rank", ".1f"),
        tables.Column("use", "use", ".1f"),
    ),
)


def make_tables(results: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """One row a model, from model -> `evaluate_density` of it; vectors of those that have them."""
    perplexity_rows = {
        model: metrics | {"perplexity": _with_interval(metrics["perplexity"])}
        for model, metrics in results.items()
    }
    vector_rows = {
        model: _with_values_per_dimension(metrics)
        for model, metrics in results.items()
        if "nll" in metrics
    }
    result_tables = [PERPLEXITY_TABLE.fill(perplexity_rows)]
    if vector_rows:
        result_tables.append(VECTOR_TABLE.fill(vector_rows))
    return result_tables


def _with_interval(estimate: dict[str, float | None]) -> dict[str, Any]:
    """The estimate with "interval", its bounds as text; None if one is not finite."""
    if estimate["high"] is None:
        return {**estimate, "interval": None}
    return {**estimate, "interval": f"{estimate['low']:.4g} to {estimate['high']:.4g}"}


def _with_values_per_dimension(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with "per_dimension" beside the values that are sums over dimensions."""
    sums_over_dimensions = ("nll", "noise", "margin")
    return metrics | {
        name: metrics[name]
        | {"per_dimension": metrics[name]["value"] / metrics["width"]}
        for name in sums_over_dimensions
    }
