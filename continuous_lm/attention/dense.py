"""The dense form of attention over weighted keys: plainly right, in O(T S) memory."""

import jax
import jax.numpy as jnp

from continuous_lm.attention.problem import AttentionProblem
from continuous_lm.attention.softmax import (
    lift_keys,
    lift_mask,
    softcap,
    weighted_exp,
)
from continuous_lm.attention.visibility import visibility_mask


def attend(problem: AttentionProblem) -> jax.Array:
    """y [..., T, K, G, H] of the problem, in the dtype of the weights."""
    # Axes stand as the products leave them: others would be copies, and in bfloat16 XLA for CPUs
    # knows no others.
    scores = jnp.einsum(
        "...tkgh,...skh->...ktgs",
        problem.q,
        problem.k,
        preferred_element_type=problem.dtype,
    )
    scores = softcap(problem.scale * scores, problem.softcap)
    query_indices = jnp.asarray(problem.query_offset) + jnp.arange(problem.num_queries)
    key_indices = jnp.arange(problem.num_keys)
    mask = visibility_mask(
        query_indices, key_indices, problem.window_times, problem.window
    )
    p, row_sum = weighted_exp(scores, lift_keys(problem.key_weights), lift_mask(mask))
    y = jnp.einsum(
        "...ktgs,...skh->...ktgh",
        p.astype(problem.v.dtype),
        problem.v,
        preferred_element_type=problem.dtype,
    )
    return jnp.swapaxes(y / row_sum[..., None], -3, -4)
