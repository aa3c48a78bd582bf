"""The benchmark's sweeps: 100 points of one prompt, ours, the paper's code and batched PyTorch.

A random Llama, 512 wide with 8 layers, 8 heads, MLPs of 1376 and 32,768 tokens, in float32. The
second quarter of the prompt changes its duration from 1 to 0.1; ten tokens' probabilities are
wanted. All sides have the same weights, and their answers are compared before they are timed.
"""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import baselines, timing
from continuous_lm.experiments.benchmarks.timing import Row
from continuous_lm.experiments.densities import density_training

GROUPS = [[i] for i in range(10)]
SHOWN = 10  # points of the paper's procedure that are timed: it takes them one by one, all alike


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large everything is."""

    points: int = 100
    lengths: tuple[int, int] = (40, 256)  # of the short and of the long prompt
    vocab_size: int = 32768
    hidden_size: int = 512
    num_layers: int = 8
    deep: int = 32  # layers of the model that takes longer to compile
    batches: tuple[int, ...] = (5, 10, 25, 50)  # of PyTorch, to choose the best from


QUICK = Setting(6, (8, 12), 64, 32, 2, 4, (3, 6))
TARGETS = {40: 12.0, 256: 20.0}  # times as fast as the paper's procedure, by tokens


def random_lm(setting: Setting, num_layers: int | None = None) -> clm.LanguageModel:
    """A Llama with random weights."""
    config = density_training.trunk(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        num_layers=num_layers or setting.num_layers,
        num_heads=8,
    )
    made = jax.jit(clm.Transformer(config).init)(jax.random.key(0), jnp.zeros(1, jnp.int32))
    return clm.LanguageModel(config, nn.unbox(made["params"]))


def problem(setting: Setting, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and durations [P, T]."""
    tokens = np.random.default_rng(0).integers(0, setting.vocab_size, length)
    durations = np.ones((setting.points, length), np.float32)
    factors = np.linspace(0.1, 1.0, setting.points, dtype=np.float32)
    durations[:, length // 4 : length // 2] = factors[:, None]
    return tokens, durations


def ours(lm: clm.LanguageModel, tokens: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """Probabilities [P, 10]."""
    return clm.sweep.probabilities(lm, GROUPS, tokens=tokens, durations=durations)


# --- Warm ---------------------------------------------------------------------------------------


class Rival(NamedTuple):
    """Another way to do the sweep."""

    run: Callable[[], Any]
    scale: float  # of its time, where it does a part of the points alone
    least: float | None  # ours is to be so many times as fast
    note: str


def warm(long: bool, quick: bool, repeats: int) -> Iterator[Row]:
    """One sweep over the short prompt, or the long one."""
    setting = QUICK if quick else Setting()
    length, lm = setting.lengths[long], random_lm(setting)
    tokens, durations = problem(setting, length)
    mine = functools.partial(ours, lm, tokens, durations)
    product, size = _product(64 if quick else 2048)
    absent = baselines.missing("torch", "transformers")
    rivals = {} if absent else _rivals(setting, lm, tokens, durations, mine())
    ways: dict[str, Callable[[], Any]] = {"ours": mine, "product": product}
    ways |= {name: rival.run for name, rival in rivals.items()}
    seconds = timing.in_turns(ways, repeats, warm=bool(rivals))  # these have run, to be compared
    compare = f"{length} tokens: times as fast as"
    if absent:
        yield Row(f"{compare} PyTorch", note=absent)
    for name, rival in rivals.items():
        theirs = [rival.scale * s for s in seconds[name]]
        yield timing.times_as_fast(
            f"{compare} {name}", seconds["ours"], theirs, rival.least, rival.note
        )
    work = operations(lm.config, setting.points, length)
    yield timing.times_as_fast(
        f"{length} tokens: share of a matrix product's speed",
        seconds["ours"],
        [work / size * s for s in seconds["product"]],
        note=f"theirs: the {work / 1e9:.3g} GFLOP that it takes, prefix once, last logits alone",
    )


def _rivals(
    setting: Setting,
    lm: clm.LanguageModel,
    tokens: np.ndarray,
    durations: np.ndarray,
    expected: np.ndarray,
) -> dict[str, Rival]:
    """The paper's procedure and batched PyTorch, which have given what was `expected`."""
    with tempfile.TemporaryDirectory() as folder:
        clm.save(folder, lm)
        model = baselines.causal_lm(folder)
    shown = np.linspace(0, setting.points - 1, min(SHOWN, setting.points)).astype(int)
    scale, note = setting.points / len(shown), f"theirs: {len(shown)} points' time, scaled"
    paper = functools.partial(baselines.paper_sweep, model, tokens, durations[shown])
    timing.require_equal("the paper's procedure", expected[shown], paper()[:, :10], 1e-4)
    given = functools.partial(paper, baselines.paper_masks(durations[shown]))
    rivals = {
        "the paper's procedure, mask included": Rival(paper, scale, TARGETS.get(len(tokens)), note),
        "the paper's procedure, mask excluded": Rival(given, scale, None, note),
    }
    for dtype, tolerance in {"float32": 1e-4, "bfloat16": 0.2}.items():
        batched = baselines.BatchedLlama(model, dtype)
        for prefix, least in {0: 2.0, len(tokens) // 4: 1.5}.items():
            name = f"PyTorch {dtype}{' with prefix KV' if prefix else ''}"
            run = functools.partial(batched.sweep, tokens, prefix=prefix)
            found = run(durations, batch_size=setting.batches[-1])
            timing.require_equal(name, expected, found[:, :10], tolerance)
            size = _best_size(run, durations, setting.batches)
            best = functools.partial(run, durations, batch_size=size)
            least_of = least if dtype == "float32" else None
            rivals[name] = Rival(best, 1.0, least_of, f"its best: {size} points at once")
    return rivals


def _best_size(run: Callable[..., Any], durations: np.ndarray, sizes: tuple[int, ...]) -> int:
    """The batch size at which a point takes the least time."""

    def taken(size: int) -> float:
        return timing.seconds(lambda: run(durations[:size], batch_size=size)) / size

    return min(sizes, key=taken)


def _product(size: int) -> tuple[Callable[[], jax.Array], float]:
    """A plain matrix product, and its operations."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    product = jax.jit(functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST))
    return functools.partial(product.lower(a, b).compile(), a, b), 2.0 * size**3


def operations(config: clm.TransformerConfig, points: int, length: int) -> float:
    """Of the products with weights and the attention that a sweep cannot do without.

    The first quarter is computed once, all later tokens at every point but for the first layer's
    queries, keys and values, and only the last position needs the last layer's query, its output
    and MLP, and the head.
    """
    width, layers = config.hidden_size, config.num_layers
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rest = 2 * width * heads + 3 * width * config.mlp_size
    prefix, later = length // 4, points * (length - length // 4)
    everywhere = (prefix + later) * (layers * 2 * width * kv + (layers - 1) * rest)
    if layers > 1:
        everywhere -= (points - 1) * (length - prefix) * width * (heads + 2 * kv)
    pairs = prefix**2 / 2 + points * (length**2 - prefix**2) / 2
    attention = 2 * heads * (pairs * (layers - 1) + points * length)
    return 2 * (everywhere + attention + points * (rest + width * config.vocab_size))


# --- Cold ---------------------------------------------------------------------------------------


def first_of_ours(folder: str, setting: Setting, length: int) -> Callable[[], Any]:
    """For `measuring.fresh`."""
    return functools.partial(ours, clm.load(folder), *problem(setting, length))


def first_of_paper(folder: str, setting: Setting, length: int) -> Callable[[], Any]:
    """For `measuring.fresh`."""
    model = baselines.causal_lm(folder)
    return functools.partial(baselines.paper_sweep, model, *problem(setting, length))


def first_of_batched(folder: str, setting: Setting, length: int) -> Callable[[], Any]:
    """For `measuring.fresh`."""
    batched = baselines.BatchedLlama(baselines.causal_lm(folder))
    tokens, durations = problem(setting, length)
    size = setting.batches[len(setting.batches) // 2]
    return functools.partial(batched.sweep, tokens, durations, batch_size=size, prefix=length // 4)


def cold(quick: bool, repeats: int) -> Iterator[Row]:
    """The first sweep of a process, over the short prompt."""
    setting = QUICK if quick else Setting()
    length = setting.lengths[0]
    firsts = {"ours": first_of_ours}
    absent = baselines.missing("torch", "transformers")
    if not absent:
        firsts |= {"paper": first_of_paper, "batched": first_of_batched}
    runs: dict[str, list[timing.Fresh]] = {name: [] for name in firsts}
    with tempfile.TemporaryDirectory() as folder:
        clm.save(folder, random_lm(setting))
        for _ in range(min(repeats, 3)):
            for name, first in firsts.items():
                runs[name].append(timing.fresh(first, folder, setting, length))
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    what = f"{length} tokens, the first sweep of a process: times as fast as"
    if absent:
        median = statistics.median(seconds["ours"])
        yield Row(f"{what} PyTorch", ours=median, unit="s", note=absent)
    else:
        yield timing.times_as_fast(
            f"{what} the paper's procedure, mask included",
            seconds["ours"],
            seconds["paper"],
            2.5 if length in TARGETS else None,
            "compilation included, without a cache",
        )
        yield timing.times_as_fast(
            f"{what} PyTorch float32 with prefix KV", seconds["ours"], seconds["batched"]
        )
    for name, found in runs.items():
        memory = [run.memory / 1e6 for run in found if run.memory is not None]
        if memory:
            yield timing.figures(
                f"{length} tokens, the first sweep: MB of memory above the weights, {name}", memory
            )


def compiling(setting: Setting, num_layers: int) -> Callable[[], float]:
    """For `measuring.fresh`: what the first sweep takes longer than the second."""
    lm = random_lm(setting, num_layers)
    tokens, durations = problem(setting, setting.lengths[0])
    run = functools.partial(ours, lm, tokens, durations)
    return lambda: timing.seconds(run) - timing.seconds(run)


def depth(quick: bool, repeats: int) -> Iterator[Row]:
    """What a deeper model takes to compile."""
    setting = QUICK if quick else Setting()
    found: dict[int, list[float]] = {setting.num_layers: [], setting.deep: []}
    for _ in range(min(repeats, 3)):
        for layers, taken in found.items():
            taken.append(timing.fresh(compiling, setting, layers).result)
    shallow, deep = found.values()
    yield timing.times_as_much(
        f"compiling {setting.deep} layers, over {setting.num_layers}",
        deep,
        shallow,
        1.5,
        note="the first sweep less the second",
    )
