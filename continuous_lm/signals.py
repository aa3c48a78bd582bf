"""Signals over continuous time, and their samples: what a continuous transformer integrates.

A sentence is a signal of pieces that are constant: token j, of duration d_j, holds its embedding
until it ends at t_j (Marro et al., arXiv:2504.03933, section 3). Here a signal may move between its
knots, linearly or by cubics, and is sampled by a quadrature rule in each interval between them:

    embeddings, times, weights = signals.sample(e, d, kind="linear", rule="gauss", points=3)
    logits = lm(embeddings=embeddings, times=times, durations=weights, position=-1)

One sample an interval at its right end, weighted by its length (rule "rectangle", points=1), is the
ordinary model with durations d, exactly, whatever the kind: a signal passes through its knots.

How fast samples converge. A model sees samples in order and by index: query i weighs keys 1, ...,
i, its own included, by their weights. The query at the signal's end has the whole rule, so that its
integral over exact values converges as the rule does: order 1 for the rectangle, 2 for the
trapezoid, 2 `points` for Gauss-Legendre in each interval. A query in the middle has the sum of the
weights up to its own, which is no rule for the integral up to its own time: it is off by a part of
its own weight, so that its error is of order 1 whichever the rule. Attention over keys and values
that are functions of time thus has the rule's order; whole models, whose second layer reads what
such queries found, have order 1, and two refinements can be extrapolated (Richardson).
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
    """Samples a signal in the intervals between its knots.

    The last sample always is the signal's end, where its answer is read: Gauss-Legendre points lie
    inside of intervals, so there a sample of weight 0 follows them. It sees all others.

    Args:
      embeddings: values e_j at the knots t_j = start + d_1 + ... + d_j, [T, D].
      durations: lengths d_j of the intervals that end at the knots, [T]; > 0 for cubics.
      start: where the signal begins, a scalar.
      initial: its value there, [D]; e_1 if left out, so that it begins with a constant interval.
      kind: of the signal between knots; see `interpolate`.
      rule: "rectangle": right ends of `points` equal parts of each interval; "trapezoid": all ends
        of these parts, with half of the weights of the parts around them; "gauss": the `points`
        Gauss-Legendre nodes of each interval.
      points: in each interval.

    Returns:
      S = T points samples, and one more for "trapezoid" and "gauss"; embeddings in their dtype,
      times and weights at least float32. Differentiable in all arrays.

    Raises:
      InputError: if arguments do not fit, or the trapezoid rule is asked for the ends of constant
        pieces, where the signal jumps.
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
    """The signal's values inside each of its intervals.

    "constant" holds the value of the interval's end, as a token does; "linear" joins the two ends;
    "cubic" joins them by the Hermite polynomial whose slope at a knot is that of the parabola
    through it and its neighbours (at the two ends of the signal, through the nearest three), which
    has one continuous derivative and follows parabolas exactly.

    Args:
      embeddings: values at the intervals' ends, [T, D].
      durations: the intervals' lengths [T], > 0 for cubics.
      fractions: of an interval that have passed, in [0, 1], [num_fractions].
      initial: the value where the first interval begins, [D].
      kind: of the signal.

    Returns:
      [T, num_fractions, D] in their dtype; exactly the embeddings where the share is 1.
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
    """Where an interval is sampled, in (0, 1], and the weights there, which sum to 1."""
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
