"""Which moments of a sentence make its answer: attributions along durations.

Durations are differentiable, and a token of duration 0 is exactly absent. So the path from nothing
to a sentence, d(alpha) = base + alpha (end - base), goes through sentences that the model is
defined on, and the integrated gradients along it (Sundararajan et al., arXiv:1703.01365),

    a_j = (end_j - base_j) * integral over alpha in [0, 1] of  df/dd_j (d(alpha)),

share out f(end) - f(base) among tokens: they sum to it (completeness). Two cheaper methods stand
beside it, gradient times input and leaving one token out, and deletion curves compare them all.

f is any function of durations [T] to a scalar, `LogProbability` of an answer above all. What is a
pytree with a `__call__`, as that is, is compiled once for all prompts of a length; any other
function is compiled for each call.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.analysis.sweep import HasModel
from continuous_lm.arguments import as_float, check_integers
from continuous_lm.durations import check as check_durations
from continuous_lm.errors import InputError

Value = Callable[[jax.Array], jax.Array]  # durations [T] -> a scalar


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "inputs", "at"),
    meta_fields=("model",),
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class Logits:
    """A prompt as a function of its durations: [..., T] -> logits [..., V] of the next token.

    Attributes:
      params: of the model.
      inputs: the model's other arguments: tokens int [T] or embeddings [T, D], and start.
      at: index of the token after which the answer stands, int [].
      model: whose `apply` is a pure function.
    """

    params: Any
    inputs: Mapping[str, jax.Array]
    at: jax.Array
    model: Any

    def __call__(self, durations: jax.Array) -> jax.Array:
        return self.model.apply(
            {"params": self.params}, durations=durations, at=self.at, **self.inputs
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("logits", "answer"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class LogProbability:
    """Durations [..., T] -> log probability [...] that the next token is one of a group.

    Attributes:
      logits: durations -> logits.
      answer: the group's token ids, int [C].
    """

    logits: Logits
    answer: jax.Array

    def __call__(self, durations: jax.Array) -> jax.Array:
        logits = as_float(self.logits(durations))
        return jax.nn.logsumexp(logits[..., self.answer], axis=-1) - jax.nn.logsumexp(
            logits, axis=-1
        )


def next_token(lm: HasModel, *, at: int = -1, **inputs: ArrayLike) -> Logits:
    """The logits of the token after token `at`, as a function of durations alone.

    Args:
      lm: the language model.
      at: index of the token after which the answer stands.
      **inputs: of the model: tokens int [T] or embeddings [T, D], and start.

    Raises:
      InputError: if an argument does not fit the model, or has a batch axis.
    """
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    ranks = {"tokens": 1, "embeddings": 2, "start": 0}
    for name, array in arrays.items():
        if name not in ranks:
            raise InputError(f"{name} is no argument here; only {', '.join(ranks)} are")
        if array.ndim != ranks[name]:
            raise InputError(
                f"{name} has shape {list(array.shape)}; one prompt at a time has {ranks[name]} axes"
            )
    lm.model.check(**arrays, at=at)
    return Logits(lm.params, arrays, jnp.asarray(at), lm.model)


def log_probability(
    lm: HasModel, answer: Sequence[int], *, at: int = -1, **inputs: ArrayLike
) -> LogProbability:
    """The log probability of an answer, a group of tokens, as a function of durations alone.

    Args:
      lm: the language model.
      answer: ids of the tokens that count as the answer; their probabilities are summed.
      at: index of the token after which the answer stands.
      **inputs: of the model: tokens int [T] or embeddings [T, D], and start.

    Raises:
      InputError: if an argument does not fit the model, or the group is empty or names no tokens.
    """
    return LogProbability(next_token(lm, at=at, **inputs), group(answer, lm.config.vocab_size))


def group(answer: Sequence[int], vocab_size: int) -> jax.Array:
    """The tokens of an answer, int [C], each once.

    Raises:
      InputError: if there are none, or one is not in the vocabulary.
    """
    if not len(answer):
        raise InputError("the answer has no tokens; give at least one")
    check_integers("answer", np.asarray(answer), 0, vocab_size)
    return jnp.asarray(sorted(set(map(int, answer))))


def as_pytree(value: Value) -> Value:
    """A function that can be an argument of jitted ones."""
    return jax.tree_util.Partial(value) if jax.tree_util.all_leaves([value]) else value


@functools.partial(jax.jit, static_argnums=2)
def values(value: Value, durations: jax.Array, batch_size: int) -> jax.Array:
    """f [P] at durations [P, T], `batch_size` of them at once; f is a pytree with a `__call__`."""
    return jax.lax.map(value, durations, batch_size=min(batch_size, len(durations)))


class Attribution(NamedTuple):
    """What each token contributes, and how exactly the contributions are known.

    Attributes:
      tokens: contributions, in the unit of f (nats, of a log probability), float64 [T].
      end: f at the durations that were explained.
      base: f at the durations where the path begins.
    """

    tokens: np.ndarray
    end: float
    base: float

    @property
    def change(self) -> float:
        """f(end) - f(base), what the contributions should sum to."""
        return self.end - self.base

    @property
    def residual(self) -> float:
        """The sum of the contributions less `change`: the error of the integral."""
        return float(self.tokens.sum()) - self.change

    def relative_residual(self, least: float = 0.1) -> float:
        """|residual| / max(|change|, `least`); `least` in the unit of f."""
        return abs(self.residual) / max(abs(self.change), least)


def integrated(
    value: Value,
    durations: ArrayLike,
    base: ArrayLike | None = None,
    *,
    nodes: int = 64,
    batch_size: int = 16,
) -> Attribution:
    """Integrated gradients along the straight path of durations from `base` to `durations`.

    Fixed nodes do badly: along the path an answer comes about suddenly (log probabilities move by
    30 nats while alpha moves by 0.05), anywhere in [0, 1], so that 64 Gauss-Legendre nodes in u,
    alpha = u^p, miss up to 20 to 50 % for every p from 1 to 6. So f itself is looked at first, at
    2 `nodes` + 1 points, at a forward pass each; then `nodes` gradients are taken in panels of
    `PANEL` Gauss-Legendre nodes, placed by `panels`. Sums are taken in float64.

    Look at the residual. A path longer than the window of a model with sliding windows crosses
    times at which a key leaves a window: f jumps there, and what jumps is in no integral.

    Args:
      value: f, durations [T] -> a scalar.
      durations: the end of the path [T], finite and >= 0.
      base: where it begins [T]; every token absent but the first one, without which there is
        nothing to attend to, if left out.
      nodes: gradients that are taken, a multiple of `PANEL`.
      batch_size: durations computed at once, which bounds the memory.

    Returns:
      The attribution. A token whose duration does not change along the path contributes exactly 0.

    Raises:
      InputError: if durations do not fit, or `nodes` is no multiple of `PANEL`.
    """
    end, base = _path(durations, base)
    if nodes < PANEL or nodes % PANEL:
        raise InputError(f"nodes is {nodes}; it must be a positive multiple of {PANEL}")
    _check_batch(batch_size)
    grid = np.linspace(0.0, 1.0, 2 * nodes + 1) ** 2
    value = as_pytree(value)
    heights = np.asarray(values(value, _along(base, end, grid), batch_size), np.float64)
    _check_finite(heights)
    alphas, weights = gauss(panels(grid, heights, nodes // PANEL), PANEL)
    gradients = _gradients(value, _along(base, end, alphas), batch_size)
    mean = weights @ np.asarray(gradients, np.float64)
    step = np.asarray(end, np.float64) - np.asarray(base, np.float64)
    return Attribution(step * mean + 0.0, float(heights[-1]), float(heights[0]))


PANEL = 4  # Gauss-Legendre nodes of a panel
EVEN = 0.6  # share of the panels spread over the path, however little f changes there


def panels(grid: np.ndarray, heights: np.ndarray, number: int) -> np.ndarray:
    """Edges of panels in [0, 1], narrow where f changes fast.

    Half of them are spread evenly in sqrt(alpha), since paths are steep where tokens begin to
    exist, and half by the variation of f: an interval counts with the largest change of f in itself
    and in its two neighbours, so that panels are narrow on both sides of a cliff.

    Args:
      grid: increasing points [G] from 0 to 1.
      heights: f at these points [G].
      number: of panels.

    Returns:
      edges [number + 1], float64, from 0 to 1.
    """
    change = np.abs(np.diff(heights))
    padded = np.pad(change, 1)
    change = np.maximum(change, np.maximum(padded[:-2], padded[2:]))
    even = np.diff(np.sqrt(grid))
    share = change / change.sum() if change.sum() > 0 else even
    density = EVEN * even + (1.0 - EVEN) * share
    below = np.concatenate([[0.0], np.cumsum(density)])
    return np.interp(np.linspace(0.0, 1.0, number + 1), below / below[-1], grid)


def gauss(edges: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights in each panel.

    Args:
      edges: of the panels [E + 1].
      nodes: in each of them.

    Returns:
      points [E * nodes] and weights [E * nodes], which sum to the length; float64.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    width = np.diff(edges)[:, None]
    inside = edges[:-1, None] + width * (points + 1.0) / 2.0
    return inside.ravel(), (width * weights / 2.0).ravel()


def gradient_times_input(
    value: Value, durations: ArrayLike, base: ArrayLike | None = None
) -> Attribution:
    """The gradient at the end of the path times the step (end - base): first order, one gradient.

    Args and errors as of `integrated`.
    """
    end, base = _path(durations, base)
    value = as_pytree(value)
    heights = np.asarray(values(value, jnp.stack([base, end]), 2), np.float64)
    gradient = np.asarray(_gradients(value, end[None], 1)[0], np.float64)
    step = np.asarray(end, np.float64) - np.asarray(base, np.float64)
    return Attribution(step * gradient + 0.0, float(heights[1]), float(heights[0]))


def leave_one_out(
    value: Value, durations: ArrayLike, base: ArrayLike | None = None, *, batch_size: int = 16
) -> Attribution:
    """f less f with one token's duration at its base, for each token: T + 2 values, no gradient.

    Args and errors as of `integrated`.
    """
    end, base = _path(durations, base)
    without = jnp.where(jnp.eye(len(end), dtype=bool), base, end)
    rows = jnp.concatenate([without, jnp.stack([base, end])])
    heights = np.asarray(values(as_pytree(value), rows, batch_size), np.float64)
    return Attribution(heights[-1] - heights[:-2], float(heights[-1]), float(heights[-2]))


def _path(durations: ArrayLike, base: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """The ends of the path, [T] each."""
    end = as_float(durations)
    if end.ndim != 1 or not end.size:
        raise InputError(f"durations have shape {list(end.shape)}; a path needs [T], T >= 1")
    check_durations(end, len(end))
    if base is None:
        return end, jnp.where(jnp.arange(len(end)) == 0, end, 0.0)
    base = as_float(base).astype(end.dtype)
    if base.shape != end.shape:
        raise InputError(f"base has shape {list(base.shape)}; it must be {list(end.shape)}")
    check_durations(base, len(end), "base")
    return end, base


def _along(base: jax.Array, end: jax.Array, alphas: np.ndarray) -> jax.Array:
    """Durations [P, T] at points of the path; exactly the ends at 0 and 1."""
    share = jnp.asarray(alphas, end.dtype)[:, None]
    return (1.0 - share) * base + share * end


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")


def _check_finite(heights: np.ndarray) -> None:
    if not np.isfinite(heights).all():
        raise InputError(
            "the value is not finite everywhere on the path; choose a base at which it is"
        )


@functools.partial(jax.jit, static_argnums=2)
def _gradients(value: Value, durations: jax.Array, batch_size: int) -> jax.Array:
    """df/dd [P, T] at durations [P, T]."""
    return jax.lax.map(jax.grad(value), durations, batch_size=min(batch_size, len(durations)))
