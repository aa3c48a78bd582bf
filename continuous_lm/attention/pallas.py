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
from continuous_lm.attention.blocked import Options
from continuous_lm.attention.softmax import clamp_for_absent_keys, present_and_log
from continuous_lm.attention.visibility import WindowTimes, reach

BLOCK = 128  # tokens in a block: a TPU's lanes
LEAST = 16  # channels that a GPU multiplies at once


class Side(NamedTuple):
    """Where the queries, or the keys, stand: [B, T] each, and with an axis for the others."""

    place: jax.Array  # its own key's index
    ticks: Any = None  # of the clock, for the window
    rest: Any = None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: ArrayLike | None,
    clock: WindowTimes | None,
    first: ArrayLike,
) -> jax.Array:
    """What `dense.attend` gives, from such arguments as `refusal` lets through."""
    num_queries, heads = q.shape[-4], q.shape[-3:]
    batch, (q, k, v, weights, *times) = blocked.in_one_batch(q, k, v, weights, *(clock or ()))
    channels = [(0, 0)] * 3 + [(0, max(pl.next_power_of_2(heads[-1]), LEAST) - heads[-1])]
    q = jnp.moveaxis(_filled(q), 1, 3)  # [B, K, G, T, H]
    k, v = (jnp.moveaxis(_filled(x), 1, 2) for x in (k, v))  # [B, K, S, H]
    q, k, v = jnp.pad(q, [(0, 0), *channels]), jnp.pad(k, channels), jnp.pad(v, channels)
    if clock is not None:
        ticks, rest, tick = times
        clock = WindowTimes(_filled(ticks, "edge"), _filled(rest, "edge"), tick)
    seen = blocked.Seen(jnp.asarray(first), clock, None if window is None else jnp.asarray(window))
    y = _attend(Options(scale, softcap, BLOCK, BLOCK), q, k, v, _filled(weights), seen)
    y = jnp.moveaxis(y, 3, 1)[:, :num_queries, ..., : heads[-1]]
    return y.reshape(*batch, num_queries, *heads)


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weights: jax.Array,
    *,
    scale: ArrayLike,
    softcap: ArrayLike | None,
    window: ArrayLike | None,
    clock: WindowTimes | None,
    first: ArrayLike,
) -> str | None:
    """Why the kernel does not take arguments of `dense.attend`, if it does not."""
    del q, k, v, weights, window, clock, first
    for name, value in {"scale": scale, "softcap": softcap}.items():
        if isinstance(value, jax.Array):
            return f"{name} is an array; the kernel needs a number"
    return None


def _filled(x: jax.Array, mode: str = "constant") -> jax.Array:
    return blocked.padded(x, BLOCK, mode)


# --- What the programs of the grid do -----------------------------------------------------------


def _visible(queries: Side, keys: Side, limits) -> jax.Array:
    """Which keys the queries see: `masks.visible` for what is in a core's memory."""
    causal = keys.place <= queries.place
    if limits is None:
        return causal
    tick, span = limits
    ticks, rest = queries.ticks - keys.ticks, queries.rest - keys.rest
    return causal & (ticks.astype(rest.dtype) * tick[...] + rest < span[...])


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype) -> jax.Array:
    return lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)


def _capped(options: Options, s: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Scores s from products, and their derivative up to `scale`."""
    s, cap = options.scale * s, options.softcap
    if cap is None:
        return s, 1.0
    s = jnp.tanh(s / cap)
    return cap * s, 1.0 - jnp.square(s)


def _loop(bounds, step, state):
    """`step(i, state)` for the blocks i between the bounds, which are [1, 1] each."""
    begin, end = (jnp.max(bound[...]) for bound in bounds)
    return lax.fori_loop(begin, end, step, state)


def _along(side, i, block: int):
    """Block i of what lies along the last axis."""
    return jax.tree.map(lambda x: x[:, pl.ds(pl.multiple_of(i * block, block), block)], side)


def _forward(options: Options, q, k, v, d, queries, keys, limits, bounds, y, peak, total) -> None:
    """y, and the maximum and the sum of each row, of a block of queries."""
    dtype, block = d.dtype, options.keys
    queries = jax.tree.map(lambda x: x[...], queries)

    def add_keys(j, state):
        peak, total, y = state
        part = pl.ds(pl.multiple_of(j * block, block), block)
        s, _ = _capped(options, _product(q[...], k[part, :], (1, 1), dtype))
        s = s + present_and_log(d[:, part])[1]
        s = jnp.where(_visible(queries, _along(keys, j, block), limits), s, -jnp.inf)
        new = jnp.maximum(peak, jnp.max(s, axis=1, keepdims=True))
        finite = jnp.where(new > -jnp.inf, new, 0.0)
        p, kept = jnp.exp(s - finite), jnp.exp(peak - finite)
        y = kept * y + _product(p.astype(v.dtype), v[part, :], (1, 0), dtype)
        return new, kept * total + jnp.sum(p, axis=1, keepdims=True), y

    zeros = jnp.zeros((q.shape[0], 1), dtype)
    state = zeros - jnp.inf, zeros, jnp.zeros(q.shape, dtype)
    found, z, sum_ = _loop(bounds, add_keys, state)
    z = jnp.where(z > 0, z, 1.0)
    y[...] = (sum_ / z).astype(y.dtype)
    peak[...] = jnp.where(found > -jnp.inf, found, 0.0)
    total[...] = z


def _backward_queries(
    options: Options, q, k, v, d, queries, keys, limits, bounds, dy, inner, peak, total, dq
) -> None:
    """The gradient for a block of queries."""
    dtype, block = d.dtype, options.keys
    queries = jax.tree.map(lambda x: x[...], queries)

    def add_keys(j, dq):
        part = pl.ds(pl.multiple_of(j * block, block), block)
        s, slope = _capped(options, _product(q[...], k[part, :], (1, 1), dtype))
        d_j = d[:, part]
        e = jnp.exp(clamp_for_absent_keys(s - peak[...], present_and_log(d_j)[0])) / total[...]
        e = jnp.where(_visible(queries, _along(keys, j, block), limits), e, 0.0)
        g = e * (_product(dy[...], v[part, :], (1, 1), dtype) - inner[...])
        ds = (options.scale * slope * d_j * g).astype(k.dtype)
        return dq + _product(ds, k[part, :], (1, 0), dtype)

    dq[...] = _loop(bounds, add_keys, jnp.zeros(q.shape, dtype)).astype(dq.dtype)


def _backward_keys(
    options: Options, q, k, v, d, queries, keys, limits, bounds, dy, inner, peak, total, *grads
) -> None:
    """The gradients for a block of keys, its values and its weights; scores are [S, T]."""
    dtype, block = d.dtype, options.queries
    keys, d_j = jax.tree.map(lambda x: x[...], keys), d[...]
    present, _ = present_and_log(d_j)

    def add_queries(i, state):
        seen = _visible(_along(queries, i, block), keys, limits)
        part = pl.ds(pl.multiple_of(i * block, block), block)

        def add_head(group, state):
            dk, dv, dd = state
            q_i, dy_i = q[group, part, :], dy[group, part, :]
            inner_i, peak_i, total_i = (x[group, :, part] for x in (inner, peak, total))
            s, slope = _capped(options, _product(k[...], q_i, (1, 1), dtype))
            e = jnp.where(seen, jnp.exp(clamp_for_absent_keys(s - peak_i, present)) / total_i, 0.0)
            g = e * (_product(v[...], dy_i, (1, 1), dtype) - inner_i)
            ds = (options.scale * slope * d_j * g).astype(q.dtype)
            dk = dk + _product(ds, q_i, (1, 0), dtype)
            dv = dv + _product((d_j * e).astype(dy.dtype), dy_i, (1, 0), dtype)
            return dk, dv, dd + jnp.sum(g, axis=1, keepdims=True)

        return lax.fori_loop(0, q.shape[0], add_head, state)

    zeros = [jnp.zeros(x.shape, dtype) for x in (k, v, d)]
    for out, grad in zip(grads, _loop(bounds, add_queries, tuple(zeros)), strict=True):
        out[...] = grad.astype(out.dtype)


# --- How they are called -------------------------------------------------------------------------


def _sight(options: Options, q: jax.Array, k: jax.Array, seen: blocked.Seen):
    """Queries and keys as `Side`s, the clock's tick and the window's reach, and `reachable_blocks`.

    q is [B, K, G, T, H] and k [B, K, S, H].
    """
    num_queries, num_keys = q.shape[3], k.shape[2]
    reachable = blocked.reachable_blocks(seen, options, num_queries, num_keys)
    own = (seen.first + jnp.arange(num_queries)).astype(jnp.int32)
    queries, keys = (
        Side(jnp.broadcast_to(place, (len(q), *place.shape)))
        for place in (own, jnp.arange(num_keys, dtype=jnp.int32))
    )
    if seen.clock is None or seen.window is None:
        return queries, keys, None, reachable
    ticks, rest, tick = seen.clock
    at = jnp.minimum(own, num_keys - 1)
    span = jnp.broadcast_to(reach(seen.clock, seen.window).astype(tick.dtype), tick.shape)
    queries = Side(queries.place, ticks[:, at], rest[:, at])
    return queries, Side(keys.place, ticks, rest), (tick[:, None], span[:, None]), reachable


def _call(options: Options, kernel, axes: str, grid: tuple[int, ...], inputs, outputs) -> Any:
    """Runs `kernel(options, ...)` on each point of a grid whose axes have these letters.

    Inputs, and what outputs look like, come with letters for their axes. A point of the grid has
    its own entry of the grid's axes, but its own block of "t"; of "n" it has the entry for that
    block, and of "." everything.
    """

    def spec(letters: str, x) -> pl.BlockSpec:
        sizes = dict.fromkeys(axes + "n") | {"t": options.queries}
        block = [sizes.get(a, size) for a, size in zip(letters, x.shape, strict=True)]
        places = [axes.find(a) for a in letters.replace("n", "t")]
        return pl.BlockSpec(block, lambda *point: tuple(0 if i < 0 else point[i] for i in places))

    def run(*arrays, **how):
        return pl.pallas_call(
            functools.partial(kernel, options),
            grid=grid,
            in_specs=[jax.tree.map(functools.partial(spec, a), x) for a, x in inputs],
            out_specs=[spec(a, x) for a, x in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
            **how,
        )(*arrays)

    return lax.platform_dependent(
        *(x for _, x in inputs),
        cpu=functools.partial(run, interpret=True),
        cuda=functools.partial(run, compiler_params=triton.CompilerParams()),
        default=run,
    )


def _column(side):
    """What belongs to tokens, with an axis behind theirs."""
    return jax.tree.map(lambda x: x[..., None], side)


def _row(side):
    """What belongs to tokens, with an axis in front of theirs."""
    return jax.tree.map(lambda x: x[..., None, :], side)


def _bounds(reachable: jax.Array) -> tuple[jax.Array, ...]:
    """The first block in sight of each, and the one after its last, [blocks, 1, 1] each."""
    return tuple(x[:, None, None] for x in blocked.bounds(reachable))


def _by_query(options: Options, kernel, q, k, v, d, seen: blocked.Seen, others, outputs) -> Any:
    """Runs a kernel on blocks of queries; `others`, and `outputs` alike, are [B, K, G, T, ...]."""
    queries, keys, limits, reachable = _sight(options, q, k, seen)
    inputs = [
        ("bhgt.", q),
        ("bh..", k),
        ("bh..", v),
        ("b..", _row(d)),
        ("bt.", _column(queries)),
        ("b..", _row(keys)),
        ("b..", limits),
        ("n..", _bounds(reachable)),
        *(("bhgt.", x) for x in others),
    ]
    outputs = [("bhgt.", x) for x in outputs]
    grid = *q.shape[:3], q.shape[3] // options.queries
    return _call(options, kernel, "bhgt", grid, inputs, outputs)


def _by_key(options: Options, kernel, q, k, v, d, seen: blocked.Seen, dy, stats, outputs) -> Any:
    """Runs a kernel on blocks of keys; `outputs` are like [B, K, S, ...]."""
    queries, keys, limits, reachable = _sight(options, q, k, seen)
    inputs = [
        ("bh...", q),
        ("bht.", k),
        ("bht.", v),
        ("bt.", _column(d)),
        ("b..", _row(queries)),
        ("bt.", _column(keys)),
        ("b..", limits),
        ("n..", _bounds(reachable.T)),
        ("bh...", dy),
        *(("bh...", _row(x)) for x in stats),
    ]
    outputs = [("bht.", x) for x in outputs]
    grid = *k.shape[:2], k.shape[2] // options.keys
    return _call(options, kernel, "bht", grid, inputs, outputs)


def _attend_and_keep(options: Options, q, k, v, d, seen: blocked.Seen):
    """y [B, K, G, T, H] in the dtype of d, and what the backward pass needs."""
    y = jax.ShapeDtypeStruct(q.shape, d.dtype)
    row = jax.ShapeDtypeStruct((*q.shape[:4], 1), d.dtype)
    y, peak, total = _by_query(options, _forward, q, k, v, d, seen, (), (y, row, row))
    return y, (q, k, v, d, seen, y, peak[..., 0], total[..., 0])


def _backward(options: Options, residuals, dy):
    """Gradients for q, k, v and d."""
    q, k, v, d, seen, y, peak, total = residuals
    arrays = q, k, v, d, seen
    stats = jnp.sum(dy * y, axis=-1), peak, total  # dy . y first
    dy = dy.astype(v.dtype)
    others = dy, *(_column(x) for x in stats)
    (dq,) = _by_query(options, _backward_queries, *arrays, others, (q,))
    dd = jax.ShapeDtypeStruct((*k.shape[:3], 1), d.dtype)
    dk, dv, dd = _by_key(options, _backward_keys, *arrays, dy, stats, (k, v, dd))
    return dq, dk, dv, jnp.sum(dd[..., 0], axis=1), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, d, seen: blocked.Seen) -> jax.Array:
    return _attend_and_keep(options, q, k, v, d, seen)[0]


_attend.defvjp(_attend_and_keep, _backward)
