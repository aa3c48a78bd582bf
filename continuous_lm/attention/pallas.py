"""Attention over weighted keys by a Pallas kernel, for TPUs and GPUs: O(T + S) memory.

It uses the formulas of the blocked form (see `blocked`), but keeps scores in the on-chip memory of
a core. A program of the grid has one block of queries and loops over the visible blocks of keys.
For the gradients of keys and weights it has one block of keys and loops over the blocks of queries
that see it. There the scores are transposed: values of queries lie along the last axis, as stored.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from continuous_lm.attention import blocked
from continuous_lm.attention.blocked import KernelArrays, KernelOptions, Visibility
from continuous_lm.attention.problem import AttentionProblem, find_array
from continuous_lm.attention.softmax import (
    clamp_for_absent_keys,
    present_and_log,
    softcap,
    softcap_and_slope,
)
from continuous_lm.attention.visibility import window_limit

BLOCK_SIZE = 128  # tokens in a block: a TPU's lanes
MIN_CHANNELS = 16  # channels that a GPU multiplies at once

Tree = TypeVar("Tree")  # of arrays, or of references to them
ThreeArrays = tuple[jax.Array, jax.Array, jax.Array]


class TokenPositions(NamedTuple):
    """Indices and times of queries [B, T] or keys [B, S], with an axis to broadcast."""

    key_index: jax.Array  # its own key's index
    ticks: Any = None  # of `WindowTimes`, for the window
    remainders: Any = None


class KernelInputs(NamedTuple):
    """Inputs of a program of the grid: references to its part of each array.

    The same class also holds the whole arrays, and the letters of their axes.
    """

    q: Any
    k: Any
    v: Any
    key_weights: Any
    query_positions: Any  # `TokenPositions`
    key_positions: Any  # `TokenPositions`
    tick_and_limit: Any  # of the window, or None
    block_range: (
        Any  # the first block of the others in sight, and the one after the last
    )
    rows: Any  # `RowArrays` for the gradients, else None


class RowArrays(NamedTuple):
    """Residuals and gradients of the rows of scores."""

    dy: Any
    dy_dot_y: Any
    row_max: Any
    row_sum: Any


class Grid(NamedTuple):
    """The axes of a grid, of inputs and of outputs, a letter each.

    A point of the grid gets one entry of each axis, but a block of the last axis, "t" or "s". On
    "#" it gets the entry of that block, and on "." the whole axis.
    """

    axes: str
    inputs: KernelInputs
    outputs: str


class Residuals(NamedTuple):
    """Residuals of the backward pass."""

    arrays: KernelArrays
    visibility: Visibility
    y: jax.Array  # [B, K, G, T, H]
    row_max: jax.Array  # [B, K, G, T]
    row_sum: jax.Array  # [B, K, G, T]


BY_QUERY_BLOCK = Grid(
    axes="bkgt",
    inputs=KernelInputs(
        q="bkgt.",
        k="bk..",
        v="bk..",
        key_weights="b..",
        query_positions="bt.",
        key_positions="b..",
        tick_and_limit="b..",
        block_range="#..",
        rows="bkgt.",
    ),
    outputs="bkgt.",
)
BY_KEY_BLOCK = Grid(
    axes="bks",
    inputs=KernelInputs(
        q="bk...",
        k="bks.",
        v="bks.",
        key_weights="bs.",
        query_positions="b..",
        key_positions="bs.",
        tick_and_limit="b..",
        block_range="#..",
        rows="bk...",
    ),
    outputs="bks.",
)


def attend(problem: AttentionProblem) -> jax.Array:
    """The result of `dense.attend`, for a problem that `why_unsupported` lets through."""
    options = KernelOptions(
        scale=problem.static_scale,
        softcap=problem.static_softcap,
        query_block=BLOCK_SIZE,
        key_block=BLOCK_SIZE,
    )
    batch_shape, flat_problem = problem.flatten_batch()
    num_queries, *head_shape = flat_problem.q.shape[1:]
    head_width = problem.head_width
    arrays = KernelArrays(
        q=_pad_channels(
            jnp.moveaxis(_pad_to_blocks(flat_problem.q), 1, 3)
        ),  # [B, K, G, T, H]
        k=_pad_channels(
            jnp.moveaxis(_pad_to_blocks(flat_problem.k), 1, 2)
        ),  # [B, K, S, H]
        v=_pad_channels(
            jnp.moveaxis(_pad_to_blocks(flat_problem.v), 1, 2)
        ),  # [B, K, S, H]
        key_weights=_pad_to_blocks(flat_problem.key_weights),
    )
    visibility = blocked.make_visibility(flat_problem, BLOCK_SIZE)
    y = jnp.moveaxis(_attend(options, arrays, visibility), 3, 1)
    y = y[:, :num_queries, ..., :head_width]
    return y.reshape(*batch_shape, num_queries, *head_shape)


def why_unsupported(problem: AttentionProblem) -> str | None:
    """Return the reason why the kernel does not support a problem, or None."""
    name = find_array({"scale": problem.scale, "softcap": problem.softcap})
    return None if name is None else f"{name} is an array; the kernel needs a number"


def _pad_to_blocks(x: jax.Array) -> jax.Array:
    return blocked.pad_to_blocks(x, BLOCK_SIZE)


def _pad_channels(x: jax.Array) -> jax.Array:
    """x [..., H] with as many channels as a GPU multiplies."""
    head_width = x.shape[-1]
    num_channels = max(pl.next_power_of_2(head_width), MIN_CHANNELS)
    padding = [(0, 0)] * x.ndim
    padding[-1] = (0, num_channels - head_width)
    return jnp.pad(x, padding)


# --- Programs of the grid -----------------------------------------------------------------------


def _visibility_mask(
    query_positions: TokenPositions,
    key_positions: TokenPositions,
    tick_and_limit: Any,
) -> jax.Array:
    """Return `visibility.visibility_mask` of the queries and keys in a core's memory."""
    is_causal = key_positions.key_index <= query_positions.key_index
    if tick_and_limit is None:
        return is_causal
    tick_size, limit = tick_and_limit
    ticks = query_positions.ticks - key_positions.ticks
    remainders = query_positions.remainders - key_positions.remainders
    elapsed_times = ticks.astype(remainders.dtype) * tick_size[...] + remainders
    return is_causal & (elapsed_times < limit[...])


def _matmul(
    x: jax.Array,
    y: jax.Array,
    axes: tuple[int, int],
    dtype: DTypeLike,
) -> jax.Array:
    """The product that sums over these axes of x and y."""
    contracting = ((axes[0],), (axes[1],))
    return lax.dot_general(x, y, (contracting, ((), ())), preferred_element_type=dtype)


def _loop_over_blocks(
    block_range: Any,
    step: Callable[[jax.Array, Tree], Tree],
    state: Tree,
) -> Tree:
    """`step(i, state)` for the blocks i of the range, whose ends are [1, 1] each."""
    begin, end = block_range
    return lax.fori_loop(jnp.max(begin[...]), jnp.max(end[...]), step, state)


def _read(references: Tree) -> Tree:
    """The values of a tree of references."""
    return jax.tree.map(lambda reference: reference[...], references)


def _write(references: Any, values: Any) -> None:
    for reference, value in zip(references, values, strict=True):
        reference[...] = value.astype(reference.dtype)


def _block_slice(i: jax.Array, block_size: int) -> slice | pl.Slice:
    """The entries of block i."""
    return pl.ds(pl.multiple_of(i * block_size, block_size), block_size)


def _get_block(
    per_token: Tree,
    i: jax.Array,
    block_size: int,
) -> Tree:
    """Return block i along the last axis."""
    entries = _block_slice(i, block_size)
    return jax.tree.map(lambda reference: reference[:, entries], per_token)


def _forward(options: KernelOptions, inputs: KernelInputs, *outputs: Any) -> None:
    """y, and the maximum and the sum of each row, of a block of queries."""
    q, k, v, key_weights = inputs[:4]
    dtype, block_size = key_weights.dtype, options.key_block
    query_positions = _read(inputs.query_positions)

    def add_key_block(j: jax.Array, state: ThreeArrays) -> ThreeArrays:
        row_max, row_sum, y = state
        entries = _block_slice(j, block_size)
        products = options.scale * _matmul(q[...], k[entries, :], (1, 1), dtype)
        _, log_weights = present_and_log(key_weights[:, entries])
        mask = _visibility_mask(
            query_positions,
            _get_block(inputs.key_positions, j, block_size),
            inputs.tick_and_limit,
        )
        scores = softcap(products, options.softcap) + log_weights
        scores = jnp.where(mask, scores, -jnp.inf)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1, keepdims=True))
        finite_max = jnp.where(new_max > -jnp.inf, new_max, 0.0)
        p = jnp.exp(scores - finite_max)
        rescaling = jnp.exp(row_max - finite_max)
        update = _matmul(p.astype(v.dtype), v[entries, :], (1, 0), dtype)
        row_sum = rescaling * row_sum + jnp.sum(p, axis=1, keepdims=True)
        return new_max, row_sum, rescaling * y + update

    zeros = jnp.zeros((q.shape[0], 1), dtype)
    state = zeros - jnp.inf, zeros, jnp.zeros(q.shape, dtype)
    row_max, row_sum, y = _loop_over_blocks(inputs.block_range, add_key_block, state)
    row_sum = jnp.where(row_sum > 0, row_sum, 1.0)
    row_max = jnp.where(row_max > -jnp.inf, row_max, 0.0)
    _write(outputs, (y / row_sum, row_max, row_sum))


def _backward_queries(
    options: KernelOptions, inputs: KernelInputs, *outputs: Any
) -> None:
    """The gradient for a block of queries."""
    q, k, v, key_weights = inputs[:4]
    dy, dy_dot_y, row_max, row_sum = inputs.rows
    dtype, block_size = key_weights.dtype, options.key_block
    query_positions = _read(inputs.query_positions)

    def add_key_block(j: jax.Array, dq: jax.Array) -> jax.Array:
        entries = _block_slice(j, block_size)
        products = options.scale * _matmul(q[...], k[entries, :], (1, 1), dtype)
        scores, slope = softcap_and_slope(products, options.softcap)
        weights = key_weights[:, entries]
        is_present, _ = present_and_log(weights)
        mask = _visibility_mask(
            query_positions,
            _get_block(inputs.key_positions, j, block_size),
            inputs.tick_and_limit,
        )
        exponent = clamp_for_absent_keys(scores - row_max[...], is_present)
        e = jnp.where(mask, jnp.exp(exponent) / row_sum[...], 0.0)
        dp = _matmul(dy[...], v[entries, :], (1, 1), dtype)
        g = e * (dp - dy_dot_y[...])
        ds = (options.scale * slope * weights * g).astype(k.dtype)
        return dq + _matmul(ds, k[entries, :], (1, 0), dtype)

    dq = jnp.zeros(q.shape, dtype)
    _write(outputs, (_loop_over_blocks(inputs.block_range, add_key_block, dq),))


def _backward_keys(options: KernelOptions, inputs: KernelInputs, *outputs: Any) -> None:
    """The gradients for a block of keys, its values and its weights; scores are [S, T]."""
    q, k, v, key_weights = inputs[:4]
    dtype, block_size = key_weights.dtype, options.query_block
    key_positions = _read(inputs.key_positions)
    weights = key_weights[...]
    is_present, _ = present_and_log(weights)

    def add_query_block(i: jax.Array, gradients: ThreeArrays) -> ThreeArrays:
        entries = _block_slice(i, block_size)
        mask = _visibility_mask(
            _get_block(inputs.query_positions, i, block_size),
            key_positions,
            inputs.tick_and_limit,
        )

        def add_head(head: jax.Array, gradients: ThreeArrays) -> ThreeArrays:
            dk, dv, dd = gradients
            q_i = q[head, entries, :]
            dy_i = inputs.rows.dy[head, entries, :]
            dy_dot_y = inputs.rows.dy_dot_y[head, :, entries]
            row_max = inputs.rows.row_max[head, :, entries]
            row_sum = inputs.rows.row_sum[head, :, entries]
            products = options.scale * _matmul(k[...], q_i, (1, 1), dtype)
            scores, slope = softcap_and_slope(products, options.softcap)
            exponent = clamp_for_absent_keys(scores - row_max, is_present)
            e = jnp.where(mask, jnp.exp(exponent) / row_sum, 0.0)
            g = e * (_matmul(v[...], dy_i, (1, 1), dtype) - dy_dot_y)
            ds = (options.scale * slope * weights * g).astype(q.dtype)
            p = (weights * e).astype(dy_i.dtype)
            dk = dk + _matmul(ds, q_i, (1, 0), dtype)
            dv = dv + _matmul(p, dy_i, (1, 0), dtype)
            return dk, dv, dd + jnp.sum(g, axis=1, keepdims=True)

        return lax.fori_loop(0, q.shape[0], add_head, gradients)

    zeros = (
        jnp.zeros(k.shape, dtype),
        jnp.zeros(v.shape, dtype),
        jnp.zeros(key_weights.shape, dtype),
    )
    _write(outputs, _loop_over_blocks(inputs.block_range, add_query_block, zeros))


# --- How they are called -------------------------------------------------------------------------


def _run_grid(
    grid: Grid,
    options: KernelOptions,
    kernel: Callable[..., None],
    inputs: KernelInputs,
    outputs: tuple[jax.ShapeDtypeStruct | jax.Array, ...],
) -> list[jax.Array]:
    """Run `kernel(options, inputs, *outputs)` on each point of the grid; `outputs` are shapes."""
    *batch_sizes, num_tokens, _ = outputs[0].shape
    make_spec = functools.partial(_block_spec, grid, options)
    input_specs = KernelInputs(
        *(
            jax.tree.map(functools.partial(make_spec, letters), part)
            for letters, part in zip(grid.inputs, inputs, strict=True)
        )
    )

    def run_kernel(inputs: KernelInputs, **kernel_options: Any) -> list[jax.Array]:
        return pl.pallas_call(
            functools.partial(kernel, options),
            grid=(*batch_sizes, num_tokens // _block_size(grid, options)),
            in_specs=[input_specs],
            out_specs=[make_spec(grid.outputs, output) for output in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            **kernel_options,
        )(inputs)

    return lax.platform_dependent(
        inputs,
        cpu=functools.partial(run_kernel, interpret=True),
        cuda=functools.partial(run_kernel, compiler_params=triton.CompilerParams()),
        default=run_kernel,
    )


def _block_size(grid: Grid, options: KernelOptions) -> int:
    """Tokens in a block of the grid's last axis."""
    sizes = {"t": options.query_block, "s": options.key_block}
    return sizes[grid.axes[-1]]


def _block_spec(
    grid: Grid,
    options: KernelOptions,
    letters: str,
    array: Any,
) -> pl.BlockSpec:
    """Return the block specification of an array with these letters; see `Grid`."""
    block_axis = grid.axes[-1]
    block_sizes: dict[str, int | None] = dict.fromkeys((*grid.axes, "#"))
    block_sizes[block_axis] = _block_size(grid, options)
    block_shape = [
        block_sizes.get(letter, size)
        for letter, size in zip(letters, array.shape, strict=True)
    ]
    grid_places = [grid.axes.find(a) for a in letters.replace("#", block_axis)]
    return pl.BlockSpec(
        block_shape,
        lambda *point: tuple(0 if place < 0 else point[place] for place in grid_places),
    )


def _as_column(per_token: Tree) -> Tree:
    """Add a last axis to values of tokens."""
    return jax.tree.map(lambda x: x[..., None], per_token)


def _as_row(per_token: Tree) -> Tree:
    """Add an axis before the last to values of tokens."""
    return jax.tree.map(lambda x: x[..., None, :], per_token)


def _block_range(reachable: jax.Array) -> tuple[jax.Array, ...]:
    """The first block in sight of each, and the one after its last, [blocks, 1, 1] each."""
    return tuple(x[:, None, None] for x in blocked.block_ranges(reachable))


def _token_positions(
    arrays: KernelArrays, visibility: Visibility
) -> tuple[TokenPositions, TokenPositions]:
    """Return the positions of queries [B, K, G, T, H] and keys [B, K, S, H]."""
    query_offset, window_times, window = visibility
    num_batch, _, _, num_queries, _ = arrays.q.shape
    num_keys = arrays.k.shape[2]
    query_indices = (query_offset + jnp.arange(num_queries)).astype(jnp.int32)
    key_indices = jnp.arange(num_keys, dtype=jnp.int32)
    queries = TokenPositions(jnp.broadcast_to(query_indices, (num_batch, num_queries)))
    keys = TokenPositions(jnp.broadcast_to(key_indices, (num_batch, num_keys)))
    if window_times is None or window is None:
        return queries, keys
    ticks, remainders, _ = window_times
    query_keys = jnp.minimum(query_indices, num_keys - 1)
    queries = queries._replace(
        ticks=ticks[:, query_keys], remainders=remainders[:, query_keys]
    )
    return queries, keys._replace(ticks=ticks, remainders=remainders)


def _tick_and_limit(
    visibility: Visibility,
) -> tuple[jax.Array, jax.Array] | None:
    """Tick size and limit of the window, [B, 1, 1] each, if there is one."""
    _, window_times, window = visibility
    if window_times is None or window is None:
        return None
    tick_size = window_times.tick_size
    limit = window_limit(window_times, window).astype(tick_size.dtype)
    limit = jnp.broadcast_to(limit, tick_size.shape)
    return tick_size[:, None], limit[:, None]


def _reachable_blocks(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
) -> jax.Array:
    num_queries, num_keys = arrays.q.shape[3], arrays.k.shape[2]
    return blocked.reachable_blocks(visibility, options, num_queries, num_keys)


def _inputs_by_query_block(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
    rows: RowArrays | None = None,
) -> KernelInputs:
    """The inputs for `BY_QUERY_BLOCK`; rows are [B, K, G, T, ...]."""
    query_positions, key_positions = _token_positions(arrays, visibility)
    return KernelInputs(
        q=arrays.q,
        k=arrays.k,
        v=arrays.v,
        key_weights=_as_row(arrays.key_weights),
        query_positions=_as_column(query_positions),
        key_positions=_as_row(key_positions),
        tick_and_limit=_tick_and_limit(visibility),
        block_range=_block_range(_reachable_blocks(options, arrays, visibility)),
        rows=rows,
    )


def _inputs_by_key_block(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
    rows: RowArrays,
) -> KernelInputs:
    """The inputs for `BY_KEY_BLOCK`; rows are [B, K, G, ...]."""
    query_positions, key_positions = _token_positions(arrays, visibility)
    return KernelInputs(
        q=arrays.q,
        k=arrays.k,
        v=arrays.v,
        key_weights=_as_column(arrays.key_weights),
        query_positions=_as_row(query_positions),
        key_positions=_as_column(key_positions),
        tick_and_limit=_tick_and_limit(visibility),
        block_range=_block_range(_reachable_blocks(options, arrays, visibility).T),
        rows=rows,
    )


def _attend_with_residuals(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
) -> tuple[jax.Array, Residuals]:
    """Compute y [B, K, G, T, H] in the dtype of the weights, and the residuals."""
    q, dtype = arrays.q, arrays.key_weights.dtype
    rows = jax.ShapeDtypeStruct((*q.shape[:4], 1), dtype)
    outputs = jax.ShapeDtypeStruct(q.shape, dtype), rows, rows
    inputs = _inputs_by_query_block(options, arrays, visibility)
    y, row_max, row_sum = _run_grid(BY_QUERY_BLOCK, options, _forward, inputs, outputs)
    return y, Residuals(arrays, visibility, y, row_max[..., 0], row_sum[..., 0])


def _backward(
    options: KernelOptions,
    residuals: Residuals,
    dy: jax.Array,
) -> tuple[KernelArrays, None]:
    """Gradients for the arrays."""
    arrays, visibility, y, row_max, row_sum = residuals
    q, k, v, key_weights = arrays
    statistics = jnp.sum(dy * y, axis=-1), row_max, row_sum
    dy = dy.astype(v.dtype)
    query_inputs = _inputs_by_query_block(
        options, arrays, visibility, RowArrays(dy, *_as_column(statistics))
    )
    key_inputs = _inputs_by_key_block(
        options, arrays, visibility, RowArrays(dy, *_as_row(statistics))
    )
    (dq,) = _run_grid(BY_QUERY_BLOCK, options, _backward_queries, query_inputs, (q,))
    per_head = jax.ShapeDtypeStruct((*k.shape[:3], 1), key_weights.dtype)
    dk, dv, dd = _run_grid(
        BY_KEY_BLOCK, options, _backward_keys, key_inputs, (k, v, per_head)
    )
    dd = jnp.sum(dd[..., 0], axis=1)
    return KernelArrays(dq, dk, dv, dd), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: KernelOptions,
    arrays: KernelArrays,
    visibility: Visibility,
) -> jax.Array:
    y, _ = _attend_with_residuals(options, arrays, visibility)
    return y


_attend.defvjp(_attend_with_residuals, _backward)
