"""Data parallel by `jax.pmap`, for code that is built on it.

JAX only maintains pmap: `jax.jit` of arrays that lie on a mesh (see `devices.mesh`) does the same
and more, over many hosts too, and is what the rest of the package is made for.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


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
    mapped = jax.pmap(function, in_axes=(None, 0), devices=devices)
    count = jax.local_device_count() if devices is None else len(devices)

    def spread(shared: Any, rows: Any) -> Any:
        num_rows = jax.tree.leaves(rows)[0].shape[0]
        size = math.ceil(num_rows / count)
        index = np.minimum(np.arange(count * size), num_rows - 1).reshape(count, size)
        found = mapped(shared, jax.tree.map(lambda leaf: np.asarray(leaf)[index], rows))
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:num_rows], found)

    return spread
