"""Where a model's parameters lie in the tensors of a checkpoint: their names, checks, both ways.

One idea serves loading, on one device or a mesh, and saving: a stored tensor that is sliced,
reshaped and transposed without a copy *is* the parameter (`Stored.view`). Any part of it is then an
index away, and since the stored tensors are mapped files, a part is all that is read.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.models.families.family import Family

Index = tuple[slice, ...]
Targets = Mapping[str, jax.ShapeDtypeStruct]
PIECE = 2**24  # bytes that a thread copies at a time, about
STACKS = ("L", "J", "I")  # axes that are one tensor for each index in a checkpoint


class Sized(Protocol):
    """A config: it says how large the axes are."""

    @property
    def sizes(self) -> Mapping[str, int]: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parameters of a model in the tensors of a checkpoint of its family.

    Attributes:
      config: of the model.
      family: whose table says where they lie.
      boxes: parameter path -> shape and axes.
    """

    config: Sized
    family: Family
    boxes: Mapping[str, nn.LogicallyPartitioned]

    @functools.cached_property
    def places(self) -> dict[str, tuple[int, list[str]]]:
        """Stored name -> the layer and the parameters in that tensor, several in a fused one."""
        found: dict[str, tuple[int, list[str]]] = {}
        for path in self.boxes:
            for layer, name in enumerate(self._names(path)):
                found.setdefault(name, (layer, []))[1].append(path)
        return found

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> the tensor's shape."""
        return {
            name: self.family.tensors[paths[0]].shape(self.config.sizes)
            for name, (_, paths) in self.places.items()
        }

    def targets(self, dtype: np.dtype, mesh: Mesh | None) -> Targets:
        """Parameter path -> what is to be made: shape, dtype, sharding (None without a mesh)."""

        def target(path: str) -> jax.ShapeDtypeStruct:
            shape = self.boxes[path].value.shape
            place = None if mesh is None else axes_lib.sharding(mesh, self._axes(path), shape)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        return {path: target(path) for path in self.boxes}

    def read(self, folder: pathlib.Path, targets: Targets) -> dict[str, jax.Array]:
        """The parameters, from a folder whose tensors are checked first.

        Each process reads the parts that its own devices hold, each of them once, into the memory
        that becomes the parameter's: there is never a second copy of the model.
        """
        tensors = safetensors_files.open_tensors(folder)
        with about(str(folder)):
            return self.build(tensors, self.check(tensors), targets)

    def check(self, tensors: safetensors_files.Tensors) -> dict[str, str]:
        """`named`, of tensors that are this model's and no others."""
        named = self.named(tensors)
        self._check_rest(tensors, named)
        return named

    def build(
        self, tensors: safetensors_files.Tensors, named: Mapping[str, str], targets: Targets
    ) -> dict[str, jax.Array]:
        """The parameters, from tensors whose names here are `named`; see `read`."""
        return {
            path: _place(target, functools.partial(self._part, tensors, named, path, target.dtype))
            for path, target in targets.items()
        }

    def write(
        self, folder: pathlib.Path, params: Mapping[str, Any], dtype: np.dtype, shard_size: int
    ) -> None:
        """Writes the parameters as safetensors files, one tensor in memory at a time."""
        tensor = functools.partial(self.tensor, params, dtype)
        safetensors_files.save_tensors(folder, self.shapes, dtype, tensor, shard_size)

    def tensor(self, params: Mapping[str, Any], dtype: np.dtype, name: str) -> np.ndarray:
        """The stored tensor of this name, filled from the parameters."""
        layer, paths = self.places[name]
        values = np.empty(self.shapes[name], dtype)
        for path in paths:
            # Of an array that is used as it is, JAX would keep the copy that is fetched.
            stack = params[path] if self._stacked(path) else params[path][None]
            self._view(path, values)[...] = np.asarray(stack[layer])
        return values

    def _part(
        self,
        tensors: safetensors_files.Tensors,
        named: Mapping[str, str],
        path: str,
        dtype: np.dtype,
        index: Index,
    ) -> np.ndarray:
        """The part `index` of a parameter, cast on the way."""
        if not self._stacked(path):  # then it is a stack of one
            index = (slice(None), *index)
        layers = [self._view(path, tensors[named[n]]) for n in self._names(path)[index[0]]]
        parts = [layer[index[1:]] for layer in layers]
        stack = _aligned_empty((len(parts), *parts[0].shape), dtype)
        _copy(stack, parts)
        return stack if self._stacked(path) else stack[0]

    def _view(self, path: str, tensor: np.ndarray) -> np.ndarray:
        """One layer of a parameter, as it lies in a stored tensor."""
        axes = self._axes(path)[self._stacked(path) :]
        return self.family.tensors[path].view(tensor, axes, self.config.sizes)

    def _names(self, path: str) -> list[str]:
        """The stored names of a parameter's layers; one that is not of a layer counts as one."""
        layers = range(self.config.sizes[self._axes(path)[0]] if self._stacked(path) else 1)
        return [self.family.tensors[path].name.format(layer=layer) for layer in layers]

    def _axes(self, path: str) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.boxes[path].names)

    def _stacked(self, path: str) -> bool:
        return self._axes(path)[0] in STACKS

    def named(self, tensors: safetensors_files.Tensors) -> dict[str, str]:
        """Refuses a tensor that is missing or of another shape, before anything is read.

        Returns:
          the name of each tensor in the family's table -> its name in this checkpoint.
        """
        prefix, names = self.family.prefix, tensors.names
        bare = not any(name.startswith(prefix) for name in names)
        named = {full: full.removeprefix(prefix) if bare else full for full in self.shapes}
        for full, name in named.items():
            shape = self.shapes[full]
            if name not in names:
                raise InputError(f"tensor {name} {list(shape)} is missing")
            if tensors.shape(name) != shape:
                raise InputError(
                    f"tensor {name} in {tensors.path(name).name} has shape"
                    f" {list(tensors.shape(name))}, but config.json asks for {list(shape)}"
                )
        return named

    def _check_rest(self, tensors: safetensors_files.Tensors, named: Mapping[str, str]) -> None:
        """Refuses what is left over."""
        head = self.family.tensors["head"].name
        bare = any(full != name for full, name in named.items())
        for name in sorted(tensors.names - set(named.values())):
            full = self.family.prefix + name if bare else name
            if any(re.fullmatch(pattern, full) for pattern in self.family.ignored):
                continue
            if name == head and "head" not in self.boxes:
                # Some exporters write the tied table twice.
                table = named[self.family.tensors["embedding"].name]
                if equal(tensors[name], tensors[table]):
                    continue
                raise InputError(
                    f"tensor {name} is not the embedding table, as tie_word_embeddings says"
                )
            raise left_over(tensors, name)


def check_tree(params: Mapping[str, Any], boxes: Mapping[str, nn.LogicallyPartitioned]) -> None:
    """Refuses parameters that are not those of the model, or not all here."""
    for path in sorted(set(params) ^ set(boxes)):
        raise InputError(
            f"parameter {path} is {'missing' if path in boxes else 'left over: it has no place'}"
        )
    for path, box in boxes.items():
        value = params[path]
        if np.shape(value) != box.value.shape:
            raise InputError(
                f"parameter {path} has shape {np.shape(value)}; it must be {box.value.shape}"
            )
        if isinstance(value, jax.Array) and not (
            value.is_fully_addressable or value.is_fully_replicated
        ):
            raise InputError(
                f"parameter {path} lies in part on devices of other processes; gather it first,"
                " with jax.experimental.multihost_utils.process_allgather(params, tiled=True)"
            )


def _place(target: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """The array whose parts `read` gives; a part that several devices hold is read once."""
    if target.sharding is None:  # not bound to its device, as jnp.array's results are not
        return jax.device_put(read((slice(None),) * target.ndim))
    parts: dict[str, np.ndarray] = {}

    def once(index: Index | None) -> np.ndarray:
        assert index is not None
        key = str(index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(target.shape, target.sharding, once, dtype=target.dtype)


def _copy(stack: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    """Copies and casts each part into its row of the stack, in pieces, one for each core at a time.

    NumPy lets other threads run while it copies, and each of them waits for pages of its own.
    """
    pieces = [
        (out[begin : begin + rows], part[begin : begin + rows])
        for out, part in zip(stack, parts, strict=True)
        for rows in [max(1, PIECE * len(part) // part.nbytes)]
        for begin in range(0, len(part), rows)
    ]
    copy = functools.partial(np.copyto, casting="unsafe")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(copy, *zip(*pieces, strict=True)))


def left_over(tensors: safetensors_files.Tensors, name: str) -> InputError:
    """What is to be said of a tensor that no parameter reads."""
    return InputError(f"tensor {name} in {tensors.path(name).name} is left over: it has no place")


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tables are equal, row by row: that takes no memory."""
    return a.shape == b.shape and all(map(np.array_equal, a, b))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that the CPU backend can take over as it is, instead of copying it."""
    dtype, alignment = jnp.dtype(dtype), 64
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + alignment, np.uint8)
    offset = -raw.ctypes.data % alignment
    return raw[offset : offset + size].view(dtype).reshape(shape)
