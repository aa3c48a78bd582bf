"""Brier scores: of probabilities, and of models that can only be sampled.

Two orientations are in use. `brier` is a loss, the squared distance of a distribution from what
came, from 0 to 2. `brier_n` and `brier_lm` are CALM's, where more is better: 1 minus that loss.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import arguments
from continuous_lm.errors import InputError


def brier(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """sum_v (p_v - 1{v = label})^2, from 0 to 2; less is better (Brier, 1950).

    >>> import jax.numpy as jnp
    >>> brier(jnp.array([0.5, 0.5, 0.0]), 0)
    Array(0.5, dtype=float32)

    Args:
      probabilities: [..., V], adding up to 1.
      labels: int [...], from 0 to V - 1.

    Returns:
      [...], at least float32.

    Raises:
      InputError: if shapes do not fit, or, outside of jit, values are out of range.
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
    """An unbiased estimate of the Brier score of n-grams, from two samples; more is better.

        1{first = reference} + 1{second = reference} - 1{first = second}

    for each n-gram as a whole. The expectation over two independent samples of a model P is
    2 P(reference) - sum_x P(x)^2, from -1 to 1, and over references of a distribution Q it is
    greatest where P = Q (Shao et al., arXiv:2510.27688). A single estimate is one of
    -1, 0 and 1: take the mean of many.

    >>> import jax.numpy as jnp
    >>> first, second, reference = jnp.array([[5, 6, 7], [5, 6, 0], [5, 0, 7]])
    >>> brier_n(first, second, reference, n=1)
    Array([ 1., -1.,  1.], dtype=float32)
    >>> brier_n(first, second, reference, n=2)
    Array([-1.,  0.], dtype=float32)

    Args:
      first: tokens drawn from the model, int [..., T].
      second: tokens drawn independently, with the same context before them, int [..., T].
      reference: the text's own tokens, int [..., T].
      n: length of the n-grams, from 1 to T.

    Returns:
      scores float32 [..., T - n + 1], of the n-grams that begin at each token.

    Raises:
      InputError: if shapes do not fit, or n is out of range.
    """
    token_arrays = _check_token_arrays(
        {"first": first, "second": second, "reference": reference}
    )
    num_tokens = token_arrays[0].shape[-1]
    if not isinstance(n, int) or not 1 <= n <= num_tokens:
        raise InputError(
            f"n is {n!r}; it must be from 1 to the {num_tokens} tokens of the samples"
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

    def is_same_ngram(one: jax.Array, other: jax.Array) -> jax.Array:
        is_same_token = (one == other)[..., ngram_indices]
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
    """BrierLM: 100 times the geometric mean of the mean Brier-n of n = 1, ..., 4; more is better.

    From 0 to 100 (Shao et al., arXiv:2510.27688). An order whose mean is below 0, as
    chance can make it, counts as 0, and so the whole: it takes many tokens.

    >>> import jax.numpy as jnp
    >>> tokens = jnp.arange(5)
    >>> print(f"{brier_lm(tokens, tokens, tokens):.4f}")
    100.0000

    Args:
      first: tokens drawn from the model, int [..., T], with T >= 4.
      second: tokens drawn independently, with the same context before them, int [..., T].
      reference: the text's own tokens, int [..., T].
      orders: the lengths n.

    Returns:
      a float32 scalar, over all n-grams of all leading axes.

    Raises:
      InputError: if shapes do not fit.
    """
    if not orders:
        raise InputError("orders is empty; it must name at least one length of n-grams")
    mean_scores = [jnp.mean(brier_n(first, second, reference, n=n)) for n in orders]
    positive_scores = jnp.maximum(jnp.stack(mean_scores), 0.0)
    return 100 * jnp.prod(positive_scores ** (1 / len(mean_scores)))


def _check_token_arrays(named_tokens: Mapping[str, ArrayLike]) -> list[jax.Array]:
    """Arrays of tokens, int [..., T], all of one shape."""
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
