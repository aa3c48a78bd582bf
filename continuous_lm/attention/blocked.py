"""Attention over weighted keys by blocks: O(T + S) memory, forward and backward.

Scores are computed for one block of queries and one block of keys at a time, with a running maximum
and a running sum (Milakov & Gimelshein, arXiv:1805.02867; Rabe & Staats, arXiv:2112.05682). The
backward pass recomputes them from the maximum and the sum of each row (Dao et al.,
arXiv:2205.14135). The two are stored separately; their log-sum-exp would round large scores. With

    e_ij = exp(s_ij - m_i) / z_i,    z_i = sum_j d_j exp(s_ij - m_i),    g_ij = dy_i . (v_j - y_i)

the gradient of a score is d_j e_ij g_ij. The gradient of a weight is e_ij g_ij summed over queries
and heads, which is finite down to d = 0. Blocks of keys that are later than all queries, or outside
the window, are skipped.

Only first-order reverse-mode gradients are supported: `jax.jvp` and second-order gradients need the
dense form.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from continuous_lm.attention.problem import AttentionProblem
from continuous_lm.attention.softmax import (
    clamp_for_absent_keys,
    lift_keys,
    lift_mask,
    present_and_log,
    softcap,
    softcap_and_slope,
)
from continuous_lm.attention.visibility import (
    WindowTimes,
    visibility_mask,
    window_limit,
)


class KernelOptions(NamedTuple):
    """Numbers that the program is compiled for."""

    scale: float
    softcap: float | None
    query_block: int  # queries in a block
    key_block: int  # keys in a block


class Visibility(NamedTuple):
    """Arguments that determine the keys a query sees."""

    query_offset: jax.Array  # index of the first query's own key
    window_times: WindowTimes | None  # [B, S]
    window: jax.Array | None


class KernelArrays(NamedTuple):
    """A problem's arrays, filled up to whole blocks; or their gradients."""

    q: jax.Array  # [B, T, K, G, H]
    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, H]
    key_weights: jax.Array  # [B, S]


class Residuals(NamedTuple):
    """Residuals of the backward pass."""

    arrays: KernelArrays
    visibility: Visibility
    y: jax.Array  # [B, T, K, G, H]
    row_max: jax.Array  # [B, T, K, G], maximum m of each row of scores
    row_sum: jax.Array  # [B, T, K, G], sum z of each row


def attend(problem: AttentionProblem, block_size: int | None = None) -> jax.Array:
    """The result of `dense.attend`, computed in blocks of at most `block_size` tokens."""
    scale = problem.static_scale
    cap = problem.static_softcap
    batch_shape, flat_problem = problem.flatten_batch()
    num_queries, *head_shape = flat_problem.q.shape[1:]
    if block_size is None:
        block_size = _choose_block_size(
            math.prod((len(flat_problem.q), *head_shape[:2]))
        )
    options = KernelOptions(
        scale=scale,
        softcap=cap,
        query_block=_even_block_size(num_queries, block_size),
        key_block=_even_block_size(problem.num_keys, block_size),
    )
    arrays = KernelArrays(
        q=pad_to_blocks(flat_problem.q, options.query_block),
        k=pad_to_blocks(flat_problem.k, options.key_block),
        v=pad_to_blocks(flat_problem.v, options.key_block),
        key_weights=pad_to_blocks(flat_problem.key_weights, options.key_block),
    )
    y = _attend(options, arrays, make_visibility(flat_problem, options.key_block))
    return y[:, :num_queries].reshape(*batch_shape, num_queries, *head_shape)


def make_visibility(problem: AttentionProblem, key_block: int) -> Visibility:
    """The visibility of a problem with one leading axis, its keys filled up to whole blocks."""
    window_times = problem.window_times
    if window_times is not None:
        window_times = window_times._replace(
            ticks=pad_to_blocks(window_times.ticks, key_block, "edge"),
            remainders=pad_to_blocks(window_times.remainders, key_block, "edge"),
        )
    return Visibility(
        jnp.asarray(problem.query_offset),
        window_times,
        None if problem.window is None else jnp.asarray(problem.window),
    )


def _choose_block_size(num_rows: int) -> int:
    """Tokens in a block: about a million scores at once for `num_rows` heads in the batch."""
    return min(max(2 ** round(math.log2(2**20 / num_rows) / 2), 64), 1024)


def _even_block_size(length: int, max_block_size: int) -> int:
    """The block size, at most `max_block_size`, that cuts `length` tokens most evenly."""
    return math.ceil(length / math.ceil(length / max_block_size))


def pad_to_blocks(
    x: jax.Array,
    block_size: int,
    mode: str = "constant",
) -> jax.Array:
    """Pad x [B, T, ...] to whole blocks. No query sees the added last keys."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % block_size)
    return jnp.pad(x, padding, mode=mode)


def _get_block(
    x: jax.Array,
    i: jax.Array,
    block_size: int,
) -> jax.Array:
    """Block i of x [B, T, ...]."""
    return lax.dynamic_slice_in_dim(x, i * block_size, block_size, axis=1)


def _set_block(
    x: jax.Array,
    values: jax.Array,
    i: jax.Array,
    block_size: int,
) -> jax.Array:
    """x [B, T, ...] with `values` as its block i."""
    return lax.dynamic_update_slice_in_dim(
        x, values.astype(x.dtype), i * block_size, axis=1
    )


def reachable_blocks(
    visibility: Visibility,
    options: KernelOptions,
    num_queries: int,
    num_keys: int,
) -> jax.Array:
    """Return whether a query of a block may see a key of a block, bool [T / queries, S / keys]."""
    query_offset, window_times, window = visibility
    query_blocks = jnp.arange(num_queries // options.query_block)
    key_blocks = jnp.arange(num_keys // options.key_block)
    last_query = query_offset + (query_blocks[:, None] + 1) * options.query_block - 1
    is_causal = key_blocks * options.key_block <= last_query
    if window_times is None or window is None:
        return is_causal
    key_ends = _rounded_end_times(window_times)
    query_keys = jnp.minimum(query_offset + jnp.arange(num_queries), num_keys - 1)
    query_ends = key_ends[:, query_keys]
    earliest_query_end = jnp.min(_cut(query_ends, options.query_block), axis=-1)
    latest_key_end = jnp.max(_cut(key_ends, options.key_block), axis=-1)
    # `key_ends` have lost digits; the mask inside of a block is exact, so a margin costs nothing.
    rounding = 1e-5 * jnp.max(jnp.abs(key_ends))
    limit = rounding + window_limit(window_times, window)
    is_in_window = earliest_query_end[:, :, None] - latest_key_end[:, None, :] < limit
    return is_causal & jnp.any(is_in_window, axis=0)


def _rounded_end_times(window_times: WindowTimes) -> jax.Array:
    """End times [B, S] as floats, which lose digits."""
    ticks = window_times.ticks.astype(window_times.remainders.dtype)
    return ticks * window_times.tick_size + window_times.remainders


def _cut(per_token: jax.Array, block_size: int) -> jax.Array:
    """[B, T] as [B, blocks, block_size]."""
    return per_token.reshape(len(per_token), -1, block_size)


def block_ranges(reachable: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first true entry of each row, and the one after its last: int [rows] each."""
    num_blocks = reachable.shape[1]
    indices = jnp.arange(num_blocks, dtype=jnp.int32)
    begin = jnp.min(jnp.where(reachable, indices, num_blocks), axis=1)
    return begin, jnp.max(jnp.where(reachable, indices + 1, 0), axis=1)


def _products(
    options: KernelOptions,
    q: jax.Array,
    k: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    """Scaled products [B, K, T, G, S] of the queries and keys of one block."""
    products = jnp.einsum("btkgh,bskh->bktgs", q, k, preferred_element_type=dtype)
    return options.scale * products


def _mask(
    options: KernelOptions,
    visibility: Visibility,
    i: jax.Array,
    j: jax.Array,
) -> jax.Array:
    """Return the mask of block i of queries and block j of keys, for scores [B, K, T, G, S]."""
    first_query = visibility.query_offset + i * options.query_block
    first_key = j * options.key_block
    mask = visibility_mask(
        first_query + jnp.arange(options.query_block),
        first_key + jnp.arange(options.key_block),
        visibility.window_times,
        visibility.window,
    )
    return lift_mask(mask)


# --- Forward: for each block of queries, over the blocks of keys that it sees --------------------


class KeyBlock(NamedTuple):
    """Keys, or one block of them."""

    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, H]
    log_weights: jax.Array  # [B, S]


class RunningSoftmax(NamedTuple):
    """The rows of a block of queries, after some of the keys."""

    row_max: jax.Array  # [B, K, T, G]
    row_sum: jax.Array  # [B, K, T, G]
    y: jax.Array  # [B, K, T, G, H], not yet divided by the sum


def _forward(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y [B, T, K, G, H], and the maximum and the sum of each row, [B, T, K, G] each."""
    q, k, v, key_weights = arrays
    num_queries, num_keys = q.shape[1], k.shape[1]
    dtype = key_weights.dtype
    begin, end = block_ranges(
        reachable_blocks(visibility, options, num_queries, num_keys)
    )
    _, log_weights = present_and_log(key_weights)
    keys = KeyBlock(k, v, log_weights)

    def attend_query_block(i, outputs):
        q_i = _get_block(q, i, options.query_block)

        def add_key_block(j, state):
            keys_j = KeyBlock(*(_get_block(x, j, options.key_block) for x in keys))
            mask = _mask(options, visibility, i, j)
            return _add_keys(options, q_i, keys_j, mask, state)

        state = lax.fori_loop(
            begin[i], end[i], add_key_block, _empty_softmax(q_i, dtype)
        )
        return tuple(
            _set_block(output, jnp.moveaxis(rows, 1, 2), i, options.query_block)
            for output, rows in zip(outputs, _normalize(state), strict=True)
        )

    rows = jnp.zeros(q.shape[:-1], dtype)
    outputs = jnp.zeros(q.shape, dtype), rows, rows
    num_blocks = num_queries // options.query_block
    return lax.fori_loop(0, num_blocks, attend_query_block, outputs)


def _empty_softmax(q: jax.Array, dtype: DTypeLike) -> RunningSoftmax:
    """The rows of queries [B, T, K, G, H] before any key."""
    num_batch, num_queries, num_kv_heads, group_size, head_width = q.shape
    row_sum = jnp.zeros((num_batch, num_kv_heads, num_queries, group_size), dtype)
    y = jnp.zeros((*row_sum.shape, head_width), dtype)
    return RunningSoftmax(row_sum - jnp.inf, row_sum, y)


def _add_keys(
    options: KernelOptions,
    q: jax.Array,
    keys: KeyBlock,
    mask: jax.Array,
    state: RunningSoftmax,
) -> RunningSoftmax:
    """The state of queries [B, T, K, G, H] after one more block of keys."""
    dtype = state.row_sum.dtype
    scores = softcap(_products(options, q, keys.k, dtype), options.softcap)
    scores = jnp.where(mask, scores + lift_keys(keys.log_weights), -jnp.inf)
    new_max = jnp.maximum(state.row_max, jnp.max(scores, axis=-1))
    finite_max = jnp.where(jnp.isfinite(new_max), new_max, 0.0)
    p = jnp.exp(scores - finite_max[..., None])
    rescaling = jnp.exp(state.row_max - finite_max)
    update = jnp.einsum(
        "bktgs,bskh->bktgh",
        p.astype(keys.v.dtype),
        keys.v,
        preferred_element_type=dtype,
    )
    return RunningSoftmax(
        row_max=new_max,
        row_sum=rescaling * state.row_sum + jnp.sum(p, axis=-1),
        y=rescaling[..., None] * state.y + update,
    )


def _normalize(state: RunningSoftmax) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, maximum and sum of each row; 0, 0 and 1 where no key has weight."""
    row_sum = jnp.where(state.row_sum > 0, state.row_sum, 1.0)
    row_max = jnp.where(jnp.isfinite(state.row_max), state.row_max, 0.0)
    return state.y / row_sum[..., None], row_max, row_sum


# --- Backward: for each block of keys, over the blocks of queries that see it --------------------


class WeightedKeys(NamedTuple):
    """Keys, or one block of them, as the backward pass reads them."""

    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, H]
    key_weights: jax.Array  # [B, S]
    is_present: jax.Array  # [B, S]


class QueryRows(NamedTuple):
    """Queries, or one block of them, with the residuals of their rows."""

    q: jax.Array  # [B, T, K, G, H]
    dy: jax.Array  # [B, T, K, G, H]
    dy_dot_y: jax.Array  # [B, T, K, G]
    row_max: jax.Array  # [B, T, K, G]
    row_sum: jax.Array  # [B, T, K, G]


class ScoreGradients(NamedTuple):
    """p = d e, the gradient g e of a weight, and that of a product q . k, [B, K, T, G, S] each."""

    p: jax.Array
    weight: jax.Array
    product: jax.Array


def _backward(
    options: KernelOptions,
    residuals: Residuals,
    dy: jax.Array,
) -> tuple[KernelArrays, None]:
    """Gradients for the arrays."""
    q, k, v, key_weights = residuals.arrays
    visibility = residuals.visibility
    num_queries, num_keys = q.shape[1], k.shape[1]
    dtype = key_weights.dtype
    begin, end = block_ranges(
        reachable_blocks(visibility, options, num_queries, num_keys).T
    )
    is_present, _ = present_and_log(key_weights)
    keys = WeightedKeys(k, v, key_weights, is_present)
    queries = QueryRows(
        q=q,
        dy=dy.astype(v.dtype),
        dy_dot_y=jnp.sum(dy * residuals.y, axis=-1),
        row_max=residuals.row_max,
        row_sum=residuals.row_sum,
    )

    def differentiate_key_block(j, gradients):
        keys_j = WeightedKeys(*(_get_block(x, j, options.key_block) for x in keys))

        def add_query_block(i, state):
            dq, *key_gradients = state
            rows = QueryRows(*(_get_block(x, i, options.query_block) for x in queries))
            mask = _mask(options, visibility, i, j)
            scores = _differentiate_scores(options, rows, keys_j, mask)
            dq = _add_query_gradients(options, dq, i, scores, keys_j)
            return dq, *_add_key_gradients(key_gradients, scores, rows)

        dq, *outputs = gradients
        zeros = [
            jnp.zeros(x.shape, dtype) for x in (keys_j.k, keys_j.v, keys_j.key_weights)
        ]
        dq, *key_gradients = lax.fori_loop(
            begin[j], end[j], add_query_block, (dq, *zeros)
        )
        return dq, *(
            _set_block(output, gradient, j, options.key_block)
            for output, gradient in zip(outputs, key_gradients, strict=True)
        )

    dq, dk, dv, dd = lax.fori_loop(
        0,
        num_keys // options.key_block,
        differentiate_key_block,
        (jnp.zeros(q.shape, dtype), *map(jnp.zeros_like, (k, v, key_weights))),
    )
    return KernelArrays(dq.astype(q.dtype), dk, dv, dd), None


def _differentiate_scores(
    options: KernelOptions,
    rows: QueryRows,
    keys: WeightedKeys,
    mask: jax.Array,
) -> ScoreGradients:
    """The gradients of one block of scores."""
    dtype = keys.key_weights.dtype
    dy_dot_y = _align_with_scores(rows.dy_dot_y)
    row_max = _align_with_scores(rows.row_max)
    row_sum = _align_with_scores(rows.row_sum)
    scores, slope = softcap_and_slope(
        _products(options, rows.q, keys.k, dtype), options.softcap
    )
    exponent = clamp_for_absent_keys(scores - row_max, lift_keys(keys.is_present))
    e = jnp.where(mask, jnp.exp(exponent) / row_sum, 0.0)
    dp = jnp.einsum("btkgh,bskh->bktgs", rows.dy, keys.v, preferred_element_type=dtype)
    g = e * (dp - dy_dot_y)
    weights = lift_keys(keys.key_weights)
    return ScoreGradients(
        p=(weights * e).astype(keys.v.dtype),
        weight=g,
        product=(options.scale * slope * (weights * g)).astype(rows.q.dtype),
    )


def _align_with_scores(per_row: jax.Array) -> jax.Array:
    """[B, T, K, G] as [B, K, T, G, 1]."""
    return jnp.moveaxis(per_row, 1, 2)[..., None]


def _add_query_gradients(
    options: KernelOptions,
    dq: jax.Array,
    i: jax.Array,
    scores: ScoreGradients,
    keys: WeightedKeys,
) -> jax.Array:
    """Add to dq [B, T, K, G, H] the gradient of block i of queries from a block of keys."""
    update = jnp.einsum(
        "bktgs,bskh->btkgh", scores.product, keys.k, preferred_element_type=dq.dtype
    )
    dq_i = _get_block(dq, i, options.query_block) + update
    return _set_block(dq, dq_i, i, options.query_block)


def _add_key_gradients(
    gradients: list[jax.Array],
    scores: ScoreGradients,
    rows: QueryRows,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dk, dv [B, S, K, H] and dd [B, S] of a block of keys, with those of a block of queries."""
    dk, dv, dd = gradients
    sum_over_rows = functools.partial(
        jnp.einsum, "bktgs,btkgh->bskh", preferred_element_type=dd.dtype
    )
    return (
        dk + sum_over_rows(scores.product, rows.q),
        dv + sum_over_rows(scores.p, rows.dy),
        dd + jnp.sum(scores.weight, axis=(1, 2, 3)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
) -> jax.Array:
    y, _, _ = _forward(options, arrays, visibility)
    return y


def _attend_with_residuals(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
) -> tuple[jax.Array, Residuals]:
    y, row_max, row_sum = _forward(options, arrays, visibility)
    return y, Residuals(arrays, visibility, y, row_max, row_sum)


_attend.defvjp(_attend_with_residuals, _backward)
