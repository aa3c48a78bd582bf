"""Attention over weighted keys by cuDNN's fused kernels, on NVIDIA GPUs: O(T + S) memory.

They know causal masks and grouped queries, but no weights of keys: `key_channels` carry them. Nor
do they know soft-capping, and their windows count tokens. `jax.nn.dot_product_attention` calls
them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from continuous_lm.attention import key_channels
from continuous_lm.attention.problem import AttentionProblem, find_array

WIDTH_MULTIPLE = 8  # of which widths must be


def attend(problem: AttentionProblem) -> jax.Array:
    """The result of `dense.attend`, for a problem that `why_unsupported` lets through."""
    scale = problem.static_scale
    batch_shape, flat_problem = problem.flatten_batch()
    num_queries, *head_shape = flat_problem.q.shape[1:]
    head_width = problem.head_width
    padded_width = key_channels.round_up(
        head_width, key_channels.NUM_WEIGHT_CHANNELS, WIDTH_MULTIPLE
    )
    q = flat_problem.q.reshape(*flat_problem.q.shape[:2], -1, head_width)
    q, k = key_channels.append_log_weights(
        q,
        flat_problem.k,
        flat_problem.key_weights,
        scale=scale,
        padded_width=padded_width,
    )
    channel_padding = (0, padded_width - head_width)
    v = jnp.pad(flat_problem.v, [(0, 0), (0, 0), (0, 0), channel_padding])
    batch_together = _batch_together(q, k, v)
    y = jax.nn.dot_product_attention(
        batch_together(q),
        batch_together(k),
        batch_together(v),
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    y = batch_together(y)[..., :head_width]
    return key_channels.zero_rows_without_weight(
        flat_problem.key_weights.reshape(*batch_shape, -1),
        y.reshape(*batch_shape, num_queries, *head_shape),
    )


def _batch_together(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    """Return an identity function whose result is batched if q, k or v is.

    Under `jax.vmap`, JAX's rule for cuDNN wants q, k, v and the cotangents all batched or all
    unbatched. A condition on all three, which never holds, makes them so.
    """
    never = sum(lax.stop_gradient(x[0, 0, 0, 0]) for x in (q, k, v)) < -jnp.inf
    return lambda x: jnp.where(never, 0, x)


def why_unsupported(problem: AttentionProblem) -> str | None:
    """Return the reason why this machine's cuDNN does not support a problem, or None."""
    if problem.softcap is not None:
        return "cuDNN has no soft-capping"
    if problem.window is not None:
        return "cuDNN's windows count tokens, not time"
    has_all_queries = problem.num_queries == problem.num_keys
    if not has_all_queries or not isinstance(problem.query_offset, int):
        return "cuDNN wants a query for every key"
    dtypes = [x.dtype for x in (problem.q, problem.k, problem.v)]
    if set(dtypes) != {jnp.dtype(jnp.bfloat16)}:
        # In float16 the gradients for small weights would vanish.
        return "q, k and v are {}, {} and {}; cuDNN takes bfloat16".format(*dtypes)
    if find_array({"scale": problem.scale}):
        return "scale is an array; cuDNN needs a number"
    try:  # JAX knows the limits of each GPU and each version
        jax.eval_shape(problem.as_function_of_arrays(attend), *problem.arrays)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
