"""BrierLM: a score that compares language models of any kind by their samples.

Each position has a reference, the next 4 tokens of the text, and two independent continuations by
the model. Brier-n is the mean score of the first n tokens as a whole, from -1 to 1. BrierLM is 100
times the geometric mean of Brier-1 to Brier-4 (Shao et al., arXiv:2510.27688), or 0 where one of
them is not positive. Higher is better.

A model with probabilities P has closed forms, without the noise of the draws:

    Brier-n = 2 P(reference's first n) - sum_x P(x)^2 over all n-grams x

Intervals are 95 %, by bootstrap over groups of positions, such as windows of the text.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm.arguments import check_count, check_integers
from continuous_lm.errors import InputError
from continuous_lm.experiments.common.statistics import (
    NUM_RESAMPLES,
    bootstrap_means,
    percentile_interval,
)
from continuous_lm.losses import brier_n
from continuous_lm.models import kv_cache
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.samplers import Temperature
from continuous_lm.models.transformer import Transformer, forward
from continuous_lm.models.trunk_inputs import make_inputs

NGRAM_LENGTHS = (1, 2, 3, 4)
CONTINUATION_LENGTH = max(NGRAM_LENGTHS)  # of a continuation
_MAX_ENUMERATED = 2**24  # probabilities that are enumerated


def brier_lm_from_samples(
    first: np.ndarray,
    second: np.ndarray,
    reference: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """BrierLM of a model that was sampled.

    Args:
      first: a continuation drawn at each position, int [n, 4].
      second: another one, drawn independently.
      reference: the text's own.
      groups: int [n], which positions are drawn together by the bootstrap; each for itself if left
        out, which makes intervals too narrow where neighbours are alike.
      seed: seed of the bootstrap.
      resamples: resamples of the bootstrap.

    Returns:
      "positions", and "brier_1", ..., "brier_4" and "brier_lm" with "value", "low" and "high".

    Raises:
      InputError: if shapes do not fit.
    """
    token_arrays = {"first": first, "second": second, "reference": reference}
    tokens = [
        _check_continuations(name, values) for name, values in token_arrays.items()
    ]
    if len({len(array) for array in tokens}) > 1:
        row_counts = ", ".join(
            f"{len(array)} of {name}"
            for name, array in zip(token_arrays, tokens, strict=True)
        )
        raise InputError(f"rows are {row_counts}; they must be as many")
    scores = [
        brier_n(*(array[:, :n] for array in tokens), n=n)[:, 0] for n in NGRAM_LENGTHS
    ]
    return _summarize_scores(np.stack(scores, axis=-1), groups, seed, resamples)


def brier_lm_from_probabilities(
    reference_log_probs: np.ndarray,
    collision: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> dict[str, Any]:
    """BrierLM of a model whose probabilities are known.

    Args:
      reference_log_probs: log-probability of each reference token after the earlier ones, [n, 4].
      collision: sum_x P(x)^2 over n-grams x for n = 1, ..., 4, [n, 4], or unbiased estimates of it,
        such as P(x) of an x that is drawn from P.
      groups: as in `brier_lm_from_samples`.
      seed: as in `brier_lm_from_samples`.
      resamples: as in `brier_lm_from_samples`.

    Returns:
      as `brier_lm_from_samples`.

    Raises:
      InputError: if shapes do not fit, or these are no probabilities.
    """
    log_probs = np.asarray(reference_log_probs, np.float64)
    collision = np.asarray(collision, np.float64)
    for name, values in {
        "reference_log_probs": log_probs,
        "collision": collision,
    }.items():
        if (
            values.ndim != 2
            or values.shape[1] != CONTINUATION_LENGTH
            or values.shape != log_probs.shape
        ):
            raise InputError(
                f"{name} has shape {list(values.shape)}; it must be [n, {CONTINUATION_LENGTH}],"
                " with as many"
                " rows as the other"
            )
    tolerance = 1e-3  # rounding of float32
    if not (log_probs <= tolerance).all():
        raise InputError(
            "reference_log_probs has entries above 0, or that are no numbers"
        )
    if not ((collision >= 0) & (collision <= 1 + tolerance)).all():
        raise InputError("collision has entries that are not from 0 to 1")
    return _summarize_scores(
        2 * np.exp(np.cumsum(log_probs, axis=1)) - collision, groups, seed, resamples
    )


def _check_continuations(name: str, tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if (
        tokens.ndim != 2
        or tokens.shape[1] != CONTINUATION_LENGTH
        or tokens.dtype.kind not in "iu"
    ):
        raise InputError(
            f"{name} is {tokens.dtype} {list(tokens.shape)}; it must be int [n,"
            f" {CONTINUATION_LENGTH}]"
        )
    return tokens


def _summarize_scores(
    scores: np.ndarray, groups: np.ndarray | None, seed: int, resamples: int
) -> dict[str, Any]:
    """Means of scores [n, 4], with their intervals."""
    check_count("resamples", resamples)
    if not len(scores):
        raise InputError("there are no positions to evaluate")
    if groups is not None and (
        np.shape(groups) != (len(scores),) or np.asarray(groups).dtype.kind not in "iu"
    ):
        raise InputError(f"groups must be int [{len(scores)}], one for each position")
    group_indices = np.arange(len(scores))
    if groups is not None:
        group_indices = np.unique(groups, return_inverse=True)[1]
    # Each group's sums and size: a resample's mean is that of positions, not of groups.
    group_sizes = np.bincount(group_indices).astype(np.float64)
    group_sums = [
        np.bincount(group_indices, column)
        for column in np.asarray(scores, np.float64).T
    ]
    resampled_means = bootstrap_means(
        np.stack(group_sums, axis=-1),
        group_sizes,
        seed=seed,
        num_resamples=resamples,
    )
    means = np.asarray(np.mean(scores, axis=0, dtype=np.float64))

    def interval(value: np.ndarray, values: np.ndarray) -> dict[str, float]:
        low, high = percentile_interval(values)
        return {"value": float(value), "low": low, "high": high}

    summary: dict[str, Any] = {"positions": len(scores)}
    for i, n in enumerate(NGRAM_LENGTHS):
        summary[f"brier_{n}"] = interval(means[i], resampled_means[:, i])
    return summary | {
        "brier_lm": interval(_brier_lm(means), _brier_lm(resampled_means))
    }


def _brier_lm(means: np.ndarray) -> np.ndarray:
    """BrierLM [...] of the means of Brier-1, ..., Brier-4 [..., 4]."""
    return 100 * np.prod(np.maximum(means, 0.0), axis=-1) ** (1 / means.shape[-1])


# --- Discrete models --------------------------------------------------------------------------


def ngram_probabilities(
    next_probs: Callable[[np.ndarray], np.ndarray], contexts: np.ndarray, n: int
) -> np.ndarray:
    """Probabilities of all n-grams after each context, for small vocabularies.

    Args:
      next_probs: from int [m, T] to the probabilities of the next token [m, V].
      contexts: int [rows, T].
      n: length of the n-grams.

    Returns:
      float64 [rows, V, ..., V] with n axes of V.

    Raises:
      InputError: if there are too many.
    """
    check_count("n", n)
    contexts = np.asarray(contexts)
    p = np.asarray(next_probs(contexts), np.float64)
    vocab_size = p.shape[-1]
    num_contexts = len(contexts)
    if num_contexts * vocab_size**n > _MAX_ENUMERATED:
        raise InputError(
            f"{num_contexts} contexts of {vocab_size} tokens have"
            f" {num_contexts * vocab_size**n} continuations by {n}; at most"
            f" {_MAX_ENUMERATED} are enumerated"
        )
    for _ in range(n - 1):
        next_tokens = np.tile(np.arange(vocab_size), len(contexts))[:, None]
        contexts = np.concatenate(
            [np.repeat(contexts, vocab_size, axis=0), next_tokens], axis=1
        )
        p = p.reshape(-1, 1) * np.asarray(next_probs(contexts), np.float64)
    return p.reshape(num_contexts, *[vocab_size] * n)


def collision_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """sum_x P(x)^2 [rows, n] of the first 1, ..., n tokens, from `ngram_probabilities`.

    That is how often two independent draws are the same.
    """
    num_contexts = len(probabilities)
    by_length = []
    for _ in range(probabilities.ndim - 1):
        by_length.append(np.square(probabilities).reshape(num_contexts, -1).sum(axis=1))
        probabilities = probabilities.sum(axis=-1)
    return np.stack(by_length[::-1], axis=-1)


def evaluate_language_model(
    lm: LanguageModel,
    contexts: np.ndarray,
    reference: np.ndarray,
    key: jax.Array,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
    batch_size: int = 64,
) -> dict[str, dict[str, Any]]:
    """BrierLM of a model of tokens, as any model's and in closed form, from the same draws.

    Args:
      lm: the model.
      contexts: int [n, T], of one length.
      reference: the tokens that follow, int [n, 4].
      key: PRNG key of the two continuations, which no token ends.
      groups: as in `brier_lm_from_samples`.
      seed: as in `brier_lm_from_samples`.
      resamples: as in `brier_lm_from_samples`.
      batch_size: how many contexts go through the model at once. Draws depend on it.

    Returns:
      "sampled", as `brier_lm_from_samples` has it, and "closed", as `brier_lm_from_model` has it.

    Raises:
      InputError: if shapes do not fit, or tokens are not in the vocabulary.
    """
    check_count("batch_size", batch_size)
    contexts, reference = _check_contexts(lm, contexts, reference)
    token_batches = []
    batch_size = min(batch_size, len(contexts))
    for i, batch_indices in _padded_batches(len(contexts), batch_size):
        generated = generate(
            lm,
            np.concatenate([contexts[batch_indices], contexts[batch_indices]]),
            sampler=Temperature(1.0),
            max_new_tokens=CONTINUATION_LENGTH,
            key=jax.random.fold_in(key, i),
            stop=(),
        ).tokens.reshape(2, batch_size, CONTINUATION_LENGTH)
        token_batches.append(generated)
    first, second = np.concatenate(token_batches, axis=1)[:, : len(contexts)]
    return {
        "sampled": brier_lm_from_samples(
            first, second, reference, groups=groups, seed=seed, resamples=resamples
        ),
        "closed": brier_lm_from_model(
            lm,
            contexts,
            (first, second),
            reference,
            groups=groups,
            seed=seed,
            resamples=resamples,
            batch_size=batch_size,
        ),
    }


def brier_lm_from_model(
    lm: LanguageModel,
    contexts: np.ndarray,
    draws: tuple[np.ndarray, np.ndarray],
    reference: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
    batch_size: int = 64,
) -> dict[str, Any]:
    """BrierLM of a model of tokens in closed form, from two draws of its own at each position.

    The collision rate of Brier-1 is exact, and that of longer n-grams is the mean probability of
    the two continuations: its expectation over draws from P is sum_x P(x)^2.

    Args:
      lm: the model.
      contexts: int [n, T], of one length.
      draws: two independent continuations that the model drew, int [n, 4] each.
      reference: the tokens that follow, int [n, 4].
      groups: as in `brier_lm_from_samples`.
      seed: as in `brier_lm_from_samples`.
      resamples: as in `brier_lm_from_samples`.
      batch_size: how many contexts go through the model at once.

    Returns:
      as `brier_lm_from_samples`.
    """
    contexts, reference = _check_contexts(lm, contexts, reference)
    config = lm.config.at_length(contexts.shape[1] + CONTINUATION_LENGTH)
    model = lm.model.clone(config=config)
    continuations = np.stack([*draws, reference]).astype(np.int32)
    reference_batches = []
    collision_batches = []
    for _, batch_indices in _padded_batches(
        len(contexts), min(batch_size, len(contexts))
    ):
        batch_log_probs, first_collision = _score_continuations(
            model, lm.params, contexts[batch_indices], continuations[:, batch_indices]
        )
        collision_estimates = np.exp(
            np.cumsum(np.asarray(batch_log_probs[:2], np.float64), axis=-1)
        ).mean(axis=0)
        collision_estimates[:, 0] = first_collision
        reference_batches.append(np.asarray(batch_log_probs[2]))
        collision_batches.append(collision_estimates)
    return brier_lm_from_probabilities(
        np.concatenate(reference_batches)[: len(contexts)],
        np.concatenate(collision_batches)[: len(contexts)],
        groups=groups,
        seed=seed,
        resamples=resamples,
    )


def _check_contexts(
    lm: LanguageModel, contexts: np.ndarray, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both as int32, if they fit the model and each other."""
    contexts = np.asarray(contexts)
    reference = _check_continuations("reference", reference)
    if (
        contexts.ndim != 2
        or contexts.dtype.kind not in "iu"
        or len(contexts) != len(reference)
    ):
        raise InputError(
            f"contexts are {contexts.dtype} {list(contexts.shape)}; they must be int"
            f" [{len(reference)}, T], one for each reference"
        )
    if not len(contexts):
        raise InputError("there are no positions to evaluate")
    for name, tokens in {"contexts": contexts, "reference": reference}.items():
        check_integers(name, tokens, 0, lm.config.vocab_size)
    return contexts.astype(np.int32), reference.astype(np.int32)


def _padded_batches(
    num_contexts: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Beginnings and indices of pieces; the last is filled up, so that there is one program."""
    for i in range(0, num_contexts, batch_size):
        yield i, np.minimum(np.arange(i, i + batch_size), num_contexts - 1)


@functools.partial(jax.jit, static_argnums=0)
def _score_continuations(
    model: Transformer, params: Any, contexts: jax.Array, continuations: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Score continuations by the model's probabilities.

    Contexts are computed once for all continuations, with logits only at their last token.

    Args:
      model: the model, with its config at the length of all tokens.
      params: parameters of the model.
      contexts: int [B, T].
      continuations: several continuations of each, int [num_continuations, B, 4].

    Returns:
      log-probabilities of their tokens [num_continuations, B, 4], and sum_v P(v)^2 of the
      first token [B].
    """
    cache_length = contexts.shape[-1] + continuations.shape[-1] - 1
    cache = kv_cache.empty(
        model.config, cache_length, contexts.shape[:1], params["embedding"].dtype
    )
    context_output = forward(
        model.config,
        params,
        make_inputs(model.config, contexts, cache=cache),
        position=-1,
        cache=cache,
        execution=model.execution,
    )
    first_logits = context_output.logits
    context_cache = context_output.cache

    def continuation_log_probs(tokens: jax.Array) -> jax.Array:
        output = forward(
            model.config,
            params,
            make_inputs(model.config, tokens[:, :-1], cache=context_cache),
            cache=context_cache,
            execution=model.execution,
        )
        later_logits = output.logits
        logits = jnp.concatenate([first_logits[:, None], later_logits], axis=1)
        token_logits = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return token_logits - jax.nn.logsumexp(logits, axis=-1)

    collision = jnp.sum(jnp.square(jax.nn.softmax(first_logits, axis=-1)), axis=-1)
    return jax.lax.map(continuation_log_probs, continuations), collision
