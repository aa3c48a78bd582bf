"""Attention over weighted keys by blocks: O(T + S) memory, forward and backward.

Scores are made for one block of queries and one of keys at a time, under a running maximum and a
running sum (Milakov & Gimelshein, arXiv:1805.02867; Rabe & Staats, arXiv:2112.05682). The backward
pass makes them anew from the maximum and the sum of each row (Dao et al., arXiv:2205.14135; kept
apart, they lose no digits of large scores, as their log-sum-exp would). With

    e_ij = exp(s_ij - m_i) / z_i,    z_i = sum_j d_j exp(s_ij - m_i),    g_ij = dy_i . (v_j - y_i)

the gradient for a score is d_j e_ij g_ij, and the one for a weight is e_ij g_ij summed over queries
and heads: finite down to d = 0. Blocks that no query sees, being later or out of the window, are
skipped.

The gradient is for reverse mode, once: `jax.jvp`, and gradients of gradients, need the dense form.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.attention.softmax import clamp_for_absent_keys, present_and_log
from continuous_lm.attention.visibility import (
    WindowTimes,
    visibility_mask,
    window_limit,
)
from continuous_lm.errors import InputError


class KernelOptions(NamedTuple):
    """What is known when the program is compiled."""

    scale: float
    softcap: float | None
    queries: int  # in a block
    keys: int  # in a block


class Visibility(NamedTuple):
    """What says which key a query sees."""

    query_offset: jax.Array  # index of the first query's own key
    window_times: WindowTimes | None  # [B, S]
    window: jax.Array | None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: ArrayLike | None,
    window_times: WindowTimes | None,
    query_offset: ArrayLike,
    block_size: int | None = None,
) -> jax.Array:
    """The result of `dense.attend`, computed in blocks of at most `block_size` tokens."""
    for name, value in {"scale": scale, "softcap": softcap}.items():
        if isinstance(value, jax.core.Tracer):
            raise InputError(
                f"{name} is traced; the blocked form needs a number, so make it static"
            )
    num_queries, head_shape = q.shape[-4], q.shape[-3:]
    batch_shape, (q, k, v, key_weights, *time_arrays) = flatten_batch(
        q, k, v, key_weights, *(window_times or ())
    )
    block_size = block_size or _choose_block_size(math.prod((len(q), *head_shape[:2])))
    options = KernelOptions(
        scale,
        softcap,
        _even_block_size(num_queries, block_size),
        _even_block_size(k.shape[1], block_size),
    )
    if window_times is not None:
        ticks, remainders, tick_size = time_arrays
        ticks, remainders = (
            pad_to_blocks(x, options.keys, "edge") for x in (ticks, remainders)
        )
        window_times = WindowTimes(ticks, remainders, tick_size)
    visibility = Visibility(
        jnp.asarray(query_offset),
        window_times,
        None if window is None else jnp.asarray(window),
    )
    q = pad_to_blocks(q, options.queries)
    k, v, key_weights = (pad_to_blocks(x, options.keys) for x in (k, v, key_weights))
    y = _attend(options, q, k, v, key_weights, visibility)
    return y[:, :num_queries].reshape(*batch_shape, num_queries, *head_shape)


def flatten_batch(
    q: jax.Array, k: jax.Array, v: jax.Array, *key_arrays: jax.Array
) -> tuple[tuple[int, ...], list[jax.Array]]:
    """The leading axes of q, k, v and others [..., S], and each with one axis B in their place."""
    ranks = [4, 3, 3, *(1 for _ in key_arrays)]
    arrays = list(zip((q, k, v, *key_arrays), ranks, strict=True))
    batch_shape = jnp.broadcast_shapes(
        *(x.shape[: x.ndim - rank] for x, rank in arrays)
    )

    def flatten(x: jax.Array, rank: int) -> jax.Array:
        inner_shape = x.shape[x.ndim - rank :]
        return jnp.broadcast_to(x, (*batch_shape, *inner_shape)).reshape(
            math.prod(batch_shape), *inner_shape
        )

    return batch_shape, [flatten(x, rank) for x, rank in arrays]


def _choose_block_size(num_rows: int) -> int:
    """Tokens in a block: about a million scores at once for `num_rows` heads in the batch."""
    return min(max(2 ** round(math.log2(2**20 / num_rows) / 2), 64), 1024)


def _even_block_size(length: int, max_block_size: int) -> int:
    """The block size, at most `max_block_size`, that cuts `length` tokens most evenly."""
    return math.ceil(length / math.ceil(length / max_block_size))


def pad_to_blocks(x: jax.Array, block_size: int, mode: str = "constant") -> jax.Array:
    """x [B, T, ...] with T filled up to whole blocks. As last keys, nobody sees what is added."""
    return jnp.pad(
        x, [(0, 0), (0, -x.shape[1] % block_size)] + [(0, 0)] * (x.ndim - 2), mode=mode
    )


def _get_block(x: jax.Array, i: jax.Array, block_size: int) -> jax.Array:
    """Block i of x [B, T, ...]."""
    return lax.dynamic_slice_in_dim(x, i * block_size, block_size, axis=1)


def _set_block(
    x: jax.Array, values: jax.Array, i: jax.Array, block_size: int
) -> jax.Array:
    """x [B, T, ...] with `values` as its block i."""
    return lax.dynamic_update_slice_in_dim(
        x, values.astype(x.dtype), i * block_size, axis=1
    )


def reachable_blocks(
    visibility: Visibility, options: KernelOptions, num_queries: int, num_keys: int
) -> jax.Array:
    """Whether any query of a block may see any key of a block: bool [T / queries, S / keys]."""
    query_blocks, key_blocks = (
        jnp.arange(n)
        for n in (num_queries // options.queries, num_keys // options.keys)
    )
    last_query = (
        visibility.query_offset + (query_blocks[:, None] + 1) * options.queries - 1
    )
    is_causal = key_blocks * options.keys <= last_query
    if visibility.window_times is None or visibility.window is None:
        return is_causal
    key_ends = (
        visibility.window_times.ticks.astype(visibility.window_times.remainders.dtype)
        * visibility.window_times.tick_size
        + visibility.window_times.remainders
    )
    query_keys = jnp.minimum(
        visibility.query_offset + jnp.arange(num_queries), num_keys - 1
    )
    earliest_query_end = jnp.min(
        key_ends[:, query_keys].reshape(len(key_ends), -1, options.queries), axis=-1
    )
    latest_key_end = jnp.max(key_ends.reshape(len(key_ends), -1, options.keys), axis=-1)
    # `key_ends` have lost digits; the mask inside of a block is exact, so a margin costs nothing.
    margin = 1e-5 * jnp.max(jnp.abs(key_ends)) + window_limit(
        visibility.window_times, visibility.window
    )
    is_in_window = earliest_query_end[:, :, None] - latest_key_end[:, None, :] < margin
    return is_causal & jnp.any(is_in_window, axis=0)


def block_ranges(reachable: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first true entry of each row, and the one after its last: int [rows] each."""
    num_blocks = reachable.shape[1]
    indices = jnp.arange(num_blocks, dtype=jnp.int32)
    begin = jnp.min(jnp.where(reachable, indices, num_blocks), axis=1)
    return begin, jnp.max(jnp.where(reachable, indices + 1, 0), axis=1)


def _scores(options: KernelOptions, q: jax.Array, k: jax.Array, dtype) -> jax.Array:
    """Scores [B, K, T, G, S] of one block, capped."""
    s = options.scale * jnp.einsum(
        "btkgh,bskh->bktgs", q, k, preferred_element_type=dtype
    )
    cap = options.softcap
    return s if cap is None else cap * jnp.tanh(s / cap)


def _mask(
    options: KernelOptions, visibility: Visibility, i: jax.Array, j: jax.Array
) -> jax.Array:
    """Which keys of block j the queries of block i see, for scores [B, K, T, G, S]."""
    query_indices = (
        visibility.query_offset + i * options.queries + jnp.arange(options.queries)
    )
    mask = visibility_mask(
        query_indices,
        j * options.keys + jnp.arange(options.keys),
        visibility.window_times,
        visibility.window,
    )
    mask = mask if mask.ndim == 3 else mask[None]
    return mask[:, None, :, None, :]


def _forward(
    options: KernelOptions, q, k, v, d, visibility: Visibility
) -> tuple[jax.Array, ...]:
    """y [B, T, K, G, H], and the maximum and the sum of each row, [B, T, K, G] each."""
    (num_batch, num_queries, num_kv_heads, group_size, head_width), num_keys = (
        q.shape,
        k.shape[1],
    )
    dtype, (_, log_d) = d.dtype, present_and_log(d)
    begin, end = block_ranges(
        reachable_blocks(visibility, options, num_queries, num_keys)
    )
    row_shape = (num_batch, num_kv_heads, options.queries, group_size)

    def add_key_block(i, q_i, j, state):
        row_max, row_sum, y = state
        s = _scores(options, q_i, _get_block(k, j, options.keys), dtype)
        s = s + _get_block(log_d, j, options.keys)[:, None, None, None, :]
        s = jnp.where(_mask(options, visibility, i, j), s, -jnp.inf)
        new_max = jnp.maximum(row_max, jnp.max(s, axis=-1))
        finite_max = jnp.where(jnp.isfinite(new_max), new_max, 0.0)
        p, rescaling = jnp.exp(s - finite_max[..., None]), jnp.exp(row_max - finite_max)
        v_j = _get_block(v, j, options.keys)
        update = jnp.einsum(
            "bktgs,bskh->bktgh", p.astype(v.dtype), v_j, preferred_element_type=dtype
        )
        return (
            new_max,
            rescaling * row_sum + jnp.sum(p, axis=-1),
            rescaling[..., None] * y + update,
        )

    def attend_query_block(i, carry):
        add_block = functools.partial(
            add_key_block, i, _get_block(q, i, options.queries)
        )
        zeros = jnp.zeros(row_shape, dtype), jnp.zeros((*row_shape, head_width), dtype)
        row_max, row_sum, y = lax.fori_loop(
            begin[i], end[i], add_block, (zeros[0] - jnp.inf, *zeros)
        )
        row_sum = jnp.where(row_sum > 0, row_sum, 1.0)
        updates = (
            y / row_sum[..., None],
            jnp.where(jnp.isfinite(row_max), row_max, 0.0),
            row_sum,
        )
        return tuple(
            _set_block(x, jnp.moveaxis(update, 1, 2), i, options.queries)
            for x, update in zip(carry, updates, strict=True)
        )

    zeros = jnp.zeros(q.shape[:-1], dtype)
    carry = jnp.zeros(q.shape, dtype), zeros, zeros
    return lax.fori_loop(0, num_queries // options.queries, attend_query_block, carry)


def _backward(options: KernelOptions, residuals, dy):
    """Gradients for q, k, v and d."""
    q, k, v, d, visibility, y, row_max, row_sum = residuals
    dtype, (is_present, _) = d.dtype, present_and_log(d)
    num_queries, num_keys = q.shape[1], k.shape[1]
    begin, end = block_ranges(
        reachable_blocks(visibility, options, num_queries, num_keys).T
    )
    dy_dot_y = jnp.sum(dy * y, axis=-1)  # dy . y, [B, T, K, G]
    dy = dy.astype(v.dtype)

    def add_query_block(j, keys, i, state):
        (k_j, v_j, d_j, is_present_j), (dq, dk, dv, dd) = keys, state
        q_i, dy_i = (_get_block(x, i, options.queries) for x in (q, dy))
        dy_dot_y_i, row_max_i, row_sum_i = (
            jnp.moveaxis(_get_block(x, i, options.queries), 1, 2)[..., None]
            for x in (dy_dot_y, row_max, row_sum)
        )
        s = _scores(options, q_i, k_j, dtype)
        e = jnp.exp(clamp_for_absent_keys(s - row_max_i, is_present_j)) / row_sum_i
        e = jnp.where(_mask(options, visibility, i, j), e, 0.0)
        g = jnp.einsum("btkgh,bskh->bktgs", dy_i, v_j, preferred_element_type=dtype)
        g = e * (g - dy_dot_y_i)
        ds = d_j * g
        if options.softcap is not None:
            ds = ds * (1.0 - jnp.square(s / options.softcap))
        p, ds = (d_j * e).astype(v.dtype), (options.scale * ds).astype(q.dtype)
        multiply = functools.partial(jnp.einsum, preferred_element_type=dtype)
        dq_i = _get_block(dq, i, options.queries) + multiply(
            "bktgs,bskh->btkgh", ds, k_j
        )
        dk = dk + multiply("bktgs,btkgh->bskh", ds, q_i)
        dv = dv + multiply("bktgs,btkgh->bskh", p, dy_i)
        return (
            _set_block(dq, dq_i, i, options.queries),
            dk,
            dv,
            dd + jnp.sum(g, axis=(1, 2, 3)),
        )

    def differentiate_key_block(j, carry):
        k_j, v_j, d_j, is_present_j = (
            _get_block(x, j, options.keys) for x in (k, v, d, is_present)
        )
        key_block = (
            k_j,
            v_j,
            d_j[:, None, None, None, :],
            is_present_j[:, None, None, None, :],
        )
        dq, *key_gradients = carry
        zeros = [jnp.zeros(x.shape, dtype) for x in (k_j, v_j, d_j)]
        state = lax.fori_loop(
            begin[j],
            end[j],
            functools.partial(add_query_block, j, key_block),
            (dq, *zeros),
        )
        return state[0], *(
            _set_block(x, gradient, j, options.keys)
            for x, gradient in zip(key_gradients, state[1:], strict=True)
        )

    carry = (
        jnp.zeros(q.shape, dtype),
        jnp.zeros_like(k),
        jnp.zeros_like(v),
        jnp.zeros_like(d),
    )
    dq, dk, dv, dd = lax.fori_loop(
        0, num_keys // options.keys, differentiate_key_block, carry
    )
    return dq.astype(q.dtype), dk, dv, dd, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: KernelOptions, q, k, v, d, visibility: Visibility) -> jax.Array:
    return _forward(options, q, k, v, d, visibility)[0]


def _attend_with_residuals(options: KernelOptions, q, k, v, d, visibility: Visibility):
    y, row_max, row_sum = _forward(options, q, k, v, d, visibility)
    return y, (q, k, v, d, visibility, y, row_max, row_sum)


_attend.defvjp(_attend_with_residuals, _backward)
