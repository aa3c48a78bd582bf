"""The cost of a sweep for each device, read from compiled programs; no weights are made.

The program is that of `continuous_lm.analysis.sweep`: it continues from the keys and values of the
shared prefix, at some points at once, batch after batch. The prefix itself, a quarter of the prompt
computed once, would add one part in 3 P to a sweep of P points; it is not counted.

Operations and bytes are from XLA's cost analysis, which counts the body of a loop once, regardless
of its number of iterations. So layers are unrolled and attention is dense (its blocked form loops).
The difference between programs of four and of three layers is the cost of a layer. Fewer layers do
not suffice, since XLA shares work among the first layers. Memory is measured on the program as it
runs, with all layers in their loop and attention in the form chosen by size.

XLA for CPUs computes bfloat16 in float32, from float32 copies of all weights. So programs are
compiled in float32, without such copies. The bytes of parameters and of the prefix follow from
their shapes, dtypes and shardings.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes
from continuous_lm.analysis import flops
from continuous_lm.models import kv_cache
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.parameters import Params
from continuous_lm.models.transformer import (
    DEFAULT_EXECUTION,
    Execution,
    forward,
)
from continuous_lm.models.trunk_inputs import make_inputs


class SweepBatch(NamedTuple):
    """A part of a sweep that runs as one program."""

    tokens: int  # n of the prompt
    shared_tokens: int  # of these, the first that all points share
    points: int  # at once


class ProgramCost(NamedTuple):
    """Cost of a program on each device."""

    operations: float
    bytes_accessed: (
        float  # read and written by all its steps, none of which finds them in a cache
    )


# --- The program --------------------------------------------------------------------------------


def next_token_probabilities(
    config: TransformerConfig,
    execution: Execution,
    params: Params,
    tokens: jax.Array,
    durations: jax.Array,
    prefix: kv_cache.KVCache,
) -> jax.Array:
    """Probabilities [P, V] of the next token, from tokens [T], durations [P, T] and a prefix."""
    inputs = make_inputs(
        config, tokens, durations=durations, position=-1, prefix=prefix
    )
    output = forward(
        config, params, inputs, position=-1, prefix=prefix, execution=execution
    )
    return jax.nn.softmax(output.logits)


class ProgramArguments(NamedTuple):
    """Abstract arguments of `next_token_probabilities`: shapes, dtypes and shardings."""

    params: Any
    tokens: jax.ShapeDtypeStruct
    durations: jax.ShapeDtypeStruct
    prefix: kv_cache.KVCache


def program_arguments(
    config: TransformerConfig, mesh: Mesh, sweep_batch: SweepBatch, dtype: DTypeLike
) -> ProgramArguments:
    """The arguments of `next_token_probabilities`, the model's in `dtype`."""

    def place_array(
        shape: tuple[int, ...], kind: DTypeLike, letters: str
    ) -> jax.ShapeDtypeStruct:
        sharding = axes.sharding(mesh, axes.split(letters), shape)
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    layout = trunk.parameter_layout(config)
    targets = dict(layout.parameter_specs(jnp.dtype(dtype), mesh))
    empty_cache = jax.eval_shape(
        lambda: kv_cache.empty(config, sweep_batch.shared_tokens, (1,), dtype)
    )
    cache_arrays: dict[str, Any] = {
        field: place_array(array.shape, array.dtype, kv_cache.CACHE_AXES[field])
        for field, array in empty_cache._asdict().items()
    }
    num_later_tokens = sweep_batch.tokens - sweep_batch.shared_tokens
    return ProgramArguments(
        params=traverse_util.unflatten_dict(targets, sep="/"),
        tokens=place_array((num_later_tokens,), jnp.int32, "T"),
        durations=place_array(
            (sweep_batch.points, num_later_tokens), jnp.float32, "P T"
        ),
        prefix=kv_cache.KVCache(**cache_arrays),
    )


def compile_sweep(
    config: TransformerConfig,
    mesh: Mesh,
    sweep_batch: SweepBatch,
    *,
    execution: Execution = DEFAULT_EXECUTION,
    dtype: DTypeLike = jnp.float32,
) -> jax.stages.Compiled:
    """`next_token_probabilities`, for devices that need not be there."""
    abstract_arguments = program_arguments(config, mesh, sweep_batch, dtype)
    lowered = jax.jit(next_token_probabilities, static_argnums=(0, 1)).lower(
        config, execution, *abstract_arguments
    )
    if mesh.devices.flat[0].platform != "cpu":
        return lowered.compile()
    # Machine code, which does not run, is not optimized.
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    return lowered.compile(options)


# --- Costs ------------------------------------------------------------------------------------


def unrolled(config: TransformerConfig) -> Execution:
    """Dense attention, layers one after another and not as a loop."""
    return Execution(implementation="dense", unroll=config.num_layers)


def count_cost(
    config: TransformerConfig, mesh: Mesh, sweep_batch: SweepBatch
) -> ProgramCost:
    """XLA's count of the program of all layers, unrolled."""
    compiled = compile_sweep(config, mesh, sweep_batch, execution=unrolled(config))
    cost_analysis: Any = compiled.cost_analysis()
    return ProgramCost(cost_analysis["flops"], cost_analysis["bytes accessed"])


def extrapolate_cost(
    config: TransformerConfig, mesh: Mesh, sweep_batch: SweepBatch
) -> ProgramCost:
    """`count_cost` for any number of layers, from three and four of them."""
    three_layers = count_cost(
        dataclasses.replace(config, num_layers=3), mesh, sweep_batch
    )
    four_layers = count_cost(
        dataclasses.replace(config, num_layers=4), mesh, sweep_batch
    )
    num_more_layers = config.num_layers - 3
    return ProgramCost(
        *(
            three + num_more_layers * (four - three)
            for three, four in zip(three_layers, four_layers, strict=True)
        )
    )


def count_product_flops(config: TransformerConfig, sweep_batch: SweepBatch) -> float:
    """Return the operations of the program's matrix products, over all devices.

    All scores are counted, as in the dense form; the blocked form skips most scores of later keys.
    Devices on the axis "data" each compute the first layer's queries, keys and values; here these
    are counted once.
    """
    return flops.continuation_flops(
        config,
        num_points=sweep_batch.points,
        num_tokens=sweep_batch.tokens,
        num_shared_tokens=sweep_batch.shared_tokens,
        all_scores=True,
    )


class MemoryUse(NamedTuple):
    """Bytes on each device while points are computed."""

    arguments: int  # weights, and keys and values of the shared prefix
    temporaries: int  # and outputs

    @property
    def total(self) -> int:
        return sum(self)


@functools.cache
def memory_use(
    config: TransformerConfig,
    mesh: Mesh,
    sweep_batch: SweepBatch,
    dtype: DTypeLike = jnp.bfloat16,
) -> MemoryUse:
    """Arguments in `dtype`, by their shardings; temporaries as compiled in float32."""
    abstract_arguments = program_arguments(config, mesh, sweep_batch, dtype)
    memory_analysis: Any = compile_sweep(config, mesh, sweep_batch).memory_analysis()
    return MemoryUse(
        bytes_per_device(abstract_arguments),
        memory_analysis.temp_size_in_bytes + memory_analysis.output_size_in_bytes,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of arrays on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
