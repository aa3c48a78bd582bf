"""The network of heads without a likelihood: noise and a hidden state in, a vector out."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from continuous_lm.models.transformer import layer_norm

EPS = 1e-6  # of the layer norms, as in CALM


_TIMES = 32  # sines and cosines of a time; more than a function of [0, 1] that is smooth asks for


Weights = Mapping[str, jax.Array]


def network(weights: Weights, noise: jax.Array, y: jax.Array) -> jax.Array:
    """The blocks and their ends: [..., W] from noise [..., U] and conditions y [..., D]."""
    x = layer_norm(_embedded(weights, "noise", noise), *_pair(weights, "noise_norm"), EPS)
    x = jnp.broadcast_to(x, (*jnp.broadcast_shapes(x.shape[:-1], y.shape[:-1]), x.shape[-1]))
    size = x.shape[-1]
    blocks = {n: a for n, a in weights.items() if n.startswith("blocks_")}
    inner = blocks.pop("blocks_inner")

    def block(x, stacked):
        w, of_x, of_y = stacked
        normed = layer_norm(x, *_pair(w, "blocks_norm"), EPS)
        # The map of both, [LN(x), y]; y's part is the same for all noise.
        h = _product(normed, of_x) + (_product(y, of_y) + w["blocks_inner_bias"])
        h = _embedded(w, "blocks_middle", jax.nn.silu(h))
        h = _embedded(w, "blocks_outer", jax.nn.silu(h))
        gate, up = jnp.split(h, 2, axis=-1)
        return x + _embedded(w, "blocks_down", jax.nn.silu(gate) * up), None

    x, _ = jax.lax.scan(block, x, (blocks, inner[..., :size], inner[..., size:]))
    normed = layer_norm(x, *_pair(weights, "last_norm"), EPS)
    return _embedded(weights, "last", jax.nn.silu(_embedded(weights, "last_inner", normed)))


def conditioned(weights: Weights, embedded: jax.Array) -> jax.Array:
    """What the blocks are told besides the noise, y [..., D], from its embedding [..., D]."""
    return layer_norm(embedded, *_pair(weights, "hidden_norm"), EPS)


def waves(time: jax.Array) -> jax.Array:
    """Sines and cosines of times [...] from 0 to 1, with periods from 6 down to 1/16: [..., 64]."""
    rates = jnp.geomspace(1.0, 100.0, _TIMES, dtype=time.dtype)
    angles = time[..., None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _pair(weights: Weights, name: str) -> tuple[jax.Array, jax.Array]:
    return weights[name], weights[f"{name}_bias"]


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel, axes=(-1, -1))


def _embedded(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """x [..., in] through the linear map of this name: [..., out]."""
    return _product(x, weights[name]) + weights[f"{name}_bias"]
