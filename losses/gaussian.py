"""Negative log-likelihoods of Gaussians, in nats, with three kinds of covariance.

Each function takes vectors [..., W] and returns one number for each vector. Leading axes broadcast.
The values are densities, not probabilities, so a loss can be negative. It depends on the unit of x:
if x, mean and covariance are expressed in a unit c times smaller, the loss grows by W log c.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg
from jax.typing import ArrayLike

from continuous_lm import arguments

# Matrix products at this precision: by default accelerators round the factors to bfloat16.
HIGHEST_PRECISION = lax.Precision.HIGHEST


def gaussian_nll(
    x: ArrayLike,
    mean: ArrayLike,
    scale: ArrayLike,
) -> jax.Array:
    """Compute -log N(x; mean, diag(scale^2)).

    Args:
      x: Vectors [..., W].
      mean: Means [..., W].
      scale: Standard deviations > 0, [..., W].

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a scale is not a positive finite number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> nats = losses.gaussian_nll(jnp.zeros(2), jnp.zeros(2), jnp.ones(2))
      >>> print(f"{nats:.4f}")  # log(2 pi)
      1.8379
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
    """Compute -log N(x; mean, factor factor^T + diag(scale^2)) without any W x W matrix.

    Let b = factor / scale and z = (x - mean) / scale. By the matrix determinant lemma, log det =
    log det(I + b^T b) + 2 sum log scale. By Woodbury's identity, the squared Mahalanobis distance
    is the minimum over c of |z - b c|^2 + |c|^2, reached at c = (I + b^T b)^-1 b^T z. This form has
    no cancellation, and an error of c enters only in second order. The time is O(W R^2 + R^3).

    If columns of b are very long and nearly parallel, I + b^T b is not positive definite after
    rounding (in float32, from lengths of about 3e3). The identity is then scaled up until the
    matrix is positive definite. The loss is then too large, by several nats for each such column,
    but it still has a gradient.

    Args:
      x: Vectors [..., W].
      mean: Means [..., W].
      scale: Standard deviations > 0 of the diagonal part of the covariance, [..., W].
      factor: Factor of the low-rank part, [..., W, R].

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a scale is not a positive finite number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> zeros, ones = jnp.zeros(2), jnp.ones(2)
      >>> nats = losses.low_rank_gaussian_nll(zeros, zeros, ones, jnp.ones((2, 1)))
      >>> print(f"{nats:.4f}")  # log(2 pi) + log(3) / 2
      2.3872
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
    """Compute -log N(x; mean, cholesky cholesky^T).

    Args:
      x: Vectors [..., W].
      mean: Means [..., W].
      cholesky: Lower-triangular factors of the covariance with diagonal > 0, [..., W, W]. Entries
        above the diagonal are ignored.

    Returns:
      Nats [...], at least float32.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a diagonal entry is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import losses
      >>> cholesky = jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> nats = losses.full_gaussian_nll(jnp.array([1.0, 3.0]), jnp.zeros(2), cholesky)
      >>> print(f"{nats:.4f}")  # log(2 pi) + log(2) + 1 / 2
      3.0310
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
    """Compute the Cholesky factor [..., R, R] of I + b^T b for b [..., W, R].

    If rounding makes that matrix not positive definite, the identity is scaled up first.
    """
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


# Under jnp.vectorize, several right-hand sides that share a matrix become its columns, so that
# broadcasting does not copy the matrix.


def _solve_triangular(cholesky: jax.Array, b: jax.Array) -> jax.Array:
    """Solve cholesky y = b for y [..., W], with cholesky [..., W, W] and b [..., W]."""

    def solve(matrix, vector):
        return linalg.solve_triangular(matrix, vector, lower=True)

    return jnp.vectorize(solve, signature="(w,w),(w)->(w)")(cholesky, b)


def _solve_cholesky(cholesky: jax.Array, b: jax.Array) -> jax.Array:
    """Solve cholesky cholesky^T y = b for y [..., R], with cholesky [..., R, R] and b [..., R]."""

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
