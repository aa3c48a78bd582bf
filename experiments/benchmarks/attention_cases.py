"""The benchmark's attention: blocked against dense, time and memory, with every gradient."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from continuous_lm import attention
from continuous_lm.experiments.benchmarks import timing
from continuous_lm.experiments.benchmarks.timing import Row

NUM_HEADS, HEAD_DIM = 8, 64
MAX_NUM_TOKENS = 32768


def attention_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """All rows."""
    num_tokens, max_num_tokens = (512, 2048) if quick else (4096, MAX_NUM_TOKENS)
    inputs = random_inputs(num_tokens)
    for with_gradients in (False, True):
        direction = "forward and all gradients" if with_gradients else "forward"
        label = f"{num_tokens} tokens, {direction}"
        programs = {
            implementation: compile_attention(
                implementation, with_gradients, num_tokens
            )
            for implementation in ("blocked", "dense")
        }
        callables: dict[str, Callable[[], Any]] = {
            implementation: functools.partial(program, *inputs)
            for implementation, program in programs.items()
        }
        seconds = timing.time_in_turns(callables, repeats)
        yield timing.speedup_row(
            f"{label}: blocked, times as fast as dense",
            seconds["blocked"],
            seconds["dense"],
            2.0 if with_gradients else None,
        )
        yield timing.cost_ratio_row(
            f"{label}: temporary memory, blocked over dense",
            [temporary_bytes(programs["blocked"])],
            [temporary_bytes(programs["dense"])],
            1 / 30 if with_gradients else None,
            "B",
        )
    previous_bytes = temporary_bytes(compile_attention("blocked", True, num_tokens))
    while num_tokens < max_num_tokens:
        num_tokens = 2 * num_tokens
        doubled_bytes = temporary_bytes(compile_attention("blocked", True, num_tokens))
        yield timing.cost_ratio_row(
            f"{num_tokens} tokens: temporary memory over that of {num_tokens // 2}",
            [doubled_bytes],
            [previous_bytes],
            2.2,
            unit="B",
        )
        previous_bytes = doubled_bytes


def random_inputs(num_tokens: int) -> list[jax.Array]:
    """q, k, v [1, T, N, H] and durations [1, T]."""
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = [
        jax.random.normal(key, (1, num_tokens, NUM_HEADS, HEAD_DIM)) for key in keys[:3]
    ]
    return [*qkv, jax.random.uniform(keys[3], (1, num_tokens), minval=0.1, maxval=2.0)]


def compile_attention(
    implementation: str, with_gradients: bool, num_tokens: int
) -> jax.stages.Compiled:
    """The attention, or its gradient for q, k, v and durations, without running it."""
    attend = functools.partial(attention.attend, implementation=implementation)

    def loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(*inputs)))

    function = jax.grad(loss, argnums=(0, 1, 2, 3)) if with_gradients else attend
    return (
        jax.jit(function)
        .lower(*jax.eval_shape(lambda: random_inputs(num_tokens)))
        .compile()
    )


def temporary_bytes(compiled_program: jax.stages.Compiled) -> float:
    """Bytes that a compiled program takes beside what goes in and comes out."""
    memory_analysis: Any = compiled_program.memory_analysis()
    return float(memory_analysis.temp_size_in_bytes)
