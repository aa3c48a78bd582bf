"""Parameters: declared in a table, held by one thin Linen module, made by a pure function.

A table says of each parameter, by its path in the tree, its axes, its shape and how it begins:

    {"layers/attention/q": Declaration(("L", "N", "H", "D"), (24, 14, 64, 896), normal(0.02)), ...}

Pure functions compute with the tree of arrays. `ParameterModule` gives Flax Linen's `init` and
`apply` to it, and the logical axes by which it is sharded.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError

__all__ = [
    "ONES",
    "SMALL_NORMAL",
    "ZEROS",
    "Declaration",
    "Initializer",
    "ParameterModule",
    "ParameterTable",
    "Params",
    "check_shapes",
    "declare",
    "flatten",
    "initialize",
    "place",
    "unflatten",
    "with_prefix",
]

Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
Params = Mapping[str, Any]  # the tree: dicts of dicts of arrays

ONES: Initializer = nn.initializers.ones
ZEROS: Initializer = nn.initializers.zeros
SMALL_NORMAL: Initializer = nn.initializers.normal(0.02)

Entry = TypeVar("Entry")  # the entry of one parameter in a table


class Declaration(NamedTuple):
    """Entry of one parameter in a table: its axes, shape and initializer."""

    axes: tuple[str, ...]  # letters of `axes.LETTERS`, or "-" for an axis without one
    shape: tuple[int, ...]
    initializer: Initializer


ParameterTable = Mapping[
    str, Declaration
]  # path, as in "layers/attention/q", -> declaration


def declare(
    sizes: Mapping[str, int], axes: str, initializer: Initializer = SMALL_NORMAL
) -> Declaration:
    """The declaration of a parameter whose axes are letters with known sizes.

    Args:
      sizes: the size of each letter.
      axes: the letters, as in "L N H D".
      initializer: (key, shape, dtype) -> the first values.
    """
    letters = axes_lib.split(axes)
    shape = tuple(sizes[letter] for letter in letters)
    return Declaration(letters, shape, initializer)


def with_prefix(prefix: str, table: Mapping[str, Entry]) -> dict[str, Entry]:
    """The table of a part of a model, under `prefix` in the whole tree.

    Args:
      prefix: first part of the paths.
      table: path -> `Declaration`, or another entry.
    """
    return {f"{prefix}/{path}": entry for path, entry in table.items()}


def unflatten(flat_params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of parameters that are given by their paths."""
    return traverse_util.unflatten_dict(flat_params, sep="/")


def flatten(params: Params) -> dict[str, Any]:
    """Path -> parameter; the inverse of `unflatten`."""
    return traverse_util.flatten_dict(params, sep="/")


def initialize(
    key: jax.Array, table: ParameterTable, dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """New parameters of a table.

    The random numbers of a parameter depend on its path and on `key` alone, so that a table may
    grow without a change of the others.
    """
    return unflatten(_initialize_flat(key, table, dtype))


def _initialize_flat(
    key: jax.Array, table: ParameterTable, dtype: DTypeLike
) -> dict[str, jax.Array]:
    flat_params = {}
    for path, (_, shape, initializer) in table.items():
        parameter_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        flat_params[path] = initializer(parameter_key, shape, dtype)
    return flat_params


def place(mesh: Mesh | None, params: Params, table: ParameterTable) -> Params:
    """The parameters on a mesh, where the axes of their declarations say.

    Args:
      mesh: None: where they are.
      params: parameters, as in the table.
      table: path -> declaration.
    """
    return unflatten(
        {
            path: axes_lib.place(mesh, array, " ".join(table[path].axes))
            for path, array in flatten(params).items()
        }
    )


class ParameterModule(nn.Module):
    """A Linen module that holds the parameters of its `parameter_table` and nothing else.

    `init` makes them with the logical axes of the table (`nn.LogicallyPartitioned`), `apply` takes
    the tree with or without them. Subclasses call `self.parameters()` in a compact `__call__` and
    hand the tree to pure functions.
    """

    def parameter_table(self) -> ParameterTable:
        """Path -> declaration of every parameter."""
        raise NotImplementedError

    def parameters(self, dtype: DTypeLike = jnp.float32) -> Params:
        """The tree of parameters: made by `init`, in `dtype`, and otherwise those of `apply`.

        Raises:
          InputError: for `apply`, naming a parameter that is missing or of another shape.
        """
        table = self.parameter_table()
        if not self.is_initializing():
            params = nn.unbox(self.variables.get("params", {}))
            check_shapes(flatten(params), table)
            return params
        flat_params = _initialize_flat(self.make_rng("params"), table, dtype)
        boxed_params = unflatten(
            {
                path: nn.LogicallyPartitioned(flat_params[path], declaration.axes)
                for path, declaration in table.items()
            }
        )
        for name, subtree in boxed_params.items():
            self.param(name, lambda _, subtree=subtree: subtree)
        return nn.unbox(boxed_params)


def check_shapes(flat_params: Mapping[str, Any], table: ParameterTable) -> None:
    """Raise InputError, naming the path, unless parameters are those of the table.

    Raises:
      InputError: naming a parameter that is missing, left over or of another shape.
    """
    for path in sorted(set(flat_params) ^ set(table)):
        problem = "missing" if path in table else "left over: it has no place"
        raise InputError(f"parameter {path} is {problem}")
    for path, declaration in table.items():
        shape = np.shape(flat_params[path])
        if shape != declaration.shape:
            raise InputError(
                f"parameter {path} has shape {shape}; it must be {declaration.shape}"
            )
