"""Signals over continuous time, and their samples, the inputs of a continuous transformer.

A sentence is a piecewise constant signal: token j, of duration d_j, holds its embedding until it
ends at t_j (Marro et al., arXiv:2504.03933, section 3). Here a signal may also be linear or cubic
between its knots. A quadrature rule samples it in each interval:

    embeddings, times, weights = signals.sample(e, d, kind="linear", rule="gauss", points=3)
    logits = lm(embeddings=embeddings, times=times, durations=weights, position=-1)

The rule "rectangle" with points=1 takes one sample at the right end of each interval, weighted by
its length. This is exactly the ordinary model with durations d, for every kind of signal, since a
signal passes through its knots.

Convergence. A model sees samples in order and by index: query i integrates over keys 1, ..., i with
their weights. The query at the end of the signal has all weights of the rule, so its integral over
exact values has the order of the rule: 1 for the rectangle, 2 for the trapezoid, 2 `points` for
Gauss-Legendre. A query inside has the weights up to its own. They are not a rule for the integral
up to its time: the error is a part of its own weight, of order 1 for every rule. So attention over
keys and values that are functions of time has the order of the rule at the end of the signal. The
second layer of a model reads the results of inner queries, so whole models have order 1. Two
refinements can be extrapolated (Richardson).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_count, check_numbers
from continuous_lm.durations import check_durations as check_durations
from continuous_lm.durations import end_times
from continuous_lm.errors import InputError

__all__ = [
    "QUADRATURE_RULES",
    "SIGNAL_KINDS",
    "Samples",
    "interpolate",
    "sample",
]

SIGNAL_KINDS = ("constant", "linear", "cubic")
QUADRATURE_RULES = ("rectangle", "trapezoid", "gauss")


class Samples(NamedTuple):
    """A sampled signal, as the arguments `embeddings`, `times` and `durations` of a model."""

    embeddings: jax.Array  # [S, D]
    times: jax.Array  # [S], never decreasing
    weights: jax.Array  # [S], >= 0; their sum is the signal's length


def sample(
    embeddings: ArrayLike,
    durations: ArrayLike,
    *,
    start: ArrayLike = 0.0,
    initial: ArrayLike | None = None,
    kind: str = "linear",
    rule: str = "rectangle",
    points: int = 1,
) -> Samples:
    """Sample a signal in the intervals between its knots.

    The last sample is always the end of the signal, where the answer is read. Gauss-Legendre points
    lie inside intervals, so they are followed by a sample of weight 0 at the end, which sees all
    others.

    Args:
      embeddings: values e_j at the knots t_j = start + d_1 + ... + d_j, [T, D].
      durations: lengths d_j of the intervals that end at the knots, [T]; > 0 for cubics.
      start: start time of the signal, a scalar.
      initial: value at the start, [D]; e_1 if omitted, so the first interval is constant.
      kind: kind of the signal between knots; see `interpolate`.
      rule: "rectangle" takes the right ends of `points` equal parts of each interval.

        "trapezoid" takes all ends of these parts, each with half the lengths of the adjacent parts.

        "gauss" takes the `points` Gauss-Legendre nodes of each interval.
      points: number of parts or nodes in each interval.

    Returns:
      S = T points samples, and one more for "trapezoid" and "gauss"; embeddings in their dtype,
      times and weights at least float32. Differentiable in all arrays.

    Raises:
      InputError: if arguments do not fit, or for the trapezoid rule with a constant kind, which
        jumps at the knots.
    """
    e, d, start = jnp.asarray(embeddings), as_float(durations), as_float(start)
    if jnp.issubdtype(e.dtype, jnp.integer):
        e = as_float(e)
    _check(e, d, start, initial, kind, rule, points)
    vector_width = e.shape[1]
    e0 = e[0] if initial is None else jnp.asarray(initial, e.dtype)
    fractions, part_weights = _quadrature_rule(rule, points)
    values = interpolate(e, d, fractions, initial=e0, kind=kind).reshape(
        -1, vector_width
    )
    times = (
        end_times(d, start)[:, None] - (1.0 - fractions) * d[:, None]
    )  # 1 is the knot exactly
    times, weights = times.reshape(-1), (d[:, None] * part_weights).reshape(-1)
    if rule == "rectangle":
        return Samples(values, times, weights)
    start_time = jnp.broadcast_to(start, (1,)).astype(times.dtype)
    if rule == "trapezoid":
        half_weights = jnp.pad(weights / 2.0, 1)
        times = jnp.concatenate([start_time, times])
        return Samples(
            jnp.concatenate([e0[None], values]),
            times,
            half_weights[1:] + half_weights[:-1],
        )
    end_time = end_times(d, start)[-1:]
    return Samples(
        jnp.concatenate([values, e[-1:]]),
        jnp.concatenate([times, end_time]),
        jnp.pad(weights, (0, 1)),
    )


def interpolate(
    embeddings: jax.Array,
    durations: jax.Array,
    fractions: ArrayLike,
    *,
    initial: jax.Array,
    kind: str = "linear",
) -> jax.Array:
    """Evaluate the signal inside each of its intervals.

    "constant" holds the value of the interval's end, like a token. "linear" joins the two ends.
    "cubic" joins them by a Hermite polynomial. Its slope at a knot is that of the parabola through
    the knot and its neighbours (at the two ends of the signal, through the nearest three knots). It
    has a continuous derivative and reproduces parabolas exactly.

    Args:
      embeddings: values at the intervals' ends, [T, D].
      durations: the intervals' lengths [T], > 0 for cubics.
      fractions: fractions of an interval, in [0, 1], [num_fractions].
      initial: value at the start of the first interval, [D].
      kind: kind of the signal.

    Returns:
      [T, num_fractions, D] in the embeddings' dtype; exactly the embeddings at fraction 1.
    """
    u = jnp.asarray(fractions, as_float(durations).dtype)[:, None]
    knots = jnp.concatenate([initial[None], embeddings]).astype(u.dtype)
    left, right = knots[:-1, None], knots[1:, None]
    if kind == "constant":
        values = jnp.broadcast_to(right, (len(right), len(u), right.shape[-1]))
    elif kind == "linear":
        values = (1.0 - u) * left + u * right
    else:
        d = durations.astype(u.dtype)[:, None]
        slopes = _slopes(knots, d)
        end_slopes, start_slopes = (
            d[:, None] * slopes[1:, None],
            d[:, None] * slopes[:-1, None],
        )
        v = 1.0 - u
        values = v * v * (1.0 + 2.0 * u) * left + u * u * (1.0 + 2.0 * v) * right
        values = values + u * v * v * start_slopes - u * u * v * end_slopes
    return values.astype(embeddings.dtype)


def _slopes(knots: jax.Array, durations: jax.Array) -> jax.Array:
    """Slopes [T + 1, D] of the parabolas through knots [T + 1, D], `durations` [T, 1] apart."""
    chords = jnp.diff(knots, axis=0) / durations
    if len(chords) == 1:
        return jnp.concatenate([chords, chords])
    left_durations, right_durations = durations[:-1], durations[1:]
    inner_slopes = (right_durations * chords[:-1] + left_durations * chords[1:]) / (
        left_durations + right_durations
    )
    first_slope, last_slope = (
        2.0 * chords[:1] - inner_slopes[:1],
        2.0 * chords[-1:] - inner_slopes[-1:],
    )
    return jnp.concatenate([first_slope, inner_slopes, last_slope])


def _quadrature_rule(rule: str, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes of a rule in (0, 1], and their weights, which sum to 1."""
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(points)
        return (nodes + 1.0) / 2.0, weights / 2.0
    return np.arange(1, points + 1) / points, np.full(points, 1.0 / points)


def _check(
    embeddings: ArrayLike,
    durations: ArrayLike,
    start: ArrayLike,
    initial: ArrayLike | None,
    kind: str,
    rule: str,
    points: int,
) -> None:
    shape = np.shape(embeddings)
    if len(shape) != 2 or not shape[0]:
        raise InputError(
            f"embeddings have shape {list(shape)}; a signal has [T, D], T >= 1"
        )
    if np.ndim(durations) != 1:
        raise InputError(
            f"durations have shape {list(np.shape(durations))}; they must be [T]"
        )
    check_durations(durations, shape[0])
    check_numbers("embeddings", embeddings)
    check_numbers("start", start)
    if np.ndim(start):
        raise InputError(
            f"start has shape {list(np.shape(start))}; it must be a scalar"
        )
    if initial is not None and np.shape(initial) != shape[1:]:
        raise InputError(
            f"initial has shape {list(np.shape(initial))}; it must be [{shape[1]}]"
        )
    for name, value, choices in (
        ("kind", kind, SIGNAL_KINDS),
        ("rule", rule, QUADRATURE_RULES),
    ):
        if value not in choices:
            raise InputError(
                f"{name} is {value!r}; it must be one of {', '.join(choices)}"
            )
    check_count("points", points)
    if kind == "constant" and rule == "trapezoid":
        raise InputError(
            "a constant signal jumps at its knots, where the trapezoid rule would sample it; use"
            " the rectangle or gauss rule"
        )
    has_zero_duration = (
        not isinstance(durations, jax.core.Tracer) and not np.asarray(durations).all()
    )
    if kind == "cubic" and has_zero_duration:
        raise InputError(
            "durations hold a 0: no cubic passes through two knots at one time; leave the token out"
            " or use a linear signal"
        )
