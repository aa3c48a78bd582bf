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
MAX_CASE_SECONDS = (
    100  # after which no more cases are begun, so that times are measured too
)
ARRAY_NAMES = ("y", "q", "k", "v", "durations")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the arrays are."""

    batch: int = 2
    tokens: int = 384  # no power of two, and several blocks of every form
    heads: int = 4
    width: int = 64
    long: int = 8192  # tokens, where times are measured
    rounds: int = 3


TINY_SIZES = Sizes(1, 24, 2, 16, 32, 1)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """What attention is asked for."""

    grouped: bool = False
    zeros: bool = False
    softcap: float | None = None
    window: float | None = None  # as a share of all tokens


CASES: Mapping[str, AttentionCase] = {
    "plain": AttentionCase(),
    "grouped, zeros": AttentionCase(grouped=True, zeros=True),
    "capped": AttentionCase(softcap=2.0),
    "window": AttentionCase(window=0.2),
    "grouped, zeros, capped, window": AttentionCase(True, True, 2.0, 0.2),
}


def attention_section(tiny: bool) -> Iterator[Check]:
    """All rows."""
    size, deadline = (
        (TINY_SIZES if tiny else Sizes()),
        time.monotonic() + MAX_CASE_SECONDS,
    )
    pairs = list(itertools.product(CASES, TOLERANCES))
    for name, dtype in pairs[-2:-1] if tiny else pairs:
        if time.monotonic() > deadline:
            yield Check(
                f"{name}, {dtype}", isolated_checks.NOT_RUN, note="no time was left"
            )
            continue
        yield from check_case(name, CASES[name], dtype, size, forms_of_case(name))
    for form in ("pallas", "cudnn", "blocked"):
        for gradients in (False, True):
            what = f"{form}, {size.long} tokens, " + (
                "backward too" if gradients else "forward"
            )
            yield from isolated_checks.run_guarded(
                what, functools.partial(time_form, what, form, gradients, size)
            )


# --- Right numbers ------------------------------------------------------------------------------


def check_case(
    name: str,
    case: AttentionCase,
    dtype: str,
    size: Sizes,
    forms: Mapping[str, Callable[..., jax.Array]],
) -> Iterator[Check]:
    """A row of each form, and one of how far they are from each other."""
    arrays = random_inputs(case, dtype, size)
    options: dict[str, Any] = {
        "softcap": case.softcap,
        "window": window_in_tokens(case, size),
    }
    exact = float64_reference(*(np.asarray(x, np.float64) for x in arrays), **options)
    tolerance, results = Target(maximum=TOLERANCES[dtype]), {}

    def compared(what: str, attend: Callable[..., jax.Array]) -> Iterator[Check]:
        if reason := why_unsupported(attend, arrays, options):
            yield Check(what, isolated_checks.UNSUPPORTED, note=reason)
            return
        results[what] = [
            np.asarray(x, np.float64)
            for x in value_and_gradients(attend, options)(*arrays)
        ]
        array_errors = relative_errors(results[what], exact)
        note = ", ".join(
            f"{n} {e:.1e}" for n, e in zip(ARRAY_NAMES, array_errors, strict=True)
        )
        yield isolated_checks.check_against_target(
            what, _max_or_nan(array_errors), tolerance, note=note
        )

    for form, attend in forms.items():
        what = f"{form}: {name}, {dtype}"
        yield from isolated_checks.run_guarded(
            what, functools.partial(compared, what, attend)
        )
    pairs = {
        pair: _max_or_nan(relative_errors(*(results[form] for form in pair)))
        for pair in itertools.combinations(results, 2)
    }
    if pairs:
        worst = max(pairs, key=lambda pair: np.nan_to_num(pairs[pair], nan=math.inf))
        note = " and ".join(form.split(":")[0] for form in worst)
        twice = Target(maximum=2 * TOLERANCES[dtype])
        yield isolated_checks.check_against_target(
            f"furthest from each other: {name}, {dtype}", pairs[worst], twice, note=note
        )


def random_inputs(
    case: AttentionCase, dtype: str, size: Sizes
) -> tuple[jax.Array, ...]:
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


def window_in_tokens(case: AttentionCase, size: Sizes) -> float | None:
    """In tokens."""
    return None if case.window is None else case.window * size.tokens


def float64_reference(
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
    visible = np.tri(q.shape[1], dtype=bool)[None]
    if window is not None:
        ends = np.cumsum(d, axis=1)
        visible = visible & (ends[:, :, None] - ends[:, None, :] < window)
    e = np.where(visible[:, None], np.exp(s - s.max(axis=-1, keepdims=True)), 0.0)
    e /= np.sum(d[:, None, None, :] * e, axis=-1, keepdims=True)
    p = d[:, None, None, :] * e
    y = np.einsum("bnts,bsnh->btnh", p, v)
    g = (
        np.einsum("btnh,bsnh->bnts", dy, v)
        - np.einsum("btnh,btnh->bnt", dy, y)[..., None]
    )
    ds = scale * p * g * (1.0 if softcap is None else 1.0 - np.square(s / softcap))

    def sum_groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(axis=3)

    dk, dv = (np.einsum("bnts,btnh->bsnh", *x) for x in ((ds, q), (p, dy)))
    dd = np.sum(e * g, axis=(1, 2))
    return [y, np.einsum("bnts,bsnh->btnh", ds, k), sum_groups(dk), sum_groups(dv), dd]


def value_and_gradients(
    attend: Callable[..., jax.Array], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """The compiled function of q, k, v, d and dy that gives y and all gradients."""

    @jax.jit
    def both(q, k, v, d, dy):
        with jax.default_matmul_precision("highest"):
            y, pull = jax.vjp(functools.partial(attend, **options), q, k, v, d)
            return y, *pull(dy.astype(y.dtype))

    return both


def relative_errors(values: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    """The largest difference of each array, as a share of the largest number in `exact`'s."""
    return [
        float(np.abs(x - reference).max() / np.abs(reference).max())
        for x, reference in zip(values, exact, strict=True)
    ]


def _max_or_nan(values: list[float]) -> float:
    """With a NaN if there is one, which `max` may pass over."""
    return float(np.max(values))


# --- The forms ----------------------------------------------------------------------------------


def attend_by_key_channels(q, k, v, d, *, softcap, window) -> jax.Array:
    """Plain causal attention, the durations carried by channels of the keys."""
    if softcap is not None or window is not None:
        raise InputError(
            "it is not possible: channels of the keys know no soft-capping, no window"
        )
    scale, width = (
        1.0 / math.sqrt(q.shape[-1]),
        key_channels.round_up(q.shape[-1], key_channels.NUM_WEIGHT_CHANNELS, 8),
    )
    q, k = key_channels.append_log_weights(q, k, d, scale=scale, padded_width=width)
    padded_values = jnp.pad(v, [(0, 0)] * 3 + [(0, width - v.shape[-1])])
    y = jax.nn.dot_product_attention(
        q, k, padded_values, scale=scale, is_causal=True, implementation="xla"
    )
    return y[..., : v.shape[-1]]


def attend_by_value_channels(q, k, v, d, *, softcap, window) -> jax.Array:
    """Plain causal attention, the durations carried by a channel of the values."""
    if window is not None:
        raise InputError("it is not possible: channels of the values know no window")
    scale, width = (
        1.0 / math.sqrt(q.shape[-1]),
        key_channels.round_up(q.shape[-1], 1, 8),
    )
    pad = [(0, 0)] * 3 + [(0, width - q.shape[-1])]
    padded_queries_and_keys, v = (
        (jnp.pad(q, pad), jnp.pad(k, pad)),
        key_channels.scale_and_append_weights(v, d, padded_width=width),
    )
    y = attention.attend(
        *padded_queries_and_keys,
        v,
        scale=scale,
        softcap=softcap,
        implementation="dense",
    )
    return key_channels.divide_by_weight_sum(y, q.shape[-1]).astype(q.dtype)


def attend_splash(*arrays, **options) -> jax.Array:
    """JAX's kernel for TPUs."""
    if jax.default_backend() != "tpu":
        raise InputError("it is not possible: the kernel is for TPUs")
    return attention.attend(*arrays, implementation="splash", **options)


FORMS: Mapping[str, Callable[..., jax.Array]] = {
    **{
        form: functools.partial(attention.attend, implementation=form)
        for form in ("dense", "blocked", "cudnn", "pallas", "auto")
    },
    "splash": attend_splash,
    "channels of keys": attend_by_key_channels,
    "channels of values": attend_by_value_channels,
}


def forms_of_case(case: str) -> dict[str, Callable[..., jax.Array]]:
    """Those that a case is for: "auto", which takes one of the others, is tried once."""
    return {
        name: f
        for name, f in FORMS.items()
        if name != "auto" or case == "grouped, zeros"
    }


def why_unsupported(
    attend: Callable[..., jax.Array], arrays: Any, options: Mapping[str, Any]
) -> str:
    """Why a form does not take these arguments; "" if it does."""
    try:
        jax.eval_shape(functools.partial(attend, **options), *arrays[:4])
    except InputError as error:
        if "is not possible: " not in str(error):
            raise
        return str(error).partition("is not possible: ")[2].partition("; take ")[0]
    return ""


# --- Times --------------------------------------------------------------------------------------


def time_form(what: str, form: str, gradients: bool, size: Sizes) -> Iterator[Check]:
    """Milliseconds of one call, in bfloat16."""
    arrays = gpu_cases.random_inputs(
        gpu_cases.Sizes(num_heads=16, head_dim=128), size.long
    )
    if size is TINY_SIZES:
        arrays = tuple(x[..., :2, :16] if x.ndim == 4 else x for x in arrays)
    attend = FORMS[form]
    if reason := why_unsupported(attend, arrays, {"softcap": None, "window": None}):
        yield Check(what, isolated_checks.UNSUPPORTED, note=reason)
        return
    run = gpu_cases.repeated_calls(attend, arrays, gradients)
    seconds = timing.time_in_turns({"ours": run}, size.rounds)["ours"]
    value = 1e3 * float(np.median(seconds)) / gpu_cases.NUM_CALLS
    note = "16 heads of 128, bfloat16"
    yield Check(
        what,
        isolated_checks.MEASURED,
        value,
        "ms",
        note="" if size is TINY_SIZES else note,
    )
