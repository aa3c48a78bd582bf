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

EXACT = lax.Precision.HIGHEST  # of products that accelerators would round to bfloat16


def gaussian_nll(x: ArrayLike, mean: ArrayLike, scale: ArrayLike) -> jax.Array:
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
    x, mean, scale = arguments.floats(x=(x, "... W"), mean=(mean, "... W"), scale=(scale, "... W"))
    arguments.positive("scale", scale)
    z = (x - mean) / scale
    return jnp.sum(jnp.square(z) / 2 + jnp.log(scale), axis=-1) + _constant(x.shape[-1])


def low_rank_gaussian_nll(
    x: ArrayLike, mean: ArrayLike, scale: ArrayLike, factor: ArrayLike
) -> jax.Array:
    """-log N(x; mean, factor factor^T + diag(scale^2)), without any W x W matrix.

    With B = factor / scale and z = (x - mean) / scale, the matrix determinant lemma gives
    log det = log det(I + B^T B) + 2 sum log scale, and Woodbury's identity turns the squared
    distance into the least of |z - B c|^2 + |c|^2 over c, taken at c = (I + B^T B)^-1 B^T z. In
    that form nothing cancels and errors of c count to second order only. Time O(W R^2 + R^3).

    Where columns of B are so long and so nearly parallel that I + B^T B, rounded, is not positive
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
    x, mean, scale, factor = arguments.floats(
        x=(x, "... W"), mean=(mean, "... W"), scale=(scale, "... W"), factor=(factor, "... W R")
    )
    arguments.positive("scale", scale)
    z = (x - mean) / scale
    b = factor / scale[..., None]
    cholesky = cholesky_of_gram(b)
    c = _solve(cholesky, jnp.einsum("...wr,...w->...r", b, z, precision=EXACT))
    rest = z - jnp.einsum("...wr,...r->...w", b, c, precision=EXACT)
    distance = jnp.sum(jnp.square(rest), axis=-1) + jnp.sum(jnp.square(c), axis=-1)
    half_log_det = jnp.sum(jnp.log(scale), axis=-1) + _sum_log_diagonal(cholesky)
    return distance / 2 + half_log_det + _constant(x.shape[-1])


def full_gaussian_nll(x: ArrayLike, mean: ArrayLike, cholesky: ArrayLike) -> jax.Array:
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
    x, mean, cholesky = arguments.floats(
        x=(x, "... W"), mean=(mean, "... W"), cholesky=(cholesky, "... W W")
    )
    arguments.positive("the diagonal of cholesky", jnp.diagonal(cholesky, axis1=-2, axis2=-1))
    z = _forward(cholesky, x - mean)
    distance = jnp.sum(jnp.square(z), axis=-1)
    return distance / 2 + _sum_log_diagonal(cholesky) + _constant(x.shape[-1])


def cholesky_of_gram(b: jax.Array) -> jax.Array:
    """The Cholesky factor [..., R, R] of I + B^T B, with a larger I where rounding leaves none."""
    rank = b.shape[-1]
    eye = jnp.eye(rank, dtype=b.dtype)
    gram = jnp.einsum("...wr,...ws->...rs", b, b, precision=EXACT)
    found = jnp.linalg.cholesky(lax.stop_gradient(eye + gram))
    failed = ~jnp.all(jnp.isfinite(found), axis=(-2, -1), keepdims=True)
    longest = jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    more = jnp.where(failed, 4 * rank * jnp.finfo(b.dtype).eps * longest, 0.0)
    return jnp.linalg.cholesky((1 + lax.stop_gradient(more)) * eye + gram)


# vectorize makes many right-hand sides of one matrix into columns, and copies no matrix.


def _forward(cholesky: jax.Array, b: jax.Array) -> jax.Array:
    """L^-1 b [..., W], of L [..., W, W] and b [..., W]."""

    def solve(matrix, vector):
        return linalg.solve_triangular(matrix, vector, lower=True)

    return jnp.vectorize(solve, signature="(w,w),(w)->(w)")(cholesky, b)


def _solve(cholesky: jax.Array, b: jax.Array) -> jax.Array:
    """(L L^T)^-1 b [..., R], of L [..., R, R] and b [..., R]."""

    def solve(matrix, vector):
        return linalg.cho_solve((matrix, True), vector)

    return jnp.vectorize(solve, signature="(r,r),(r)->(r)")(cholesky, b)


def _sum_log_diagonal(cholesky: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(jnp.diagonal(cholesky, axis1=-2, axis2=-1)), axis=-1)


def _constant(width: int) -> float:
    return width * math.log(2 * math.pi) / 2
