"""Sweeps: probabilities of answers to a prompt at many durations, under one jit.

The prefix, all tokens before the first difference between points, is computed once, and every point
reuses its keys and values. Tokens after the answer position are not computed, and the last layer
computes only that position. Points run in batches of one size; see `sweep_batches`. On a mesh,
points are sharded over its axis "data".
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.analysis.sweep_batches import (
    LENGTH_MULTIPLE,
    Batch,
    BatchOptions,
    make_points,
    round_up_length,
    run_batches,
)
from continuous_lm.arguments import as_float, check_integers
from continuous_lm.durations import end_times
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models import transformer
from continuous_lm.models.language_model import LanguageModel, trunk_model
from continuous_lm.models.parameters import Params
from continuous_lm.models.transformer import Transformer
from continuous_lm.parallel.pmap import pmap_rows

__all__ = [
    "DurationsAndTimes",
    "Sweep",
    "change_durations",
    "group_by_program",
    "membership_matrix",
    "pmap_sweep",
    "probabilities",
    "run_group",
    "tokens_above",
]


class DurationsAndTimes(NamedTuple):
    """Arguments of a model: durations and end times of tokens."""

    durations: jax.Array  # [P, T]
    times: jax.Array | None  # [P, T]; None: from the durations


def change_durations(durations: ArrayLike, change: str = "both") -> DurationsAndTimes:
    """Return model arguments that follow `durations` [P, T] in mass, in time, or in both.

    "mass" changes the weights of the keys (log d) and leaves every token at its ordinary time.
    "times" moves the tokens (rotary angles, windows) and leaves their weights at 1. "both" is the
    continuous transformer.
    """
    durations = as_float(durations)
    ones = jnp.ones_like(durations)
    match change:
        case "both":
            return DurationsAndTimes(durations, None)
        case "mass":
            return DurationsAndTimes(durations, end_times(ones))
        case "times":
            return DurationsAndTimes(ones, end_times(durations))
    raise InputError(f"change is {change!r}; it must be 'both', 'mass' or 'times'")


# --- One prompt -------------------------------------------------------------------------------


def probabilities(
    lm: LanguageModel[Transformer],
    groups: Sequence[Sequence[int]],
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: ArrayLike = -1,
    batch_size: int | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Compute the probability of each group of tokens as the next token, at every point of a sweep.

    At least one of the model's arguments has the points' axis P in front.

    Args:
      lm: the language model.
      groups: A groups of token ids; the probabilities of a group's tokens are summed.
      tokens: int [T] or [P, T].
      embeddings: [T, D] or [P, T, D] instead of tokens.
      durations: d >= 0 [T] or [P, T]; 1 if omitted.
      times: when each token ends, [T] or [P, T].
      start: when the first token begins, [] or [P].
      position: index of the token after which the answer stands, an int or int [P].
      batch_size: at most so many points at once; as many as suit the device if omitted.
      progress: label of a progress bar; none is shown if omitted.

    Returns:
      probabilities [P, A], float32.

    Raises:
      InputError: if arguments do not fit each other or the model.
    """
    compute = _make_group_probabilities(lm, groups)
    points = make_points(
        lm.config,
        tokens,
        embeddings=embeddings,
        durations=durations,
        times=times,
        start=start,
        position=position,
    )
    batches = run_batches(lm, compute, [points], BatchOptions(batch_size, progress))
    return np.concatenate([outputs[0] for outputs in batches])


def tokens_above(
    lm: LanguageModel[Transformer],
    threshold: float,
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: ArrayLike = -1,
    batch_size: int | None = None,
) -> list[int]:
    """The tokens whose probability reaches `threshold` at any point of a sweep, likeliest first.

    Other arguments as in `probabilities`.
    """
    points = make_points(
        lm.config,
        tokens,
        embeddings=embeddings,
        durations=durations,
        times=times,
        start=start,
        position=position,
    )
    batches = run_batches(
        lm, _largest_probabilities, [points], BatchOptions(batch_size)
    )
    largest = functools.reduce(np.maximum, batches)[0, 0]
    likeliest_first = np.argsort(-largest, kind="stable")
    return [int(token) for token in likeliest_first if largest[token] >= threshold]


# --- Many prompts -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One prompt at P points.

    Attributes:
      num_points: number of points, P.
      num_tokens: number of tokens, T; the answer follows the last.
      make_inputs: function that makes the model's inputs, as in `probabilities`. It is called when
        the inputs are needed, and they are checked then.
    """

    num_points: int
    num_tokens: int
    make_inputs: Callable[[], Inputs]


def group_by_program(
    lm: LanguageModel[Transformer], sweeps: Sequence[Sweep], batch_size: int = 32
) -> list[tuple[int, ...]]:
    """Group sweeps to compute together, for few compiled programs and full batches.

    A group holds sweeps of similar length with about `batch_size` points. Groups, and so the bits
    of the results, depend only on the sweeps.
    """

    def program_key(sweep: Sweep) -> tuple:
        rounded_length = round_up_length(sweep.num_tokens, LENGTH_MULTIPLE)
        return sweep.num_points, rounded_length, lm.config.at_length(sweep.num_tokens)

    def size(index: int) -> tuple[int, int]:
        return sweeps[index].num_points, sweeps[index].num_tokens

    groups: list[list[int]] = []
    for index in sorted(range(len(sweeps)), key=size):
        last_group = groups[-1] if groups else []
        num_points = sum(sweeps[member].num_points for member in (*last_group, index))
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
    lm: LanguageModel[Transformer],
    groups: Sequence[Sequence[int]],
    sweeps: Sequence[Sweep],
    batch_size: int | None = None,
) -> list[np.ndarray]:
    """The probabilities [P, A] of each of a set of sweeps that `group_by_program` has made.

    Prompts of similar length run one program: they are filled up with tokens of duration 0, which
    no token sees.
    """
    compute = _make_group_probabilities(lm, groups)
    prompts = [
        make_points(lm.config, **sweep.make_inputs()._asdict()) for sweep in sweeps
    ]
    kinds = {
        (points.num_points, jax.tree.structure(points.inputs)) for points in prompts
    }
    if len(kinds) > 1:
        raise InputError(
            "sweeps that are computed together must have the same arguments and number of points"
        )
    batches = run_batches(lm, compute, prompts, BatchOptions(batch_size))
    return list(np.concatenate(list(batches), axis=1))


# --- Programs -----------------------------------------------------------------------------------


def _next_token_distribution(
    model: Transformer, params: Params, batch: Batch
) -> jax.Array:
    """The distribution [B, P, V] of the next token, float32."""
    output = transformer.forward(
        model.config,
        params,
        batch.inputs,
        position=batch.position,
        prefix=batch.prefix,
        execution=model.execution,
    )
    return jax.nn.softmax(output.logits.astype(jnp.float32))


def _make_group_probabilities(
    lm: LanguageModel[Transformer], groups: Sequence[Sequence[int]]
) -> Callable[[Transformer, Mesh | None, Params, Batch], jax.Array]:
    """A function of batches: the probabilities [B, P, A] of these groups."""
    membership = membership_matrix(groups, trunk_model(lm).config.vocab_size)
    return functools.partial(_group_probabilities, membership)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _group_probabilities(
    membership: jax.Array,
    model: Transformer,
    mesh: Mesh | None,
    params: Params,
    batch: Batch,
) -> jax.Array:
    """Group probabilities [B, P, A] of the next token, whole on each process."""
    distribution = _next_token_distribution(model, params, batch)
    group_probabilities = _sum_groups(distribution, membership)
    return axes_lib.place(mesh, group_probabilities, "- - -")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest_probabilities(
    model: Transformer, mesh: Mesh | None, params: Params, batch: Batch
) -> jax.Array:
    """The largest probability of each token at any point, [B, 1, V], whole on each process."""
    distribution = _next_token_distribution(model, params, batch)
    largest = jnp.max(distribution, axis=1, keepdims=True)
    return axes_lib.place(mesh, largest, "- - -")


def _sum_groups(distribution: jax.Array, membership: jax.Array) -> jax.Array:
    """Group probabilities [..., A] of a distribution [..., V]."""
    return jnp.dot(distribution, membership, precision=jax.lax.Precision.HIGHEST)


def membership_matrix(groups: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[V, A]: 1 where a token belongs to a group."""
    matrix = np.zeros((vocab_size, len(groups)), np.float32)
    for column, group in enumerate(groups):
        if len(group):
            check_integers(f"group {column}", np.asarray(group), 0, vocab_size)
        matrix[list(group), column] = 1.0
    return matrix


# --- By pmap ------------------------------------------------------------------------------------


class _SharedArguments(NamedTuple):
    """Arguments that are replicated on all devices."""

    params: Params
    inputs: Inputs  # inputs that all points share, without the points' axis
    membership: np.ndarray  # [V, A]


class _PointArguments(NamedTuple):
    """Arguments that are sharded over devices, with the points' axis first."""

    inputs: Inputs  # what differs
    position: np.ndarray  # int [P]


def pmap_sweep(
    lm: LanguageModel[Transformer],
    groups: Sequence[Sequence[int]],
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: ArrayLike = -1,
    devices: Sequence[jax.Device] | None = None,
) -> np.ndarray:
    """Compute `probabilities` by `jax.pmap`, with the points sharded over devices.

    All points run in one batch; to bound the memory, call it with fewer points.

    Args:
      lm: the language model, not on a mesh.
      groups: A groups of token ids, as in `probabilities`.
      tokens: int [T] or [P, T].
      embeddings: [T, D] or [P, T, D] instead of tokens.
      durations: [T] or [P, T].
      times: [T] or [P, T].
      start: [] or [P].
      position: an int or int [P].
      devices: devices of this process; all of them if omitted.

    Returns:
      probabilities [P, A], float32, equal to those of one device up to rounding.
    """
    model = trunk_model(lm)
    points = make_points(
        model.config,
        tokens,
        embeddings=embeddings,
        durations=durations,
        times=times,
        start=start,
        position=position,
    )
    membership = membership_matrix(groups, model.config.vocab_size)
    fixed_inputs, varying_inputs = _split_by_variation(points.inputs)
    run_points = _pmapped_probabilities(
        model, None if devices is None else tuple(devices)
    )
    return run_points(
        _SharedArguments(lm.params, fixed_inputs, membership),
        _PointArguments(varying_inputs, points.position),
    )


def _split_by_variation(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Split inputs into those that all points share, without their axis, and those that differ."""
    fixed_inputs = [
        array[0] if array is not None and len(array) == 1 else None for array in inputs
    ]
    varying_inputs = [
        array if array is not None and len(array) > 1 else None for array in inputs
    ]
    return Inputs(*fixed_inputs), Inputs(*varying_inputs)


@functools.lru_cache(maxsize=8)
def _pmapped_probabilities(
    model: Transformer, devices: tuple[jax.Device, ...] | None
) -> Callable[[_SharedArguments, _PointArguments], np.ndarray]:
    """The same function for the same model, so that it is compiled once."""

    def compute_probabilities(
        shared: _SharedArguments, rows: _PointArguments
    ) -> jax.Array:
        inputs = Inputs(
            *(
                fixed if varying is None else varying
                for fixed, varying in zip(shared.inputs, rows.inputs, strict=True)
            )
        )
        batch = Batch(inputs, rows.position, prefix=None)
        distribution = _next_token_distribution(model, shared.params, batch)
        return _sum_groups(distribution, jnp.asarray(shared.membership))

    return pmap_rows(compute_probabilities, devices)
