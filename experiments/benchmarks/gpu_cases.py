"""The benchmark's rows for a GPU: attention in bfloat16, an 8-billion-parameter sweep, a search."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import continuous_lm as clm
from continuous_lm import quantize as q
from continuous_lm.analysis import sweep
from continuous_lm.experiments.benchmarks import baselines, search_cases, timing
from continuous_lm.experiments.benchmarks.timing import Row, Target
from continuous_lm.rotary import Rope

CALLS = 10  # in a row, so that what it takes to start them does not count

LLAMA = clm.TransformerConfig(  # Llama 3, 8 billion
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
class Setting:
    """How large everything is."""

    lengths: tuple[int, ...] = (8192, 32768)
    heads: int = 16
    width: int = 128
    points: int = 100
    tokens: int = 40
    codes: tuple[int, int] = (131072, 4096)
    batch: int = 4096
    model: clm.TransformerConfig = LLAMA


QUICK = Setting((256,), 2, 64, 5, 8, (256, 64), 32, dataclasses.replace(LLAMA, num_layers=2))


def case(quick: bool, repeats: int) -> Iterator[Row]:
    """All rows."""
    if jax.default_backend() != "gpu":
        yield Row("attention, a sweep and a search on a GPU", note="no GPU: not measured")
        return
    setting = QUICK if quick else Setting()
    for n in setting.lengths:
        yield from attention(setting, n, repeats)
    yield from large_sweep(setting, repeats)
    yield from search(setting, repeats)


# --- Attention ----------------------------------------------------------------------------------


def attention(
    setting: Setting, n: int, repeats: int, plain: str | None = "cudnn", *, peer: bool = True
) -> Iterator[Row]:
    """Continuous attention against the plain causal one and, with its `peer`, flex_attention."""
    *qkv, durations = drawn(setting, n)
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=plain)
    absent = baselines.without_cuda() if peer else "left out"
    for gradients, most in {False: 1.15, True: 1.25}.items():
        ways: dict[str, Callable[[], Any]] = {
            "ours": calls(clm.attention.attend, (*qkv, durations), gradients),
            "plain": calls(causal, qkv, gradients),
        }
        if not absent:
            arrays = [np.asarray(x.astype(jnp.float32)) for x in (*qkv, durations)]
            ways["flex"] = baselines.flex_attention(*arrays, gradients=gradients, calls=CALLS)
        seconds = timing.in_turns(ways, repeats)
        what = f"{n} tokens, bf16, " + ("forward and backward" if gradients else "forward")
        yield timing.times_as_much(
            f"{what}: time over that of plain causal attention",
            seconds["ours"],
            seconds["plain"],
            most,
            note=f"{CALLS} calls",
        )
        if absent:
            yield Row(f"{what}: times as fast as flex_attention", note=absent)
        else:
            yield timing.times_as_fast(
                f"{what}: times as fast as flex_attention", seconds["ours"], seconds["flex"], 1.0
            )


def drawn(setting: Setting, n: int) -> tuple[jax.Array, ...]:
    """Queries, keys and values in bfloat16, and durations, of n tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, n, setting.heads, setting.width)
    qkv = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
    return *qkv, jax.random.uniform(keys[3], (1, n), minval=0.1, maxval=2.0)


def calls(attend: Callable[..., jax.Array], arguments: Any, gradients: bool) -> Callable[[], Any]:
    """Attention, or the gradients for all its arguments, some times in a row."""

    def loss(*arguments: jax.Array) -> jax.Array:
        return jnp.sum(attend(*arguments).astype(jnp.float32))

    function = jax.grad(loss, argnums=tuple(range(len(arguments)))) if gradients else attend
    program = jax.jit(function)
    return lambda: [program(*arguments) for _ in range(CALLS)]


# --- A sweep, a search --------------------------------------------------------------------------


def large_sweep(setting: Setting, repeats: int) -> Iterator[Row]:
    """All points of a sweep of a large model, with random weights."""
    lm = clm.LanguageModel(setting.model, random_params(setting.model))
    size = sum(x.size for x in jax.tree.leaves(lm.params))
    durations = np.ones((setting.points, setting.tokens), np.float32)
    changed = slice(setting.tokens // 4, setting.tokens // 2)
    durations[:, changed] = np.linspace(0.1, 1.0, setting.points)[:, None]
    tokens = np.arange(setting.tokens)
    run = functools.partial(
        sweep.probabilities, lm, [[i] for i in range(10)], tokens=tokens, durations=durations
    )
    yield timing.figures(
        f"seconds of {setting.points} points, {setting.tokens} tokens, {size / 1e9:.2g} G numbers",
        timing.in_turns({"ours": run}, repeats)["ours"],
        target=Target(most=0.5),
    )


def random_params(config: clm.TransformerConfig) -> Any:
    """Parameters in bfloat16, made where they stay."""
    init = clm.Transformer(config).init
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), jnp.zeros(1, jnp.int32)))["params"]

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, made)


def search(setting: Setting, repeats: int) -> Iterator[Row]:
    """The nearest of many codes to each of many vectors, against the matrix product."""
    num_codes, width = setting.codes
    keys = jax.random.split(jax.random.key(0))
    codes = jax.random.normal(keys[0], (num_codes, width))
    x = jax.random.normal(keys[1], (setting.batch, width))
    ways: dict[str, Callable[[], Any]] = {
        "ours": functools.partial(q.nearest, x, codes, norms=q.squared_norms(codes)),
        "product": functools.partial(search_cases.product, x, codes),
    }
    seconds = timing.in_turns(ways, repeats)
    yield timing.times_as_fast(
        f"{num_codes} x {width}, batch {setting.batch}: share of the matrix product's speed",
        seconds["ours"],
        seconds["product"],
        0.7,
    )
