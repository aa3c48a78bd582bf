"""Letters of axes, one meaning each: `LETTERS` lists them.

Comments, einsums, parameter declarations and checkpoint tables all use them. `...` stands for any
number of leading batch axes, and an axis that occurs in one place has a word: [num_panels + 1].
Einsums have the letters in lower case, and in upper case a second axis of the same meaning, as in
"...D,cdD->...cd".
"""

from collections.abc import Mapping, Sequence
from typing import overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from continuous_lm.errors import InputError

__all__ = [
    "LEADING",
    "LETTERS",
    "SHARDING_RULES",
    "broadcast_leading_axes",
    "letter_each_axis",
    "mesh_of",
    "place",
    "sharding",
    "split",
]


LETTERS: Mapping[str, str] = {
    "A": "tracked answers",
    "B": "batch",
    "C": "tokens of a chunk",
    "D": "model width",
    "E": "codes of a codebook",
    "F": "MLP width",
    "G": "query heads for each key/value head, N / K",
    "H": "width of a head",
    "I": "layers of a decoder",
    "J": "layers of an encoder, or blocks of a head",
    "K": "key/value heads",
    "L": "layers",
    "M": "rows of learned positions",
    "N": "query heads",
    "P": "points of a sweep",
    "Q": "stages of a residual quantizer",
    "R": "rank of a low-rank covariance",
    "S": "time (keys)",
    "T": "time (queries)",
    "U": "width of a head's noise",
    "V": "vocabulary",
    "W": "width of a predicted vector",
    "X": "components of a mixture, or experts",
    "Z": "samples",
}

# Axis letter -> mesh axis that shards it. Other letters are replicated.
SHARDING_RULES: Mapping[str, str] = {
    "B": "data",
    "P": "data",
    "N": "model",
    "K": "model",
    "F": "model",
    "V": "model",
}


LEADING = "..."  # any number of batch axes, in front or between


def split(axes: str) -> tuple[str, ...]:
    """The letters of "N H D"."""
    return tuple(axes.split())


def letter_each_axis(axes: str, num_axes: int) -> tuple[str, ...]:
    """The letters of `num_axes` axes: ("Z", "...", "...", "W") for "Z ... W" and 4.

    There are more or fewer where so many axes do not fit.
    """
    num_letters = len(split(axes.replace(LEADING, "")))
    num_leading = max(num_axes - num_letters, 0)
    return split(axes.replace(LEADING, f"{LEADING} " * num_leading))


def sharding(
    mesh: Mesh,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    rules: Mapping[str, str] = SHARDING_RULES,
) -> NamedSharding:
    """Return the sharding on `mesh` of an array with these `axes` and this `shape`.

    An axis whose size its mesh axis does not divide (a single key/value head, say) is replicated.
    """

    def shard_axis(axis: str, size: int) -> str | None:
        mesh_axis = rules.get(axis)
        if mesh_axis not in mesh.shape or size % mesh.shape[mesh_axis]:
            return None
        return mesh_axis

    # Axes of type Auto, whatever jax.make_mesh chose: the compiler spreads the computation.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*map(shard_axis, axes, shape)))


@overload
def place(mesh: Mesh, array: ArrayLike, axes: str) -> jax.Array: ...
@overload
def place(mesh: Mesh | None, array: jax.Array, axes: str) -> jax.Array: ...
@overload
def place(mesh: Mesh | None, array: ArrayLike, axes: str) -> ArrayLike: ...


def place(mesh: Mesh | None, array: ArrayLike, axes: str) -> ArrayLike:
    """The array where its letters say; inside jit, where the compiler is to put it.

    Args:
      mesh: None: where it is.
      array: in every process the same, or one that lies on the mesh.
      axes: its letters, as in "B T D"; "-" is an axis that is not spread.
    """
    if mesh is None:
        return array
    target = sharding(mesh, split(axes), np.shape(array))
    if isinstance(array, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(array, target)
    if jax.process_count() == 1 or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, target)
    host_array = np.asarray(array)  # each process has it all, and hands on its part
    return jax.make_array_from_callback(
        host_array.shape, target, lambda index: host_array[index]
    )


def broadcast_leading_axes(
    leading_axes: Mapping[str, Sequence[int]],
) -> tuple[int, ...]:
    """The shape to which the leading axes of arguments broadcast, given by the arguments' names.

    Raises:
      InputError: if they do not: whose they are.
    """
    try:
        return np.broadcast_shapes(*map(tuple, leading_axes.values()))
    except ValueError:
        shapes = ", ".join(
            f"{list(axes)} of {name}" for name, axes in leading_axes.items() if axes
        )
        raise InputError(f"leading axes do not broadcast: {shapes}") from None


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array lies on, if it lies on one."""
    array_sharding = getattr(array, "sharding", None)
    mesh = array_sharding.mesh if isinstance(array_sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None
