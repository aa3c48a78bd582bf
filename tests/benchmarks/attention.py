"""Blocked against dense attention: time and memory, forward and with every gradient.

    python -m tests.benchmarks.attention [--lengths=256,1024,4096] [--heads=8] [--width=64]

Both run in turn in one process, so that their ratio holds on a shared machine; medians of --repeat.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from continuous_lm import attention

_LENGTHS = flags.DEFINE_list("lengths", ["256", "512", "1024", "4096"], "Tokens.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.")
_HEADS = flags.DEFINE_integer("heads", 8, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "Key/value heads.")
_WIDTH = flags.DEFINE_integer("width", 64, "Of a head.")
_WINDOW = flags.DEFINE_float("window", None, "In tokens.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of q, k and v.")
_BLOCK = flags.DEFINE_integer("block", None, "Tokens in a block; by size if left out.")
_REPEAT = flags.DEFINE_integer("repeat", 5, "Runs of each.")


def compiled(form: str, gradients: bool, arguments):
    """The attention, or the gradient for q, k, v and the durations, compiled."""
    attend = functools.partial(
        attention.attend, implementation=form, block=_BLOCK.value, window=_WINDOW.value
    )

    def loss(*arguments):
        return jnp.sum(jnp.square(attend(*arguments).astype(jnp.float32)))

    function = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradients else attend
    return jax.jit(function).lower(*arguments).compile()


def main(_) -> None:
    print(f"{jax.devices()[0].device_kind}; ms are medians, MB temporary memory")
    print("     n  what      dense ms  blocked ms  ratio   dense MB  blocked MB  ratio")
    for n in map(int, _LENGTHS.value):
        rng = np.random.default_rng(0)
        shapes = [
            (_BATCH.value, n, h, _WIDTH.value) for h in (_HEADS.value, *[_KV_HEADS.value] * 2)
        ]
        q, k, v = (jnp.asarray(rng.normal(size=s), _DTYPE.value) for s in shapes)
        arguments = q, k, v, jnp.asarray(rng.uniform(0.1, 2.0, (_BATCH.value, n)), jnp.float32)
        for gradients in (False, True):
            programs = {f: compiled(f, gradients, arguments) for f in ("dense", "blocked")}
            times = {form: [] for form in programs}
            for _ in range(_REPEAT.value + 1):
                for form, program in programs.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(program(*arguments))
                    times[form].append(1e3 * (time.perf_counter() - begin))
            dense, blocked = (statistics.median(t[1:]) for t in times.values())
            sizes = [p.memory_analysis().temp_size_in_bytes / 1e6 for p in programs.values()]
            print(
                f"{n:6}  {'gradients' if gradients else 'forward':9}"
                f" {dense:8.1f}  {blocked:10.1f}  {dense / blocked:5.2f}"
                f"  {sizes[0]:9.1f}  {sizes[1]:10.1f}  {sizes[0] / sizes[1]:5.1f}"
            )


if __name__ == "__main__":
    app.run(main)
