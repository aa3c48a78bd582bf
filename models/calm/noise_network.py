"""The network of heads without a likelihood: noise and a hidden state in, a vector out.

Gated residual MLP blocks. With LN a layer norm, x = LN(noise's embedding) and y = LN(hidden state's
embedding), a block is

    h = outer(silu(middle(silu(inner([LN(x), y])))))
    x + down(silu(gate) * up),     gate, up = the halves of h

and the end last(silu(last_inner(LN(x)))), as in CALM (Shao et al., arXiv:2510.27688). All linear
maps have a bias; all but those to and from the blocks keep or double the width D.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from continuous_lm.models.head import declare_linear, linear
from continuous_lm.models.layers import layer_norm
from continuous_lm.models.parameters import ONES, ZEROS, Declaration

__all__ = [
    "LAYER_NORM_EPS",
    "NUM_TIME_FREQUENCIES",
    "NetworkParams",
    "NetworkSizes",
    "apply_norm",
    "condition",
    "declare_norm",
    "parameter_table",
    "run_noise_network",
    "stack_table",
    "time_features",
]

LAYER_NORM_EPS = 1e-6  # of the layer norms, as in CALM
NUM_TIME_FREQUENCIES = 32  # of sines and cosines, enough for smooth functions of [0, 1]

NetworkParams = Mapping[str, jax.Array]


class NetworkSizes(NamedTuple):
    """The sizes of a network.

    Attributes:
      block_width: width of the blocks, D.
      depth: number of blocks, J.
      input_width: width of the blocks' input, noise or a noisy vector, U.
      hidden_width: width of the hidden states.
      output_width: width of a sample, W.
      time_width: number of features of a time; 0 if the blocks have no time input.
    """

    block_width: int
    depth: int
    input_width: int
    hidden_width: int
    output_width: int
    time_width: int = 0


def parameter_table(sizes: NetworkSizes) -> dict[str, Declaration]:
    """Return name -> declaration of every parameter; parameters of blocks are stacked on axis J.

    F is the axis that a mesh shards: the inner width of a block.

    The last map starts at 0, so all samples are equal at first. Its gradient is an outer product
    with features of the noise, so samples differ after one step.
    """
    width = sizes.block_width
    square = {"D": width, "F": width}
    first = {"D": width, "U": sizes.input_width}
    blocks = {
        **declare_linear("blocks_inner", {"F": width, "D": 2 * width}, "F", "D"),
        **declare_linear("blocks_middle", square, "D", "F"),
        **declare_linear("blocks_outer", {"F": 2 * width, "D": width}, "F", "D"),
        **declare_linear("blocks_down", square, "D", "F"),
        **declare_norm("blocks_norm", width),
    }
    last = {"W": sizes.output_width, "F": width}
    hidden = {"-": width, "D": sizes.hidden_width}
    table = {
        **declare_linear("noise", first, "D", "U"),
        **declare_norm("noise_norm", width),
        **declare_linear("hidden", hidden, "-", "D"),
        **declare_norm("hidden_norm", width),
        **stack_table(sizes.depth, blocks),
        **declare_norm("last_norm", width),
        **declare_linear("last_inner", square, "F", "D"),
        **declare_linear("last", last, "W", "F", kernel=ZEROS),
    }
    if sizes.time_width:
        time_sizes = {"D": width, "-": sizes.time_width}
        table |= declare_linear("time", time_sizes, "D", "-")
    return table


def declare_norm(name: str, width: int) -> dict[str, Declaration]:
    """The scale `name` and the bias `name_bias` of a layer norm."""
    return {
        name: Declaration(("D",), (width,), ONES),
        f"{name}_bias": Declaration(("D",), (width,), ZEROS),
    }


def stack_table(depth: int, table: Mapping[str, Declaration]) -> dict[str, Declaration]:
    """The table of `depth` blocks, stacked on a leading axis J."""
    return {
        name: Declaration(("J", *axes), (depth, *shape), initializer)
        for name, (axes, shape, initializer) in table.items()
    }


def run_noise_network(
    params: NetworkParams, noise: jax.Array, conditions: jax.Array
) -> jax.Array:
    """The blocks and their ends: [..., W] from noise [..., U] and conditions y [..., D]."""
    x = apply_norm(params, "noise_norm", linear(params, "noise", noise))
    batch_shape = jnp.broadcast_shapes(x.shape[:-1], conditions.shape[:-1])
    x = jnp.broadcast_to(x, (*batch_shape, x.shape[-1]))
    block_width = x.shape[-1]
    # The map of both, [LN(x), y], in two: y's part is the same for all noise.
    inner_kernel = params["blocks_inner"]
    stacks = {name: stack for name, stack in params.items() if "blocks_" in name}
    stacks["blocks_inner"] = inner_kernel[..., :block_width]
    stacks["blocks_hidden"] = inner_kernel[..., block_width:]

    def run_block(x, block):
        normalized = apply_norm(block, "blocks_norm", x)
        from_noise = jnp.tensordot(normalized, block["blocks_inner"], axes=(-1, -1))
        from_hidden = jnp.tensordot(conditions, block["blocks_hidden"], axes=(-1, -1))
        activations = from_noise + (from_hidden + block["blocks_inner_bias"])
        activations = linear(block, "blocks_middle", jax.nn.silu(activations))
        activations = linear(block, "blocks_outer", jax.nn.silu(activations))
        gate, up = jnp.split(activations, 2, axis=-1)
        return x + linear(block, "blocks_down", jax.nn.silu(gate) * up), None

    x, _ = jax.lax.scan(run_block, x, stacks)
    x = linear(params, "last_inner", apply_norm(params, "last_norm", x))
    return linear(params, "last", jax.nn.silu(x))


def condition(params: NetworkParams, embedding: jax.Array) -> jax.Array:
    """Return the blocks' condition y [..., D], from the hidden state's embedding [..., D]."""
    return apply_norm(params, "hidden_norm", embedding)


def time_features(time: jax.Array) -> jax.Array:
    """Sines and cosines of times [...] from 0 to 1, with periods from 6 down to 1/16: [..., 64]."""
    frequencies = jnp.geomspace(1.0, 100.0, NUM_TIME_FREQUENCIES, dtype=time.dtype)
    angles = time[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def apply_norm(params: NetworkParams, name: str, x: jax.Array) -> jax.Array:
    """x [..., D] through the layer norm of this name."""
    return layer_norm(x, params[name], params[f"{name}_bias"], LAYER_NORM_EPS)
