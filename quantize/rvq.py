"""A residual quantizer: Q codebooks, each of what those before it left over.

A vector is the sum of one code of each stage (Zeghidour et al., arXiv:2107.03312, section III.C).
The state is a `Codebook` whose arrays have an axis Q in front; one compiled loop runs over it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import (
    as_float,
    as_indices,
    check_count,
    check_integers,
    check_shapes,
)
from continuous_lm.errors import InputError
from continuous_lm.quantize import vq
from continuous_lm.quantize.kmeans import check_vectors
from continuous_lm.quantize.nearest import DEFAULT_BLOCK_SIZE
from continuous_lm.quantize.straight_through import with_gradient
from continuous_lm.quantize.vq import Codebook, Quantized


def init_residual(
    key: jax.Array,
    x: ArrayLike,
    num_stages: int,
    num_codes: int,
    *,
    steps: int = 10,
    axis_name: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Codebook:
    """Codebooks from data, stage after stage by k-means of what is left over.

    Args:
      key: PRNG key; the same on all devices.
      x: vectors [..., W]; see `init`.
      num_stages: Q.
      num_codes: E of each stage.
      steps: of k-means, in each stage.
      axis_name: a mapped axis over which batches are spread; the codebooks are made from all.
      block_size: see `nearest`.

    Returns:
      the codebooks: codes [Q, E, W], counts [Q, E] and sums [Q, E, W].

    Raises:
      InputError: if shapes or numbers do not fit; outside of jit, if a vector is not finite.

    >>> codebooks = init_residual(
    ...     jax.random.key(0), [[0.0], [1.0], [10.0], [11.0]], 2, 2
    ... )
    >>> print(jnp.sort(codebooks.codes[..., 0]))
    [[ 0.5 10.5]
     [-0.5  0.5]]
    """
    x = as_float(x)
    check_vectors(x)
    check_count("num_stages", num_stages)
    check_count("num_codes", num_codes)
    check_count("steps", steps, minimum=0)
    return _init(
        jax.random.split(key, num_stages), x, num_codes, steps, axis_name, block_size
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _init(
    keys: jax.Array,
    x: jax.Array,
    num_codes: int,
    steps: int,
    axis_name: str | None,
    block_size: int,
) -> Codebook:
    def init_stage(rest, key):
        codebook = vq.init(
            key,
            rest,
            num_codes,
            steps=steps,
            axis_name=axis_name,
            block_size=block_size,
        )
        codes = vq.quantize(codebook, rest, block_size=block_size).vectors
        return rest - lax.stop_gradient(codes), codebook

    return lax.scan(init_stage, x, keys)[1]


def quantize_residual(
    codebooks: Codebook,
    x: ArrayLike,
    *,
    gradient: str = "straight_through",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Quantized:
    """The nearest code of each stage, greedily, and their sum.

    Args:
      codebooks: with codes [Q, E, W].
      x: vectors [..., W].
      gradient: of the sum in x: "straight_through" or "rotation", the rotation trick.
      block_size: see `nearest`.

    Returns:
      vectors [..., W], indices and losses [..., Q]; a stage's losses are between its codes and what
      the stages before left over.

    Raises:
      InputError: if the widths differ or the gradient is not known; outside of jit, if a vector is
        not finite.

    >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> quantized = quantize_residual(Codebook(codes, codes[..., 0], codes), [[8.5]])
    >>> print(quantized.vectors, quantized.indices, quantized.commitment_loss)
    [[9.]] [[1 0]] [[2.25 0.25]]
    """
    x = as_float(x)
    _check(codebooks, x)
    return _quantize(codebooks, x, gradient, block_size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantize(
    codebooks: Codebook,
    x: jax.Array,
    gradient: str,
    block_size: int,
) -> Quantized:
    def quantize_stage(rest, codebook):
        quantized = vq.quantize(codebook, rest, block_size=block_size)
        codes = lax.stop_gradient(quantized.vectors)
        return rest - codes, quantized._replace(vectors=codes)

    _, stages = lax.scan(quantize_stage, x, codebooks)
    indices_and_losses = (jnp.moveaxis(array, 0, -1) for array in stages[1:])
    return Quantized(
        with_gradient(x, jnp.sum(stages.vectors, axis=0), gradient), *indices_and_losses
    )


def lookup_residual(codes: ArrayLike, indices: ArrayLike) -> jax.Array:
    """The sums [..., W] of the codes [Q, E, W] at `indices` [..., Q].

    The first stages of a longer quantizer's indices are coarser vectors: give the codes of these.

    Raises:
      InputError: if the stages differ; outside of jit, if an index is not one of 0, ..., E - 1.

    >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> print(lookup_residual(codes, [[1, 0], [0, 1]]))
    [[9.]
     [1.]]
    """
    codes = jnp.asarray(codes)
    check_shapes({"codes": (codes, "Q E W"), "indices": (indices, "... Q")})
    check_integers("indices", indices, 0, codes.shape[1])
    return _lookup(codes, jnp.moveaxis(as_indices(indices), -1, 0))


@jax.jit
def _lookup(codes: jax.Array, indices: jax.Array) -> jax.Array:
    def add_stage(total, one):
        return total + as_float(one[0][one[1]]), None

    dtype = jnp.promote_types(codes.dtype, jnp.float32)
    zeros = jnp.zeros((*indices.shape[1:], codes.shape[2]), dtype)
    return lax.scan(add_stage, zeros, (codes, indices))[0]


def update_residual_ema(
    codebooks: Codebook,
    x: ArrayLike,
    indices: ArrayLike,
    *,
    decay: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> Codebook:
    """`update_ema` of each stage with what the codes of the stages before left over.

    Args:
      codebooks: before, with codes [Q, E, W].
      x: vectors [..., W] of a batch.
      indices: [..., Q], as `quantize_residual` gives them.
      decay: see `update_ema`.
      epsilon: see `update_ema`.
      axis_name: see `update_ema`.

    Returns:
      the codebooks after; no gradient flows into them.

    Raises:
      InputError: if shapes do not fit.

    >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> codebooks = Codebook(codes, jnp.ones((2, 2)), codes)
    >>> after = update_residual_ema(codebooks, [[8.5]], [[1, 0]], decay=0.5)
    >>> print(after.codes[..., 0].round(2))
    [[ 0.    9.25]
     [-1.25  1.  ]]
    """
    x = as_float(x)
    _check(codebooks, x)
    if np.shape(indices) != (*x.shape[:-1], len(codebooks.codes)):
        raise InputError(
            f"indices have shape {list(np.shape(indices))}; for vectors {list(x.shape)} and"
            f" {len(codebooks.codes)} stages it must be {[*x.shape[:-1], len(codebooks.codes)]}"
        )
    stage_indices = jnp.moveaxis(as_indices(indices), -1, 0)
    return _update_ema(codebooks, x, stage_indices, decay, epsilon, axis_name)


@functools.partial(jax.jit, static_argnums=5)
def _update_ema(
    codebooks: Codebook,
    x: jax.Array,
    indices: jax.Array,
    decay: ArrayLike,
    epsilon: float,
    axis_name: str | None,
) -> Codebook:
    def update_stage(rest, one):
        codebook, code_indices = one
        updated = vq.update_ema(
            codebook,
            rest,
            code_indices,
            decay=decay,
            epsilon=epsilon,
            axis_name=axis_name,
        )
        return rest - codebook.codes[code_indices], updated

    return lax.scan(update_stage, x, (codebooks, indices))[1]


def revive_residual(
    key: jax.Array,
    codebooks: Codebook,
    x: ArrayLike,
    *,
    threshold: ArrayLike = 1.0,
    axis_name: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Codebook:
    """`revive` of each stage with what the stages before leave over.

    Args:
      key: PRNG key; the same on all devices.
      codebooks: before, with codes [Q, E, W].
      x: vectors [..., W] of a batch.
      threshold: see `revive`.
      axis_name: see `revive`.
      block_size: see `nearest`.

    Returns:
      the codebooks after; no gradient flows into them.

    Raises:
      InputError: if shapes do not fit.

    >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> codebooks = Codebook(codes, jnp.array([[5.0, 5.0], [5.0, 0.0]]), codes)
    >>> print(revive_residual(jax.random.key(0), codebooks, [[8.5]]).codes[..., 0])
    [[ 0.  10. ]
     [-1.  -1.5]]
    """
    x = as_float(x)
    _check(codebooks, x)
    keys = jax.random.split(key, len(codebooks.codes))
    return _revive(keys, codebooks, x, threshold, axis_name, block_size)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _revive(
    keys: jax.Array,
    codebooks: Codebook,
    x: jax.Array,
    threshold: ArrayLike,
    axis_name: str | None,
    block_size: int,
) -> Codebook:
    def revive_stage(rest, one):
        codebook, key = one
        revived = vq.revive(
            key, codebook, rest, threshold=threshold, axis_name=axis_name
        )
        codes = vq.quantize(revived, rest, block_size=block_size).vectors
        return rest - lax.stop_gradient(codes), revived

    return lax.scan(revive_stage, x, (codebooks, keys))[1]


def _check(codebooks: Codebook, x: jax.Array) -> None:
    codes = codebooks.codes
    check_shapes({"codes": (codes, "Q E W"), "x": (x, "... W")})
    if not len(codes):
        raise InputError(f"codes has shape {list(codes.shape)}; Q must be at least 1")
    check_vectors(x if x.ndim != 1 else x[None])
