"""Meshes of devices with the axes "data" and "model".

    mesh = make_mesh("data=2,model=4")
    lm = clm.load(folder, mesh=mesh)            # parameters and results are sharded over it

The letters of their axes determine the sharding of parameters and activations; see
`axes.SHARDING_RULES`.
"""

import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError

__all__ = [
    "MESH_AXES",
    "make_mesh",
]

MESH_AXES = ("data", "model")


def make_mesh(description: str | None = None) -> Mesh:
    """The mesh that a text such as "data=2,model=4" describes.

    Args:
      description: sizes of the axes "data" (over which batches and points lie) and "model" (over
        which parameters do); an axis that is left out has size 1. All devices on "data", if None.

    Returns:
      a mesh of these two axes. A single process may leave devices over: the mesh has the first.

    Raises:
      InputError: if it is no such text, or the devices are not as many.
    """
    num_available = jax.device_count()
    sizes = {"data": num_available} if description is None else _parse_mesh(description)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    num_needed = math.prod(shape)
    if num_needed > num_available or (
        num_needed < num_available and jax.process_count() > 1
    ):
        raise InputError(
            f"a mesh of {description} takes {num_needed} devices, and there are"
            f" {num_available}; on a CPU,"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={num_needed} gives so many"
        )
    axis_types = (AxisType.Auto,) * len(
        MESH_AXES
    )  # the compiler spreads the computation
    device_mesh = jax.make_mesh(
        shape, MESH_AXES, axis_types=axis_types, devices=jax.devices()[:num_needed]
    )
    if jax.process_count() > 1:
        _warm_up_collectives(device_mesh)
    return device_mesh


@functools.lru_cache
def _warm_up_collectives(mesh: Mesh) -> None:
    """Let the devices along each axis meet now, when the processes are at the same place.

    On CPUs (gloo) the first time must be within 30 seconds of each other, which it would not be
    after a compilation that takes longer in one process than in another.
    """
    spec = PartitionSpec(MESH_AXES)
    ones = axes_lib.place(mesh, np.ones(mesh.size, np.float32), "-")
    for axes in (*MESH_AXES, MESH_AXES):
        sum_over_axes = functools.partial(jax.lax.psum, axis_name=axes)
        sharded_sum = jax.shard_map(
            sum_over_axes, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        jax.block_until_ready(jax.jit(sharded_sum)(ones))


def _parse_mesh(description: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in description.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if (
            axis not in MESH_AXES
            or axis in sizes
            or not size.isdecimal()
            or int(size) < 1
        ):
            raise InputError(
                f"{description!r:.60} is not a mesh; give the number of devices of each axis, as in"
                " data=2,model=4"
            )
        sizes[axis] = int(size)
    return sizes
