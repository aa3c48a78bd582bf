"""Attention as an integral over time: every key is weighted by its token's duration.

    y_i = sum_{j <= i} d_j exp(s_ij) v_j / sum_{j <= i} d_j exp(s_ij),
    s_ij = softcap(scale q_i . k_j)

With d = 1 this is causal softmax attention. With d the durations of the tokens it is the continuous
transformer of Marro et al. (arXiv:2504.03933, section 3). With d any quadrature weights it
integrates a sampled signal. Adding log d to the logits is equivalent, but has no gradient at d = 0.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import jax
from jax.typing import ArrayLike

from continuous_lm.arguments import check_count
from continuous_lm.attention import blocked, dense
from continuous_lm.attention.problem import AttentionProblem, check_arguments
from continuous_lm.errors import InputError

__all__ = ["IMPLEMENTATIONS", "AttentionProblem", "attend", "attend_problem"]

IMPLEMENTATIONS = ("auto", "dense", "blocked", "cudnn", "splash", "pallas")
MAX_DENSE_SCORES = 256**2  # scores of a head, up to which the dense form is as fast

Form = Callable[[AttentionProblem], jax.Array]


def attend(  # noqa: PLR0913 (a problem's arguments, and how to compute it)
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array | None = None,
    *,
    scale: float | jax.Array | None = None,
    softcap: float | jax.Array | None = None,
    window: ArrayLike | None = None,
    intervals: jax.Array | None = None,
    query_offset: int | jax.Array | None = None,
    implementation: str = "auto",
    block_size: int | None = None,
) -> jax.Array:
    """Compute causal attention over weighted keys.

    Causality is by index: a query sees the key of its own token and earlier keys, for all
    durations. Scores, weights and sums are in at least float32. Leading axes broadcast.

    Args:
      q: queries [..., T, N, H], rotated.
      k: keys [..., S, K, H], rotated; K divides N.
      v: values [..., S, K, H].
      key_weights: d >= 0 of each key, [..., S]; all 1 if omitted.
      scale: factor of the scores; 1 / sqrt(H) if omitted.
      softcap: bound c of the scores, c tanh(s / c), applied before the weights.
      window: length of the window in time: a key is visible while the time since its end is less.
      intervals: time [..., S] from the end of the previous key to the end of this one, for the
        window; `key_weights` if omitted.
      query_offset: index of the first query's token among the keys; S - T if omitted, so that the
        queries are the last tokens.
      implementation: form of the computation; results differ only by rounding. All forms but
        "dense" take O(T + S) memory, and support only first-order reverse-mode gradients.

        - "dense" stores [T, S] scores, in O(T S) memory.
        - "blocked" computes scores block by block, on any device.
        - "cudnn" calls cuDNN, on NVIDIA GPUs. It needs bfloat16 and a query for every key, without
          soft-capping or window. Heads are at most 120 wide, or 248 from Hopper on (3 channels
          carry the weights, and widths are multiples of 8). Weights below 1e-30 are raised to it.
        - "splash" calls JAX's kernel for TPUs, without window; `query_offset` must be a number.
          Without soft-capping, weights below 1e-30 are raised to it.
        - "pallas" is this package's kernel for GPUs and TPUs, with all features of "blocked". On
          CPUs it is interpreted, for tests. It is not measured yet, so "auto" never selects it.
        - "auto" is dense for short sequences and single queries. For others it is cudnn on a GPU,
          or splash on a machine with one TPU, if the kernel supports the arguments and the machine
          has the device that the program is compiled for. It is blocked otherwise.

        On several TPUs, call "splash" and "pallas" inside `jax.shard_map`; the compiler cannot
        partition them.
      block_size: largest number of tokens in a block of "blocked"; set by size if omitted.

    Returns:
      y [..., T, N, H] in the dtype of q. It is 0 for a query whose visible weights are all 0 (model
      inputs refuse such durations).

    Raises:
      InputError: if shapes do not fit, or the implementation is unknown or does not support the
        arguments.

    Examples:
      A key of weight 2 counts like two equal keys:

      >>> import jax.numpy as jnp
      >>> from continuous_lm.attention import attend
      >>> q, k = jnp.zeros((1, 1, 2)), jnp.zeros((2, 1, 2))  # one head, 2 wide
      >>> v = jnp.array([[[0.0, 3.0]], [[3.0, 0.0]]])
      >>> print(attend(q, k, v, jnp.array([1.0, 2.0])))
      [[[2. 1.]]]
    """
    check_arguments(q, k, v, key_weights, intervals, window, query_offset)
    problem = AttentionProblem.make(
        q,
        k,
        v,
        key_weights,
        scale=scale,
        softcap=softcap,
        window=window,
        intervals=intervals,
        query_offset=query_offset,
    )
    return attend_problem(problem, implementation, block_size)


def attend_problem(
    problem: AttentionProblem,
    implementation: str = "auto",
    block_size: int | None = None,
) -> jax.Array:
    """Compute `attend` for checked arguments, as in a model's layers.

    Returns:
      y [..., T, N, H] in the dtype of q.
    """
    _check_options(implementation, block_size)
    y = _attend_by(implementation, problem, block_size)
    num_heads = problem.q.shape[-3] * problem.q.shape[-2]
    y = y.reshape(*y.shape[:-3], num_heads, problem.head_width)
    return y.astype(problem.q.dtype)


def _attend_by(
    implementation: str,
    problem: AttentionProblem,
    block_size: int | None,
) -> jax.Array:
    """y [..., T, K, G, H]."""
    if implementation == "auto" and _is_short(problem):
        implementation = "dense"
    match implementation:
        case "dense":
            return dense.attend(problem)
        case "blocked":
            return blocked.attend(problem, block_size)
        case "auto":
            return _attend_on_platform(problem, block_size)
    kernel = _import_kernel(implementation)
    if reason := kernel.why_unsupported(problem):
        raise InputError(
            f"implementation {implementation!r} is not possible: {reason};"
            " take 'blocked', or 'auto', which finds one that is"
        )
    return kernel.attend(problem)


def _is_short(problem: AttentionProblem) -> bool:
    """Return whether the problem is so small that the dense form is as fast as any."""
    num_scores = problem.num_queries * problem.num_keys
    return problem.num_queries == 1 or num_scores <= MAX_DENSE_SCORES


def _import_kernel(kernel: str) -> ModuleType:
    """Import the module of a kernel when it is first used, since importing Pallas is slow."""
    return importlib.import_module(f"{__name__}.{kernel}")


def _attend_on_platform(problem: AttentionProblem, block_size: int | None) -> jax.Array:
    """The result of the kernel of the platform that the program is compiled for, or blocked."""
    kernels = {"cuda": _import_kernel("cudnn")}
    # Not on several TPUs: the compiler cannot spread splash attention over devices.
    if jax.default_backend() == "tpu" and jax.device_count() == 1:
        kernels["tpu"] = _import_kernel("splash")
    forms = {
        platform: kernel.attend
        for platform, kernel in kernels.items()
        if kernel.why_unsupported(problem) is None
    }
    attend_blocked = functools.partial(blocked.attend, block_size=block_size)
    if not forms:
        return attend_blocked(problem)
    forms["default"] = attend_blocked
    branches = {
        platform: problem.as_function_of_arrays(_in_query_dtype(form))
        for platform, form in forms.items()
    }
    return jax.lax.platform_dependent(*problem.arrays, **branches)


def _in_query_dtype(form: Form) -> Form:
    """The form with its result in the dtype of q, as branches must agree on it."""
    return lambda problem: form(problem).astype(problem.q.dtype)


def _check_options(implementation: str, block_size: int | None) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if block_size is not None:
        check_count("block_size", block_size)
