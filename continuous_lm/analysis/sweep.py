"""Sweeps: a prompt at many durations, the answer's probabilities at each, under one jit.

What all points have in common is computed once: the tokens before the first that differs from
point to point run through the model a single time, and every point goes on from their keys and
values. Behind the answer nothing is computed, and in the last layer nothing but the answer. Points
run in batches of one size; lengths are rounded up to few different ones, with tokens of duration 0,
so that one program serves many prompts. On a mesh, points are spread over its axis "data".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import as_float, check_integers
from continuous_lm.durations import end_times
from continuous_lm.errors import InputError
from continuous_lm.parallel.pmap import pmap_rows

_RANKS = {"tokens": 1, "embeddings": 2, "durations": 1, "times": 1, "start": 0}
# Operations that a prefix has to save before it is computed apart, which is one more program to
# compile.
WORTH = 1e10
COARSE = 16  # lengths of many prompts, and of prefixes, are rounded up to multiples of it


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
    d = as_float(durations)
    ones = jnp.ones_like(d)
    match what:
        case "both":
            return {"durations": d}
        case "mass":
            return {"durations": d, "times": end_times(ones)}
        case "times":
            return {"durations": ones, "times": end_times(d)}
    raise InputError(f"vary is {what!r}; it must be 'both', 'mass' or 'times'")


# --- One prompt -------------------------------------------------------------------------------


def probabilities(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
    progress: str | None = None,
    at: ArrayLike = -1,
    **arguments: ArrayLike,
) -> np.ndarray:
    """The probability of each group of tokens as the next token, at every point of a sweep.

    Args:
      lm: the language model.
      groups: C groups of token ids; the probabilities of a group's tokens are summed.
      batch_size: at most so many points at once; as many as suit the device if left out.
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
    read = functools.partial(_probabilities, indicator(groups, lm.config.vocab_size))
    points = checked(lm, arguments, at)
    return np.concatenate([rows[0] for rows in _batches(lm, read, [points], batch_size, progress)])


def reached(
    lm: HasModel,
    threshold: float,
    *,
    batch_size: int | None = None,
    at: ArrayLike = -1,
    **arguments: ArrayLike,
) -> list[int]:
    """The tokens whose probability reaches `threshold` at any point of a sweep, likeliest first.

    `batch_size`, `at` and `arguments` as of `probabilities`.
    """
    batches = _batches(lm, _largest, [checked(lm, arguments, at)], batch_size, None)
    largest = functools.reduce(np.maximum, batches)[0, 0]
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
        length = _bucket(swept.num_tokens, COARSE)
        return swept.num_points, length, lm.config.at_length(swept.num_tokens)

    sets: list[list[int]] = []
    for i in sorted(range(len(sweeps)), key=lambda i: (sweeps[i].num_points, sweeps[i].num_tokens)):
        last = sets[-1] if sets else []
        size = sum(sweeps[j].num_points for j in (*last, i))
        if last and alike(sweeps[last[0]]) == alike(sweeps[i]) and size <= batch_size:
            last.append(i)
        else:
            sets.append([i])
    return [tuple(indices) for indices in sets]


def together(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    sweeps: Sequence[Sweep],
    batch_size: int | None = None,
) -> list[np.ndarray]:
    """The probabilities [P, C] of each of a set of sweeps that `plan` has made.

    Prompts of similar length run one program: they are filled up with tokens of duration 0, which
    no token sees.
    """
    read = functools.partial(_probabilities, indicator(groups, lm.config.vocab_size))
    points = [checked(lm, swept.arguments(), -1) for swept in sweeps]
    if len({(len(p.at), frozenset(p.arguments)) for p in points}) > 1:
        raise InputError(
            "sweeps that are computed together must have the same arguments and number of points"
        )
    found = np.concatenate(list(_batches(lm, read, points, batch_size, None)), axis=1)
    return list(found)


# --- From points to batches -------------------------------------------------------------------


class Points(NamedTuple):
    """The points of one prompt."""

    num_tokens: int  # T
    arguments: dict[str, np.ndarray]  # [P, ...] of what differs, [1, ...] of what does not
    at: np.ndarray  # int [P], not negative
    shared: int  # tokens that all points begin with


def checked(lm: HasModel, given: Mapping[str, ArrayLike], at: ArrayLike) -> Points:
    """The arguments of a sweep, checked."""
    arrays = {name: np.asarray(value) for name, value in given.items()}
    for name, array in arrays.items():
        if name not in _RANKS:
            raise InputError(f"a sweep has no argument {name}; only {', '.join(_RANKS)}")
        if array.ndim - _RANKS[name] not in (0, 1):
            raise InputError(
                f"{name} has shape {list(array.shape)}; a sweep allows one axis in front"
            )
    varied = {name: array for name, array in arrays.items() if array.ndim > _RANKS[name]}
    counts = {array.shape[0] for array in varied.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(
            f"a sweep needs arguments with one common number of points; these have {sorted(counts)}"
        )
    lm.model.check(**arrays, at=at)
    (num_points,) = counts
    first = next(name for name in ("tokens", "embeddings") if name in arrays)
    num_tokens = arrays[first].shape[arrays[first].ndim - _RANKS[first]]
    arrays.setdefault("durations", np.ones(num_tokens, np.float32))
    arrays = {n: x if n in varied else x[None] for n, x in arrays.items()}
    at = np.broadcast_to(np.asarray(at) % num_tokens, num_points)
    return Points(num_tokens, arrays, at, _shared(arrays, int(at.min())))


def _shared(arrays: Mapping[str, np.ndarray], most: int) -> int:
    """How many tokens are the same at every point, from the first on, at most `most`."""
    for name, array in arrays.items():
        differs = (array != array[:1]).any(axis=0)
        if _RANKS[name] == 0:
            most = 0 if differs else most
        else:
            places = np.flatnonzero(differs.reshape(len(differs), -1).any(axis=1))
            most = min([most, *places[:1].tolist()])
    return most


def _bucket(length: int, least: int) -> int:
    """The length rounded up to a multiple of `least`, and of more as it grows: by an eighth."""
    step = max(least, 2 ** (max(length - 1, 8).bit_length() - 4))
    return math.ceil(length / step) * step


def _batches(
    lm: HasModel,
    read: Callable[..., jax.Array],
    prompts: Sequence[Points],
    batch_size: int | None,
    progress: str | None,
) -> Iterator[np.ndarray]:
    """What `read(model, params, arguments)` finds for B prompts at some points at a time [B, ...].

    The last batch is cut to the points that are left.
    """
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise InputError(f"batch_size is {batch_size!r}; it must be a positive integer")
    num_points = len(prompts[0].at)
    model = lm.model.clone(config=lm.config.at_length(prompts[0].num_tokens))
    cuts = [p.shared if _worth(lm, p) else 0 for p in prompts]
    mesh = axes_lib.mesh_of(jax.tree.leaves(lm.params)[0])
    if mesh is not None:
        mesh = Mesh(mesh.devices, mesh.axis_names)  # axes of type Auto, as of the parameters
    arguments: dict[str, Any] = {}
    if all(cuts):
        before = _stacked(prompts, [(0, cut) for cut in cuts], COARSE)
        before = {name: array[:, :1] for name, array in before.items()}
        arguments["prefix"] = _remember(model, lm.params, before)
    else:
        cuts = [0] * len(prompts)
    ends = [int(p.at.max()) + 1 for p in prompts]
    fine = 1 if len(prompts) == 1 else COARSE
    rest = _stacked(prompts, list(zip(cuts, ends, strict=True)), fine)
    if any(cuts):
        rest.pop("start", None)  # the prefix says when it ends
    rest["at"] = np.stack([p.at - cut for p, cut in zip(prompts, cuts, strict=True)])

    width = rest["durations"].shape[-1]
    spread = 1 if mesh is None else mesh.shape.get("data", 1)
    most = max(1, (batch_size or _at_once(width, spread)) // len(prompts))
    num_batches = math.ceil(num_points / most)
    size = math.ceil(math.ceil(num_points / num_batches) / spread) * spread
    for first in tqdm.tqdm(
        range(0, num_points, size), desc=progress, disable=progress is None, unit="batch"
    ):
        index = np.minimum(np.arange(first, first + size), num_points - 1)  # the last one fills up
        batch = {n: x[:, index] if x.shape[1] > 1 else x for n, x in rest.items()}
        if mesh is not None:
            places = {name: " ".join(f"-P{'-' * (x.ndim - 2)}") for name, x in batch.items()}
            batch = {name: axes_lib.placed(mesh, x, places[name]) for name, x in batch.items()}
        found = np.asarray(
            read(model, mesh, lm.params, batch | arguments)
        )  # waits: the bar is true
        yield found[:, : num_points - first]


def _worth(lm: HasModel, points: Points) -> bool:
    """Whether what all points share is worth a program of its own."""
    config = lm.config
    width = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    each = 2 * config.num_layers * (width + 3 * config.hidden_size * config.mlp_size)
    return points.shared * (len(points.at) - 1) * each > WORTH


def _at_once(width: int, spread: int) -> int:
    """How many points of `width` tokens suit the device: its caches on a CPU, else its memory."""
    tokens = 2048 if jax.default_backend() == "cpu" else 16384
    return max(1, spread * tokens // width)


def _stacked(
    prompts: Sequence[Points], parts: Sequence[tuple[int, int]], least: int
) -> dict[str, np.ndarray]:
    """Tokens `begin` to `end` of each prompt, filled up to one length: [B, P or 1, ...]."""
    width = _bucket(max(end - begin for begin, end in parts), least)
    stacked = {}
    for name in prompts[0].arguments:
        arrays = [p.arguments[name] for p in prompts]
        if _RANKS[name]:
            mode: Any = "edge" if name == "times" else "constant"
            arrays = [
                np.pad(
                    array[:, begin:end],
                    [(0, 0), (0, width - (end - begin)), *[(0, 0)] * (_RANKS[name] - 1)],
                    mode=mode,
                )
                for array, (begin, end) in zip(arrays, parts, strict=True)
            ]
        count = max(map(len, arrays))
        stacked[name] = np.stack([np.broadcast_to(a, (count, *a.shape[1:])) for a in arrays])
    return stacked


# --- Programs -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _remember(model, params, arguments: Mapping[str, jax.Array]) -> Any:
    """What all points share, of B prompts: a prefix with leading axes [B, 1]."""
    return model.apply({"params": params}, method="remember", **arguments)


def _next(model, params, arguments: Mapping[str, Any]) -> jax.Array:
    """The distribution [B, P, V] of the next token."""
    logits = model.apply({"params": params}, **arguments)
    return jax.nn.softmax(logits.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _probabilities(members, model, mesh, params, arguments: Mapping[str, Any]) -> jax.Array:
    """Group probabilities [B, P, C] of the next token."""
    distribution = _next(model, params, arguments)
    found = jnp.dot(distribution, members, precision=jax.lax.Precision.HIGHEST)
    return axes_lib.placed(mesh, found, "- - -")  # so that each process can read it


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest(model, mesh, params, arguments: Mapping[str, Any]) -> jax.Array:
    """The largest probability of each token at any point, [B, 1, V]."""
    largest = jnp.max(_next(model, params, arguments), axis=1, keepdims=True)
    return axes_lib.placed(mesh, largest, "- - -")


def indicator(groups: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[V, C]: 1 where a token belongs to a group."""
    found = np.zeros((vocab_size, len(groups)), np.float32)
    for column, group in enumerate(groups):
        if len(group):
            check_integers(f"group {column}", np.asarray(group), 0, vocab_size)
        found[list(group), column] = 1.0
    return found


def pmap_sweep(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    *,
    devices: Sequence[jax.Device] | None = None,
    at: ArrayLike = -1,
    **arguments: ArrayLike,
) -> np.ndarray:
    """`sweep.probabilities` by `jax.pmap`: the points spread over devices.

    Args:
      lm: the language model, on no mesh.
      groups: as of `sweep.probabilities`.
      devices: of this process; all of them if left out.
      at: as of `sweep.probabilities`, and
      **arguments: as there. All points run at once: for fewer, cut them up.

    Returns:
      probabilities [P, C], float32: those of one device, to rounding.
    """
    points = checked(lm, arguments, at)
    rows: dict[str, np.ndarray] = {n: x for n, x in points.arguments.items() if len(x) > 1}
    fixed = {name: x[0] for name, x in points.arguments.items() if name not in rows}
    rows["at"] = points.at
    members = indicator(groups, lm.config.vocab_size)
    read = _pmap_program(lm.model, None if devices is None else tuple(devices))
    return read((lm.params, fixed, members), rows)


@functools.lru_cache(maxsize=8)
def _pmap_program(model: Any, devices: tuple[jax.Device, ...] | None) -> Callable[..., Any]:
    """The same function for the same model, so that it is compiled once."""

    def read(shared: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        params, fixed, members = shared
        logits = model.apply({"params": params}, **fixed, **rows)
        distribution = jax.nn.softmax(logits.astype(jnp.float32))
        return jnp.dot(distribution, members, precision=jax.lax.Precision.HIGHEST)

    return pmap_rows(read, devices)
