"""The letters of the axes, listed once.

Comments, einsums, parameter declarations and checkpoint tables all use them. `...` stands for any
number of leading batch axes.

    B  batch              T  time (queries)        S  time (keys)        P  points of a sweep
    L  layers             D  model width           F  MLP width          V  vocabulary
    N  query heads        K  key/value heads       G  query heads for each key/value head, N / K
    H  width of a head    C  tracked answers     M  rows of learned positions
    W  width of a vector that is predicted       X  components of a mixture, or experts
    E  codes of a codebook                       Q  stages of a residual quantizer
    R  rank of a low-rank covariance             Z  samples
    O  tokens of a chunk                         U  width of a head's noise
    J  layers of an encoder, blocks of a head    I  layers of a decoder
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from continuous_lm.errors import InputError

# Which mesh axis shards which letter. What is not here is replicated.
RULES: Mapping[str, str] = {
    "B": "data",
    "P": "data",
    "N": "model",
    "K": "model",
    "F": "model",
    "V": "model",
}


def split(axes: str) -> tuple[str, ...]:
    """The letters of "N H D"."""
    return tuple(axes.split())


def sharding(
    mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], rules: Mapping[str, str] = RULES
) -> NamedSharding:
    """Where an array with these `axes` and this `shape` lies on `mesh`.

    An axis whose size its mesh axis does not divide (a single key/value head, say) is replicated.
    """

    def place(axis: str, size: int) -> str | None:
        name = rules.get(axis)
        return name if name in mesh.shape and size % mesh.shape[name] == 0 else None

    # Axes of type Auto, whatever jax.make_mesh chose: the compiler spreads the computation.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*map(place, axes, shape)))


def placed(mesh: Mesh | None, array: ArrayLike, axes: str) -> Any:
    """The array where its letters say; inside jit, where the compiler is to put it.

    Args:
      mesh: None: where it is.
      array: in every process the same, or one that lies on the mesh.
      axes: its letters, as in "B T D"; "-" is an axis that is not spread.
    """
    if mesh is None:
        return array
    where = sharding(mesh, split(axes), np.shape(array))
    if isinstance(array, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(array, where)
    if jax.process_count() == 1 or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, where)
    host = np.asarray(array)  # each process has it all, and hands on its part
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def placed_tree(mesh: Mesh | None, tree: Any, declared: Any) -> Any:
    """Parameters where their declarations say; those that are not declared stay where they are.

    Args:
      mesh: None: where they are.
      tree: of arrays.
      declared: the same tree as the modules declare it, `jax.eval_shape(module.init, ...)`: leaves
        have the `names` of their axes.
    """
    boxes = jax.tree.leaves_with_path(declared, is_leaf=lambda x: hasattr(x, "names"))
    names = {jax.tree_util.keystr(path): " ".join(box.names) for path, box in boxes}

    def place(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        return placed(mesh, leaf, names[name]) if name in names else leaf

    return jax.tree.map_with_path(place, tree)


def check_leading(leading: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The shape to which the leading axes of arguments broadcast, given by the arguments' names.

    Raises:
      InputError: if they do not: whose they are.
    """
    try:
        return np.broadcast_shapes(*map(tuple, leading.values()))
    except ValueError:
        told = ", ".join(f"{list(axes)} of {name}" for name, axes in leading.items() if axes)
        raise InputError(f"leading axes do not broadcast: {told}") from None


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array lies on, if it lies on one."""
    placed = getattr(array, "sharding", None)
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None
