"""Data parallel by `jax.pmap`, for code that is built on it.

JAX only maintains pmap: `jax.jit` of arrays that lie on a mesh (see `devices.mesh`) does the same
and more, over many hosts too, and is what the rest of the package is made for.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import sweep as sweep_lib


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


def pmap_sweep(
    lm: sweep_lib.HasModel,
    groups: Sequence[Sequence[int]],
    *,
    devices: Sequence[jax.Device] | None = None,
    at: ArrayLike = -1,
    **arguments: ArrayLike,
) -> np.ndarray:
    """`sweep.probabilities` by `jax.pmap`: the points spread over devices.

    Args:
      lm: the language model, on no mesh.
      groups: as of `sweep.probabilities`.
      devices: of this process; all of them if left out.
      at: as of `sweep.probabilities`, and
      **arguments: as there. All points run at once: for fewer, cut them up.

    Returns:
      probabilities [P, C], float32: those of one device, to rounding.
    """
    points = sweep_lib.checked(lm, arguments, at)
    rows: dict[str, np.ndarray] = {n: x for n, x in points.arguments.items() if len(x) > 1}
    fixed = {name: x[0] for name, x in points.arguments.items() if name not in rows}
    rows["at"] = points.at
    indicator = sweep_lib.indicator(groups, lm.config.vocab_size)
    read = _points(lm.model, None if devices is None else tuple(devices))
    return read((lm.params, fixed, indicator), rows)


@functools.lru_cache(maxsize=8)
def _points(model: Any, devices: tuple[jax.Device, ...] | None) -> Callable[..., Any]:
    """The same function for the same model, so that it is compiled once."""

    def read(shared: Any, rows: Mapping[str, jax.Array]) -> jax.Array:
        params, fixed, indicator = shared
        logits = model.apply({"params": params}, **fixed, **rows)
        distribution = jax.nn.softmax(logits.astype(jnp.float32))
        return jnp.dot(distribution, indicator, precision=jax.lax.Precision.HIGHEST)

    return pmap_rows(read, devices)
