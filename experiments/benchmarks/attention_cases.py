"""The benchmark's attention: blocked against dense, time and memory, with every gradient."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from continuous_lm import attention
from continuous_lm.experiments.benchmarks import timing
from continuous_lm.experiments.benchmarks.timing import Row

HEADS, WIDTH = 8, 64
LONGEST = 32768


def case(quick: bool, repeats: int) -> Iterator[Row]:
    """All rows."""
    n, longest = (512, 2048) if quick else (4096, LONGEST)
    arguments = drawn(n)
    for gradients in (False, True):
        what = f"{n} tokens, " + ("forward and all gradients" if gradients else "forward")
        programs = {form: compiled(form, gradients, n) for form in ("blocked", "dense")}
        ways: dict[str, Callable[[], Any]] = {
            form: functools.partial(program, *arguments) for form, program in programs.items()
        }
        seconds = timing.in_turns(ways, repeats)
        yield timing.times_as_fast(
            f"{what}: blocked, times as fast as dense",
            seconds["blocked"],
            seconds["dense"],
            2.0 if gradients else None,
        )
        yield timing.times_as_much(
            f"{what}: temporary memory, blocked over dense",
            [temporary(programs["blocked"])],
            [temporary(programs["dense"])],
            1 / 30 if gradients else None,
            "B",
        )
    before = temporary(compiled("blocked", True, n))
    while n < longest:
        n, after = 2 * n, temporary(compiled("blocked", True, 2 * n))
        yield timing.times_as_much(
            f"{n} tokens: temporary memory over that of {n // 2}", [after], [before], 2.2, unit="B"
        )
        before = after


def drawn(n: int) -> list[jax.Array]:
    """q, k, v [1, n, N, H] and durations [1, n]."""
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = [jax.random.normal(key, (1, n, HEADS, WIDTH)) for key in keys[:3]]
    return [*qkv, jax.random.uniform(keys[3], (1, n), minval=0.1, maxval=2.0)]


def compiled(form: str, gradients: bool, n: int) -> Any:
    """The attention, or its gradient for q, k, v and durations, without running it."""
    attend = functools.partial(attention.attend, implementation=form)

    def loss(*arguments: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(*arguments)))

    function = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradients else attend
    return jax.jit(function).lower(*jax.eval_shape(lambda: drawn(n))).compile()


def temporary(program: Any) -> float:
    """Bytes that a compiled program takes beside what goes in and comes out."""
    return float(program.memory_analysis().temp_size_in_bytes)
