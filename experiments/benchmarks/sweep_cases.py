"""The benchmark's sweeps: 100 points of one prompt, ours, the paper's code and batched PyTorch.

A random Llama, 512 wide with 8 layers, 8 heads, MLPs of 1376 and 32,768 tokens, in float32. The
second quarter of the prompt changes its duration from 1 to 0.1. The result is the probabilities of
ten tokens. All sides have the same weights, and their results are compared before they are timed.
"""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import continuous_lm as clm
from continuous_lm.analysis import flops
from continuous_lm.experiments.benchmarks import baselines, timing
from continuous_lm.experiments.benchmarks.timing import Row
from continuous_lm.experiments.densities import density_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWER_GROUPS = [[i] for i in range(10)]
# Points of the paper's procedure that are timed: it takes them one by one, all alike.
NUM_PAPER_POINTS = 10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the model, the prompt and the sweep."""

    num_points: int = 100
    short_length: int = 40  # tokens of the short prompt
    long_length: int = 256
    vocab_size: int = 32768
    hidden_size: int = 512
    num_layers: int = 8
    num_deep_layers: int = 32  # layers of the model that takes longer to compile
    batch_sizes: tuple[int, ...] = (
        5,
        10,
        25,
        50,
    )  # of PyTorch, to choose the best from


QUICK_SIZES = Sizes(6, 8, 12, 64, 32, 2, 4, (3, 6))
MIN_PAPER_SPEEDUPS = {
    40: 12.0,
    256: 20.0,
}  # times as fast as the paper's procedure, by tokens


def random_lm(sizes: Sizes, num_layers: int | None = None) -> clm.LanguageModel:
    """A Llama with random weights."""
    config = density_training.trunk_config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=num_layers or sizes.num_layers,
        num_heads=8,
    )
    variables = jax.jit(clm.Transformer(config).init)(
        jax.random.key(0), jnp.zeros(1, jnp.int32)
    )
    return clm.LanguageModel(clm.Transformer(config), nn.unbox(variables["params"]))


def random_sweep_inputs(sizes: Sizes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and durations [P, T]."""
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, length)
    durations = np.ones((sizes.num_points, length), np.float32)
    factors = np.linspace(0.1, 1.0, sizes.num_points, dtype=np.float32)
    durations[:, length // 4 : length // 2] = factors[:, None]
    return tokens, durations


def run_our_sweep(
    lm: clm.LanguageModel, tokens: np.ndarray, durations: np.ndarray
) -> np.ndarray:
    """Probabilities [P, 10]."""
    return clm.sweep.probabilities(
        lm, ANSWER_GROUPS, tokens=tokens, durations=durations
    )


# --- Warm ---------------------------------------------------------------------------------------


class BaselineSweep(NamedTuple):
    """Another way to do the sweep."""

    run: Callable[[], Any]
    time_scale: float  # of its time, where it does a part of the points alone
    minimum: float | None  # ours is to be so many times as fast
    note: str


def short_sweep_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """Warm sweeps over the short prompt."""
    sizes = QUICK_SIZES if quick else Sizes()
    yield from warm_sweep_rows(sizes, sizes.short_length, repeats)


def long_sweep_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """Warm sweeps over the long prompt."""
    sizes = QUICK_SIZES if quick else Sizes()
    yield from warm_sweep_rows(sizes, sizes.long_length, repeats)


def warm_sweep_rows(sizes: Sizes, length: int, repeats: int) -> Iterator[Row]:
    """One sweep over a prompt of `length` tokens, after one that compiled it."""
    lm = random_lm(sizes)
    tokens, durations = random_sweep_inputs(sizes, length)
    our_sweep = functools.partial(run_our_sweep, lm, tokens, durations)
    matrix_product, product_flops = _make_matrix_product(4 * sizes.hidden_size)
    missing_reason = baselines.why_missing("torch", "transformers")
    baseline_sweeps = (
        {}
        if missing_reason
        else _make_baseline_sweeps(sizes, lm, tokens, durations, our_sweep())
    )
    callables: dict[str, Callable[[], Any]] = {
        "ours": our_sweep,
        "product": matrix_product,
    }
    callables |= {
        baseline_name: baseline_sweep.run
        for baseline_name, baseline_sweep in baseline_sweeps.items()
    }
    # The baselines have run, to be compared.
    seconds = timing.time_in_turns(callables, repeats, is_warm=bool(baseline_sweeps))
    label = f"{length} tokens: times as fast as"
    if missing_reason:
        yield Row(f"{label} PyTorch", note=missing_reason)
    for baseline_name, baseline_sweep in baseline_sweeps.items():
        theirs = [baseline_sweep.time_scale * s for s in seconds[baseline_name]]
        yield timing.speedup_row(
            f"{label} {baseline_name}",
            seconds["ours"],
            theirs,
            baseline_sweep.minimum,
            baseline_sweep.note,
        )
    sweep_flops = count_sweep_flops(lm.config, sizes.num_points, length)
    yield timing.speedup_row(
        f"{length} tokens: share of a matrix product's speed",
        seconds["ours"],
        [sweep_flops / product_flops * s for s in seconds["product"]],
        note=f"theirs: the {sweep_flops / 1e9:.3g} GFLOP of a sweep, prefix once, last logits only",
    )


def _make_baseline_sweeps(
    sizes: Sizes,
    lm: clm.LanguageModel,
    tokens: np.ndarray,
    durations: np.ndarray,
    expected: np.ndarray,
) -> dict[str, BaselineSweep]:
    """Return the paper's procedure and batched PyTorch; both must give `expected`."""
    with tempfile.TemporaryDirectory() as folder:
        clm.save(folder, lm)
        model = baselines.load_causal_lm(folder)
    return _make_paper_sweeps(model, tokens, durations, expected) | (
        _make_batched_sweeps(model, tokens, durations, expected, sizes.batch_sizes)
    )


def _make_paper_sweeps(
    model: "PreTrainedModel",
    tokens: np.ndarray,
    durations: np.ndarray,
    expected: np.ndarray,
) -> dict[str, BaselineSweep]:
    """The paper's procedure at some of the points, with and without making the masks."""
    num_points = len(durations)
    num_timed = min(NUM_PAPER_POINTS, num_points)
    timed_points = np.linspace(0, num_points - 1, num_timed).astype(int)
    time_scale = num_points / num_timed
    note = f"theirs: {num_timed} points' time, scaled"
    run_paper = functools.partial(
        baselines.paper_sweep, model, tokens, durations[timed_points]
    )
    timing.require_close(
        "the paper's procedure", expected[timed_points], run_paper()[:, :10], 1e-4
    )
    masks = baselines.paper_masks(durations[timed_points])
    return {
        "the paper's procedure, mask included": BaselineSweep(
            run_paper, time_scale, MIN_PAPER_SPEEDUPS.get(len(tokens)), note
        ),
        "the paper's procedure, mask excluded": BaselineSweep(
            functools.partial(run_paper, masks), time_scale, None, note
        ),
    }


def _make_batched_sweeps(
    model: "PreTrainedModel",
    tokens: np.ndarray,
    durations: np.ndarray,
    expected: np.ndarray,
    batch_sizes: tuple[int, ...],
) -> dict[str, BaselineSweep]:
    """Batched PyTorch in both dtypes, with the keys of the first quarter and without."""
    baseline_sweeps = {}
    for dtype, tolerance in {"float32": 1e-4, "bfloat16": 0.2}.items():
        batched_llama = baselines.BatchedLlama(model, dtype)
        for prefix_length, minimum in {0: 2.0, len(tokens) // 4: 1.5}.items():
            name = f"PyTorch {dtype}"
            if prefix_length:
                name += " with prefix KV"
            run_batched = functools.partial(
                batched_llama.sweep, tokens, prefix=prefix_length
            )
            probabilities = run_batched(durations, batch_size=batch_sizes[-1])
            timing.require_close(name, expected, probabilities[:, :10], tolerance)
            batch_size = _fastest_batch_size(run_batched, durations, batch_sizes)
            baseline_sweeps[name] = BaselineSweep(
                functools.partial(run_batched, durations, batch_size=batch_size),
                time_scale=1.0,
                minimum=minimum if dtype == "float32" else None,
                note=f"its best: {batch_size} points at once",
            )
    return baseline_sweeps


def _fastest_batch_size(
    run: Callable[..., Any], durations: np.ndarray, batch_sizes: tuple[int, ...]
) -> int:
    """The batch size at which a point takes the least time."""

    def seconds_per_point(size: int) -> float:
        return timing.time_call(lambda: run(durations[:size], batch_size=size)) / size

    return min(batch_sizes, key=seconds_per_point)


def _make_matrix_product(size: int) -> tuple[Callable[[], jax.Array], float]:
    """A plain matrix product, and its operations."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    product = jax.jit(functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST))
    return functools.partial(product.lower(a, b).compile(), a, b), 2.0 * size**3


def count_sweep_flops(
    config: clm.TransformerConfig, num_points: int, length: int
) -> float:
    """Return the operations of a sweep's matrix products; the first quarter is computed once."""
    num_shared_tokens = length // 4
    return flops.prefix_flops(config, num_shared_tokens) + flops.continuation_flops(
        config,
        num_points=num_points,
        num_tokens=length,
        num_shared_tokens=num_shared_tokens,
    )


# --- Cold ---------------------------------------------------------------------------------------


# A checkpoint, sizes and the tokens of the prompt -> the sweep.
SweepPreparation = Callable[[str, Sizes, int], Callable[[], Any]]


def prepare_our_sweep(folder: str, sizes: Sizes, length: int) -> Callable[[], Any]:
    """For `timing.measure_in_process`."""
    return functools.partial(
        run_our_sweep, clm.load(folder), *random_sweep_inputs(sizes, length)
    )


def prepare_paper_sweep(folder: str, sizes: Sizes, length: int) -> Callable[[], Any]:
    """For `timing.measure_in_process`."""
    model = baselines.load_causal_lm(folder)
    return functools.partial(
        baselines.paper_sweep, model, *random_sweep_inputs(sizes, length)
    )


def prepare_batched_sweep(folder: str, sizes: Sizes, length: int) -> Callable[[], Any]:
    """For `timing.measure_in_process`."""
    batched_llama = baselines.BatchedLlama(baselines.load_causal_lm(folder))
    tokens, durations = random_sweep_inputs(sizes, length)
    batch_size = sizes.batch_sizes[len(sizes.batch_sizes) // 2]
    return functools.partial(
        batched_llama.sweep,
        tokens,
        durations,
        batch_size=batch_size,
        prefix=length // 4,
    )


def cold_sweep_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """The first sweep of a process, over the short prompt."""
    sizes = QUICK_SIZES if quick else Sizes()
    length = sizes.short_length
    prepare_by_method: dict[str, SweepPreparation] = {"ours": prepare_our_sweep}
    missing_reason = baselines.why_missing("torch", "transformers")
    if not missing_reason:
        prepare_by_method["paper"] = prepare_paper_sweep
        prepare_by_method["batched"] = prepare_batched_sweep
    runs = _time_cold_sweeps(prepare_by_method, sizes, length, min(repeats, 3))
    seconds = {
        method: [run.seconds for run in method_runs]
        for method, method_runs in runs.items()
    }
    label = f"{length} tokens, the first sweep of a process: times as fast as"
    if missing_reason:
        median = statistics.median(seconds["ours"])
        yield Row(f"{label} PyTorch", ours=median, unit="s", note=missing_reason)
    else:
        yield timing.speedup_row(
            f"{label} the paper's procedure, mask included",
            seconds["ours"],
            seconds["paper"],
            2.5 if length in MIN_PAPER_SPEEDUPS else None,
            "compilation included, without a cache",
        )
        yield timing.speedup_row(
            f"{label} PyTorch float32 with prefix KV",
            seconds["ours"],
            seconds["batched"],
        )
    for method, method_runs in runs.items():
        peak_megabytes = [
            run.memory_bytes / 1e6
            for run in method_runs
            if run.memory_bytes is not None
        ]
        if peak_megabytes:
            yield timing.median_row(
                f"{length} tokens, the first sweep: MB of memory above the weights, {method}",
                peak_megabytes,
            )


def _time_cold_sweeps(
    prepare_by_method: Mapping[str, SweepPreparation],
    sizes: Sizes,
    length: int,
    repeats: int,
) -> dict[str, list[timing.ProcessCost]]:
    """The costs of each method in each round, all with the same random weights."""
    runs: dict[str, list[timing.ProcessCost]] = {
        method: [] for method in prepare_by_method
    }
    with tempfile.TemporaryDirectory() as folder:
        clm.save(folder, random_lm(sizes))
        for _ in range(repeats):
            for method, prepare_sweep in prepare_by_method.items():
                cost = timing.measure_in_process(prepare_sweep, folder, sizes, length)
                runs[method].append(cost)
    return runs


def prepare_compile_time(sizes: Sizes, num_layers: int) -> Callable[[], float]:
    """Return a function that measures the first sweep's time less the second's."""
    lm = random_lm(sizes, num_layers)
    tokens, durations = random_sweep_inputs(sizes, sizes.short_length)
    run_sweep = functools.partial(run_our_sweep, lm, tokens, durations)
    return lambda: timing.time_call(run_sweep) - timing.time_call(run_sweep)


def compile_time_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """Yield compile times of models of different depths."""
    sizes = QUICK_SIZES if quick else Sizes()
    times_by_depth: dict[int, list[float]] = {
        sizes.num_layers: [],
        sizes.num_deep_layers: [],
    }
    for _ in range(min(repeats, 3)):
        for num_layers, compile_times in times_by_depth.items():
            compile_times.append(
                timing.measure_in_process(
                    prepare_compile_time, sizes, num_layers
                ).result
            )
    yield timing.cost_ratio_row(
        f"compiling {sizes.num_deep_layers} layers, over {sizes.num_layers}",
        times_by_depth[sizes.num_deep_layers],
        times_by_depth[sizes.num_layers],
        1.5,
        note="the first sweep less the second",
    )
