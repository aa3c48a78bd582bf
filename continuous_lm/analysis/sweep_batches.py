"""Points of a sweep to batches: what all points share is cut off, the rest stacked and cut up.

    points = make_points(config, tokens, durations=durations)
    for outputs in run_batches(lm, compute, [points], BatchOptions()): ...

Lengths are rounded up to few different ones, with tokens of duration 0, so that one program serves
many prompts. Batches are cut on the host, from NumPy arrays.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.analysis import flops
from continuous_lm.arguments import check_count
from continuous_lm.errors import InputError
from continuous_lm.inputs import Array, Inputs
from continuous_lm.models import transformer, trunk_inputs
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.language_model import LanguageModel, trunk_model
from continuous_lm.models.parameters import Params
from continuous_lm.models.transformer import Transformer

__all__ = [
    "LENGTH_MULTIPLE",
    "MIN_SAVED_FLOPS",
    "Batch",
    "BatchOptions",
    "Compute",
    "Points",
    "make_points",
    "round_up_length",
    "run_batches",
]

# Operations that a prefix has to save before it is computed apart, which is one more program to
# compile.
MIN_SAVED_FLOPS = 1e10
# Lengths of many prompts, and of prefixes, are rounded up to multiples of it.
LENGTH_MULTIPLE = 16


class Points(NamedTuple):
    """The points of one prompt.

    Attributes:
      inputs: inputs of the model: arrays [P, ...] that differ between points, [1, ...] that do not.
      position: index of the token before the answer, int [P], not negative.
      num_shared_tokens: number of first tokens that all points share.
    """

    inputs: Inputs
    position: np.ndarray
    num_shared_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.inputs.num_tokens

    @property
    def num_points(self) -> int:
        """P."""
        return len(self.position)


class Batch(NamedTuple):
    """Points of B prompts, as one program computes them.

    Attributes:
      inputs: inputs after the prefix: arrays [B, P, ...] that differ between points, [B, 1, ...]
        that do not.
      position: index of the token before the answer among these, int [B, P].
      prefix: the tokens before these, with leading axes [B, 1]; None if there are none.
    """

    inputs: Inputs
    position: Array
    prefix: KVCache | None


class BatchOptions(NamedTuple):
    """Options of batches of points.

    Attributes:
      batch_size: largest number of points in a batch; None: a number that suits the device.
      progress: label of a progress bar; None: no bar.
    """

    batch_size: int | None = None
    progress: str | None = None


class Compute(Protocol):
    """A jitted function of a batch; its results [B, P, ...] lie whole on every process."""

    def __call__(
        self, model: Transformer, mesh: Mesh | None, params: Params, batch: Batch, /
    ) -> jax.Array: ...


# --- Arguments to points ----------------------------------------------------------------------


def make_points(
    config: TransformerConfig,
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: ArrayLike = -1,
) -> Points:
    """Make the checked points of a sweep from a user's arguments, as in `sweep.probabilities`.

    Raises:
      InputError: if arguments do not fit each other or the model.
    """
    num_points = _count_points(
        {
            "tokens": (tokens, 1),
            "embeddings": (embeddings, 2),
            "durations": (durations, 1),
            "times": (times, 1),
            "start": (start, 0),
        }
    )
    inputs = trunk_inputs.make_inputs(
        config,
        tokens,
        embeddings=embeddings,
        durations=durations,
        times=times,
        start=start,
        position=position,
    )
    if inputs.durations is None:
        ordinary_durations = np.ones(inputs.num_tokens, np.float32)
        inputs = inputs._replace(durations=ordinary_durations)
    inputs = _with_points_axis(inputs)
    positions = np.broadcast_to(np.asarray(position) % inputs.num_tokens, num_points)
    num_shared_tokens = _count_shared_tokens(inputs, int(positions.min()))
    return Points(inputs, positions, num_shared_tokens)


def _count_points(
    arrays_and_ranks: Mapping[str, tuple[ArrayLike | None, int]],
) -> int:
    """P, from arrays with and without the points' axis in front; ranks are those without it."""
    point_counts = set()
    for name, (array, rank) in arrays_and_ranks.items():
        shape = (1,) * rank if array is None else np.shape(array)
        if len(shape) not in (rank, rank + 1):
            raise InputError(
                f"{name} has shape {list(shape)}; a sweep allows one axis in front"
            )
        if len(shape) > rank:
            point_counts.add(shape[0])
    if len(point_counts) != 1 or 0 in point_counts:
        raise InputError(
            "a sweep needs arguments with one common number of points; these have"
            f" {sorted(point_counts)}"
        )
    return point_counts.pop()


def _with_points_axis(inputs: Inputs) -> Inputs:
    """Arrays of NumPy with the points' axis in front: of size 1 where points do not differ."""

    def add_axis(array: Array | None, rank: int) -> np.ndarray | None:
        if array is None:
            return None
        return np.asarray(array).reshape(-1, *array.shape[array.ndim - rank :])

    return Inputs(
        tokens=add_axis(inputs.tokens, 1),
        embeddings=add_axis(inputs.embeddings, 2),
        durations=add_axis(inputs.durations, 1),
        times=add_axis(inputs.times, 1),
        start=add_axis(inputs.start, 0),
    )


def _count_shared_tokens(inputs: Inputs, max_shared: int) -> int:
    """Count the first tokens that are the same at every point, at most `max_shared`."""
    start = inputs.start
    if start is not None and (start != start[:1]).any():
        return 0
    for array in inputs._replace(start=None):
        if array is None:
            continue
        differs = (array != array[:1]).any(axis=0)
        differing_tokens = np.flatnonzero(differs.reshape(len(differs), -1).any(axis=1))
        max_shared = min([max_shared, *differing_tokens[:1].tolist()])
    return max_shared


# --- Points to batches ------------------------------------------------------------------------


def run_batches(
    lm: LanguageModel[Transformer],
    compute: Compute,
    prompts: Sequence[Points],
    options: BatchOptions,
) -> Iterator[np.ndarray]:
    """Results [B, P, ...] of `compute`, batch by batch of the points of B prompts.

    The last batch is cut to the points that are left. All prompts have the same number of points
    and the same kinds of inputs.
    """
    if options.batch_size is not None:
        check_count("batch_size", options.batch_size)
    trunk = trunk_model(lm)
    model = trunk.clone(config=trunk.config.at_length(prompts[0].num_tokens))
    mesh = _auto_mesh(lm.params)
    num_shards = 1 if mesh is None else mesh.shape.get("data", 1)
    all_points = _stack_points(model, lm.params, prompts)
    points_per_batch = _count_points_per_batch(
        all_points, options.batch_size, num_shards
    )
    num_points = prompts[0].num_points
    for begin in tqdm.tqdm(
        range(0, num_points, points_per_batch),
        desc=options.progress,
        disable=options.progress is None,
        unit="batch",
    ):
        point_indices = np.arange(begin, begin + points_per_batch)
        batch = _take_points(all_points, np.minimum(point_indices, num_points - 1))
        if mesh is not None:
            batch = _place(mesh, batch)
        outputs = compute(model, mesh, lm.params, batch)
        # The conversion waits for the device, so that the bar is true.
        yield np.asarray(outputs)[:, : num_points - begin]


def _auto_mesh(params: Params) -> Mesh | None:
    """The mesh of the parameters, with axes of type Auto; None without one."""
    mesh = axes_lib.mesh_of(jax.tree.leaves(params)[0])
    return None if mesh is None else Mesh(mesh.devices, mesh.axis_names)


def _stack_points(
    model: Transformer, params: Params, prompts: Sequence[Points]
) -> Batch:
    """Make one batch of all points of the prompts, with a computed prefix where it saves time."""
    prefix_lengths = [p.num_shared_tokens for p in prompts]
    ends = [int(p.position.max()) + 1 for p in prompts]
    if not all(_is_prefix_worthwhile(model.config, points) for points in prompts):
        prefix_lengths = [0] * len(prompts)
    token_ranges = list(zip(prefix_lengths, ends, strict=True))
    multiple = 1 if len(prompts) == 1 else LENGTH_MULTIPLE
    inputs = _stack_tokens(prompts, token_ranges, multiple)
    prefix = None
    if any(prefix_lengths):
        prefix = _compute_prefix(model, params, prompts, prefix_lengths)
        inputs = inputs._replace(start=None)  # the prefix says when it ends
    positions = [
        points.position - prefix_length
        for points, prefix_length in zip(prompts, prefix_lengths, strict=True)
    ]
    return Batch(inputs, np.stack(positions), prefix)


def _is_prefix_worthwhile(config: TransformerConfig, points: Points) -> bool:
    """Return whether computing the shared tokens in a separate program saves time."""
    num_saved_tokens = points.num_shared_tokens * (points.num_points - 1)
    return num_saved_tokens * flops.token_flops(config) > MIN_SAVED_FLOPS


def _compute_prefix(
    model: Transformer,
    params: Params,
    prompts: Sequence[Points],
    prefix_lengths: Sequence[int],
) -> KVCache:
    """Compute the shared prefix of B prompts, with leading axes [B, 1]."""
    token_ranges = [(0, prefix_length) for prefix_length in prefix_lengths]
    inputs = _stack_tokens(prompts, token_ranges, LENGTH_MULTIPLE)
    first_point = jax.tree.map(lambda array: array[:, :1], inputs)
    return _prefill(model, params, first_point)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model: Transformer, params: Params, inputs: Inputs) -> KVCache:
    return transformer.prefill(model.config, params, inputs, model.execution)


def _stack_tokens(
    prompts: Sequence[Points],
    token_ranges: Sequence[tuple[int, int]],
    min_multiple: int,
) -> Inputs:
    """Tokens `begin` to `end` of each prompt, filled up to one length: [B, P or 1, ...]."""
    longest = max(end - begin for begin, end in token_ranges)
    length = round_up_length(longest, min_multiple)
    rows = [
        _cut_and_fill(points.inputs, token_range, length)
        for points, token_range in zip(prompts, token_ranges, strict=True)
    ]
    return jax.tree.map(_stack_rows, *rows)


def _stack_rows(*rows: np.ndarray) -> np.ndarray:
    """Arrays [P or 1, ...], stacked: [B, P, ...], or [B, 1, ...] if all have one point."""
    num_points = max(map(len, rows))
    return np.stack(
        [np.broadcast_to(array, (num_points, *array.shape[1:])) for array in rows]
    )


def _cut_and_fill(inputs: Inputs, token_range: tuple[int, int], length: int) -> Inputs:
    """A range of the tokens, filled up to `length` tokens with ones of duration 0."""
    begin, end = token_range
    num_missing = length - (end - begin)

    def cut(
        array: Array | None, fill_mode: Literal["constant", "edge"] = "constant"
    ) -> np.ndarray | None:
        if array is None:
            return None
        padding = [(0, 0), (0, num_missing), *[(0, 0)] * (array.ndim - 2)]
        return np.pad(array[:, begin:end], padding, mode=fill_mode)

    return Inputs(
        tokens=cut(inputs.tokens),
        embeddings=cut(inputs.embeddings),
        durations=cut(inputs.durations),
        times=cut(inputs.times, "edge"),
        start=inputs.start,
    )


def round_up_length(length: int, min_multiple: int) -> int:
    """The length rounded up to a multiple of `min_multiple`, which grows to about an eighth."""
    multiple = max(min_multiple, 2 ** (max(length - 1, 8).bit_length() - 4))
    return math.ceil(length / multiple) * multiple


def _count_points_per_batch(
    all_points: Batch, batch_size: int | None, num_shards: int
) -> int:
    """Points of each prompt in a batch: batches of one size, which the shards divide."""
    num_prompts, num_points = all_points.position.shape
    if batch_size is None:
        batch_size = _default_batch_size(all_points.inputs.num_tokens, num_shards)
    max_points = max(1, batch_size // num_prompts)
    num_batches = math.ceil(num_points / max_points)
    points_per_shard = math.ceil(math.ceil(num_points / num_batches) / num_shards)
    return points_per_shard * num_shards


def _default_batch_size(num_tokens: int, num_shards: int) -> int:
    """Points of `num_tokens` tokens that suit the device: a CPU's caches, another's memory."""
    max_tokens = 2048 if jax.default_backend() == "cpu" else 16384
    return max(1, num_shards * max_tokens // num_tokens)


def _take_points(all_points: Batch, point_indices: np.ndarray) -> Batch:
    """Select points of each prompt; inputs that all points share are unchanged."""

    def take(array: Array | None) -> Array | None:
        if array is None or array.shape[1] == 1:
            return array
        return array[:, point_indices]

    inputs = Inputs(*map(take, all_points.inputs))
    position = all_points.position[:, point_indices]
    return Batch(inputs, position, all_points.prefix)


def _place(mesh: Mesh, batch: Batch) -> Batch:
    """The batch with its points spread over the mesh's axis "data"."""

    def place(array: Array | None, axes: str) -> jax.Array | None:
        return None if array is None else axes_lib.place(mesh, array, axes)

    inputs = Inputs(
        tokens=place(batch.inputs.tokens, "- P -"),
        embeddings=place(batch.inputs.embeddings, "- P - -"),
        durations=place(batch.inputs.durations, "- P -"),
        times=place(batch.inputs.times, "- P -"),
        start=place(batch.inputs.start, "- P"),
    )
    return Batch(inputs, axes_lib.place(mesh, batch.position, "- P"), batch.prefix)
