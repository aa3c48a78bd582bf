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

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array lies on, if it lies on one."""
    placed = getattr(array, "sharding", None)
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None
