"""Attention as an integral over time: every key counts as long as its token lasts.

    y_i = sum_{j <= i} d_j exp(s_ij) v_j / sum_{j <= i} d_j exp(s_ij),
    s_ij = softcap(scale q_i . k_j)

With d = 1 this is causal softmax attention; with d the durations of the tokens it is the continuous
transformer of Marro et al. (arXiv:2504.03933, section 3); with d any quadrature weights it
integrates any sampled signal. Adding log d to the logits is the same, but has no gradient at d = 0.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import axes
from continuous_lm.attention import blocked, dense
from continuous_lm.attention.visibility import exact_end_times
from continuous_lm.errors import InputError

IMPLEMENTATIONS = ("auto", "dense", "blocked", "cudnn", "splash", "pallas")
MAX_DENSE_SCORES = 256**2  # scores of a head, up to which the dense form is as fast


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: ArrayLike | None = None,
    intervals: jax.Array | None = None,
    query_offset: ArrayLike | None = None,
    implementation: str = "auto",
    block_size: int | None = None,
) -> jax.Array:
    """Causal attention over weighted keys.

    Causality is by index: a query sees the key of its own token and those before it, whatever their
    durations. Scores, weights and sums are held in at least float32.

    Leading axes broadcast.

    Args:
      q: queries [..., T, N, H], rotated.
      k: keys [..., S, K, H], rotated; K divides N.
      v: values [..., S, K, H].
      key_weights: d >= 0 of each key, [..., S]; all 1 if left out.
      scale: of the scores; 1 / sqrt(H) if left out.
      softcap: bound c of the scores, c tanh(s / c), before they are weighted.
      window: a key is visible while the time since its end is below this, in tokens.
      intervals: time [..., S] from the end of the key before to the end of this one, for the
        window; the weights if left out.
      query_offset: index among the keys of the first query's token; S - T if left out, so that the
        queries are the last tokens.
      implementation: how it is computed, to the same result within rounding. All but "dense" take
        memory O(T + S), and have reverse-mode gradients of first order alone.
        "dense" holds [T, S] scores, in memory O(T S).
        "blocked" makes scores block by block, on any device.
        "cudnn" calls cuDNN, on NVIDIA GPUs: bfloat16, a query for every key, no soft-capping, no
        window, heads up to 120 wide, or 248 from Hopper on (3 channels carry the weights, and
        widths are multiples of 8). Weights below 1e-30 count as that.
        "splash" calls JAX's kernel for TPUs: no window; `query_offset` must be a number. Without
        soft-capping, weights below 1e-30 count as that.
        "pallas" is a kernel of ours that does all that "blocked" does, on GPUs and TPUs; on CPUs it
        is interpreted, for tests. It is not measured yet, so it must be asked for.
        "auto" is dense for short sequences and single queries. For others it is cudnn or, on a
        machine with but one device, splash, if the program is compiled for a GPU or TPU that this
        machine has, and they take the arguments; and blocked everywhere else.
        On several TPUs "splash" and "pallas" must be called inside of `jax.shard_map`: the compiler
        cannot spread them over devices.
      block_size: tokens in a block of the blocked form, at most; chosen by size if left out.

    Returns:
      y [..., T, N, H] in the dtype of q. A query that sees no weight at all has no value: it
      gives 0 (callers that know the weights refuse them).

    Raises:
      InputError: if shapes do not fit, the implementation is not known, or does not take them.
    """
    _check(q, k, v, key_weights, intervals, implementation, block_size)
    *_, num_queries, num_heads, head_width = q.shape
    num_keys, num_kv_heads = k.shape[-3:-1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    key_weights = (
        jnp.ones(num_keys, dtype) if key_weights is None else key_weights.astype(dtype)
    )
    window_times = None
    if window is not None:
        intervals = key_weights if intervals is None else intervals.astype(dtype)
        window_times = exact_end_times(jax.lax.stop_gradient(intervals))
    q_grouped = q.reshape(
        *q.shape[:-2], num_kv_heads, num_heads // num_kv_heads, head_width
    )
    arrays = q_grouped, k, v, key_weights
    options: dict[str, Any] = {
        "scale": 1.0 / math.sqrt(head_width) if scale is None else scale,
        "softcap": softcap,
        "window": window,
        "window_times": window_times,
        "query_offset": num_keys - num_queries
        if query_offset is None
        else query_offset,
    }
    attend_blocked = functools.partial(blocked.attend, block_size=block_size)
    if implementation == "auto" and (
        num_queries == 1 or num_queries * num_keys <= MAX_DENSE_SCORES
    ):
        implementation = "dense"
    match implementation:
        case "dense":
            y = dense.attend(*arrays, **options)
        case "blocked":
            y = attend_blocked(*arrays, **options)
        case "auto":
            y = _attend_on_platform(attend_blocked, arrays, options)
        case _:
            kernel = _import_kernel(implementation)
            if reason := kernel.why_unsupported(*arrays, **options):
                raise InputError(
                    f"implementation {implementation!r} is not possible: {reason};"
                    " take 'blocked', or 'auto', which finds one that is"
                )
            y = kernel.attend(*arrays, **options)
    return y.reshape(*y.shape[:-3], num_heads, head_width).astype(q.dtype)


def _import_kernel(kernel: str) -> Any:
    """The module of a kernel, imported when it is wanted: Pallas takes its time."""
    return importlib.import_module(f"{__name__}.{kernel}")


def _attend_on_platform(
    fallback: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    options: Mapping[str, Any],
) -> jax.Array:
    """What the kernel of the platform that the program is compiled for gives, if there is one."""
    kernels = {"cuda": "cudnn"}
    if jax.default_backend() == "tpu" and jax.device_count() == 1:
        kernels["tpu"] = (
            "splash"  # not on several: the compiler cannot spread it over devices
        )
    branches = {
        platform: functools.partial(_import_kernel(kernel).attend, **options)
        for platform, kernel in kernels.items()
        if _import_kernel(kernel).why_unsupported(*arrays, **options) is None
    }
    fallback = functools.partial(fallback, **options)
    if not branches:
        return fallback(*arrays)

    def in_query_dtype(attend):
        return lambda *arrays: attend(*arrays).astype(arrays[0].dtype)

    branches = {
        platform: in_query_dtype(attend) for platform, attend in branches.items()
    }
    return jax.lax.platform_dependent(
        *arrays, **branches, default=in_query_dtype(fallback)
    )


def _check(q, k, v, key_weights, intervals, implementation, block_size) -> None:
    is_missing_axes = min(q.ndim, k.ndim, v.ndim) < 3
    if is_missing_axes or k.shape[-3:] != v.shape[-3:] or q.shape[-1] != k.shape[-1]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they must be"
            " [..., T, N, H], [..., S, K, H] and [..., S, K, H]"
        )
    if q.shape[-2] % k.shape[-2]:
        raise InputError(
            f"{k.shape[-2]} key/value heads do not divide {q.shape[-2]} query heads"
        )
    if q.shape[-3] > k.shape[-3]:
        raise InputError(
            f"{q.shape[-3]} queries for {k.shape[-3]} keys; queries are the last tokens of the keys"
        )
    for name, array in (("key_weights", key_weights), ("intervals", intervals)):
        if array is not None and (array.ndim < 1 or array.shape[-1] != k.shape[-3]):
            raise InputError(
                f"{name} has shape {list(array.shape)}; it must be [..., {k.shape[-3]}]"
            )
    arrays = {
        "q": (q, 3),
        "k": (k, 3),
        "v": (v, 3),
        "key_weights": (key_weights, 1),
        "intervals": (intervals, 1),
    }
    axes.broadcast_leading_axes(
        {
            n: x.shape[: x.ndim - rank]
            for n, (x, rank) in arrays.items()
            if x is not None
        }
    )
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise InputError(f"block_size is {block_size!r}; it must be a positive integer")
