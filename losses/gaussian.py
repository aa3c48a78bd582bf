"""Negative log-likelihoods of Gaussians, in nats, with three kinds of covariance.

Each takes vectors of width W in the last axis and returns one number for each; leading axes
broadcast. They are densities, not probabilities, so that a loss can be negative, and it changes
with the unit of x: vectors c times as long cost W log c more.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg
from jax.typing import ArrayLike

from continuous_lm import arguments

# Of products, whose factors accelerators would round to bfloat16.
HIGHEST_PRECISION = lax.Precision.HIGHEST


def gaussian_nll(
    x: ArrayLike,
    mean: ArrayLike,
    scale: ArrayLike,
) -> jax.Array:
    """-log N(x; mean, diag(scale^2)).

    >>> import jax.numpy as jnp
    >>> nll = gaussian_nll(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))
    >>> print(f"{nll:.4f}")  # log(2 pi)
    1.8379

    Args:
      x: [..., W].
      mean: [..., W].
      scale: standard deviations > 0, [..., W].

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit, or, outside of jit, a scale is not above 0.
    """
    x, mean, scale = arguments.check(
        x=(x, "... W"),
        mean=(mean, "... W"),
        scale=(scale, "... W"),
    )
    arguments.check_positive("scale", scale)
    standardized = (x - mean) / scale
    nats_by_dimension = jnp.square(standardized) / 2 + jnp.log(scale)
    return jnp.sum(nats_by_dimension, axis=-1) + _log_normalizer(x.shape[-1])


def low_rank_gaussian_nll(
    x: ArrayLike,
    mean: ArrayLike,
    scale: ArrayLike,
    factor: ArrayLike,
) -> jax.Array:
    """-log N(x; mean, factor factor^T + diag(scale^2)), without any W x W matrix.

    With b = factor / scale and z = (x - mean) / scale, the matrix determinant lemma gives
    log det = log det(I + b^T b) + 2 sum log scale, and Woodbury's identity turns the squared
    distance into the least of |z - b c|^2 + |c|^2 over c, taken at c = (I + b^T b)^-1 b^T z. In
    that form nothing cancels and errors of c count to second order only. Time O(W R^2 + R^3).

    Where columns of b are so long and so nearly parallel that I + b^T b, rounded, is not positive
    definite (in float32, of length 3e3 and up), the I is enlarged until it is: the loss is then too
    large, by several nats for each such column, and still has a gradient.

    >>> import jax.numpy as jnp
    >>> zeros, ones = jnp.zeros(2), jnp.ones(2)
    >>> nll = low_rank_gaussian_nll(zeros, zeros, ones, jnp.ones((2, 1)))
    >>> print(f"{nll:.4f}")  # log(2 pi) + log(3) / 2
    2.3872

    Args:
      x: [..., W].
      mean: [..., W].
      scale: standard deviations > 0 of what the factor leaves over, [..., W].
      factor: [..., W, R].

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit, or, outside of jit, a scale is not above 0.
    """
    x, mean, scale, factor = arguments.check(
        x=(x, "... W"),
        mean=(mean, "... W"),
        scale=(scale, "... W"),
        factor=(factor, "... W R"),
    )
    arguments.check_positive("scale", scale)
    standardized = (x - mean) / scale
    scaled_factor = factor / scale[..., None]
    cholesky = cholesky_of_gram(scaled_factor)
    projection = jnp.einsum(
        "...wr,...w->...r",
        scaled_factor,
        standardized,
        precision=HIGHEST_PRECISION,
    )
    coefficients = _solve_cholesky(cholesky, projection)
    explained = jnp.einsum(
        "...wr,...r->...w",
        scaled_factor,
        coefficients,
        precision=HIGHEST_PRECISION,
    )
    residual = standardized - explained
    distance = _squared_length(residual) + _squared_length(coefficients)
    half_log_det = jnp.sum(jnp.log(scale), axis=-1) + _sum_log_diagonal(cholesky)
    return distance / 2 + half_log_det + _log_normalizer(x.shape[-1])


def full_gaussian_nll(
    x: ArrayLike,
    mean: ArrayLike,
    cholesky: ArrayLike,
) -> jax.Array:
    """-log N(x; mean, cholesky cholesky^T).

    >>> import jax.numpy as jnp
    >>> cholesky = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    >>> nll = full_gaussian_nll(jnp.array([1.0, 3.0]), jnp.zeros(2), cholesky)
    >>> print(f"{nll:.4f}")  # log(2 pi) + log(2) + 1 / 2
    3.0310

    Args:
      x: [..., W].
      mean: [..., W].
      cholesky: lower triangular, diagonal > 0, [..., W, W]; what is above the diagonal is not read.

    Returns:
      nats [...], at least float32.

    Raises:
      InputError: if shapes do not fit, or, outside of jit, a diagonal entry is not above 0.
    """
    x, mean, cholesky = arguments.check(
        x=(x, "... W"),
        mean=(mean, "... W"),
        cholesky=(cholesky, "... W W"),
    )
    arguments.check_positive("the diagonal of cholesky", _diagonal(cholesky))
    distance = _squared_length(_solve_triangular(cholesky, x - mean))
    half_log_det = _sum_log_diagonal(cholesky)
    return distance / 2 + half_log_det + _log_normalizer(x.shape[-1])


def cholesky_of_gram(b: jax.Array) -> jax.Array:
    """The Cholesky factor [..., R, R] of I + b^T b, with a larger I where rounding leaves none."""
    rank = b.shape[-1]
    identity = jnp.eye(rank, dtype=b.dtype)
    gram_matrix = jnp.einsum(
        "...wr,...wR->...rR",
        b,
        b,
        precision=HIGHEST_PRECISION,
    )
    trial_cholesky = jnp.linalg.cholesky(lax.stop_gradient(identity + gram_matrix))
    is_finite = jnp.isfinite(trial_cholesky)
    has_failed = ~jnp.all(is_finite, axis=(-2, -1), keepdims=True)
    max_diagonal = jnp.max(_diagonal(gram_matrix), axis=-1)[..., None, None]
    rounding_error = 4 * rank * jnp.finfo(b.dtype).eps * max_diagonal
    extra_identity = jnp.where(has_failed, rounding_error, 0.0)
    identity_scale = 1 + lax.stop_gradient(extra_identity)
    return jnp.linalg.cholesky(identity_scale * identity + gram_matrix)


# vectorize makes many right-hand sides of one matrix into columns, and copies no matrix.


def _solve_triangular(cholesky: jax.Array, b: jax.Array) -> jax.Array:
    """cholesky^-1 b [..., W], of cholesky [..., W, W] and b [..., W]."""

    def solve(matrix, vector):
        return linalg.solve_triangular(matrix, vector, lower=True)

    return jnp.vectorize(solve, signature="(w,w),(w)->(w)")(cholesky, b)


def _solve_cholesky(cholesky: jax.Array, b: jax.Array) -> jax.Array:
    """(cholesky cholesky^T)^-1 b [..., R], of cholesky [..., R, R] and b [..., R]."""

    def solve(matrix, vector):
        return linalg.cho_solve((matrix, True), vector)

    return jnp.vectorize(solve, signature="(r,r),(r)->(r)")(cholesky, b)


def _squared_length(vectors: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(vectors), axis=-1)


def _diagonal(matrices: jax.Array) -> jax.Array:
    return jnp.diagonal(matrices, axis1=-2, axis2=-1)


def _sum_log_diagonal(cholesky: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(_diagonal(cholesky)), axis=-1)


def _log_normalizer(width: int) -> float:
    return width * math.log(2 * math.pi) / 2
