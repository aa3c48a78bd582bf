"""Brier scores of token probabilities, and of models that can only be sampled.

The functions use two orientations. `brier` is a loss from 0 to 2: the squared distance between a
distribution and the one-hot target. `brier_n` and `brier_lm` follow CALM (Shao et al.,
arXiv:2510.27688), where higher is better: the expectation of `brier_n` is 1 minus that loss.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


def brier(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Compute the Brier loss sum_v (p_v - 1{v = label})^2, from 0 to 2; lower is better.

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950.

    Args:
      probabilities: Probabilities [..., V]; the last axis sums to 1.
      labels: Integers [...] from 0 to V - 1.

    Returns:
      Losses [...], at least float32.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a value is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> losses.brier(jnp.array([0.5, 0.5, 0.0]), 0)
      Array(0.5, dtype=float32)
    """
    (probabilities,) = arguments.check(probabilities=(probabilities, "... V"))
    arguments.check_distribution("probabilities", probabilities)
    *leading_shape, num_classes = probabilities.shape
    labels = arguments.check_labels("labels", labels, tuple(leading_shape), num_classes)
    targets = jax.nn.one_hot(labels, num_classes, dtype=probabilities.dtype)
    return jnp.sum(jnp.square(probabilities - targets), axis=-1)


def brier_n(
    first: ArrayLike,
    second: ArrayLike,
    reference: ArrayLike,
    *,
    n: int,
) -> jax.Array:
    """Estimate the Brier score of n-grams from two samples, without bias; higher is better.

    For each n-gram, compared as a whole, the score is

        1{first = reference} + 1{second = reference} - 1{first = second}

    Its expectation over two independent samples of a model P is 2 P(reference) - sum_x P(x)^2, from
    -1 to 1. If the references follow a distribution Q, the expectation is greatest at P = Q (Shao
    et al., arXiv:2510.27688). One estimate is -1, 0 or 1, so average many of them.

    Args:
      first: Tokens sampled from the model, int [..., T].
      second: Tokens sampled independently after the same context, int [..., T].
      reference: Tokens of the text, int [..., T].
      n: Length of the n-grams, from 1 to T.

    Returns:
      Scores float32 [..., T - n + 1], one for each n-gram in order of its first token.

    Raises:
      InputError: The shapes differ, an array has no integer dtype, or n is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> first, second, reference = jnp.array([[5, 6, 7], [5, 6, 0], [5, 0, 7]])
      >>> losses.brier_n(first, second, reference, n=1)
      Array([ 1., -1.,  1.], dtype=float32)
      >>> losses.brier_n(first, second, reference, n=2)
      Array([-1.,  0.], dtype=float32)
    """
    token_arrays = _check_token_arrays(
        {"first": first, "second": second, "reference": reference}
    )
    num_tokens = token_arrays[0].shape[-1]
    if not isinstance(n, int) or not 1 <= n <= num_tokens:
        raise InputError(
            f"n is {n!r}; it must be an integer from 1 to {num_tokens}, the number of tokens"
        )
    return _brier_n(*token_arrays, n)


@functools.partial(jax.jit, static_argnames="n")
def _brier_n(
    first: jax.Array,
    second: jax.Array,
    reference: jax.Array,
    n: int,
) -> jax.Array:
    num_ngrams = first.shape[-1] - n + 1
    ngram_indices = jnp.arange(num_ngrams)[:, None] + jnp.arange(n)

    def is_same_ngram(tokens: jax.Array, other_tokens: jax.Array) -> jax.Array:
        is_same_token = (tokens == other_tokens)[..., ngram_indices]
        return jnp.all(is_same_token, axis=-1).astype(jnp.float32)

    return (
        is_same_ngram(first, reference)
        + is_same_ngram(second, reference)
        - is_same_ngram(first, second)
    )


def brier_lm(
    first: ArrayLike,
    second: ArrayLike,
    reference: ArrayLike,
    *,
    orders: Sequence[int] = (1, 2, 3, 4),
) -> jax.Array:
    """Compute BrierLM: 100 times the geometric mean over n of the mean `brier_n`; higher is better.

    The score lies between 0 and 100 (Shao et al., arXiv:2510.27688). Noise can make the mean of one
    order negative. That mean counts as 0, which makes the whole score 0, so use many tokens.

    Args:
      first: Tokens sampled from the model, int [..., T] with T >= max(orders).
      second: Tokens sampled independently after the same context, int [..., T].
      reference: Tokens of the text, int [..., T].
      orders: Lengths n of the n-grams.

    Returns:
      Scalar float32; the means are over all n-grams of all leading axes.

    Raises:
      InputError: `orders` is empty, the shapes differ, an array has no integer dtype, or there are
        fewer tokens than an order.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> tokens = jnp.arange(5)
      >>> print(f"{losses.brier_lm(tokens, tokens, tokens):.4f}")
      100.0000
    """
    if not orders:
        raise InputError("orders is empty; give at least one length of n-grams")
    mean_scores = [jnp.mean(brier_n(first, second, reference, n=n)) for n in orders]
    positive_scores = jnp.maximum(jnp.stack(mean_scores), 0.0)
    return 100 * jnp.prod(positive_scores ** (1 / len(mean_scores)))


def _check_token_arrays(named_tokens: Mapping[str, ArrayLike]) -> list[jax.Array]:
    """Convert token arrays to JAX; raise InputError unless all are int [..., T] of one shape."""
    token_arrays = [jnp.asarray(tokens) for tokens in named_tokens.values()]
    for array_name, tokens in zip(named_tokens, token_arrays, strict=True):
        arguments.check_integer_dtype(array_name, tokens)
    shapes = [tokens.shape for tokens in token_arrays]
    if len(set(shapes)) > 1 or () in shapes:
        descriptions = [
            f"{array_name} {list(shape)}"
            for array_name, shape in zip(named_tokens, shapes, strict=True)
        ]
        raise InputError(
            f"shapes are {', '.join(descriptions)}; they must be the same [..., T]"
        )
    return token_arrays
