"""Data parallel by `jax.pmap`, for code that is built on it.

JAX only maintains pmap: `jax.jit` of arrays that lie on a mesh (see `parallel.mesh.make_mesh`) does
the same and more, over many hosts too, and is what the rest of the package is made for.
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
      function: pure, of a tree that every device gets whole and of a tree of arrays [P, ...],
        whose rows it treats one as the other; returns a tree of arrays [P, ...].
      devices: of this process; all of them if left out.

    Returns:
      a function of the same arguments; of P rows each device gets P / devices, the last filled up.
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
