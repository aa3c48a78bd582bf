"""Attention over weighted keys by a kernel of our own, for TPUs and GPUs: O(T + S) memory.

It does all that the blocked form does, by the same formulas (see `blocked`), but keeps scores in a
core's own memory. A program of the grid has one block of queries, or, for the gradients of keys and
weights, one of keys, and loops over the blocks of the others that are in sight. In the latter the
scores are transposed: what belongs to a query lies along the last axis, as it is stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import ArrayLike

from continuous_lm.attention import blocked
from continuous_lm.attention.blocked import KernelOptions
from continuous_lm.attention.softmax import clamp_for_absent_keys, present_and_log
from continuous_lm.attention.visibility import WindowTimes, window_limit

BLOCK_SIZE = 128  # tokens in a block: a TPU's lanes
MIN_CHANNELS = 16  # channels that a GPU multiplies at once


class TokenPositions(NamedTuple):
    """Where queries [B, T], or keys [B, S], stand, and with an axis for the others."""

    key_index: jax.Array  # its own key's index
    ticks: Any = None  # of `WindowTimes`, for the window
    remainders: Any = None


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
) -> jax.Array:
    """What `dense.attend` gives, from such arguments as `why_unsupported` lets through."""
    num_queries, head_shape = q.shape[-4], q.shape[-3:]
    batch_shape, (q, k, v, key_weights, *time_arrays) = blocked.flatten_batch(
        q, k, v, key_weights, *(window_times or ())
    )
    channel_padding = [(0, 0)] * 3 + [
        (0, max(pl.next_power_of_2(head_shape[-1]), MIN_CHANNELS) - head_shape[-1])
    ]
    q = jnp.moveaxis(_pad_to_blocks(q), 1, 3)  # [B, K, G, T, H]
    k, v = (jnp.moveaxis(_pad_to_blocks(x), 1, 2) for x in (k, v))  # [B, K, S, H]
    q, k, v = (
        jnp.pad(q, [(0, 0), *channel_padding]),
        jnp.pad(k, channel_padding),
        jnp.pad(v, channel_padding),
    )
    if window_times is not None:
        ticks, remainders, tick_size = time_arrays
        window_times = WindowTimes(
            _pad_to_blocks(ticks, "edge"), _pad_to_blocks(remainders, "edge"), tick_size
        )
    visibility = blocked.Visibility(
        jnp.asarray(query_offset),
        window_times,
        None if window is None else jnp.asarray(window),
    )
    y = _attend(
        KernelOptions(scale, softcap, BLOCK_SIZE, BLOCK_SIZE),
        q,
        k,
        v,
        _pad_to_blocks(key_weights),
        visibility,
    )
    y = jnp.moveaxis(y, 3, 1)[:, :num_queries, ..., : head_shape[-1]]
    return y.reshape(*batch_shape, num_queries, *head_shape)


def why_unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    window_times: WindowTimes | None,
    query_offset: ArrayLike,
) -> str | None:
    """Why the kernel does not take arguments of `dense.attend`, if it does not."""
    del q, k, v, key_weights, window, window_times, query_offset
    for name, value in {"scale": scale, "softcap": softcap}.items():
        if isinstance(value, jax.Array):
            return f"{name} is an array; the kernel needs a number"
    return None


def _pad_to_blocks(x: jax.Array, mode: str = "constant") -> jax.Array:
    return blocked.pad_to_blocks(x, BLOCK_SIZE, mode)


# --- What the programs of the grid do -----------------------------------------------------------


def _visibility_mask(
    query_positions: TokenPositions, key_positions: TokenPositions, tick_and_limit
) -> jax.Array:
    """Which keys the queries see: `visibility.visibility_mask` for what is in a core's memory."""
    is_causal = key_positions.key_index <= query_positions.key_index
    if tick_and_limit is None:
        return is_causal
    tick_size, limit = tick_and_limit
    ticks, remainders = (
        query_positions.ticks - key_positions.ticks,
        query_positions.remainders - key_positions.remainders,
    )
    return is_causal & (
        ticks.astype(remainders.dtype) * tick_size[...] + remainders < limit[...]
    )


def _matmul(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype) -> jax.Array:
    return lax.dot_general(
        x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype
    )


def _scores_and_slope(
    options: KernelOptions, s: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Scores s from products, and their derivative up to `scale`."""
    s, cap = options.scale * s, options.softcap
    if cap is None:
        return s, 1.0
    s = jnp.tanh(s / cap)
    return cap * s, 1.0 - jnp.square(s)


def _loop_over_blocks(bounds, step, state):
    """`step(i, state)` for the blocks i between the bounds, which are [1, 1] each."""
    begin, end = (jnp.max(bound[...]) for bound in bounds)
    return lax.fori_loop(begin, end, step, state)


def _get_block(per_token, i, block_size: int):
    """Block i of what lies along the last axis."""
    return jax.tree.map(
        lambda x: x[:, pl.ds(pl.multiple_of(i * block_size, block_size), block_size)],
        per_token,
    )


def _forward(
    options: KernelOptions,
    q,
    k,
    v,
    d,
    query_positions,
    key_positions,
    tick_and_limit,
    bounds,
    y,
    row_max,
    row_sum,
) -> None:
    """y, and the maximum and the sum of each row, of a block of queries."""
    dtype, block_size = d.dtype, options.keys
    query_positions = jax.tree.map(lambda x: x[...], query_positions)

    def add_key_block(j, state):
        peak, total, y = state
        block_rows = pl.ds(pl.multiple_of(j * block_size, block_size), block_size)
        s, _ = _scores_and_slope(
            options, _matmul(q[...], k[block_rows, :], (1, 1), dtype)
        )
        s = s + present_and_log(d[:, block_rows])[1]
        s = jnp.where(
            _visibility_mask(
                query_positions,
                _get_block(key_positions, j, block_size),
                tick_and_limit,
            ),
            s,
            -jnp.inf,
        )
        new_max = jnp.maximum(peak, jnp.max(s, axis=1, keepdims=True))
        finite_max = jnp.where(new_max > -jnp.inf, new_max, 0.0)
        p, rescaling = jnp.exp(s - finite_max), jnp.exp(peak - finite_max)
        y = rescaling * y + _matmul(p.astype(v.dtype), v[block_rows, :], (1, 0), dtype)
        return new_max, rescaling * total + jnp.sum(p, axis=1, keepdims=True), y

    zeros = jnp.zeros((q.shape[0], 1), dtype)
    state = zeros - jnp.inf, zeros, jnp.zeros(q.shape, dtype)
    final_max, final_sum, weighted_sum = _loop_over_blocks(bounds, add_key_block, state)
    final_sum = jnp.where(final_sum > 0, final_sum, 1.0)
    y[...] = (weighted_sum / final_sum).astype(y.dtype)
    row_max[...] = jnp.where(final_max > -jnp.inf, final_max, 0.0)
    row_sum[...] = final_sum


def _backward_queries(
    options: KernelOptions,
    q,
    k,
    v,
    d,
    query_positions,
    key_positions,
    tick_and_limit,
    bounds,
    dy,
    dy_dot_y,
    row_max,
    row_sum,
    dq,
) -> None:
    """The gradient for a block of queries."""
    dtype, block_size = d.dtype, options.keys
    query_positions = jax.tree.map(lambda x: x[...], query_positions)

    def add_key_block(j, dq):
        block_rows = pl.ds(pl.multiple_of(j * block_size, block_size), block_size)
        s, slope = _scores_and_slope(
            options, _matmul(q[...], k[block_rows, :], (1, 1), dtype)
        )
        d_j = d[:, block_rows]
        e = (
            jnp.exp(clamp_for_absent_keys(s - row_max[...], present_and_log(d_j)[0]))
            / row_sum[...]
        )
        e = jnp.where(
            _visibility_mask(
                query_positions,
                _get_block(key_positions, j, block_size),
                tick_and_limit,
            ),
            e,
            0.0,
        )
        g = e * (_matmul(dy[...], v[block_rows, :], (1, 1), dtype) - dy_dot_y[...])
        ds = (options.scale * slope * d_j * g).astype(k.dtype)
        return dq + _matmul(ds, k[block_rows, :], (1, 0), dtype)

    dq[...] = _loop_over_blocks(
        bounds, add_key_block, jnp.zeros(q.shape, dtype)
    ).astype(dq.dtype)


def _backward_keys(
    options: KernelOptions,
    q,
    k,
    v,
    d,
    query_positions,
    key_positions,
    tick_and_limit,
    bounds,
    dy,
    dy_dot_y,
    row_max,
    row_sum,
    *gradient_refs,
) -> None:
    """The gradients for a block of keys, its values and its weights; scores are [S, T]."""
    dtype, block_size = d.dtype, options.queries
    key_positions, d_j = jax.tree.map(lambda x: x[...], key_positions), d[...]
    is_present, _ = present_and_log(d_j)

    def add_query_block(i, state):
        mask = _visibility_mask(
            _get_block(query_positions, i, block_size), key_positions, tick_and_limit
        )
        block_rows = pl.ds(pl.multiple_of(i * block_size, block_size), block_size)

        def add_head(group, state):
            dk, dv, dd = state
            q_i, dy_i = q[group, block_rows, :], dy[group, block_rows, :]
            dy_dot_y_i, row_max_i, row_sum_i = (
                x[group, :, block_rows] for x in (dy_dot_y, row_max, row_sum)
            )
            s, slope = _scores_and_slope(options, _matmul(k[...], q_i, (1, 1), dtype))
            e = jnp.where(
                mask,
                jnp.exp(clamp_for_absent_keys(s - row_max_i, is_present)) / row_sum_i,
                0.0,
            )
            g = e * (_matmul(v[...], dy_i, (1, 1), dtype) - dy_dot_y_i)
            ds = (options.scale * slope * d_j * g).astype(q.dtype)
            dk = dk + _matmul(ds, q_i, (1, 0), dtype)
            dv = dv + _matmul((d_j * e).astype(dy.dtype), dy_i, (1, 0), dtype)
            return dk, dv, dd + jnp.sum(g, axis=1, keepdims=True)

        return lax.fori_loop(0, q.shape[0], add_head, state)

    zeros = [jnp.zeros(x.shape, dtype) for x in (k, v, d)]
    for gradient_ref, gradient in zip(
        gradient_refs,
        _loop_over_blocks(bounds, add_query_block, tuple(zeros)),
        strict=True,
    ):
        gradient_ref[...] = gradient.astype(gradient_ref.dtype)


# --- How they are called -------------------------------------------------------------------------


def _positions_and_reachable(
    options: KernelOptions, q: jax.Array, k: jax.Array, visibility: blocked.Visibility
):
    """Queries and keys as `TokenPositions`, the window's tick and limit, and `reachable_blocks`.

    q is [B, K, G, T, H] and k [B, K, S, H].
    """
    num_queries, num_keys = q.shape[3], k.shape[2]
    reachable = blocked.reachable_blocks(visibility, options, num_queries, num_keys)
    query_indices = (visibility.query_offset + jnp.arange(num_queries)).astype(
        jnp.int32
    )
    query_positions, key_positions = (
        TokenPositions(jnp.broadcast_to(indices, (len(q), *indices.shape)))
        for indices in (query_indices, jnp.arange(num_keys, dtype=jnp.int32))
    )
    if visibility.window_times is None or visibility.window is None:
        return query_positions, key_positions, None, reachable
    ticks, remainders, tick_size = visibility.window_times
    query_keys = jnp.minimum(query_indices, num_keys - 1)
    limit = jnp.broadcast_to(
        window_limit(visibility.window_times, visibility.window).astype(
            tick_size.dtype
        ),
        tick_size.shape,
    )
    query_positions = TokenPositions(
        query_positions.key_index, ticks[:, query_keys], remainders[:, query_keys]
    )
    return (
        query_positions,
        TokenPositions(key_positions.key_index, ticks, remainders),
        (tick_size[:, None], limit[:, None]),
        reachable,
    )


def _run_grid(
    options: KernelOptions,
    kernel,
    grid_axes: str,
    grid_shape: tuple[int, ...],
    inputs,
    outputs,
) -> Any:
    """Runs `kernel(options, ...)` on each point of a grid whose axes have these letters.

    Inputs, and what outputs look like, come with letters for their axes. A point of the grid has
    its own entry of the grid's axes, but its own block of the last, "t" or "s"; of "#" it has the
    entry for that block, and of "." everything.
    """
    block_axis = grid_axes[-1]
    block_size = {"t": options.queries, "s": options.keys}[block_axis]

    def block_spec(letters: str, x) -> pl.BlockSpec:
        sizes = dict.fromkeys(grid_axes + "#") | {block_axis: block_size}
        block_shape = [
            sizes.get(a, size) for a, size in zip(letters, x.shape, strict=True)
        ]
        grid_places = [grid_axes.find(a) for a in letters.replace("#", block_axis)]
        return pl.BlockSpec(
            block_shape,
            lambda *point: tuple(0 if i < 0 else point[i] for i in grid_places),
        )

    def run_kernel(*arrays, **kernel_options):
        return pl.pallas_call(
            functools.partial(kernel, options),
            grid=grid_shape,
            in_specs=[
                jax.tree.map(functools.partial(block_spec, a), x) for a, x in inputs
            ],
            out_specs=[block_spec(a, x) for a, x in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
            **kernel_options,
        )(*arrays)

    return lax.platform_dependent(
        *(x for _, x in inputs),
        cpu=functools.partial(run_kernel, interpret=True),
        cuda=functools.partial(run_kernel, compiler_params=triton.CompilerParams()),
        default=run_kernel,
    )


def _as_column(per_token):
    """What belongs to tokens, with an axis behind theirs."""
    return jax.tree.map(lambda x: x[..., None], per_token)


def _as_row(per_token):
    """What belongs to tokens, with an axis in front of theirs."""
    return jax.tree.map(lambda x: x[..., None, :], per_token)


def _block_ranges(reachable: jax.Array) -> tuple[jax.Array, ...]:
    """The first block in sight of each, and the one after its last, [blocks, 1, 1] each."""
    return tuple(x[:, None, None] for x in blocked.block_ranges(reachable))


def _run_by_query_block(
    options: KernelOptions,
    kernel,
    q,
    k,
    v,
    d,
    visibility: blocked.Visibility,
    per_query,
    outputs,
) -> Any:
    """Runs a kernel on blocks of queries; `per_query` and `outputs` are [B, K, G, T, ...]."""
    query_positions, key_positions, tick_and_limit, reachable = (
        _positions_and_reachable(options, q, k, visibility)
    )
    inputs = [
        ("bkgt.", q),
        ("bk..", k),
        ("bk..", v),
        ("b..", _as_row(d)),
        ("bt.", _as_column(query_positions)),
        ("b..", _as_row(key_positions)),
        ("b..", tick_and_limit),
        ("#..", _block_ranges(reachable)),
        *(("bkgt.", x) for x in per_query),
    ]
    outputs = [("bkgt.", x) for x in outputs]
    grid_shape = *q.shape[:3], q.shape[3] // options.queries
    return _run_grid(options, kernel, "bkgt", grid_shape, inputs, outputs)


def _run_by_key_block(
    options: KernelOptions,
    kernel,
    q,
    k,
    v,
    d,
    visibility: blocked.Visibility,
    dy,
    row_statistics,
    outputs,
) -> Any:
    """Runs a kernel on blocks of keys; `outputs` are like [B, K, S, ...]."""
    query_positions, key_positions, tick_and_limit, reachable = (
        _positions_and_reachable(options, q, k, visibility)
    )
    inputs = [
        ("bk...", q),
        ("bks.", k),
        ("bks.", v),
        ("bs.", _as_column(d)),
        ("b..", _as_row(query_positions)),
        ("bs.", _as_column(key_positions)),
        ("b..", tick_and_limit),
        ("#..", _block_ranges(reachable.T)),
        ("bk...", dy),
        *(("bk...", _as_row(x)) for x in row_statistics),
    ]
    outputs = [("bks.", x) for x in outputs]
    grid_shape = *k.shape[:2], k.shape[2] // options.keys
    return _run_grid(options, kernel, "bks", grid_shape, inputs, outputs)


def _attend_with_residuals(
    options: KernelOptions, q, k, v, d, visibility: blocked.Visibility
):
    """y [B, K, G, T, H] in the dtype of d, and what the backward pass needs."""
    y = jax.ShapeDtypeStruct(q.shape, d.dtype)
    row_struct = jax.ShapeDtypeStruct((*q.shape[:4], 1), d.dtype)
    y, row_max, row_sum = _run_by_query_block(
        options, _forward, q, k, v, d, visibility, (), (y, row_struct, row_struct)
    )
    return y, (q, k, v, d, visibility, y, row_max[..., 0], row_sum[..., 0])


def _backward(options: KernelOptions, residuals, dy):
    """Gradients for q, k, v and d."""
    q, k, v, d, visibility, y, row_max, row_sum = residuals
    arrays = q, k, v, d, visibility
    row_statistics = jnp.sum(dy * y, axis=-1), row_max, row_sum  # dy . y first
    dy = dy.astype(v.dtype)
    per_query = dy, *(_as_column(x) for x in row_statistics)
    (dq,) = _run_by_query_block(options, _backward_queries, *arrays, per_query, (q,))
    dd = jax.ShapeDtypeStruct((*k.shape[:3], 1), d.dtype)
    dk, dv, dd = _run_by_key_block(
        options, _backward_keys, *arrays, dy, row_statistics, (k, v, dd)
    )
    return dq, dk, dv, jnp.sum(dd[..., 0], axis=1), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: KernelOptions, q, k, v, d, visibility: blocked.Visibility
) -> jax.Array:
    return _attend_with_residuals(options, q, k, v, d, visibility)[0]


_attend.defvjp(_attend_with_residuals, _backward)
