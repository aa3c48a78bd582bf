"""Nearest neighbours: time against faiss's flat index and against the matrix product alone.

    python -m tests.benchmarks.quantize [--codes=32768] [--width=512] [--queries=4096]

All run in turn in one process with as many threads, so that their ratios hold on a shared machine;
medians of --repeat. MB is the temporary memory of the compiled program.
"""

import importlib
import os
import statistics
import time

import faiss
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

nearest = importlib.import_module("continuous_lm.quantize.nearest")  # the module of that name

_CODES = flags.DEFINE_integer("codes", 32768, "Rows of the codebook.")
_WIDTH = flags.DEFINE_integer("width", 512, "Of a vector.")
_QUERIES = flags.DEFINE_integer("queries", 4096, "Vectors to find neighbours of.")
_NUMBERS = flags.DEFINE_list("k", ["1", "10"], "How many neighbours.")
_BLOCKS = flags.DEFINE_list("blocks", ["1024", "4096"], "Codes in a block.")
_REPEAT = flags.DEFINE_integer("repeat", 5, "Runs of each.")


def main(_) -> None:
    threads = len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(threads)
    rng = np.random.default_rng(0)
    codes, x = (
        rng.standard_normal((n, _WIDTH.value), np.float32) for n in (_CODES.value, _QUERIES.value)
    )
    index = faiss.IndexFlatL2(_WIDTH.value)
    index.add(codes)
    on_device = jnp.asarray(x), jnp.asarray(codes)
    norms = nearest.squared_norms(codes)

    def product(x, codes):
        return jnp.einsum("nw,ew->ne", x, codes, precision=jax.lax.Precision.HIGHEST)

    programs = {"product": jax.jit(product).lower(*on_device).compile()}
    runs = {"product": lambda: programs["product"](*on_device)}
    for k in map(int, _NUMBERS.value):
        runs[f"faiss, k = {k}"] = lambda k=k: index.search(x, k)
        for block in map(int, _BLOCKS.value):
            name = f"ours, k = {k}, blocks of {block}"
            how = nearest._How(k, "euclidean", block)
            programs[name] = nearest._alone.lower(how, *on_device, norms).compile()
            runs[name] = lambda k=k, block=block: nearest.k_nearest(
                *on_device, k, norms=norms, block=block
            )
    times = {name: [] for name in runs}
    results = {}
    for _ in range(_REPEAT.value + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            results[name] = jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - begin))
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    print(f"{jax.devices()[0].device_kind}, {threads} threads; {_CODES.value} x {_WIDTH.value}")
    print(f"{'':30} {'ms':>8}  / product  / faiss      MB  same indices as faiss")
    for name, ms in median.items():
        theirs = name.split(", blocks")[0].replace("ours", "faiss")
        size, faster, same = (" " * 6,) * 3
        if name in programs:
            size = f"{programs[name].memory_analysis().temp_size_in_bytes / 1e6:6.0f}"
        if name.startswith("ours"):
            faster = f"{ms / median[theirs]:6.2f}"
            same = f"{np.mean(np.asarray(results[name].indices) == results[theirs][1]):.4%}"
        print(f"{name:30} {ms:8.1f}  {ms / median['product']:9.2f}  {faster:7}  {size}  {same}")


if __name__ == "__main__":
    app.run(main)
