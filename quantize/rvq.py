"""Residual quantizer: Q codebooks, each for the residuals of the previous stages.

A vector is approximated by the sum of one code of each stage (Zeghidour et al., arXiv:2107.03312,
section III.C). The state is a `Codebook` whose arrays have a leading axis Q. One compiled loop runs
over that axis.
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
    """Initialize the codebooks from data, stage by stage, by k-means of the residuals.

    Args:
      key: PRNG key; the same on all devices.
      x: Vectors [..., W], preferably as many as in a training batch; see `init`.
      num_stages: Number of stages, Q.
      num_codes: Number of codes of each stage, E.
      steps: Number of k-means steps of each stage, >= 0.
      axis_name: Mapped axis over which the batch is sharded; k-means then uses the whole batch.
        None: x is the whole batch.
      block_size: Number of codes scored at a time; see `k_nearest`.

    Returns:
      Codebooks: codes [Q, E, W], counts [Q, E] and sums [Q, E, W], at least float32.

    Raises:
      InputError: Shapes or numbers do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> x = [[0.0], [1.0], [10.0], [11.0]]
      >>> codebooks = quantize.init_residual(
      ...     jax.random.key(0), x, num_stages=2, num_codes=2
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
    def init_stage(residual, key):
        codebook = vq.init(
            key,
            residual,
            num_codes,
            steps=steps,
            axis_name=axis_name,
            block_size=block_size,
        )
        codes = vq.quantize(codebook, residual, block_size=block_size).vectors
        return residual - lax.stop_gradient(codes), codebook

    return lax.scan(init_stage, x, keys)[1]


def quantize_residual(
    codebooks: Codebook,
    x: ArrayLike,
    *,
    gradient: str = "straight_through",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Quantized:
    """Replace each vector by the sum of one code of each stage, selected greedily.

    Args:
      codebooks: Codebooks with codes [Q, E, W].
      x: Vectors [..., W].
      gradient: Gradient of the sum with respect to x: "straight_through" or "rotation" (see
        `rotation_trick`).
      block_size: Number of codes scored at a time; see `k_nearest`.

    Returns:
      Vectors [..., W], indices int32 [..., Q] and losses [..., Q]. The losses of a stage compare
      its code with the residual of the previous stages.

    Raises:
      InputError: The widths differ, `gradient` is unknown, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
      >>> codebooks = quantize.Codebook(codes, counts=jnp.ones((2, 2)), sums=codes)
      >>> quantized = quantize.quantize_residual(codebooks, [[8.5]])
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
    def quantize_stage(residual, codebook):
        quantized = vq.quantize(codebook, residual, block_size=block_size)
        codes = lax.stop_gradient(quantized.vectors)
        return residual - codes, quantized._replace(vectors=codes)

    _, stages = lax.scan(quantize_stage, x, codebooks)
    indices_and_losses = (jnp.moveaxis(array, 0, -1) for array in stages[1:])
    return Quantized(
        with_gradient(x, jnp.sum(stages.vectors, axis=0), gradient), *indices_and_losses
    )


def lookup_residual(codes: ArrayLike, indices: ArrayLike) -> jax.Array:
    """Return the sums of the codes at these indices.

    To decode only the first stages, give the first codebooks and the first indices.

    Args:
      codes: Codebooks [Q, E, W].
      indices: Integers [..., Q] from 0 to E - 1.

    Returns:
      Vectors [..., W], at least float32.

    Raises:
      InputError: The numbers of stages differ, or (outside jit) an index is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
      >>> print(quantize.lookup_residual(codes, [[1, 0], [0, 1]]))
      [[9.]
       [1.]]
    """
    codes = jnp.asarray(codes)
    check_shapes({"codes": (codes, "Q E W"), "indices": (indices, "... Q")})
    check_integers("indices", indices, 0, codes.shape[1])
    return _lookup(codes, jnp.moveaxis(as_indices(indices), -1, 0))


@jax.jit
def _lookup(codes: jax.Array, indices: jax.Array) -> jax.Array:
    def add_stage(total, stage):
        stage_codes, code_indices = stage
        return total + as_float(stage_codes[code_indices]), None

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
    """Apply `update_ema` to each stage, with the residuals of the previous stages.

    The residuals are computed with the codes before the update.

    Args:
      codebooks: Codebooks before the update, with codes [Q, E, W].
      x: Vectors [..., W] of a batch.
      indices: Codes of each vector, int [..., Q], as in `Quantized.indices`.
      decay: Decay of the moving averages; see `update_ema`.
      epsilon: Smoothing constant > 0; see `update_ema`.
      axis_name: Mapped axis over which the batch is sharded; see `update_ema`.

    Returns:
      Codebooks after the update, without gradients from x.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
      >>> before = quantize.Codebook(codes, counts=jnp.ones((2, 2)), sums=codes)
      >>> after = quantize.update_residual_ema(before, [[8.5]], [[1, 0]], decay=0.5)
      >>> print(after.codes[..., 0].round(2))
      [[ 0.    9.25]
       [-1.25  1.  ]]
    """
    x = as_float(x)
    _check(codebooks, x)
    if np.shape(indices) != (*x.shape[:-1], len(codebooks.codes)):
        raise InputError(
            f"indices have shape {list(np.shape(indices))}; for vectors of shape {list(x.shape)}"
            f" and {len(codebooks.codes)} stages it must be"
            f" {[*x.shape[:-1], len(codebooks.codes)]}"
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
    def update_stage(residual, stage):
        codebook, code_indices = stage
        updated = vq.update_ema(
            codebook,
            residual,
            code_indices,
            decay=decay,
            epsilon=epsilon,
            axis_name=axis_name,
        )
        return residual - codebook.codes[code_indices], updated

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
    """Apply `revive` to each stage, with the residuals of the previous stages.

    The residuals are computed with the codes after the replacement.

    Args:
      key: PRNG key; the same on all devices.
      codebooks: Codebooks before the replacement, with codes [Q, E, W].
      x: Vectors [..., W] of a batch.
      threshold: A code is replaced if its average count in a batch is below this; see `revive`.
      axis_name: Mapped axis over which the batch is sharded; see `revive`.
      block_size: Number of codes scored at a time; see `k_nearest`.

    Returns:
      Codebooks after the replacement, without gradients from x.

    Raises:
      InputError: The shapes do not fit, or (outside jit) a vector is not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from continuous_lm import quantize
      >>> codes = jnp.array([[[0.0], [10.0]], [[-1.0], [1.0]]])
      >>> counts = jnp.array([[5.0, 5.0], [5.0, 0.0]])
      >>> before = quantize.Codebook(codes, counts, sums=codes)
      >>> after = quantize.revive_residual(jax.random.key(0), before, [[8.5]])
      >>> print(after.codes[..., 0])
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
    def revive_stage(residual, stage):
        codebook, key = stage
        revived = vq.revive(
            key, codebook, residual, threshold=threshold, axis_name=axis_name
        )
        codes = vq.quantize(revived, residual, block_size=block_size).vectors
        return residual - lax.stop_gradient(codes), revived

    return lax.scan(revive_stage, x, (codebooks, keys))[1]


def _check(codebooks: Codebook, x: jax.Array) -> None:
    codes = codebooks.codes
    check_shapes({"codes": (codes, "Q E W"), "x": (x, "... W")})
    if not len(codes):
        raise InputError(f"codes has shape {list(codes.shape)}; Q must be at least 1")
    check_vectors(x if x.ndim != 1 else x[None])
