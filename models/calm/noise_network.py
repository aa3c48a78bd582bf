"""The network of heads without a likelihood: noise and a hidden state in, a vector out."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from continuous_lm.models.layers import layer_norm

LAYER_NORM_EPS = 1e-6  # of the layer norms, as in CALM


_NUM_TIME_FREQUENCIES = (
    32  # of sines and cosines, enough for smooth functions of [0, 1]
)


Weights = Mapping[str, jax.Array]


def run_noise_network(
    weights: Weights, noise: jax.Array, conditions: jax.Array
) -> jax.Array:
    """The blocks and their ends: [..., W] from noise [..., U] and conditions y [..., D]."""
    x = layer_norm(
        _apply_linear(weights, "noise", noise),
        *_scale_and_bias(weights, "noise_norm"),
        LAYER_NORM_EPS,
    )
    x = jnp.broadcast_to(
        x, (*jnp.broadcast_shapes(x.shape[:-1], conditions.shape[:-1]), x.shape[-1])
    )
    block_width = x.shape[-1]
    blocks = {
        name: array for name, array in weights.items() if name.startswith("blocks_")
    }
    inner_kernel = blocks.pop("blocks_inner")

    def run_block(x, stacked):
        block_weights, x_kernel, condition_kernel = stacked
        normalized = layer_norm(
            x, *_scale_and_bias(block_weights, "blocks_norm"), LAYER_NORM_EPS
        )
        # The map of both, [LN(x), y]; y's part is the same for all noise.
        activations = _apply_kernel(normalized, x_kernel) + (
            _apply_kernel(conditions, condition_kernel)
            + block_weights["blocks_inner_bias"]
        )
        activations = _apply_linear(
            block_weights, "blocks_middle", jax.nn.silu(activations)
        )
        activations = _apply_linear(
            block_weights, "blocks_outer", jax.nn.silu(activations)
        )
        gate, up = jnp.split(activations, 2, axis=-1)
        return x + _apply_linear(
            block_weights, "blocks_down", jax.nn.silu(gate) * up
        ), None

    x, _ = jax.lax.scan(
        run_block,
        x,
        (blocks, inner_kernel[..., :block_width], inner_kernel[..., block_width:]),
    )
    normalized = layer_norm(x, *_scale_and_bias(weights, "last_norm"), LAYER_NORM_EPS)
    return _apply_linear(
        weights, "last", jax.nn.silu(_apply_linear(weights, "last_inner", normalized))
    )


def condition(weights: Weights, embedding: jax.Array) -> jax.Array:
    """What the blocks are given besides the noise, y [..., D], from its embedding [..., D]."""
    return layer_norm(
        embedding, *_scale_and_bias(weights, "hidden_norm"), LAYER_NORM_EPS
    )


def time_features(time: jax.Array) -> jax.Array:
    """Sines and cosines of times [...] from 0 to 1, with periods from 6 down to 1/16: [..., 64]."""
    frequencies = jnp.geomspace(1.0, 100.0, _NUM_TIME_FREQUENCIES, dtype=time.dtype)
    angles = time[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _scale_and_bias(weights: Weights, name: str) -> tuple[jax.Array, jax.Array]:
    return weights[name], weights[f"{name}_bias"]


def _apply_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel, axes=(-1, -1))


def _apply_linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """x [..., in] through the linear map of this name: [..., out]."""
    return _apply_kernel(x, weights[name]) + weights[f"{name}_bias"]
