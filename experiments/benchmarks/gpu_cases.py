"""The benchmark's rows for a GPU: attention in bfloat16, an 8-billion-parameter sweep, a search."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import continuous_lm as clm
from continuous_lm import quantize
from continuous_lm.analysis import sweep
from continuous_lm.experiments.benchmarks import baselines, search_cases, timing
from continuous_lm.experiments.benchmarks.timing import Row, Target
from continuous_lm.models.parameters import Params
from continuous_lm.rotary import Rope

NUM_CALLS = 10  # consecutive calls, so that launch overhead does not count

LLAMA_3_8B = clm.TransformerConfig(  # Llama 3, 8 billion
    vocab_size=128256,
    hidden_size=4096,
    mlp_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=Rope(theta=5e5),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark's models and arrays."""

    lengths: tuple[int, ...] = (8192, 32768)
    num_heads: int = 16
    head_dim: int = 128
    num_points: int = 100
    num_tokens: int = 40
    codebook_shape: tuple[int, int] = (131072, 4096)
    batch_size: int = 4096
    model_config: clm.TransformerConfig = LLAMA_3_8B


QUICK_SIZES = Sizes(
    (256,), 2, 64, 5, 8, (256, 64), 32, dataclasses.replace(LLAMA_3_8B, num_layers=2)
)


def gpu_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """All rows."""
    if jax.default_backend() != "gpu":
        yield Row(
            "attention, a sweep and a search on a GPU", note="no GPU: not measured"
        )
        return
    sizes = QUICK_SIZES if quick else Sizes()
    for num_tokens in sizes.lengths:
        yield from attention_rows(sizes, num_tokens, repeats)
    yield from large_sweep_rows(sizes, repeats)
    yield from search_rows(sizes, repeats)


# --- Attention ----------------------------------------------------------------------------------


def attention_rows(
    sizes: Sizes,
    num_tokens: int,
    repeats: int,
    baseline_implementation: str | None = "cudnn",
    *,
    peer: bool = True,
) -> Iterator[Row]:
    """Continuous attention against the plain causal one and, with its `peer`, flex_attention."""
    *qkv, durations = random_inputs(sizes, num_tokens)
    causal_attention = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        implementation=baseline_implementation,
    )
    missing_reason = baselines.without_cuda() if peer else "left out"
    for with_gradients, maximum in {False: 1.15, True: 1.25}.items():
        callables: dict[str, Callable[[], Any]] = {
            "ours": repeated_calls(
                clm.attention.attend, (*qkv, durations), with_gradients
            ),
            "plain": repeated_calls(causal_attention, qkv, with_gradients),
        }
        if not missing_reason:
            arrays = [np.asarray(x.astype(jnp.float32)) for x in (*qkv, durations)]
            callables["flex"] = baselines.flex_attention(
                *arrays, with_gradients=with_gradients, num_calls=NUM_CALLS
            )
        seconds = timing.time_in_turns(callables, repeats)
        direction = "forward and backward" if with_gradients else "forward"
        label = f"{num_tokens} tokens, bf16, {direction}"
        yield timing.cost_ratio_row(
            f"{label}: time over that of plain causal attention",
            seconds["ours"],
            seconds["plain"],
            maximum,
            note=f"{NUM_CALLS} calls",
        )
        if missing_reason:
            yield Row(f"{label}: times as fast as flex_attention", note=missing_reason)
        else:
            yield timing.speedup_row(
                f"{label}: times as fast as flex_attention",
                seconds["ours"],
                seconds["flex"],
                1.0,
            )


def random_inputs(sizes: Sizes, num_tokens: int) -> list[jax.Array]:
    """q, k, v [1, T, N, H] in bfloat16, and durations [1, T]."""
    *qkv_keys, duration_key = jax.random.split(jax.random.key(0), 4)
    shape = (1, num_tokens, sizes.num_heads, sizes.head_dim)
    qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key in qkv_keys]
    durations = jax.random.uniform(
        duration_key, (1, num_tokens), minval=0.1, maxval=2.0
    )
    return [*qkv, durations]


def repeated_calls(
    attend: Callable[..., jax.Array],
    arguments: Sequence[jax.Array],
    with_gradients: bool,
) -> Callable[[], object]:
    """Attention, or the gradients for all its arguments, some times in a row."""

    def loss(*arguments: jax.Array) -> jax.Array:
        return jnp.sum(attend(*arguments).astype(jnp.float32))

    function: Callable[..., object] = attend
    if with_gradients:
        function = jax.grad(loss, argnums=tuple(range(len(arguments))))
    program = jax.jit(function)
    return lambda: [program(*arguments) for _ in range(NUM_CALLS)]


# --- A sweep, a search --------------------------------------------------------------------------


def large_sweep_rows(sizes: Sizes, repeats: int) -> Iterator[Row]:
    """All points of a sweep of a large model, with random weights."""
    lm = clm.LanguageModel(
        clm.Transformer(sizes.model_config), random_params(sizes.model_config)
    )
    num_parameters = sum(x.size for x in jax.tree.leaves(lm.params))
    durations = np.ones((sizes.num_points, sizes.num_tokens), np.float32)
    changed_tokens = slice(sizes.num_tokens // 4, sizes.num_tokens // 2)
    durations[:, changed_tokens] = np.linspace(0.1, 1.0, sizes.num_points)[:, None]
    tokens = np.arange(sizes.num_tokens)
    run_sweep = functools.partial(
        sweep.probabilities,
        lm,
        [[i] for i in range(10)],
        tokens=tokens,
        durations=durations,
    )
    yield timing.median_row(
        f"seconds of {sizes.num_points} points, {sizes.num_tokens} tokens,"
        f" {num_parameters / 1e9:.2g} G numbers",
        timing.time_in_turns({"ours": run_sweep}, repeats)["ours"],
        target=Target(maximum=0.5),
    )


def random_params(config: clm.TransformerConfig) -> Params:
    """Parameters in bfloat16, made where they stay."""
    init = clm.Transformer(config).init
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), jnp.zeros(1, jnp.int32)))[
        "params"
    ]

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def search_rows(sizes: Sizes, repeats: int) -> Iterator[Row]:
    """The nearest of many codes to each of many vectors, against the matrix product."""
    num_codes, width = sizes.codebook_shape
    keys = jax.random.split(jax.random.key(0))
    codes = jax.random.normal(keys[0], (num_codes, width))
    x = jax.random.normal(keys[1], (sizes.batch_size, width))
    callables: dict[str, Callable[[], Any]] = {
        "ours": functools.partial(
            quantize.nearest, x, codes, norms=quantize.squared_norms(codes)
        ),
        "product": functools.partial(search_cases.dense_scores, x, codes),
    }
    seconds = timing.time_in_turns(callables, repeats)
    yield timing.speedup_row(
        f"{num_codes} x {width}, batch {sizes.batch_size}: share of the matrix product's speed",
        seconds["ours"],
        seconds["product"],
        0.7,
    )
