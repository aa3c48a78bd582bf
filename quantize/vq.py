"""A vector quantizer: a learned codebook (van den Oord et al., arXiv:1711.00937).

Pure functions of a small state, so that a training step can be:

    quantized = quantize(codebook, encode(x))         # in the loss, with commitment_loss
    codebook = update_ema(codebook, y, quantized.indices)
    codebook = revive(key, codebook, y)

or, with a codebook that learns by gradient, `codebook.codes` among the parameters, codebook_loss in
the loss and no `update_ema`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import (
    as_float,
    as_indices,
    check_integers,
    check_shapes,
)
from continuous_lm.errors import InputError
from continuous_lm.losses import codebook_loss, commitment_loss
from continuous_lm.quantize.kmeans import (
    check_vectors,
    count_codes,
    count_selected_before,
    kmeans,
    sum_by_code,
)
from continuous_lm.quantize.nearest import DEFAULT_BLOCK_SIZE, nearest
from continuous_lm.quantize.straight_through import with_gradient


class Codebook(NamedTuple):
    """The state of a vector quantizer; a residual one has an axis Q in front of each array."""

    codes: jax.Array  # [E, W]
    counts: jax.Array  # [E], moving average of the vectors of each code in a batch
    sums: jax.Array  # [E, W], moving average of the sum of these vectors


class Quantized(NamedTuple):
    """Vectors as codes; of a residual quantizer, indices and losses have an axis Q at the end."""

    vectors: jax.Array  # [..., W], the codes, with a gradient for what was quantized
    indices: jax.Array  # int32 [...], which codes
    codebook_loss: jax.Array  # [...], moves codes to vectors; losses.codebook_loss
    commitment_loss: jax.Array  # [...], moves vectors to codes; losses.commitment_loss


def init(
    key: jax.Array,
    x: ArrayLike,
    num_codes: int,
    *,
    steps: int = 10,
    axis_name: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Codebook:
    """A codebook from data, by k-means.

    Args:
      key: PRNG key; the same on all devices.
      x: vectors [..., W], best as many as a batch of training has: counts and sums start as these
        have them, and what a moving average starts with is forgotten at its rate.
      num_codes: E.
      steps: of k-means.
      axis_name: a mapped axis over which batches are spread; the codebook is made from all of them.
      block_size: see `nearest`.

    Returns:
      the codebook, at least float32.

    Raises:
      InputError: if shapes or numbers do not fit; outside of jit, if a vector is not finite.

    >>> codebook = init(jax.random.key(0), [[0.0], [2.0], [10.0], [12.0], [14.0]], 2)
    >>> print(jnp.sort(codebook.codes, axis=0).T)
    [[ 1. 12.]]
    """
    x = as_float(x)
    if axis_name is not None:
        x = lax.all_gather(x, axis_name)
    codes, counts = kmeans(key, x, num_codes, steps=steps, block_size=block_size)
    return Codebook(codes, counts, codes * counts[:, None])


def quantize(
    codebook: Codebook,
    x: ArrayLike,
    *,
    gradient: str = "straight_through",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Quantized:
    """The nearest code of each vector, by Euclidean distance.

    Args:
      codebook: with codes [E, W].
      x: vectors [..., W].
      gradient: of the quantized vectors in x: "straight_through" or "rotation", the rotation trick.
      block_size: see `nearest`.

    Returns:
      the codes. The vectors have a gradient in x alone, the codebook loss one in the codes alone.

    Raises:
      InputError: if the widths differ or the gradient is not known; outside of jit, if a vector or
        code is not finite.

    >>> codebook = init(jax.random.key(0), [[0.0], [2.0], [10.0], [12.0], [14.0]], 2)
    >>> quantized = quantize(codebook, [[3.0]])
    >>> print(quantized.vectors, quantized.commitment_loss)
    [[1.]] [4.]
    """
    x = as_float(x)
    neighbours = nearest(x, codebook.codes, block_size=block_size)
    vectors = as_float(codebook.codes)[neighbours.indices]
    return Quantized(
        with_gradient(x, vectors, gradient),
        neighbours.indices,
        codebook_loss(x, vectors),
        commitment_loss(x, vectors),
    )


def lookup(codes: ArrayLike, indices: ArrayLike) -> jax.Array:
    """The codes [..., W] of a codebook [E, W] at `indices` [...].

    Raises:
      InputError: outside of jit, if an index is not one of 0, ..., E - 1.

    >>> print(lookup(jnp.array([[1.0, 0.0], [0.0, 2.0]]), [1, 1, 0]))
    [[0. 2.]
     [0. 2.]
     [1. 0.]]
    """
    codes = jnp.asarray(codes)
    check_shapes({"codes": (codes, "E W")})
    check_integers("indices", indices, 0, len(codes))
    return codes[as_indices(indices)]


def update_ema(
    codebook: Codebook,
    x: ArrayLike,
    indices: ArrayLike,
    *,
    decay: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> Codebook:
    """Moves each code to the moving average of the vectors that it stood for.

    Appendix A.1 of van den Oord et al. (arXiv:1711.00937), for a code with n vectors x in a batch:

        counts = decay counts + (1 - decay) n
        sums = decay sums + (1 - decay) sum of x
        code = sums / counts

    with counts smoothed in the last line (Laplace): (counts + epsilon) / (total + E epsilon) total.

    Args:
      codebook: before.
      x: vectors [..., W] of a batch.
      indices: which code each has, [...], as `quantize` gives them.
      decay: from 0, where a code becomes the mean of this batch, to 1, where it stays.
      epsilon: > 0, keeps codes without vectors finite, and draws them slowly to zero.
      axis_name: a mapped axis over which the batch is spread; all its devices get the same codes.

    Returns:
      the codebook after; no gradient flows into it.

    Raises:
      InputError: if shapes do not fit.

    >>> codebook = Codebook(jnp.zeros((1, 2)), jnp.ones(1), jnp.zeros((1, 2)))
    >>> print(update_ema(codebook, [[4.0, 8.0]], [0], decay=0.75).codes)
    [[1. 2.]]
    """
    x = as_float(x)
    code_indices = as_indices(indices)
    num_codes, width = codebook.codes.shape
    check_vectors(x, codebook.codes)
    if code_indices.shape != x.shape[:-1]:
        raise InputError(
            f"indices have shape {list(code_indices.shape)}; there are vectors {list(x.shape[:-1])}"
        )
    x = lax.stop_gradient(x.reshape(-1, width))
    code_indices = code_indices.reshape(-1)
    batch_counts = count_codes(code_indices, num_codes, codebook.counts.dtype)
    batch_sums = sum_by_code(x, code_indices, num_codes)
    if axis_name is not None:
        batch_counts, batch_sums = lax.psum((batch_counts, batch_sums), axis_name)
    decay = jnp.asarray(decay, codebook.counts.dtype)
    counts = decay * codebook.counts + (1 - decay) * batch_counts
    sums = decay * codebook.sums + (1 - decay) * batch_sums
    total_count = jnp.sum(counts)
    smoothed_counts = (
        (counts + epsilon) / (total_count + num_codes * epsilon) * total_count
    )
    return Codebook(sums / smoothed_counts[:, None], counts, sums)


def revive(
    key: jax.Array,
    codebook: Codebook,
    x: ArrayLike,
    *,
    threshold: ArrayLike = 1.0,
    axis_name: str | None = None,
) -> Codebook:
    """Replaces codes that are hardly used by vectors drawn from a batch.

    Random restarts (Dhariwal et al., arXiv:2005.00341, section 3.1). No vector is drawn twice while
    there are others. A new code starts with the count `threshold`, so that it has time to be used.

    Args:
      key: PRNG key; the same on all devices.
      codebook: before.
      x: vectors [..., W] of a batch.
      threshold: a code whose average count in a batch is below this is replaced.
      axis_name: a mapped axis over which the batch is spread; vectors are drawn from all of it.

    Returns:
      the codebook after; no gradient flows into it.

    Raises:
      InputError: if shapes do not fit.

    >>> codebook = Codebook(jnp.zeros((2, 1)), jnp.array([5.0, 0.1]), jnp.zeros((2, 1)))
    >>> print(revive(jax.random.key(0), codebook, [[7.0]]).codes)
    [[0.]
     [7.]]
    """
    x = as_float(x)
    num_codes, width = codebook.codes.shape
    check_vectors(x, codebook.codes)
    if axis_name is not None:
        x = lax.all_gather(x, axis_name)
    x = jnp.reshape(lax.stop_gradient(x), (-1, width))
    drawn_vectors = x[jax.random.permutation(key, len(x))[:num_codes]]
    is_dead = codebook.counts < threshold
    new_codes = drawn_vectors[count_selected_before(is_dead) % len(drawn_vectors)]
    initial_count = jnp.asarray(threshold, codebook.counts.dtype)
    return Codebook(
        jnp.where(is_dead[:, None], new_codes, codebook.codes),
        jnp.where(is_dead, initial_count, codebook.counts),
        jnp.where(is_dead[:, None], new_codes * initial_count, codebook.sums),
    )
