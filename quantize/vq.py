"""Vector quantizer: a learned codebook (van den Oord et al., arXiv:1711.00937).

All functions are pure functions of a `Codebook`. A training step can be

    quantized = quantize(codebook, encoded)    # in the loss, together with commitment_loss
    codebook = update_ema(codebook, encoded, quantized.indices)
    codebook = revive(key, codebook, encoded)

Alternatively, train `codebook.codes` by gradient: add `codebook_loss` to the loss, and do not call
`update_ema`.
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
    """State of a vector quantizer. In a residual quantizer each array has a leading axis Q.

    Attributes:
      codes: Code vectors [E, W].
      counts: Moving average of the number of vectors of each code in a batch, [E].
      sums: Moving average of the sum of these vectors, [E, W].
    """

    codes: jax.Array
    counts: jax.Array
    sums: jax.Array


class Quantized(NamedTuple):
    """Quantized vectors. For a residual quantizer, indices and losses have a last axis Q.

    Attributes:
      vectors: Codes [..., W], with the selected gradient with respect to the vectors.
      indices: Rows of the codebook, int32 [...].
      codebook_loss: Loss [...] that moves codes to vectors; see `losses.codebook_loss`.
      commitment_loss: Loss [...] that moves vectors to codes; see `losses.commitment_loss`.
    """

    vectors: jax.Array
    indices: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array


def init(
    key: jax.Array,
    x: ArrayLike,
    num_codes: int,
    *,
    steps: int = 10,
    axis_name: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Codebook:
    """Initialize a codebook from data, by k-means.

    Args:
      key: PRNG key; the same on all devices.
      x: Vectors [..., W], preferably as many as in a training batch. `counts` and `sums` start with
        the values of these vectors; later updates replace them at the decay rate of `update_ema`.
      num_codes: Number of codes, E.
      steps: Number of k-means steps, >= 0.
      axis_name: Mapped axis over which the batch is sharded; k-means then uses the whole batch.
        None: x is the whole batch.
      block_size: Number of codes scored at a time; see `k_nearest`.

    Returns:
      Codebook in at least float32.

    Raises:
      InputError: Shapes or numbers do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> x = [[0.0], [2.0], [10.0], [12.0], [14.0]]
      >>> codebook = quantize.init(jax.random.key(0), x, num_codes=2)
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
    """Replace each vector by its nearest code in Euclidean distance.

    Args:
      codebook: Codebook with codes [E, W].
      x: Vectors [..., W].
      gradient: Gradient of the quantized vectors with respect to x: "straight_through" or
        "rotation" (see `rotation_trick`).
      block_size: Number of codes scored at a time; see `k_nearest`.

    Returns:
      Codes, indices and losses. `vectors` and `commitment_loss` have gradients only with respect to
      x, `codebook_loss` only with respect to the codes.

    Raises:
      InputError: The widths differ, `gradient` is unknown, or (outside jit) a vector or code is not
        finite.

    Examples:
      >>> import jax
      >>> from continuous_lm import quantize
      >>> x = [[0.0], [2.0], [10.0], [12.0], [14.0]]
      >>> codebook = quantize.init(jax.random.key(0), x, num_codes=2)  # codes 1 and 12
      >>> quantized = quantize.quantize(codebook, [[3.0]])
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
    """Return the codes at these indices.

    Args:
      codes: Codebook [E, W].
      indices: Integers [...] from 0 to E - 1.

    Returns:
      Codes [..., W], in the dtype of `codes`.

    Raises:
      InputError: `codes` is not [E, W], or (outside jit) an index is out of range.

    Examples:
      >>> from continuous_lm import quantize
      >>> print(quantize.lookup([[1.0, 0.0], [0.0, 2.0]], [1, 1, 0]))
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
    """Move each code to the moving average of the vectors assigned to it.

    This is appendix A.1 of van den Oord et al. (arXiv:1711.00937). For a code with n vectors x in a
    batch:

        counts = decay counts + (1 - decay) n
        sums = decay sums + (1 - decay) sum of x
        code = sums / smoothed counts
        smoothed counts = (counts + epsilon) / (total + E epsilon) total

    where total is the sum of counts over the codes (Laplace smoothing).

    Args:
      codebook: Codebook before the update.
      x: Vectors [..., W] of a batch.
      indices: Code of each vector, int [...], as in `Quantized.indices`.
      decay: Decay of the moving averages, from 0 (a code becomes the mean of this batch) to 1 (no
        change).
      epsilon: Smoothing constant > 0. It keeps codes without vectors finite and moves them slowly
        towards zero.
      axis_name: Mapped axis over which the batch is sharded; all devices then get the same codes.
        None: x is the whole batch.

    Returns:
      Codebook after the update, without gradients from x.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> before = quantize.Codebook(jnp.zeros((1, 2)), jnp.ones(1), jnp.zeros((1, 2)))
      >>> after = quantize.update_ema(before, [[4.0, 8.0]], [0], decay=0.75)
      >>> print(after.codes)
      [[1. 2.]]
    """
    x = as_float(x)
    code_indices = as_indices(indices)
    num_codes, width = codebook.codes.shape
    check_vectors(x, codebook.codes)
    if code_indices.shape != x.shape[:-1]:
        raise InputError(
            f"indices have shape {list(code_indices.shape)}; for vectors of shape"
            f" {list(x.shape)} it must be {list(x.shape[:-1])}"
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
    """Replace rarely used codes by vectors sampled from a batch.

    Source: random restarts, Dhariwal et al., arXiv:2005.00341, section 3.1. Vectors are sampled
    without replacement; if there are more dead codes than vectors, vectors repeat. A new code
    starts with the count `threshold`, so that it is not replaced again immediately.

    Args:
      key: PRNG key; the same on all devices.
      codebook: Codebook before the replacement.
      x: Vectors [..., W] of a batch.
      threshold: A code is replaced if its average count in a batch is below this.
      axis_name: Mapped axis over which the batch is sharded; vectors are then sampled from the
        whole batch. None: x is the whole batch.

    Returns:
      Codebook after the replacement, without gradients from x.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> counts = jnp.array([5.0, 0.1])
      >>> before = quantize.Codebook(jnp.zeros((2, 1)), counts, jnp.zeros((2, 1)))
      >>> after = quantize.revive(jax.random.key(0), before, [[7.0]])
      >>> print(after.codes)
      [[0.]
       [7.]]
    """
    x = as_float(x)
    num_codes, width = codebook.codes.shape
    check_vectors(x, codebook.codes)
    if axis_name is not None:
        x = lax.all_gather(x, axis_name)
    x = jnp.reshape(lax.stop_gradient(x), (-1, width))
    sampled_vectors = x[jax.random.permutation(key, len(x))[:num_codes]]
    is_dead = codebook.counts < threshold
    new_codes = sampled_vectors[count_selected_before(is_dead) % len(sampled_vectors)]
    initial_count = jnp.asarray(threshold, codebook.counts.dtype)
    return Codebook(
        jnp.where(is_dead[:, None], new_codes, codebook.codes),
        jnp.where(is_dead, initial_count, codebook.counts),
        jnp.where(is_dead[:, None], new_codes * initial_count, codebook.sums),
    )
