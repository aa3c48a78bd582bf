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
from continuous_lm.attention.visibility import WindowTimes, reach, visible
from continuous_lm.errors import InputError


class Options(NamedTuple):
    """What is known when the program is compiled."""

    scale: float
    softcap: float | None
    queries: int  # in a block
    keys: int  # in a block


class Seen(NamedTuple):
    """What says which key a query sees."""

    first: jax.Array  # index of the first query's own key
    clock: WindowTimes | None  # [B, S]
    window: jax.Array | None


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
    block: int | None = None,
) -> jax.Array:
    """What `dense.attend` gives, from the same arguments, in blocks of at most `block` tokens."""
    for name, value in {"scale": scale, "softcap": softcap}.items():
        if isinstance(value, jax.core.Tracer):
            raise InputError(
                f"{name} is traced; the blocked form needs a number, so make it static"
            )
    num_queries, heads = q.shape[-4], q.shape[-3:]
    batch, (q, k, v, weights, *times) = in_one_batch(q, k, v, weights, *(clock or ()))
    block = block or _block(math.prod((len(q), *heads[:2])))
    options = Options(scale, softcap, _even(num_queries, block), _even(k.shape[1], block))
    if clock is not None:
        ticks, rest, tick = times
        ticks, rest = (padded(x, options.keys, "edge") for x in (ticks, rest))
        clock = WindowTimes(ticks, rest, tick)
    seen = Seen(jnp.asarray(first), clock, None if window is None else jnp.asarray(window))
    q = padded(q, options.queries)
    k, v, weights = (padded(x, options.keys) for x in (k, v, weights))
    y = _attend(options, q, k, v, weights, seen)
    return y[:, :num_queries].reshape(*batch, num_queries, *heads)


def in_one_batch(
    q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array
) -> tuple[tuple[int, ...], list[jax.Array]]:
    """The leading axes of q, k, v and others [..., S], and each with one axis B in their place."""
    ranks = [4, 3, 3, *(1 for _ in others)]
    arrays = list(zip((q, k, v, *others), ranks, strict=True))
    batch = jnp.broadcast_shapes(*(x.shape[: x.ndim - rank] for x, rank in arrays))

    def flat(x: jax.Array, rank: int) -> jax.Array:
        inner = x.shape[x.ndim - rank :]
        return jnp.broadcast_to(x, (*batch, *inner)).reshape(math.prod(batch), *inner)

    return batch, [flat(x, rank) for x, rank in arrays]


def _block(rows: int) -> int:
    """Tokens in a block, if `rows` heads in a batch have each: about a million scores at once."""
    return min(max(2 ** round(math.log2(2**20 / rows) / 2), 64), 1024)


def _even(length: int, block: int) -> int:
    """The block, at most `block`, that cuts `length` tokens into parts as equal as can be."""
    return math.ceil(length / math.ceil(length / block))


def padded(x: jax.Array, block: int, mode: str = "constant") -> jax.Array:
    """x [B, T, ...] with T filled up to whole blocks. As last keys, nobody sees what is added."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2), mode=mode)


def _cut(x: jax.Array, i: jax.Array, block: int) -> jax.Array:
    """Block i of x [B, T, ...]."""
    return lax.dynamic_slice_in_dim(x, i * block, block, axis=1)


def _put(x: jax.Array, part: jax.Array, i: jax.Array, block: int) -> jax.Array:
    """x [B, T, ...] with `part` as its block i."""
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * block, axis=1)


def reachable_blocks(seen: Seen, options: Options, num_queries: int, num_keys: int) -> jax.Array:
    """Whether any query of a block may see any key of a block: bool [T / queries, S / keys]."""
    i, j = (jnp.arange(n) for n in (num_queries // options.queries, num_keys // options.keys))
    last_query = seen.first + (i[:, None] + 1) * options.queries - 1
    causal = j * options.keys <= last_query
    if seen.clock is None or seen.window is None:
        return causal
    ends = seen.clock.ticks.astype(seen.clock.rest.dtype) * seen.clock.tick + seen.clock.rest
    own = jnp.minimum(seen.first + jnp.arange(num_queries), num_keys - 1)
    earliest = jnp.min(ends[:, own].reshape(len(ends), -1, options.queries), axis=-1)
    latest = jnp.max(ends.reshape(len(ends), -1, options.keys), axis=-1)
    # `ends` have lost digits; the mask inside of a block is exact, so that a margin costs nothing.
    margin = 1e-5 * jnp.max(jnp.abs(ends)) + reach(seen.clock, seen.window)
    near = earliest[:, :, None] - latest[:, None, :] < margin
    return causal & jnp.any(near, axis=0)


def bounds(reachable: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first true entry of each row, and the one after its last: int [rows] each."""
    size = reachable.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)
    first = jnp.min(jnp.where(reachable, index, size), axis=1)
    return first, jnp.max(jnp.where(reachable, index + 1, 0), axis=1)


def _scores(options: Options, q: jax.Array, k: jax.Array, dtype) -> jax.Array:
    """Scores [B, K, T, G, S] of one block, capped."""
    s = options.scale * jnp.einsum("btkgh,bskh->bktgs", q, k, preferred_element_type=dtype)
    cap = options.softcap
    return s if cap is None else cap * jnp.tanh(s / cap)


def _mask(options: Options, seen: Seen, i: jax.Array, j: jax.Array) -> jax.Array:
    """Which keys of block j the queries of block i see, for scores [B, K, T, G, S]."""
    queries = seen.first + i * options.queries + jnp.arange(options.queries)
    mask = visible(queries, j * options.keys + jnp.arange(options.keys), seen.clock, seen.window)
    mask = mask if mask.ndim == 3 else mask[None]
    return mask[:, None, :, None, :]


def _forward(options: Options, q, k, v, d, seen: Seen) -> tuple[jax.Array, ...]:
    """y [B, T, K, G, H], and the maximum and the sum of each row, [B, T, K, G] each."""
    (num_batch, num_queries, num_kv_heads, num_groups, width), num_keys = q.shape, k.shape[1]
    dtype, (_, log_d) = d.dtype, present_and_log(d)
    begin, end = bounds(reachable_blocks(seen, options, num_queries, num_keys))
    rows = (num_batch, num_kv_heads, options.queries, num_groups)

    def add_keys(i, q_i, j, state):
        peak, total, y = state
        s = _scores(options, q_i, _cut(k, j, options.keys), dtype)
        s = s + _cut(log_d, j, options.keys)[:, None, None, None, :]
        s = jnp.where(_mask(options, seen, i, j), s, -jnp.inf)
        new = jnp.maximum(peak, jnp.max(s, axis=-1))
        finite = jnp.where(jnp.isfinite(new), new, 0.0)
        p, kept = jnp.exp(s - finite[..., None]), jnp.exp(peak - finite)
        v_j = _cut(v, j, options.keys)
        part = jnp.einsum("bktgs,bskh->bktgh", p.astype(v.dtype), v_j, preferred_element_type=dtype)
        return new, kept * total + jnp.sum(p, axis=-1), kept[..., None] * y + part

    def attend_rows(i, carry):
        add = functools.partial(add_keys, i, _cut(q, i, options.queries))
        zeros = jnp.zeros(rows, dtype), jnp.zeros((*rows, width), dtype)
        peak, total, y = lax.fori_loop(begin[i], end[i], add, (zeros[0] - jnp.inf, *zeros))
        total = jnp.where(total > 0, total, 1.0)
        parts = y / total[..., None], jnp.where(jnp.isfinite(peak), peak, 0.0), total
        return tuple(
            _put(x, jnp.moveaxis(part, 1, 2), i, options.queries)
            for x, part in zip(carry, parts, strict=True)
        )

    zeros = jnp.zeros(q.shape[:-1], dtype)
    carry = jnp.zeros(q.shape, dtype), zeros, zeros
    return lax.fori_loop(0, num_queries // options.queries, attend_rows, carry)


def _backward(options: Options, residuals, dy):
    """Gradients for q, k, v and d."""
    q, k, v, d, seen, y, peak, total = residuals
    dtype, (present, _) = d.dtype, present_and_log(d)
    num_queries, num_keys = q.shape[1], k.shape[1]
    begin, end = bounds(reachable_blocks(seen, options, num_queries, num_keys).T)
    inner = jnp.sum(dy * y, axis=-1)  # dy . y, [B, T, K, G]
    dy = dy.astype(v.dtype)

    def add_queries(j, keys, i, state):
        (k_j, v_j, d_j, present_j), (dq, dk, dv, dd) = keys, state
        q_i, dy_i = (_cut(x, i, options.queries) for x in (q, dy))
        inner_i, peak_i, total_i = (
            jnp.moveaxis(_cut(x, i, options.queries), 1, 2)[..., None] for x in (inner, peak, total)
        )
        s = _scores(options, q_i, k_j, dtype)
        e = jnp.exp(clamp_for_absent_keys(s - peak_i, present_j)) / total_i
        e = jnp.where(_mask(options, seen, i, j), e, 0.0)
        g = jnp.einsum("btkgh,bskh->bktgs", dy_i, v_j, preferred_element_type=dtype)
        g = e * (g - inner_i)
        ds = d_j * g
        if options.softcap is not None:
            ds = ds * (1.0 - jnp.square(s / options.softcap))
        p, ds = (d_j * e).astype(v.dtype), (options.scale * ds).astype(q.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)
        dq_i = _cut(dq, i, options.queries) + product("bktgs,bskh->btkgh", ds, k_j)
        dk = dk + product("bktgs,btkgh->bskh", ds, q_i)
        dv = dv + product("bktgs,btkgh->bskh", p, dy_i)
        return _put(dq, dq_i, i, options.queries), dk, dv, dd + jnp.sum(g, axis=(1, 2, 3))

    def columns(j, carry):
        k_j, v_j, d_j, present_j = (_cut(x, j, options.keys) for x in (k, v, d, present))
        keys = k_j, v_j, d_j[:, None, None, None, :], present_j[:, None, None, None, :]
        dq, *others = carry
        zeros = [jnp.zeros(x.shape, dtype) for x in (k_j, v_j, d_j)]
        state = lax.fori_loop(
            begin[j], end[j], functools.partial(add_queries, j, keys), (dq, *zeros)
        )
        return state[0], *(
            _put(x, part, j, options.keys) for x, part in zip(others, state[1:], strict=True)
        )

    carry = jnp.zeros(q.shape, dtype), jnp.zeros_like(k), jnp.zeros_like(v), jnp.zeros_like(d)
    dq, dk, dv, dd = lax.fori_loop(0, num_keys // options.keys, columns, carry)
    return dq.astype(q.dtype), dk, dv, dd, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, d, seen: Seen) -> jax.Array:
    return _forward(options, q, k, v, d, seen)[0]


def _attend_and_keep(options: Options, q, k, v, d, seen: Seen):
    y, peak, total = _forward(options, q, k, v, d, seen)
    return y, (q, k, v, d, seen, y, peak, total)


_attend.defvjp(_attend_and_keep, _backward)
