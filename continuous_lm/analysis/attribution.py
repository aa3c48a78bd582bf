"""Attributions of an answer to the durations of a sentence's tokens.

Durations are differentiable, and a token of duration 0 is exactly absent. The straight path from an
absent sentence to the ordinary one is d(alpha) = baseline + alpha (end - baseline). The model is
defined on all of it. Integrated gradients along it (Sundararajan et al., arXiv:1703.01365),

    a_j = (end_j - baseline_j) * integral over alpha in [0, 1] of  df/dd_j (d(alpha)),

distribute f(end) - f(baseline) over the tokens: they sum to it (completeness). Two cheaper methods
are gradient times input, and leaving out one token. Deletion curves compare the methods.

f is any function from durations [T] to a scalar, such as `LogProbability` of an answer. A pytree
with `__call__`, such as `LogProbability`, is compiled once for all prompts of a length. Any other
function is compiled in each call.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import (
    as_float,
    check_count,
    check_integers,
    check_shapes,
)
from continuous_lm.durations import check_durations
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs, check_timing
from continuous_lm.models import transformer, trunk_inputs
from continuous_lm.models.language_model import LanguageModel, trunk_model
from continuous_lm.models.parameters import Params
from continuous_lm.models.transformer import Transformer

__all__ = [
    "EVENLY_SPREAD_SHARE",
    "NODES_PER_PANEL",
    "Attribution",
    "LogProbability",
    "Objective",
    "PromptLogits",
    "answer_tokens",
    "as_jit_argument",
    "check_path",
    "evaluate",
    "gauss_legendre",
    "gradient_times_input",
    "integrated_gradients",
    "leave_one_out",
    "log_probability",
    "next_token_logits",
    "panel_edges",
]

Objective = Callable[[jax.Array], jax.Array]  # durations [T] -> a scalar


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "inputs", "position"),
    meta_fields=("model",),
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class PromptLogits:
    """A prompt as a function of its durations: [..., T] -> logits [..., V] of the next token.

    Attributes:
      params: parameters of the model.
      inputs: all but the durations: tokens int [T] or embeddings [T, D], and start.
      position: index of the token after which the answer stands, int [].
      model: the transformer.
    """

    params: Params
    inputs: Inputs
    position: jax.Array
    model: Transformer

    def __call__(self, durations: jax.Array) -> jax.Array:
        token_shape = (self.inputs.num_tokens,)
        check_timing(token_shape, durations, None, None, window=None, follows=False)
        output = transformer.forward(
            self.model.config,
            self.params,
            self.inputs._replace(durations=durations),
            position=self.position,
            execution=self.model.execution,
        )
        return output.logits


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("logits", "answer"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)  # a function, compared as one
class LogProbability:
    """Durations [..., T] -> log probability [...] that the next token is one of a group.

    Attributes:
      logits: durations -> logits.
      answer: the group's token ids, int [num_answer_tokens].
    """

    logits: PromptLogits
    answer: jax.Array

    def __call__(self, durations: jax.Array) -> jax.Array:
        logits = as_float(self.logits(durations))
        return jax.nn.logsumexp(logits[..., self.answer], axis=-1) - jax.nn.logsumexp(
            logits, axis=-1
        )


def next_token_logits(
    lm: LanguageModel[Transformer],
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: int = -1,
) -> PromptLogits:
    """The logits of the token after token `position`, as a function of durations alone.

    Args:
      lm: the language model.
      tokens: int [T].
      embeddings: [T, D] instead of tokens.
      start: when the first token begins, a scalar; 0 if omitted.
      position: index of the token after which the answer stands.

    Raises:
      InputError: if an argument does not fit the model, or has a batch axis.
    """
    model = trunk_model(lm)
    check_shapes(
        {
            "tokens": (tokens, "T"),
            "embeddings": (embeddings, "T D"),
            "start": (start, ""),
        }
    )
    inputs = trunk_inputs.make_inputs(
        model.config, tokens, embeddings=embeddings, start=start, position=position
    )
    return PromptLogits(lm.params, inputs, jnp.asarray(position), model)


def log_probability(
    lm: LanguageModel[Transformer],
    answer: Sequence[int],
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: int = -1,
) -> LogProbability:
    """The log probability of an answer, a group of tokens, as a function of durations alone.

    Args:
      lm: the language model.
      answer: ids of the tokens that count as the answer; their probabilities are summed.
      tokens: int [T].
      embeddings: [T, D] instead of tokens.
      start: when the first token begins, a scalar; 0 if omitted.
      position: index of the token after which the answer stands.

    Raises:
      InputError: if an argument does not fit the model, or the group is empty or names no tokens.
    """
    logits = next_token_logits(
        lm, tokens, embeddings=embeddings, start=start, position=position
    )
    return LogProbability(logits, answer_tokens(answer, lm.config.vocab_size))


def answer_tokens(answer: Sequence[int], vocab_size: int) -> jax.Array:
    """The tokens of an answer, int [num_answer_tokens], each once.

    Raises:
      InputError: if there are none, or one is not in the vocabulary.
    """
    if not len(answer):
        raise InputError("the answer has no tokens; give at least one")
    check_integers("answer", np.asarray(answer), 0, vocab_size)
    return jnp.asarray(sorted(set(map(int, answer))))


def as_jit_argument(objective: Objective) -> Objective:
    """A function that can be an argument of jitted ones."""
    is_plain_function = jax.tree_util.all_leaves([objective])
    return jax.tree_util.Partial(objective) if is_plain_function else objective


@functools.partial(jax.jit, static_argnums=2)
def evaluate(objective: Objective, durations: jax.Array, batch_size: int) -> jax.Array:
    """f [P] at durations [P, T], `batch_size` of them at once; f is a pytree with a `__call__`."""
    return jax.lax.map(objective, durations, batch_size=min(batch_size, len(durations)))


class Attribution(NamedTuple):
    """Contributions of the tokens, and their residual.

    Attributes:
      contributions: contributions in the unit of f (nats for a log probability), float64 [T].
      end_value: f at the end of the path, the explained durations.
      baseline_value: f at the start of the path.
    """

    contributions: np.ndarray
    end_value: float
    baseline_value: float

    @property
    def change(self) -> float:
        """f(end) - f(baseline), the exact sum of the contributions."""
        return self.end_value - self.baseline_value

    @property
    def residual(self) -> float:
        """The sum of the contributions less `change`: the error of the integral."""
        return float(self.contributions.sum()) - self.change

    def relative_residual(self, min_change: float = 0.1) -> float:
        """|residual| / max(|change|, `min_change`); `min_change` in the unit of f."""
        return abs(self.residual) / max(abs(self.change), min_change)


def integrated_gradients(
    objective: Objective,
    durations: ArrayLike,
    baseline: ArrayLike | None = None,
    *,
    nodes: int = 64,
    batch_size: int = 16,
) -> Attribution:
    """Integrated gradients along the straight path of durations from `baseline` to `durations`.

    Fixed nodes are inaccurate. The answer's log probability changes suddenly along the path (by 30
    nats while alpha changes by 0.05), anywhere in [0, 1]. With alpha = u^p, 64 Gauss-Legendre nodes
    in u miss up to 20 to 50 % for every p from 1 to 6. So f is first evaluated at 2 `nodes` + 1
    points, one forward pass each. Then `nodes` gradients are computed in panels of
    `NODES_PER_PANEL` Gauss-Legendre nodes, placed by `panel_edges`. Sums are in float64.

    Check the residual. With sliding windows, a path longer than the window crosses times at which a
    key leaves a window. f jumps there, and the integral does not contain the jump.

    Args:
      objective: f, durations [T] -> a scalar.
      durations: end of the path [T], finite and >= 0.
      baseline: start of the path [T]. If omitted, all tokens but the first are absent; the first
        stays, so that there is a key to attend to.
      nodes: number of gradients, a multiple of `NODES_PER_PANEL`.
      batch_size: durations in one batch, which bounds the memory.

    Returns:
      The attribution. A token whose duration does not change along the path contributes exactly 0.

    Raises:
      InputError: if durations do not fit, or `nodes` is not a multiple of `NODES_PER_PANEL`.
    """
    end, baseline = check_path(durations, baseline)
    if nodes < NODES_PER_PANEL or nodes % NODES_PER_PANEL:
        raise InputError(
            f"nodes is {nodes}; it must be a positive multiple of {NODES_PER_PANEL}"
        )
    check_count("batch_size", batch_size)
    grid = np.linspace(0.0, 1.0, 2 * nodes + 1) ** 2
    objective = as_jit_argument(objective)
    objective_values = np.asarray(
        evaluate(objective, _points_on_path(baseline, end, grid), batch_size),
        np.float64,
    )
    _check_finite(objective_values)
    alphas, weights = gauss_legendre(
        panel_edges(grid, objective_values, nodes // NODES_PER_PANEL), NODES_PER_PANEL
    )
    gradients = _gradients(
        objective, _points_on_path(baseline, end, alphas), batch_size
    )
    mean_gradient = weights @ np.asarray(gradients, np.float64)
    step = np.asarray(end, np.float64) - np.asarray(baseline, np.float64)
    return Attribution(
        step * mean_gradient + 0.0,
        float(objective_values[-1]),
        float(objective_values[0]),
    )


NODES_PER_PANEL = 4  # Gauss-Legendre nodes of a panel
# The share of the panels that is spread over the path, however little f changes there.
EVENLY_SPREAD_SHARE = 0.6


def panel_edges(
    grid: np.ndarray, objective_values: np.ndarray, num_panels: int
) -> np.ndarray:
    """Edges of panels in [0, 1], narrow where f changes fast.

    Half of the edges are even in sqrt(alpha), since f is steep near alpha = 0. The other half
    follow the variation of f. The weight of an interval is the largest change of f in the interval
    and its two neighbours, so panels are narrow on both sides of a sudden change.

    Args:
      grid: increasing points [num_points] from 0 to 1.
      objective_values: f at these points [num_points].
      num_panels: number of panels.

    Returns:
      edges [num_panels + 1], float64, from 0 to 1.
    """
    changes = np.abs(np.diff(objective_values))
    padded = np.pad(changes, 1)
    changes = np.maximum(changes, np.maximum(padded[:-2], padded[2:]))
    even_density = np.diff(np.sqrt(grid))
    change_density = changes / changes.sum() if changes.sum() > 0 else even_density
    panel_density = (
        EVENLY_SPREAD_SHARE * even_density
        + (1.0 - EVENLY_SPREAD_SHARE) * change_density
    )
    cumulative = np.concatenate([[0.0], np.cumsum(panel_density)])
    return np.interp(
        np.linspace(0.0, 1.0, num_panels + 1), cumulative / cumulative[-1], grid
    )


def gauss_legendre(edges: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights in each panel.

    Args:
      edges: edges of the panels [num_panels + 1].
      nodes: in each of them.

    Returns:
      points and weights, [num_panels * nodes] each; weights sum to the length; float64.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    panel_widths = np.diff(edges)[:, None]
    panel_points = edges[:-1, None] + panel_widths * (points + 1.0) / 2.0
    return panel_points.ravel(), (panel_widths * weights / 2.0).ravel()


def gradient_times_input(
    objective: Objective, durations: ArrayLike, baseline: ArrayLike | None = None
) -> Attribution:
    """The gradient at the end of the path times end - baseline: a first-order estimate.

    Args and errors as in `integrated_gradients`.
    """
    end, baseline = check_path(durations, baseline)
    objective = as_jit_argument(objective)
    objective_values = np.asarray(
        evaluate(objective, jnp.stack([baseline, end]), 2), np.float64
    )
    gradient = np.asarray(_gradients(objective, end[None], 1)[0], np.float64)
    step = np.asarray(end, np.float64) - np.asarray(baseline, np.float64)
    return Attribution(
        step * gradient + 0.0, float(objective_values[1]), float(objective_values[0])
    )


def leave_one_out(
    objective: Objective,
    durations: ArrayLike,
    baseline: ArrayLike | None = None,
    *,
    batch_size: int = 16,
) -> Attribution:
    """f less f with each token's duration at its baseline: T + 2 values, no gradient.

    Args and errors as in `integrated_gradients`.
    """
    end, baseline = check_path(durations, baseline)
    ablated_rows = jnp.where(jnp.eye(len(end), dtype=bool), baseline, end)
    rows = jnp.concatenate([ablated_rows, jnp.stack([baseline, end])])
    objective_values = np.asarray(
        evaluate(as_jit_argument(objective), rows, batch_size), np.float64
    )
    return Attribution(
        objective_values[-1] - objective_values[:-2],
        float(objective_values[-1]),
        float(objective_values[-2]),
    )


def check_path(
    durations: ArrayLike, baseline: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """The ends of a path of durations, [T] each: `baseline`, or its default, comes second.

    Raises:
      InputError: if they do not fit.
    """
    end = as_float(durations)
    if end.ndim != 1 or not end.size:
        raise InputError(
            f"durations have shape {list(end.shape)}; a path needs [T], T >= 1"
        )
    check_durations(end, len(end))
    if baseline is None:
        return end, jnp.where(jnp.arange(len(end)) == 0, end, 0.0)
    baseline = as_float(baseline).astype(end.dtype)
    if baseline.shape != end.shape:
        raise InputError(
            f"baseline has shape {list(baseline.shape)}; it must be {list(end.shape)}"
        )
    check_durations(baseline, len(end), "baseline")
    return end, baseline


def _points_on_path(
    baseline: jax.Array, end: jax.Array, alphas: np.ndarray
) -> jax.Array:
    """Durations [P, T] at points of the path; exactly the ends at 0 and 1."""
    share = jnp.asarray(alphas, end.dtype)[:, None]
    return (1.0 - share) * baseline + share * end


def _check_finite(objective_values: np.ndarray) -> None:
    if not np.isfinite(objective_values).all():
        raise InputError(
            "the value is not finite everywhere on the path; choose a baseline at which it is"
        )


@functools.partial(jax.jit, static_argnums=2)
def _gradients(
    objective: Objective, durations: jax.Array, batch_size: int
) -> jax.Array:
    """df/dd [P, T] at durations [P, T]."""
    return jax.lax.map(
        jax.grad(objective), durations, batch_size=min(batch_size, len(durations))
    )
