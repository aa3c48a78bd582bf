"""BrierLM: language models of any kind held against each other by what they draw.

At each position there are the reference, which is the next 4 tokens of the text, and two
independent continuations by the model. Brier-n is the mean score of the first n tokens as a whole,
from -1 to 1; BrierLM is 100 times the geometric mean of n = 1, ..., 4 (Shao et al.,
arXiv:2510.27688), or 0 where one of them is not positive. More is better.

A model with probabilities P has closed forms, without the noise of the draws:

    Brier-n = 2 P(reference's first n) - sum_x P(x)^2 over all n-grams x

Intervals are 95 %, by bootstrap over groups of positions, such as windows of the text.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm.arguments import check_count, check_integers
from continuous_lm.errors import InputError
from continuous_lm.losses import brier_n
from continuous_lm.models import kv_cache
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.transformer import Transformer

ORDERS = (1, 2, 3, 4)
TOKENS = max(ORDERS)  # of a continuation
RESAMPLES = 1000
_LEVELS = (0.025, 0.975)
_MOST = 2**24  # probabilities that are enumerated


def judge(
    first: np.ndarray,
    second: np.ndarray,
    reference: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """BrierLM of a model that was sampled.

    Args:
      first: a continuation drawn at each position, int [n, 4].
      second: another one, drawn independently.
      reference: the text's own.
      groups: int [n], which positions are drawn together by the bootstrap; each for itself if left
        out, which makes intervals too narrow where neighbours are alike.
      seed: of the bootstrap.
      resamples: of the bootstrap.

    Returns:
      "positions", and "brier_1", ..., "brier_4" and "brier_lm" with "value", "low" and "high".

    Raises:
      InputError: if shapes do not fit.
    """
    given = {"first": first, "second": second, "reference": reference}
    tokens = [_continuations(name, values) for name, values in given.items()]
    if len({len(t) for t in tokens}) > 1:
        sizes = ", ".join(f"{len(t)} of {name}" for name, t in zip(given, tokens, strict=True))
        raise InputError(f"rows are {sizes}; they must be as many")
    scores = [brier_n(*(t[:, :n] for t in tokens), n=n)[:, 0] for n in ORDERS]
    return _summary(np.stack(scores, axis=-1), groups, seed, resamples)


def closed_form(
    reference_log_probs: np.ndarray,
    collision: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """BrierLM of a model whose probabilities are known.

    Args:
      reference_log_probs: of each token of the references given those before it, nats [n, 4].
      collision: sum_x P(x)^2 over n-grams x for n = 1, ..., 4, [n, 4], or unbiased estimates of it,
        such as P(x) of an x that is drawn from P.
      groups: as of `judge`.
      seed: as of `judge`.
      resamples: as of `judge`.

    Returns:
      as `judge`.

    Raises:
      InputError: if shapes do not fit, or these are no probabilities.
    """
    logs = np.asarray(reference_log_probs, np.float64)
    collision = np.asarray(collision, np.float64)
    for name, values in {"reference_log_probs": logs, "collision": collision}.items():
        if values.ndim != 2 or values.shape[1] != TOKENS or values.shape != logs.shape:
            raise InputError(
                f"{name} has shape {list(values.shape)}; it must be [n, {TOKENS}], with as many"
                " rows as the other"
            )
    slack = 1e-3  # rounding of float32
    if not (logs <= slack).all():
        raise InputError("reference_log_probs has entries above 0, or that are no numbers")
    if not ((collision >= 0) & (collision <= 1 + slack)).all():
        raise InputError("collision has entries that are not from 0 to 1")
    return _summary(2 * np.exp(np.cumsum(logs, axis=1)) - collision, groups, seed, resamples)


def _continuations(name: str, tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != TOKENS or tokens.dtype.kind not in "iu":
        raise InputError(
            f"{name} is {tokens.dtype} {list(tokens.shape)}; it must be int [n, {TOKENS}]"
        )
    return tokens


def _summary(
    scores: np.ndarray, groups: np.ndarray | None, seed: int, resamples: int
) -> dict[str, Any]:
    """Means of scores [n, 4], with their intervals."""
    check_count("resamples", resamples)
    if not len(scores):
        raise InputError("there are no positions to judge")
    if groups is not None and (
        np.shape(groups) != (len(scores),) or np.asarray(groups).dtype.kind not in "iu"
    ):
        raise InputError(f"groups must be int [{len(scores)}], one for each position")
    numbers = np.arange(len(scores))
    if groups is not None:
        numbers = np.unique(groups, return_inverse=True)[1]
    # Each group's sums and size: a resample's mean is that of positions, not of groups.
    sizes = np.bincount(numbers).astype(np.float64)
    sums = [np.bincount(numbers, column) for column in np.asarray(scores, np.float64).T]
    drawn = _resampled(np.stack([*sums, sizes], axis=-1), seed, resamples)
    means = np.asarray(np.mean(scores, axis=0, dtype=np.float64))

    def interval(value: np.ndarray, values: np.ndarray) -> dict[str, float]:
        low, high = np.quantile(values, _LEVELS)
        return {"value": float(value), "low": float(low), "high": float(high)}

    found: dict[str, Any] = {"positions": len(scores)}
    for i, n in enumerate(ORDERS):
        found[f"brier_{n}"] = interval(means[i], drawn[:, i])
    return found | {"brier_lm": interval(_brier_lm(means), _brier_lm(drawn))}


def _resampled(table: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means [resamples, 4] over groups that are drawn with replacement, from sums and sizes."""
    rng, num = np.random.default_rng(seed), len(table)
    sums = np.empty((resamples, table.shape[1]))
    for row in sums:  # one at a time stays in the processor's cache
        row[:] = np.bincount(rng.integers(num, size=num), minlength=num) @ table
    return sums[:, :-1] / sums[:, -1:]


def _brier_lm(means: np.ndarray) -> np.ndarray:
    """BrierLM [...] of the means of Brier-1, ..., Brier-4 [..., 4]."""
    return 100 * np.prod(np.maximum(means, 0.0), axis=-1) ** (1 / means.shape[-1])


# --- Discrete models --------------------------------------------------------------------------


def enumerated(
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
    size, rows = p.shape[-1], len(contexts)
    if rows * size**n > _MOST:
        raise InputError(
            f"{rows} contexts of {size} tokens have {rows * size**n} continuations by {n}; at most"
            f" {_MOST} are enumerated"
        )
    for _ in range(n - 1):
        tokens = np.tile(np.arange(size), len(contexts))[:, None]
        contexts = np.concatenate([np.repeat(contexts, size, axis=0), tokens], axis=1)
        p = p.reshape(-1, 1) * np.asarray(next_probs(contexts), np.float64)
    return p.reshape(rows, *[size] * n)


def collisions(probabilities: np.ndarray) -> np.ndarray:
    """sum_x P(x)^2 [rows, n] of the first 1, ..., n tokens, from `enumerated`'s [rows, V, ..., V].

    That is how often two independent draws are the same.
    """
    rows, found = len(probabilities), []
    for _ in range(probabilities.ndim - 1):
        found.append(np.square(probabilities).reshape(rows, -1).sum(axis=1))
        probabilities = probabilities.sum(axis=-1)
    return np.stack(found[::-1], axis=-1)


def discrete(
    lm: LanguageModel,
    contexts: np.ndarray,
    reference: np.ndarray,
    key: jax.Array,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    rows: int = 64,
) -> dict[str, dict[str, Any]]:
    """BrierLM of a model of tokens, as any model's and in closed form, from the same draws.

    Args:
      lm: the model.
      contexts: int [n, T], of one length.
      reference: the tokens that follow, int [n, 4].
      key: PRNG key of the two continuations, which no token ends.
      groups: as of `judge`.
      seed: as of `judge`.
      resamples: as of `judge`.
      rows: how many contexts go through the model at once. Draws depend on it.

    Returns:
      "sampled", as `judge` has it, and "closed", as `known` has it.

    Raises:
      InputError: if shapes do not fit, or tokens are not in the vocabulary.
    """
    check_count("rows", rows)
    contexts, reference = _contexts(lm, contexts, reference)
    found = []
    rows = min(rows, len(contexts))
    for i, picked in _pieces(len(contexts), rows):
        drawn = generate(
            lm,
            np.concatenate([contexts[picked], contexts[picked]]),
            max_new_tokens=TOKENS,
            temperature=1.0,
            key=jax.random.fold_in(key, i),
            stop=(),
        ).tokens.reshape(2, rows, TOKENS)
        found.append(drawn)
    first, second = np.concatenate(found, axis=1)[:, : len(contexts)]
    bootstrap: Any = {"groups": groups, "seed": seed, "resamples": resamples}
    return {
        "sampled": judge(first, second, reference, **bootstrap),
        "closed": known(lm, contexts, (first, second), reference, rows=rows, **bootstrap),
    }


def known(
    lm: LanguageModel,
    contexts: np.ndarray,
    drawn: tuple[np.ndarray, np.ndarray],
    reference: np.ndarray,
    *,
    rows: int = 64,
    **bootstrap: Any,
) -> dict[str, Any]:
    """BrierLM of a model of tokens in closed form, from two draws of its own at each position.

    The collision rate of Brier-1 is exact, and that of longer n-grams is the mean probability of
    the two continuations: its expectation over draws from P is sum_x P(x)^2.

    Args:
      lm: the model.
      contexts: int [n, T], of one length.
      drawn: two independent continuations that the model drew, int [n, 4] each.
      reference: the tokens that follow, int [n, 4].
      rows: how many contexts go through the model at once.
      **bootstrap: groups, seed and resamples, as of `judge`.

    Returns:
      as `judge`.
    """
    contexts, reference = _contexts(lm, contexts, reference)
    config = lm.config.at_length(contexts.shape[1] + TOKENS)
    model = lm.model.clone(config=config)
    following = np.stack([*drawn, reference]).astype(np.int32)
    logs, collision = [], []
    for _, picked in _pieces(len(contexts), min(rows, len(contexts))):
        told, same = _forced(model, lm.params, contexts[picked], following[:, picked])
        own = np.exp(np.cumsum(np.asarray(told[:2], np.float64), axis=-1)).mean(axis=0)
        own[:, 0] = same
        logs.append(np.asarray(told[2]))
        collision.append(own)
    values = (np.concatenate(parts)[: len(contexts)] for parts in (logs, collision))
    return closed_form(*values, **bootstrap)


def _contexts(
    lm: LanguageModel, contexts: np.ndarray, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both as int32, if they fit the model and each other."""
    contexts, reference = np.asarray(contexts), _continuations("reference", reference)
    if contexts.ndim != 2 or contexts.dtype.kind not in "iu" or len(contexts) != len(reference):
        raise InputError(
            f"contexts are {contexts.dtype} {list(contexts.shape)}; they must be int"
            f" [{len(reference)}, T], one for each reference"
        )
    if not len(contexts):
        raise InputError("there are no positions to judge")
    for name, tokens in {"contexts": contexts, "reference": reference}.items():
        check_integers(name, tokens, 0, lm.config.vocab_size)
    return contexts.astype(np.int32), reference.astype(np.int32)


def _pieces(count: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Beginnings and indices of pieces; the last is filled up, so that there is one program."""
    for i in range(0, count, rows):
        yield i, np.minimum(np.arange(i, i + rows), count - 1)


@functools.partial(jax.jit, static_argnums=0)
def _forced(
    model: Transformer, params: Any, contexts: jax.Array, following: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the model thinks of given continuations.

    Contexts are read once, and logits made of their last token alone, however many continuations
    there are.

    Args:
      model: with its config at the length of all tokens.
      params: of the model.
      contexts: int [B, T].
      following: C continuations of each, int [C, B, 4].

    Returns:
      log-probabilities of their tokens [C, B, 4], and sum_v P(v)^2 of the first token [B].
    """
    room = contexts.shape[-1] + following.shape[-1] - 1
    cache = kv_cache.empty(model.config, room, contexts.shape[:1], params["embedding"].dtype)
    variables: Any = {"params": params}
    first, cache = cast(Any, model.apply(variables, contexts, cache=cache, at=-1))

    def log_probs(tokens: jax.Array) -> jax.Array:
        rest, _ = cast(Any, model.apply(variables, tokens[:, :-1], cache=cache))
        logits = jnp.concatenate([first[:, None], rest], axis=1)
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    collision = jnp.sum(jnp.square(jax.nn.softmax(first, axis=-1)), axis=-1)
    return jax.lax.map(log_probs, following), collision
