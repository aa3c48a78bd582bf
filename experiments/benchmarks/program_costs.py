"""The cost of a sweep for each device, read from compiled programs; no weights are made.

The program is that of `continuous_lm.analysis.sweep`: it continues from the keys and values of the
shared prefix, at some points at once, batch after batch. The prefix itself, a quarter of the prompt
computed once, would add one part in 3 P to a sweep of P points, and are left out.

Operations and bytes are those of XLA's cost analysis, which counts the body of a loop once, however
often it runs. So layers are unrolled, attention is dense (its blocked form loops), and what one
more layer adds to a program is multiplied: three and four of them say all. (Fewer do not: in the
first layers XLA finds something to share.) Memory is that of the program as it runs, all layers in
their loop, attention in the form chosen by size.

XLA for CPUs computes bfloat16 in float32, from copies of all weights at once. So programs are
compiled in float32, where no such copies are; the bytes of parameters and of what is remembered
follow from their shapes, dtype and shardings.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes
from continuous_lm.models import kv_cache, language_model
from continuous_lm.models.checkpoints.parameter_layout import Layout
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.transformer import Transformer


class Task(NamedTuple):
    """A part of a sweep that runs as one program."""

    tokens: int  # n of the prompt
    shared: int  # of these, the first that all points share
    points: int  # at once


class Work(NamedTuple):
    """What a program does, on each device."""

    operations: float
    bytes: float  # read and written by all its steps, none of which finds them in a cache


# --- The program --------------------------------------------------------------------------------


def answer(model: Transformer, params: Any, tokens, durations, prefix) -> jax.Array:
    """Probabilities [P, V] of the next token, from tokens [T], durations [P, T] and a prefix."""
    logits: Any = model.apply({"params": params}, tokens, durations=durations, prefix=prefix, at=-1)
    return jax.nn.softmax(logits)


class Arguments(NamedTuple):
    """Of `answer`: shapes, dtypes and shardings alone."""

    params: Any
    tokens: jax.ShapeDtypeStruct
    durations: jax.ShapeDtypeStruct
    prefix: kv_cache.KVCache


def arguments(config: TransformerConfig, mesh: Mesh, task: Task, dtype: DTypeLike) -> Arguments:
    """The arguments of `answer`, the model's in `dtype`."""

    def place(shape: tuple[int, ...], kind: DTypeLike, letters: str) -> jax.ShapeDtypeStruct:
        where = axes.sharding(mesh, axes.split(letters), shape)
        return jax.ShapeDtypeStruct(shape, kind, sharding=where)

    layout = Layout(
        config, language_model.FAMILIES[config.family], language_model.parameter_boxes(config)
    )
    targets = dict(layout.targets(jnp.dtype(dtype), mesh))
    remembered = jax.eval_shape(lambda: kv_cache.empty(config, task.shared, (1,), dtype))
    letters: Any = kv_cache.AXES
    places: Any = [place(x.shape, x.dtype, a) for x, a in zip(remembered, letters, strict=True)]
    rest = task.tokens - task.shared
    return Arguments(
        params=traverse_util.unflatten_dict(targets, sep="/"),
        tokens=place((rest,), jnp.int32, "T"),
        durations=place((task.points, rest), jnp.float32, "P T"),
        prefix=kv_cache.KVCache(*places),
    )


def compiled(
    config: TransformerConfig,
    mesh: Mesh,
    task: Task,
    *,
    implementation: str = "auto",
    dtype: DTypeLike = jnp.float32,
) -> jax.stages.Compiled:
    """`answer`, for devices that need not be there."""
    model = Transformer(config, implementation=implementation)
    given = arguments(config, mesh, task, dtype)
    lowered = jax.jit(functools.partial(answer, model)).lower(*given)
    quick: Any = {"xla_backend_optimization_level": 0}  # of machine code, which does not run
    return lowered.compile(quick if mesh.devices.flat[0].platform == "cpu" else None)


# --- What it costs ------------------------------------------------------------------------------


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """In it, layers are compiled one after another and not as a loop."""
    scan = jax.lax.scan
    with mock.patch.object(jax.lax, "scan", lambda *a, **k: scan(*a, **k | {"unroll": True})):
        yield


def counted(config: TransformerConfig, mesh: Mesh, task: Task) -> Work:
    """What XLA counts in the program of all layers, unrolled."""
    with unrolled():
        found: Any = compiled(config, mesh, task, implementation="dense").cost_analysis()
    return Work(found["flops"], found["bytes accessed"])


def work(config: TransformerConfig, mesh: Mesh, task: Task) -> Work:
    """`counted` for any number of layers, from three and four of them."""
    three, four = (counted(dataclasses.replace(config, num_layers=n), mesh, task) for n in (3, 4))
    more = config.num_layers - 3
    return Work(*(a + more * (b - a) for a, b in zip(three, four, strict=True)))


def products(config: TransformerConfig, task: Task) -> float:
    """Operations of the program's matrix products, on all devices together.

    2 for each weight that a token meets and 4 N H for each score: all T S of them, as the dense
    form has them, where the blocked one leaves out most of what comes later. The last layer makes
    keys and values of all tokens, and the rest for one token of each point; the first makes
    queries, keys and values once for all points, unless positions were added to the embeddings
    before. (Rows of devices on the axis "data" each make them; here they are counted once.)
    """
    s, rest = config.sizes, task.tokens - task.shared
    keys = 2 * s["K"] * s["H"] * s["D"]
    queries = s["N"] * s["H"] * s["D"]
    others = 2 * queries + (2 + config.gated) * s["D"] * s["F"]
    scores = 2 * s["N"] * s["H"] * task.tokens
    layer = rest * (keys + others + scores)
    last = rest * keys + others + scores
    total = task.points * ((s["L"] - 1) * layer + last + s["D"] * s["V"])
    if s["L"] > 1 and config.max_positions is None:
        total -= (task.points - 1) * rest * (queries + keys)
    return 2 * total


class Memory(NamedTuple):
    """Bytes on each device while points are computed."""

    arguments: int  # weights, and what is remembered of the shared tokens
    temporaries: int  # and what the program gives

    @property
    def total(self) -> int:
        return sum(self)


@functools.cache
def memory(
    config: TransformerConfig, mesh: Mesh, task: Task, dtype: DTypeLike = jnp.bfloat16
) -> Memory:
    """Arguments in `dtype`, by their shardings; temporaries as compiled in float32."""
    given = arguments(config, mesh, task, dtype)
    found: Any = compiled(config, mesh, task).memory_analysis()
    return Memory(
        held(given),
        found.temp_size_in_bytes + found.output_size_in_bytes,
    )


def held(tree: Any) -> int:
    """Bytes of arrays on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
