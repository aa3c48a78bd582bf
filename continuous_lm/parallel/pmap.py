"""Data parallelism by `jax.pmap`, for code that already uses it.

JAX keeps pmap in maintenance mode. New code should use `jax.jit` on arrays that are sharded over a
mesh (see `parallel.mesh.make_mesh`). The rest of the package does so; it also runs on many hosts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

__all__ = [
    "pmap_rows",
]


def pmap_rows(
    function: Callable[..., Any], devices: Sequence[jax.Device] | None = None
) -> Callable[..., Any]:
    """`function(shared, rows)` by `jax.pmap`, rows spread over devices.

    Args:
      function: pure function of two trees. The first is replicated. The second has arrays [P, ...],
        whose rows are independent. It returns a tree of arrays [P, ...].
      devices: devices of this process; all of them if omitted.

    Returns:
      a function of the same arguments. Each device gets P / devices rows; the last ones are padded.
    """
    pmapped = jax.pmap(function, in_axes=(None, 0), devices=devices)
    num_devices = jax.local_device_count() if devices is None else len(devices)

    def run_rows(shared: Any, rows: Any) -> Any:
        num_rows = jax.tree.leaves(rows)[0].shape[0]
        rows_per_device = math.ceil(num_rows / num_devices)
        row_indices = np.minimum(
            np.arange(num_devices * rows_per_device), num_rows - 1
        ).reshape(num_devices, rows_per_device)
        outputs = pmapped(
            shared, jax.tree.map(lambda leaf: np.asarray(leaf)[row_indices], rows)
        )
        return jax.tree.map(
            lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:num_rows], outputs
        )

    return run_rows
