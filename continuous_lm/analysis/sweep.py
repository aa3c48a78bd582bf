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
from continuous_lm.analysis import flops
from continuous_lm.arguments import as_float, check_count, check_integers
from continuous_lm.durations import end_times
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models import transformer
from continuous_lm.models.transformer import make_inputs
from continuous_lm.parallel.pmap import pmap_rows

_ARGUMENT_RANKS = {"tokens": 1, "embeddings": 2, "durations": 1, "times": 1, "start": 0}
# Operations that a prefix has to save before it is computed apart, which is one more program to
# compile.
MIN_SAVED_FLOPS = 1e10
LENGTH_MULTIPLE = (
    16  # lengths of many prompts, and of prefixes, are rounded up to multiples of it
)


class HasModel(Protocol):
    """What a sweep needs of a language model: a pure `model.apply`, and its parameters."""

    @property
    def config(self) -> Any: ...
    @property
    def params(self) -> Any: ...
    @property
    def model(self) -> Any: ...


def change_durations(durations: ArrayLike, change: str = "both") -> dict[str, Any]:
    """The arguments of a model that follow `durations` [P, T] in mass, in time, or in both.

    "mass" changes the weights of the keys (log d) and leaves every token at its ordinary time;
    "times" moves the tokens (rotary angles, windows) and leaves their weights at 1; "both" is the
    continuous transformer.
    """
    d = as_float(durations)
    ones = jnp.ones_like(d)
    match change:
        case "both":
            return {"durations": d}
        case "mass":
            return {"durations": d, "times": end_times(ones)}
        case "times":
            return {"durations": ones, "times": end_times(d)}
    raise InputError(f"change is {change!r}; it must be 'both', 'mass' or 'times'")


# --- One prompt -------------------------------------------------------------------------------


def probabilities(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
    progress: str | None = None,
    position: ArrayLike = -1,
    **arguments: ArrayLike,
) -> np.ndarray:
    """The probability of each group of tokens as the next token, at every point of a sweep.

    Args:
      lm: the language model.
      groups: A groups of token ids; the probabilities of a group's tokens are summed.
      batch_size: at most so many points at once; as many as suit the device if left out.
      progress: label of a progress bar; none is shown if left out.
      position: index of the token after which the answer stands, an int or int [P].
      **arguments: of the model: tokens [T] or [P, T], or embeddings [T, D] or [P, T, D], and
        durations, times [T] or [P, T] and start [] or [P], of which at least one has the points'
        axis.

    Returns:
      probabilities [P, A], float32.

    Raises:
      InputError: if arguments do not fit each other or the model.
    """
    compute = functools.partial(
        _group_probabilities, membership_matrix(groups, lm.config.vocab_size)
    )
    points = validate(lm, arguments, position)
    return np.concatenate(
        [rows[0] for rows in _run_batches(lm, compute, [points], batch_size, progress)]
    )


def tokens_above(
    lm: HasModel,
    threshold: float,
    *,
    batch_size: int | None = None,
    position: ArrayLike = -1,
    **arguments: ArrayLike,
) -> list[int]:
    """The tokens whose probability reaches `threshold` at any point of a sweep, likeliest first.

    `batch_size`, `position` and `arguments` as of `probabilities`.
    """
    batches = _run_batches(
        lm,
        _largest_probabilities,
        [validate(lm, arguments, position)],
        batch_size,
        None,
    )
    largest = functools.reduce(np.maximum, batches)[0, 0]
    return [
        int(i) for i in np.argsort(-largest, kind="stable") if largest[i] >= threshold
    ]


# --- Many prompts -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One prompt at P points.

    Attributes:
      num_points: P.
      num_tokens: T; the answer stands after the last.
      make_arguments: makes the model's arguments, as of `probabilities`, when they are needed.
    """

    num_points: int
    num_tokens: int
    make_arguments: Callable[[], Mapping[str, ArrayLike]]


def group_by_program(
    lm: HasModel, sweeps: Sequence[Sweep], batch_size: int = 32
) -> list[tuple[int, ...]]:
    """Which sweeps to compute together, so that few programs are compiled and batches are full.

    A set holds sweeps of similar length with about `batch_size` points. It depends on the sweeps
    alone, and so do the numbers that come of it, to the last bit.
    """

    def program_key(swept: Sweep) -> tuple:
        rounded_length = _round_up_length(swept.num_tokens, LENGTH_MULTIPLE)
        return swept.num_points, rounded_length, lm.config.at_length(swept.num_tokens)

    groups: list[list[int]] = []
    for index in sorted(
        range(len(sweeps)), key=lambda i: (sweeps[i].num_points, sweeps[i].num_tokens)
    ):
        last_group = groups[-1] if groups else []
        num_points = sum(sweeps[j].num_points for j in (*last_group, index))
        if (
            last_group
            and program_key(sweeps[last_group[0]]) == program_key(sweeps[index])
            and num_points <= batch_size
        ):
            last_group.append(index)
        else:
            groups.append([index])
    return [tuple(indices) for indices in groups]


def run_group(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    sweeps: Sequence[Sweep],
    batch_size: int | None = None,
) -> list[np.ndarray]:
    """The probabilities [P, A] of each of a set of sweeps that `group_by_program` has made.

    Prompts of similar length run one program: they are filled up with tokens of duration 0, which
    no token sees.
    """
    compute = functools.partial(
        _group_probabilities, membership_matrix(groups, lm.config.vocab_size)
    )
    points = [validate(lm, sweep.make_arguments(), -1) for sweep in sweeps]
    if len({(len(p.position), frozenset(p.arguments)) for p in points}) > 1:
        raise InputError(
            "sweeps that are computed together must have the same arguments and number of points"
        )
    answer_probabilities = np.concatenate(
        list(_run_batches(lm, compute, points, batch_size, None)), axis=1
    )
    return list(answer_probabilities)


# --- From points to batches -------------------------------------------------------------------


class Points(NamedTuple):
    """The points of one prompt."""

    num_tokens: int  # T
    arguments: dict[
        str, np.ndarray
    ]  # [P, ...] of what differs, [1, ...] of what does not
    position: np.ndarray  # int [P], not negative
    num_shared_tokens: int  # tokens that all points begin with


def validate(
    lm: HasModel, arguments: Mapping[str, ArrayLike], position: ArrayLike
) -> Points:
    """The arguments of a sweep, checked."""
    arrays = {name: np.asarray(value) for name, value in arguments.items()}
    for name, array in arrays.items():
        if name not in _ARGUMENT_RANKS:
            raise InputError(
                f"a sweep has no argument {name}; only {', '.join(_ARGUMENT_RANKS)}"
            )
        if array.ndim - _ARGUMENT_RANKS[name] not in (0, 1):
            raise InputError(
                f"{name} has shape {list(array.shape)}; a sweep allows one axis in front"
            )
    varying = {
        name: array
        for name, array in arrays.items()
        if array.ndim > _ARGUMENT_RANKS[name]
    }
    point_counts = {array.shape[0] for array in varying.values()}
    if len(point_counts) != 1 or 0 in point_counts:
        raise InputError(
            "a sweep needs arguments with one common number of points; these have"
            f" {sorted(point_counts)}"
        )
    given = {name: arrays.get(name) for name in Inputs._fields}
    make_inputs(
        lm.config,
        given["tokens"],
        embeddings=given["embeddings"],
        durations=given["durations"],
        times=given["times"],
        start=given["start"],
        position=position,
    )
    (num_points,) = point_counts
    input_name = next(name for name in ("tokens", "embeddings") if name in arrays)
    num_tokens = arrays[input_name].shape[
        arrays[input_name].ndim - _ARGUMENT_RANKS[input_name]
    ]
    arrays.setdefault("durations", np.ones(num_tokens, np.float32))
    arrays = {n: x if n in varying else x[None] for n, x in arrays.items()}
    position = np.broadcast_to(np.asarray(position) % num_tokens, num_points)
    return Points(
        num_tokens, arrays, position, _count_shared_tokens(arrays, int(position.min()))
    )


def _count_shared_tokens(arrays: Mapping[str, np.ndarray], max_shared: int) -> int:
    """How many tokens are the same at every point, from the first on, at most `max_shared`."""
    for name, array in arrays.items():
        differs = (array != array[:1]).any(axis=0)
        if _ARGUMENT_RANKS[name] == 0:
            max_shared = 0 if differs else max_shared
        else:
            differing_tokens = np.flatnonzero(
                differs.reshape(len(differs), -1).any(axis=1)
            )
            max_shared = min([max_shared, *differing_tokens[:1].tolist()])
    return max_shared


def _round_up_length(length: int, min_multiple: int) -> int:
    """The length rounded up to a multiple of `min_multiple`, which grows to about an eighth."""
    multiple = max(min_multiple, 2 ** (max(length - 1, 8).bit_length() - 4))
    return math.ceil(length / multiple) * multiple


def _run_batches(
    lm: HasModel,
    compute: Callable[..., jax.Array],
    prompts: Sequence[Points],
    batch_size: int | None,
    progress: str | None,
) -> Iterator[np.ndarray]:
    """Results [B, ...] of `compute(model, params, arguments)`, batch by batch of points.

    The last batch is cut to the points that are left.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size)
    num_points = len(prompts[0].position)
    model = lm.model.clone(config=lm.config.at_length(prompts[0].num_tokens))
    prefix_lengths = [
        p.num_shared_tokens if _is_prefix_worthwhile(lm, p) else 0 for p in prompts
    ]
    mesh = axes_lib.mesh_of(jax.tree.leaves(lm.params)[0])
    if mesh is not None:
        mesh = Mesh(
            mesh.devices, mesh.axis_names
        )  # axes of type Auto, as of the parameters
    shared_arguments: dict[str, Any] = {}
    if all(prefix_lengths):
        prefix_arguments = _stack_prompts(
            prompts,
            [(0, prefix_length) for prefix_length in prefix_lengths],
            LENGTH_MULTIPLE,
        )
        prefix_arguments = {
            name: array[:, :1] for name, array in prefix_arguments.items()
        }
        shared_arguments["prefix"] = _prefill(model, lm.params, prefix_arguments)
    else:
        prefix_lengths = [0] * len(prompts)
    ends = [int(p.position.max()) + 1 for p in prompts]
    multiple = 1 if len(prompts) == 1 else LENGTH_MULTIPLE
    suffix_arguments = _stack_prompts(
        prompts, list(zip(prefix_lengths, ends, strict=True)), multiple
    )
    if any(prefix_lengths):
        suffix_arguments.pop("start", None)  # the prefix says when it ends
    suffix_arguments["position"] = np.stack(
        [
            p.position - prefix_length
            for p, prefix_length in zip(prompts, prefix_lengths, strict=True)
        ]
    )

    num_tokens = suffix_arguments["durations"].shape[-1]
    num_shards = 1 if mesh is None else mesh.shape.get("data", 1)
    max_points = max(
        1, (batch_size or _default_batch_size(num_tokens, num_shards)) // len(prompts)
    )
    num_batches = math.ceil(num_points / max_points)
    points_per_batch = (
        math.ceil(math.ceil(num_points / num_batches) / num_shards) * num_shards
    )
    for begin in tqdm.tqdm(
        range(0, num_points, points_per_batch),
        desc=progress,
        disable=progress is None,
        unit="batch",
    ):
        point_indices = np.minimum(
            np.arange(begin, begin + points_per_batch), num_points - 1
        )  # the last one fills up
        batch: dict[str, jax.Array | np.ndarray] = {
            n: x[:, point_indices] if x.shape[1] > 1 else x
            for n, x in suffix_arguments.items()
        }
        if mesh is not None:
            axes_of_argument = {
                name: " ".join(f"-P{'-' * (x.ndim - 2)}") for name, x in batch.items()
            }
            batch = {
                name: axes_lib.place(mesh, x, axes_of_argument[name])
                for name, x in batch.items()
            }
        outputs = np.asarray(
            compute(model, mesh, lm.params, batch | shared_arguments)
        )  # waits: the bar is true
        yield outputs[:, : num_points - begin]


def _is_prefix_worthwhile(lm: HasModel, points: Points) -> bool:
    """Whether what all points share is worth a program of its own."""
    num_saved_tokens = points.num_shared_tokens * (len(points.position) - 1)
    return num_saved_tokens * flops.token_flops(lm.config) > MIN_SAVED_FLOPS


def _default_batch_size(num_tokens: int, num_shards: int) -> int:
    """Points of `num_tokens` tokens that suit the device: a CPU's caches, another's memory."""
    max_tokens = 2048 if jax.default_backend() == "cpu" else 16384
    return max(1, num_shards * max_tokens // num_tokens)


def _stack_prompts(
    prompts: Sequence[Points],
    token_ranges: Sequence[tuple[int, int]],
    min_multiple: int,
) -> dict[str, np.ndarray]:
    """Tokens `begin` to `end` of each prompt, filled up to one length: [B, P or 1, ...]."""
    length = _round_up_length(
        max(end - begin for begin, end in token_ranges), min_multiple
    )
    stacked = {}
    for name in prompts[0].arguments:
        arrays = [p.arguments[name] for p in prompts]
        if _ARGUMENT_RANKS[name]:
            mode: Any = "edge" if name == "times" else "constant"
            arrays = [
                np.pad(
                    array[:, begin:end],
                    [
                        (0, 0),
                        (0, length - (end - begin)),
                        *[(0, 0)] * (_ARGUMENT_RANKS[name] - 1),
                    ],
                    mode=mode,
                )
                for array, (begin, end) in zip(arrays, token_ranges, strict=True)
            ]
        num_points = max(map(len, arrays))
        stacked[name] = np.stack(
            [np.broadcast_to(a, (num_points, *a.shape[1:])) for a in arrays]
        )
    return stacked


# --- Programs -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model, params, arguments: Mapping[str, jax.Array]) -> Any:
    """What all points share, of B prompts: a prefix with leading axes [B, 1]."""
    inputs = _as_inputs(arguments)
    return transformer.prefill(model.config, params, inputs, model.execution)


def _as_inputs(arguments: Mapping[str, jax.Array]) -> Inputs:
    return Inputs(**{name: arguments.get(name) for name in Inputs._fields})


def _next_token_distribution(model, params, arguments: Mapping[str, Any]) -> jax.Array:
    """The distribution [B, P, V] of the next token."""
    output = transformer.forward(
        model.config,
        params,
        _as_inputs(arguments),
        position=arguments["position"],
        prefix=arguments.get("prefix"),
        execution=model.execution,
    )
    logits = output.logits
    return jax.nn.softmax(logits.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _group_probabilities(
    membership, model, mesh, params, arguments: Mapping[str, Any]
) -> jax.Array:
    """Group probabilities [B, P, A] of the next token."""
    distribution = _next_token_distribution(model, params, arguments)
    group_probabilities = jnp.dot(
        distribution, membership, precision=jax.lax.Precision.HIGHEST
    )
    return axes_lib.place(
        mesh, group_probabilities, "- - -"
    )  # so that each process can read it


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest_probabilities(
    model, mesh, params, arguments: Mapping[str, Any]
) -> jax.Array:
    """The largest probability of each token at any point, [B, 1, V]."""
    largest = jnp.max(
        _next_token_distribution(model, params, arguments), axis=1, keepdims=True
    )
    return axes_lib.place(mesh, largest, "- - -")


def membership_matrix(groups: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[V, A]: 1 where a token belongs to a group."""
    matrix = np.zeros((vocab_size, len(groups)), np.float32)
    for column, group in enumerate(groups):
        if len(group):
            check_integers(f"group {column}", np.asarray(group), 0, vocab_size)
        matrix[list(group), column] = 1.0
    return matrix


def pmap_sweep(
    lm: HasModel,
    groups: Sequence[Sequence[int]],
    *,
    devices: Sequence[jax.Device] | None = None,
    position: ArrayLike = -1,
    **arguments: ArrayLike,
) -> np.ndarray:
    """`sweep.probabilities` by `jax.pmap`: the points spread over devices.

    Args:
      lm: the language model, on no mesh.
      groups: as of `sweep.probabilities`.
      devices: of this process; all of them if left out.
      position: as of `sweep.probabilities`, and
      **arguments: as there. All points run at once: for fewer, cut them up.

    Returns:
      probabilities [P, A], float32: those of one device, to rounding.
    """
    points = validate(lm, arguments, position)
    point_arguments: dict[str, np.ndarray] = {
        n: x for n, x in points.arguments.items() if len(x) > 1
    }
    fixed_arguments = {
        name: x[0]
        for name, x in points.arguments.items()
        if name not in point_arguments
    }
    point_arguments["position"] = points.position
    members = membership_matrix(groups, lm.config.vocab_size)
    run_points = _pmapped_probabilities(
        lm.model, None if devices is None else tuple(devices)
    )
    return run_points((lm.params, fixed_arguments, members), point_arguments)


@functools.lru_cache(maxsize=8)
def _pmapped_probabilities(
    model: Any, devices: tuple[jax.Device, ...] | None
) -> Callable[..., Any]:
    """The same function for the same model, so that it is compiled once."""

    def compute_probabilities(shared: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        params, fixed_arguments, members = shared
        logits = model.apply({"params": params}, **fixed_arguments, **rows)
        distribution = jax.nn.softmax(logits.astype(jnp.float32))
        return jnp.dot(distribution, members, precision=jax.lax.Precision.HIGHEST)

    return pmap_rows(compute_probabilities, devices)
