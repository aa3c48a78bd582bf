"""Sweeps: one prompt at many durations, the answer's probabilities at each, under one jit."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.typing import ArrayLike

from continuous_lm import durations as time
from continuous_lm.errors import InputError


class HasModel(Protocol):
    """What a sweep needs of a language model: a pure `model.apply`, and its parameters."""

    @property
    def config(self) -> Any: ...
    @property
    def params(self) -> Any: ...
    @property
    def model(self) -> Any: ...


def vary(durations: ArrayLike, what: str = "both") -> dict[str, Any]:
    """The arguments of a model that follow `durations` [P, T] in mass, in time, or in both.

    "mass" changes the weights of the keys (log d) and leaves every token at its ordinary time;
    "times" moves the tokens (rotary angles, windows) and leaves their weights at 1; "both" is the
    continuous transformer.
    """
    d = time.as_float(durations)
    ones = jnp.ones_like(d)
    match what:
        case "both":
            return {"durations": d}
        case "mass":
            return {"durations": d, "times": time.end_times(ones)}
        case "times":
            return {"durations": ones, "times": time.end_times(d)}
    raise InputError(f"vary is {what!r}; it must be 'both', 'mass' or 'times'")


def probabilities(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    progress: str | None = None,
    at: int = -1,
    **arguments: Any,
) -> np.ndarray:
    """The probability of each group of tokens as the next token, at every point of a sweep.

    Args:
      lm: the language model.
      groups: C groups of token ids; the probabilities of a group's tokens are summed.
      batch_size: at most so many points at once; batches are of one size, compiled once.
      progress: label of a progress bar; none is shown if left out.
      at: index of the token after which the answer stands.
      **arguments: of the model: tokens [T], or embeddings [T, D] or [P, T, D], and durations,
        times [T] or [P, T], of which at least one has the points' axis.

    Returns:
      probabilities [P, C], float32.

    Raises:
      InputError: if arguments do not fit each other or the model.
    """
    ranks = {"tokens": 1, "embeddings": 2, "durations": 1, "times": 1, "start": 0}
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    for name, array in arrays.items():
        if name not in ranks:
            raise InputError(f"a sweep has no argument {name}; only {', '.join(ranks)}")
        if array.ndim - ranks[name] not in (0, 1):
            raise InputError(
                f"{name} has shape {list(array.shape)}; a sweep allows one axis in front"
            )
    varied = {name: array for name, array in arrays.items() if array.ndim > ranks[name]}
    points = {array.shape[0] for array in varied.values()}
    if len(points) != 1 or 0 in points:
        raise InputError(
            f"a sweep needs arguments with one common number of points; these have {sorted(points)}"
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    lm.model.check(**arrays, at=at)

    (num_points,) = points
    num_batches = math.ceil(num_points / batch_size)
    size = math.ceil(num_points / num_batches)
    indicator = _indicator(groups, lm.config.vocab_size)
    fixed = {name: array for name, array in arrays.items() if name not in varied}
    rows = []
    for first in tqdm.tqdm(
        range(0, num_points, size), desc=progress, disable=progress is None, unit="batch"
    ):
        index = np.minimum(np.arange(first, first + size), num_points - 1)  # the last one fills up
        batch = {name: array[index] for name, array in varied.items()}
        row = _probabilities(lm.model, lm.params, indicator, at, fixed | batch)
        rows.append(np.asarray(row))  # waits, so that the bar tells the truth
    return np.concatenate(rows)[:num_points]


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model, params, indicator, at, arguments: Mapping[str, jax.Array]) -> jax.Array:
    """Group probabilities [P, C] of the next token."""
    logits = model.apply({"params": params}, at=at, **arguments)
    distribution = jax.nn.softmax(logits.astype(jnp.float32))
    return jnp.dot(distribution, indicator, precision=jax.lax.Precision.HIGHEST)


def _indicator(groups: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[V, C]: 1 where a token belongs to a group."""
    indicator = np.zeros((vocab_size, len(groups)), np.float32)
    for column, group in enumerate(groups):
        if len(group):
            time.check_integers(f"group {column}", np.asarray(group), 0, vocab_size)
        indicator[list(group), column] = 1.0
    return indicator
