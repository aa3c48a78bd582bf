"""Sweeps: a prompt at many durations, the answer's probabilities at each, under one jit."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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


# --- One prompt -------------------------------------------------------------------------------


def probabilities(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    progress: str | None = None,
    at: ArrayLike = -1,
    **arguments: ArrayLike,
) -> np.ndarray:
    """The probability of each group of tokens as the next token, at every point of a sweep.

    Args:
      lm: the language model.
      groups: C groups of token ids; the probabilities of a group's tokens are summed.
      batch_size: at most so many points at once; batches are of one size, compiled once.
      progress: label of a progress bar; none is shown if left out.
      at: index of the token after which the answer stands, an int or int [P].
      **arguments: of the model: tokens [T] or [P, T], or embeddings [T, D] or [P, T, D], and
        durations, times [T] or [P, T] and start [] or [P], of which at least one has the points'
        axis.

    Returns:
      probabilities [P, C], float32.

    Raises:
      InputError: if arguments do not fit each other or the model.
    """
    read = functools.partial(_probabilities, _indicator(groups, lm.config.vocab_size))
    return np.concatenate(list(_batches(lm, read, arguments, at, batch_size, progress)))


def reached(
    lm: HasModel,
    threshold: float,
    *,
    batch_size: int = 32,
    at: ArrayLike = -1,
    **arguments: ArrayLike,
) -> list[int]:
    """The tokens whose probability reaches `threshold` at any point of a sweep, likeliest first.

    `batch_size`, `at` and `arguments` as of `probabilities`.
    """
    batches = _batches(lm, _largest, arguments, at, batch_size, None)
    (largest,) = functools.reduce(np.maximum, batches)
    return [int(i) for i in np.argsort(-largest, kind="stable") if largest[i] >= threshold]


# --- Many prompts -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One prompt at P points.

    Attributes:
      num_points: P.
      num_tokens: T; the answer stands after the last.
      arguments: makes the model's arguments, as of `probabilities`, when they are needed.
    """

    num_points: int
    num_tokens: int
    arguments: Callable[[], Mapping[str, ArrayLike]]


def plan(lm: HasModel, sweeps: Sequence[Sweep], batch_size: int = 32) -> list[tuple[int, ...]]:
    """Which sweeps to compute together, so that few programs are compiled and batches are full.

    A set holds sweeps of similar length with about `batch_size` points. It depends on the sweeps
    alone, and so do the numbers that come of it, to the last bit.
    """

    def alike(swept: Sweep) -> tuple:
        return _width(swept), lm.config.at_length(swept.num_tokens)

    sets: list[list[int]] = []
    for i in sorted(range(len(sweeps)), key=lambda i: sweeps[i].num_tokens):
        last = sets[-1] if sets else []
        size = sum(sweeps[j].num_points for j in (*last, i))
        if last and alike(sweeps[last[0]]) == alike(sweeps[i]) and size <= batch_size:
            last.append(i)
        else:
            sets.append([i])
    return [tuple(indices) for indices in sets]


def together(
    lm: HasModel, groups: Sequence[Sequence[int]], sweeps: Sequence[Sweep], batch_size: int = 32
) -> list[np.ndarray]:
    """The probabilities [P, C] of each of a set of sweeps that `plan` has made.

    Prompts of similar length run one program: they are filled up with tokens of duration 0 at the
    end, which no token before them sees.
    """
    width = max(map(_width, sweeps))
    rows = [_rows(swept, width) for swept in sweeps]
    if len({frozenset(row) for row in rows}) > 1:
        raise InputError("sweeps that are computed together must have the same arguments")
    at = [np.full(swept.num_points, swept.num_tokens - 1) for swept in sweeps]
    arguments = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    model = lm.model.clone(config=lm.config.at_length(sweeps[0].num_tokens))
    read = functools.partial(_probabilities, _indicator(groups, lm.config.vocab_size))
    at_length = _Model(lm.config, lm.params, model)
    batches = _batches(at_length, read, arguments, np.concatenate(at), batch_size, None)
    found = np.concatenate(list(batches))
    return np.split(found, np.cumsum([swept.num_points for swept in sweeps])[:-1])


@dataclasses.dataclass(frozen=True)
class _Model:
    config: Any
    params: Any
    model: Any


_RANKS = {"tokens": 1, "embeddings": 2, "durations": 1, "times": 1, "start": 0}
_BUCKET = 16  # lengths of sweeps computed together are rounded up to multiples of it


def _width(swept: Sweep) -> int:
    return math.ceil(swept.num_tokens / _BUCKET) * _BUCKET


def _rows(swept: Sweep, width: int) -> dict[str, np.ndarray]:
    """A sweep's arguments at every point, filled up to `width` tokens."""
    missing = width - swept.num_tokens
    rows = {"durations": np.ones(swept.num_tokens, np.float32)} | dict(swept.arguments())
    filled = {}
    for name, value in rows.items():
        rank = _RANKS[name]
        value = np.asarray(value)
        value = np.broadcast_to(value, (swept.num_points, *value.shape[value.ndim - rank :]))
        pad = [(0, 0), (0, missing), (0, 0)][: rank + 1] if rank else [(0, 0)]
        filled[name] = np.pad(value, pad, mode="edge" if name == "times" else "constant")
    return filled


def _batches(
    lm: HasModel,
    read: Callable[..., jax.Array],
    arguments: Mapping[str, ArrayLike],
    at: ArrayLike,
    batch_size: int,
    progress: str | None,
) -> Iterator[np.ndarray]:
    """What `read(model, params, at, arguments)` finds in each batch of points; the last is cut."""
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    for name, array in arrays.items():
        if name not in _RANKS:
            raise InputError(f"a sweep has no argument {name}; only {', '.join(_RANKS)}")
        if array.ndim - _RANKS[name] not in (0, 1):
            raise InputError(
                f"{name} has shape {list(array.shape)}; a sweep allows one axis in front"
            )
    varied = {name: array for name, array in arrays.items() if array.ndim > _RANKS[name]}
    points = {array.shape[0] for array in varied.values()}
    if len(points) != 1 or 0 in points:
        raise InputError(
            f"a sweep needs arguments with one common number of points; these have {sorted(points)}"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; it must be a positive integer")
    lm.model.check(**arrays, at=at)

    (num_points,) = points
    fixed = {name: array for name, array in arrays.items() if name not in varied}
    varied["at"] = jnp.broadcast_to(jnp.asarray(at), (num_points,))
    num_batches = math.ceil(num_points / batch_size)
    size = math.ceil(num_points / num_batches)
    for first in tqdm.tqdm(
        range(0, num_points, size), desc=progress, disable=progress is None, unit="batch"
    ):
        index = np.minimum(np.arange(first, first + size), num_points - 1)  # the last one fills up
        batch = fixed | {name: array[index] for name, array in varied.items()}
        found = np.asarray(read(lm.model, lm.params, batch))  # waits: the bar tells the truth
        yield found[: num_points - first]


def _next(model, params, arguments: Mapping[str, jax.Array]) -> jax.Array:
    """The distribution [P, V] of the next token."""
    logits = model.apply({"params": params}, **arguments)
    return jax.nn.softmax(logits.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=1)
def _probabilities(indicator, model, params, arguments: Mapping[str, jax.Array]) -> jax.Array:
    """Group probabilities [P, C] of the next token."""
    distribution = _next(model, params, arguments)
    return jnp.dot(distribution, indicator, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def _largest(model, params, arguments: Mapping[str, jax.Array]) -> jax.Array:
    """The largest probability of each token at any point, [1, V]."""
    return jnp.max(_next(model, params, arguments), axis=0, keepdims=True)


def _indicator(groups: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[V, C]: 1 where a token belongs to a group."""
    indicator = np.zeros((vocab_size, len(groups)), np.float32)
    for column, group in enumerate(groups):
        if len(group):
            time.check_integers(f"group {column}", np.asarray(group), 0, vocab_size)
        indicator[list(group), column] = 1.0
    return indicator
