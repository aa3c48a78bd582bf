"""Checks of attention on this machine: every form against float64 on the host, and their times."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from continuous_lm import attention
from continuous_lm.attention import (
    AttentionProblem,
    cudnn,
    key_channels,
    pallas,
    splash,
)
from continuous_lm.experiments.benchmarks import gpu_cases, timing
from continuous_lm.experiments.benchmarks.timing import Target
from continuous_lm.experiments.gpu import isolated_checks
from continuous_lm.experiments.gpu.isolated_checks import Check

# Of the largest number of y, or of a gradient. In float32 products are made at full precision.
TOLERANCES: Mapping[str, float] = {"float32": 2e-5, "bfloat16": 2e-2}
MAX_CASE_SECONDS = 100  # after which no more cases are begun: times are measured too
ARRAY_NAMES = ("y", "q", "k", "v", "durations")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the arrays."""

    batch: int = 2
    tokens: int = 384  # no power of two, and several blocks of every form
    heads: int = 4
    width: int = 64
    timed_tokens: int = 8192
    rounds: int = 3


TINY_SIZES = Sizes(1, 24, 2, 16, 32, 1)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Arguments of attention in one case."""

    grouped: bool = False
    zeros: bool = False
    softcap: float | None = None
    window_share: float | None = None  # of all tokens

    def options(self, sizes: Sizes) -> "Options":
        if self.window_share is None:
            return Options(self.softcap, None)
        return Options(self.softcap, self.window_share * sizes.tokens)


class Options(NamedTuple):
    """Arguments of a form of attention besides its arrays."""

    softcap: float | None = None
    window: float | None = None  # in tokens


CASES: Mapping[str, AttentionCase] = {
    "plain": AttentionCase(),
    "grouped, zeros": AttentionCase(grouped=True, zeros=True),
    "capped": AttentionCase(softcap=2.0),
    "window": AttentionCase(window_share=0.2),
    "grouped, zeros, capped, window": AttentionCase(True, True, 2.0, 0.2),
}


# --- The forms ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to compute attention.

    Attributes:
      attend: from q, k, v, durations and options to y.
      why_unsupported: why it does not take a problem; None if it does.
    """

    attend: Callable[..., jax.Array]
    why_unsupported: Callable[[AttentionProblem], str | None] = lambda problem: None


def attend_by(
    implementation: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    durations: jax.Array,
    options: Options,
) -> jax.Array:
    """One of the library's implementations."""
    return attention.attend(
        q,
        k,
        v,
        durations,
        softcap=options.softcap,
        window=options.window,
        implementation=implementation,
    )


def attend_by_key_channels(
    q: jax.Array, k: jax.Array, v: jax.Array, durations: jax.Array, options: Options
) -> jax.Array:
    """Plain causal attention, the durations carried by channels of the keys."""
    del options
    head_width = q.shape[-1]
    scale = 1.0 / math.sqrt(head_width)
    width = key_channels.round_up(head_width, key_channels.NUM_WEIGHT_CHANNELS, 8)
    q, k = key_channels.append_log_weights(
        q, k, durations, scale=scale, padded_width=width
    )
    padded_values = jnp.pad(v, [(0, 0)] * 3 + [(0, width - head_width)])
    y = jax.nn.dot_product_attention(
        q, k, padded_values, scale=scale, is_causal=True, implementation="xla"
    )
    return y[..., :head_width]


def attend_by_value_channels(
    q: jax.Array, k: jax.Array, v: jax.Array, durations: jax.Array, options: Options
) -> jax.Array:
    """Plain causal attention, the durations carried by a channel of the values."""
    head_width = q.shape[-1]
    width = key_channels.round_up(head_width, 1, 8)
    padding = [(0, 0)] * 3 + [(0, width - head_width)]
    y = attention.attend(
        jnp.pad(q, padding),
        jnp.pad(k, padding),
        key_channels.scale_and_append_weights(v, durations, padded_width=width),
        scale=1.0 / math.sqrt(head_width),
        softcap=options.softcap,
        implementation="dense",
    )
    return key_channels.divide_by_weight_sum(y, head_width).astype(q.dtype)


def _why_no_key_channels(problem: AttentionProblem) -> str | None:
    if problem.softcap is None and problem.window is None:
        return None
    return "channels of the keys know no soft-capping, no window"


def _why_no_value_channels(problem: AttentionProblem) -> str | None:
    return None if problem.window is None else "channels of the values know no window"


def _why_no_splash(problem: AttentionProblem) -> str | None:
    if jax.default_backend() != "tpu":
        return "the kernel is for TPUs"
    return splash.why_unsupported(problem)


FORMS: Mapping[str, Form] = {
    "dense": Form(functools.partial(attend_by, "dense")),
    "blocked": Form(functools.partial(attend_by, "blocked")),
    "cudnn": Form(functools.partial(attend_by, "cudnn"), cudnn.why_unsupported),
    "pallas": Form(functools.partial(attend_by, "pallas"), pallas.why_unsupported),
    "auto": Form(functools.partial(attend_by, "auto")),
    "splash": Form(functools.partial(attend_by, "splash"), _why_no_splash),
    "channels of keys": Form(attend_by_key_channels, _why_no_key_channels),
    "channels of values": Form(attend_by_value_channels, _why_no_value_channels),
}


def forms_of_case(case_name: str) -> dict[str, Form]:
    """Return the forms to check in a case; "auto", which selects another form, is checked once."""
    forms = dict(FORMS)
    if case_name != "grouped, zeros":
        del forms["auto"]
    return forms


# --- The section --------------------------------------------------------------------------------


def attention_section(tiny: bool) -> Iterator[Check]:
    """Every form in every case and dtype against float64, then their times."""
    sizes = TINY_SIZES if tiny else Sizes()
    deadline = time.monotonic() + MAX_CASE_SECONDS
    cases_and_dtypes = list(itertools.product(CASES, TOLERANCES))
    if tiny:
        cases_and_dtypes = cases_and_dtypes[-2:-1]
    for name, dtype in cases_and_dtypes:
        if time.monotonic() > deadline:
            yield Check(
                f"{name}, {dtype}", isolated_checks.NOT_RUN, note="no time was left"
            )
            continue
        yield from check_case(name, CASES[name], dtype, sizes, forms_of_case(name))
    for form_name in ("pallas", "cudnn", "blocked"):
        for with_gradients in (False, True):
            direction = "backward too" if with_gradients else "forward"
            label = f"{form_name}, {sizes.timed_tokens} tokens, {direction}"
            yield from isolated_checks.run_guarded(
                label,
                functools.partial(
                    time_form, label, FORMS[form_name], with_gradients, sizes
                ),
            )


# --- Right numbers ------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Arrays of a case."""

    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, T, K, H]
    v: jax.Array  # [B, T, K, H]
    durations: jax.Array  # [B, T], float32
    cotangent: jax.Array  # [B, T, N, H], of y


def check_case(
    name: str,
    case: AttentionCase,
    dtype: str,
    sizes: Sizes,
    forms: Mapping[str, Form],
) -> Iterator[Check]:
    """A row of each form, and one of how far they are from each other."""
    inputs = random_inputs(case, dtype, sizes)
    options = case.options(sizes)
    wide_inputs = [np.asarray(array, np.float64) for array in inputs]
    exact = float64_reference(wide_inputs, options)
    results: dict[str, list[np.ndarray]] = {}

    def compare(label: str, form_name: str) -> Iterator[Check]:
        form = forms[form_name]
        if reason := why_unsupported(form, inputs, options):
            yield Check(label, isolated_checks.UNSUPPORTED, note=reason)
            return
        arrays = value_and_gradients(form, options)(*inputs)
        results[form_name] = [np.asarray(array, np.float64) for array in arrays]
        errors = relative_errors(results[form_name], exact)
        note = ", ".join(
            f"{array_name} {error:.1e}"
            for array_name, error in zip(ARRAY_NAMES, errors, strict=True)
        )
        target = Target(maximum=TOLERANCES[dtype])
        yield isolated_checks.check_against_target(
            label, _max_or_nan(errors), target, note=note
        )

    for form_name in forms:
        label = f"{form_name}: {name}, {dtype}"
        yield from isolated_checks.run_guarded(
            label, functools.partial(compare, label, form_name)
        )
    if len(results) > 1:
        yield check_agreement(f"{name}, {dtype}", results, 2 * TOLERANCES[dtype])


def check_agreement(
    case_label: str, results: Mapping[str, list[np.ndarray]], tolerance: float
) -> Check:
    """The row of the two forms whose results are furthest from each other."""
    error_of_pair = {
        (first, second): _max_or_nan(relative_errors(results[first], results[second]))
        for first, second in itertools.combinations(results, 2)
    }
    furthest = max(
        error_of_pair,
        key=lambda pair: np.nan_to_num(error_of_pair[pair], nan=math.inf),
    )
    return isolated_checks.check_against_target(
        f"furthest from each other: {case_label}",
        error_of_pair[furthest],
        Target(maximum=tolerance),
        note=" and ".join(furthest),
    )


def random_inputs(case: AttentionCase, dtype: str, sizes: Sizes) -> Inputs:
    """q, k, v in the dtype, durations in float32, and a cotangent for y."""
    generator = np.random.default_rng(0)
    num_kv_heads = sizes.heads // 2 if case.grouped else sizes.heads
    query_shape = (sizes.batch, sizes.tokens, sizes.heads, sizes.width)
    key_shape = (sizes.batch, sizes.tokens, num_kv_heads, sizes.width)
    q, cotangent = generator.normal(size=(2, *query_shape))
    k, v = generator.normal(size=(2, *key_shape))
    durations = generator.uniform(0.1, 2.0, (sizes.batch, sizes.tokens))
    if case.zeros:  # not the first: a query must see something
        durations[:, 1::5] = 0.0
    return Inputs(
        q=jnp.asarray(q, dtype),
        k=jnp.asarray(k, dtype),
        v=jnp.asarray(v, dtype),
        durations=jnp.asarray(durations, jnp.float32),
        cotangent=jnp.asarray(cotangent, dtype),
    )


def float64_reference(
    inputs: Sequence[np.ndarray], options: Options
) -> list[np.ndarray]:
    """y and the gradients of sum(cotangent y) for q, k, v and durations, by their formulas.

    Args:
      inputs: those of `Inputs`, in float64.
      options: soft-cap and window.
    """
    q, k, v, durations, cotangent = inputs
    softcap = options.softcap
    scale = 1.0 / math.sqrt(q.shape[-1])
    group_size = q.shape[2] // k.shape[2]
    k = np.repeat(k, group_size, axis=2)
    v = np.repeat(v, group_size, axis=2)
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    slope = 1.0
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
        slope = 1.0 - np.square(scores / softcap)
    visible = _visible_keys(durations, options.window)[:, None]
    peaks = scores.max(axis=-1, keepdims=True)
    densities = np.where(visible, np.exp(scores - peaks), 0.0)  # p / durations
    key_weights = durations[:, None, None, :]
    densities /= np.sum(key_weights * densities, axis=-1, keepdims=True)
    p = key_weights * densities
    y = np.einsum("bnts,bsnh->btnh", p, v)
    value_products = np.einsum("btnh,bsnh->bnts", cotangent, v)
    mean_products = np.einsum("btnh,btnh->bnt", cotangent, y)[..., None]
    p_gradient = value_products - mean_products
    score_gradient = scale * p * p_gradient * slope

    def sum_groups(gradient: np.ndarray) -> np.ndarray:
        grouped_shape = (*gradient.shape[:2], -1, group_size, gradient.shape[-1])
        return gradient.reshape(grouped_shape).sum(axis=3)

    return [
        y,
        np.einsum("bnts,bsnh->btnh", score_gradient, k),
        sum_groups(np.einsum("bnts,btnh->bsnh", score_gradient, q)),
        sum_groups(np.einsum("bnts,btnh->bsnh", p, cotangent)),
        np.sum(densities * p_gradient, axis=(1, 2)),
    ]


def _visible_keys(durations: np.ndarray, window: float | None) -> np.ndarray:
    """Return whether each query sees each key, [B, T, S]."""
    num_tokens = durations.shape[1]
    visible = np.tri(num_tokens, dtype=bool)[None]
    if window is None:
        return visible
    ends = np.cumsum(durations, axis=1)
    return visible & (ends[:, :, None] - ends[:, None, :] < window)


def value_and_gradients(
    form: Form, options: Options
) -> Callable[..., tuple[jax.Array, ...]]:
    """The compiled function of `Inputs` that gives y and all gradients."""

    @jax.jit
    def both(q, k, v, durations, cotangent):
        attend = functools.partial(form.attend, options=options)
        with jax.default_matmul_precision("highest"):
            y, pull_back = jax.vjp(attend, q, k, v, durations)
            return y, *pull_back(cotangent.astype(y.dtype))

    return both


def relative_errors(values: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    """The largest difference of each array, as a share of the largest number in `exact`'s."""
    return [
        float(np.abs(array - reference).max() / np.abs(reference).max())
        for array, reference in zip(values, exact, strict=True)
    ]


def _max_or_nan(values: list[float]) -> float:
    """The largest, or NaN if there is one, which `max` may pass over."""
    return float(np.max(values))


def why_unsupported(form: Form, inputs: Inputs, options: Options) -> str:
    """Why a form does not take these arguments; "" if it does."""
    problem = AttentionProblem.make(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.durations,
        softcap=options.softcap,
        window=options.window,
    )
    return form.why_unsupported(problem) or ""


# --- Times --------------------------------------------------------------------------------------


def time_form(
    label: str, form: Form, with_gradients: bool, sizes: Sizes
) -> Iterator[Check]:
    """Milliseconds of one call, in bfloat16."""
    q, k, v, durations = gpu_cases.random_inputs(
        gpu_cases.Sizes(num_heads=16, head_dim=128), sizes.timed_tokens
    )
    note = "16 heads of 128, bfloat16"
    if sizes is TINY_SIZES:
        q, k, v = q[..., :2, :16], k[..., :2, :16], v[..., :2, :16]
        note = ""
    options = Options()
    if reason := why_unsupported(form, Inputs(q, k, v, durations, q), options):
        yield Check(label, isolated_checks.UNSUPPORTED, note=reason)
        return
    attend = functools.partial(form.attend, options=options)
    calls = gpu_cases.repeated_calls(attend, (q, k, v, durations), with_gradients)
    seconds = timing.time_in_turns({"ours": calls}, sizes.rounds)["ours"]
    milliseconds = 1e3 * float(np.median(seconds)) / gpu_cases.NUM_CALLS
    yield Check(label, isolated_checks.MEASURED, milliseconds, "ms", note=note)
