"""Checks of attention on this machine: every form against float64 on the host, and their times."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import attention
from continuous_lm.attention import key_channels
from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import gpu_cases, timing
from continuous_lm.experiments.benchmarks.timing import Target
from continuous_lm.experiments.gpu import isolated_checks
from continuous_lm.experiments.gpu.isolated_checks import Check

# Of the largest number of y, or of a gradient. In float32 products are made at full precision.
TOLERANCES: Mapping[str, float] = {"float32": 2e-5, "bfloat16": 2e-2}
SECONDS = 100  # after which no more cases are begun, so that times are measured too
NAMES = ("y", "q", "k", "v", "durations")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the arrays are."""

    batch: int = 2
    tokens: int = 384  # no power of two, and several blocks of every form
    heads: int = 4
    width: int = 64
    long: int = 8192  # tokens, where times are measured
    rounds: int = 3


TINY = Size(1, 24, 2, 16, 32, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is asked for."""

    grouped: bool = False
    zeros: bool = False
    softcap: float | None = None
    window: float | None = None  # as a share of all tokens


CASES: Mapping[str, Case] = {
    "plain": Case(),
    "grouped, zeros": Case(grouped=True, zeros=True),
    "capped": Case(softcap=2.0),
    "window": Case(window=0.2),
    "grouped, zeros, capped, window": Case(True, True, 2.0, 0.2),
}


def section(tiny: bool) -> Iterator[Check]:
    """All rows."""
    size, until = (TINY if tiny else Size()), time.monotonic() + SECONDS
    pairs = list(itertools.product(CASES, TOLERANCES))
    for name, dtype in pairs[-2:-1] if tiny else pairs:
        if time.monotonic() > until:
            yield Check(f"{name}, {dtype}", isolated_checks.NOT_RUN, note="no time was left")
            continue
        yield from one_case(name, CASES[name], dtype, size, forms(name))
    for form in ("pallas", "cudnn", "blocked"):
        for gradients in (False, True):
            what = f"{form}, {size.long} tokens, " + ("backward too" if gradients else "forward")
            yield from isolated_checks.guarded(
                what, functools.partial(timed, what, form, gradients, size)
            )


# --- Right numbers ------------------------------------------------------------------------------


def one_case(
    name: str, case: Case, dtype: str, size: Size, forms: Mapping[str, Callable[..., jax.Array]]
) -> Iterator[Check]:
    """A row of each form, and one of how far they are from each other."""
    arrays = draw(case, dtype, size)
    options: dict[str, Any] = {"softcap": case.softcap, "window": window(case, size)}
    exact = reference(*(np.asarray(x, np.float64) for x in arrays), **options)
    most, made = Target(most=TOLERANCES[dtype]), {}

    def compared(what: str, attend: Callable[..., jax.Array]) -> Iterator[Check]:
        if reason := refusal(attend, arrays, options):
            yield Check(what, isolated_checks.UNSUPPORTED, note=reason)
            return
        found = [np.asarray(x, np.float64) for x in program(attend, options)(*arrays)]
        made[what] = found
        apart = errors(found, exact)
        note = ", ".join(f"{n} {e:.1e}" for n, e in zip(NAMES, apart, strict=True))
        yield isolated_checks.judged(what, _largest(apart), most, note=note)

    for form, attend in forms.items():
        what = f"{form}: {name}, {dtype}"
        yield from isolated_checks.guarded(what, functools.partial(compared, what, attend))
    pairs = {
        pair: _largest(errors(*(made[form] for form in pair)))
        for pair in itertools.combinations(made, 2)
    }
    if pairs:
        worst = max(pairs, key=lambda pair: np.nan_to_num(pairs[pair], nan=math.inf))
        note = " and ".join(form.split(":")[0] for form in worst)
        twice = Target(most=2 * TOLERANCES[dtype])
        yield isolated_checks.judged(
            f"furthest from each other: {name}, {dtype}", pairs[worst], twice, note=note
        )


def draw(case: Case, dtype: str, size: Size) -> tuple[jax.Array, ...]:
    """q, k, v in the dtype, durations in float32, and a cotangent for y."""
    rng = np.random.default_rng(0)
    kv_heads = size.heads // 2 if case.grouped else size.heads
    q, dy = rng.normal(size=(2, size.batch, size.tokens, size.heads, size.width))
    k, v = rng.normal(size=(2, size.batch, size.tokens, kv_heads, size.width))
    d = rng.uniform(0.1, 2.0, (size.batch, size.tokens))
    if case.zeros:  # not the first: a query must see something
        d[:, 1::5] = 0.0
    q, k, v, dy = (jnp.asarray(x, dtype) for x in (q, k, v, dy))
    return q, k, v, jnp.asarray(d, jnp.float32), dy


def window(case: Case, size: Size) -> float | None:
    """In tokens."""
    return None if case.window is None else case.window * size.tokens


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    d: np.ndarray,
    dy: np.ndarray,
    *,
    softcap: float | None,
    window: float | None,
) -> list[np.ndarray]:
    """y and the gradients of sum(dy y) for q, k, v and d, by their formulas, in NumPy."""
    scale, groups = 1.0 / math.sqrt(q.shape[-1]), q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
    raw = scale * np.einsum("btnh,bsnh->bnts", q, k)
    s = raw if softcap is None else softcap * np.tanh(raw / softcap)
    seen = np.tri(q.shape[1], dtype=bool)[None]
    if window is not None:
        ends = np.cumsum(d, axis=1)
        seen = seen & (ends[:, :, None] - ends[:, None, :] < window)
    e = np.where(seen[:, None], np.exp(s - s.max(axis=-1, keepdims=True)), 0.0)
    e /= np.sum(d[:, None, None, :] * e, axis=-1, keepdims=True)
    p = d[:, None, None, :] * e
    y = np.einsum("bnts,bsnh->btnh", p, v)
    g = np.einsum("btnh,bsnh->bnts", dy, v) - np.einsum("btnh,btnh->bnt", dy, y)[..., None]
    ds = scale * p * g * (1.0 if softcap is None else 1.0 - np.square(s / softcap))

    def together(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(axis=3)

    dk, dv = (np.einsum("bnts,btnh->bsnh", *x) for x in ((ds, q), (p, dy)))
    dd = np.sum(e * g, axis=(1, 2))
    return [y, np.einsum("bnts,bsnh->btnh", ds, k), together(dk), together(dv), dd]


def program(attend: Callable[..., jax.Array], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The compiled function of q, k, v, d and dy that gives y and all gradients."""

    @jax.jit
    def both(q, k, v, d, dy):
        with jax.default_matmul_precision("highest"):
            y, pull = jax.vjp(functools.partial(attend, **options), q, k, v, d)
            return y, *pull(dy.astype(y.dtype))

    return both


def errors(found: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    """The largest difference of each array, as a share of the largest number in `exact`'s."""
    return [
        float(np.abs(x - reference).max() / np.abs(reference).max())
        for x, reference in zip(found, exact, strict=True)
    ]


def _largest(values: list[float]) -> float:
    """With a NaN if there is one, which `max` may pass over."""
    return float(np.max(values))


# --- The forms ----------------------------------------------------------------------------------


def in_keys(q, k, v, d, *, softcap, window) -> jax.Array:
    """Plain causal attention, the durations carried by channels of the keys."""
    if softcap is not None or window is not None:
        raise InputError("it is not possible: channels of the keys know no soft-capping, no window")
    scale, width = (
        1.0 / math.sqrt(q.shape[-1]),
        key_channels.room(q.shape[-1], key_channels.PARTS, 8),
    )
    q, k = key_channels.in_keys(q, k, d, scale=scale, width=width)
    wide = jnp.pad(v, [(0, 0)] * 3 + [(0, width - v.shape[-1])])
    y = jax.nn.dot_product_attention(q, k, wide, scale=scale, is_causal=True, implementation="xla")
    return y[..., : v.shape[-1]]


def in_values(q, k, v, d, *, softcap, window) -> jax.Array:
    """Plain causal attention, the durations carried by a channel of the values."""
    if window is not None:
        raise InputError("it is not possible: channels of the values know no window")
    scale, width = 1.0 / math.sqrt(q.shape[-1]), key_channels.room(q.shape[-1], 1, 8)
    pad = [(0, 0)] * 3 + [(0, width - q.shape[-1])]
    wide, v = (jnp.pad(q, pad), jnp.pad(k, pad)), key_channels.in_values(v, d, width=width)
    y = attention.attend(*wide, v, scale=scale, softcap=softcap, implementation="dense")
    return key_channels.divided(y, q.shape[-1]).astype(q.dtype)


def splash(*arrays, **options) -> jax.Array:
    """JAX's kernel for TPUs."""
    if jax.default_backend() != "tpu":
        raise InputError("it is not possible: the kernel is for TPUs")
    return attention.attend(*arrays, implementation="splash", **options)


FORMS: Mapping[str, Callable[..., jax.Array]] = {
    **{
        form: functools.partial(attention.attend, implementation=form)
        for form in ("dense", "blocked", "cudnn", "pallas", "auto")
    },
    "splash": splash,
    "channels of keys": in_keys,
    "channels of values": in_values,
}


def forms(case: str) -> dict[str, Callable[..., jax.Array]]:
    """Those that a case is for: "auto", which takes one of the others, is tried once."""
    return {name: f for name, f in FORMS.items() if name != "auto" or case == "grouped, zeros"}


def refusal(attend: Callable[..., jax.Array], arrays: Any, options: Mapping[str, Any]) -> str:
    """Why a form does not take these arguments; "" if it does."""
    try:
        jax.eval_shape(functools.partial(attend, **options), *arrays[:4])
    except InputError as error:
        if "is not possible: " not in str(error):
            raise
        return str(error).partition("is not possible: ")[2].partition("; take ")[0]
    return ""


# --- Times --------------------------------------------------------------------------------------


def timed(what: str, form: str, gradients: bool, size: Size) -> Iterator[Check]:
    """Milliseconds of one call, in bfloat16."""
    arrays = gpu_cases.drawn(gpu_cases.Setting(heads=16, width=128), size.long)
    if size is TINY:
        arrays = tuple(x[..., :2, :16] if x.ndim == 4 else x for x in arrays)
    attend = FORMS[form]
    if reason := refusal(attend, arrays, {"softcap": None, "window": None}):
        yield Check(what, isolated_checks.UNSUPPORTED, note=reason)
        return
    run = gpu_cases.calls(attend, arrays, gradients)
    taken = timing.in_turns({"ours": run}, size.rounds)["ours"]
    value = 1e3 * float(np.median(taken)) / gpu_cases.CALLS
    note = "16 heads of 128, bfloat16"
    yield Check(what, isolated_checks.MEASURED, value, "ms", note="" if size is TINY else note)
