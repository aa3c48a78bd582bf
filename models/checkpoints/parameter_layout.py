"""Map a model's parameters to the tensors of a checkpoint, for loading and for saving.

A stored tensor that is sliced, reshaped and transposed without a copy is the parameter
(`StoredTensor.view`). Loading on one device or a mesh and saving all use this view. The stored
tensors are memory-mapped files, so reading a part of a parameter reads only that part.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.parameters import ParameterTable

__all__ = [
    "BYTES_PER_COPY",
    "STACKED_AXES",
    "ParameterLayout",
    "ParameterSpecs",
    "Slices",
    "are_equal",
    "check_parameters",
    "unused_tensor_error",
]

Slices = tuple[slice, ...]
ParameterSpecs = Mapping[str, jax.ShapeDtypeStruct]
BYTES_PER_COPY = 2**24  # bytes that a thread copies at a time, about
STACKED_AXES = (
    "L",
    "J",
    "I",
)  # axes that are one tensor for each index in a checkpoint


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """Map from the parameters of a model, or of a part of one, to the tensors of a checkpoint.

    Attributes:
      tensors: parameter path -> its stored tensor; may have entries for other parameters.
      declarations: parameter path -> its axes and shape.
      sizes: axis letter of the stored tensors -> its size.
      tensor_prefix: prefix of the tensors' names; checkpoints saved without a head omit it.
      ignored_tensors: regular expressions of tensors that hold nothing to load.
    """

    tensors: Mapping[str, StoredTensor]
    declarations: ParameterTable
    sizes: Mapping[str, int]
    tensor_prefix: str = ""
    ignored_tensors: tuple[str, ...] = ()

    @functools.cached_property
    def tensor_contents(self) -> dict[str, tuple[int, list[str]]]:
        """Stored name -> the layer and the parameters in that tensor, several in a fused one."""
        contents: dict[str, tuple[int, list[str]]] = {}
        for path in self.declarations:
            for layer, name in enumerate(self._tensor_names(path)):
                contents.setdefault(name, (layer, []))[1].append(path)
        return contents

    @functools.cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> the tensor's shape."""
        return {
            name: self._stored_shape(paths[0])
            for name, (_, paths) in self.tensor_contents.items()
        }

    def parameter_specs(self, dtype: np.dtype, mesh: Mesh | None) -> ParameterSpecs:
        """Return parameter path -> its shape, dtype and sharding (None without a mesh)."""

        def parameter_spec(path: str) -> jax.ShapeDtypeStruct:
            shape = self.declarations[path].shape
            array_sharding = (
                None
                if mesh is None
                else axes_lib.sharding(mesh, self.declarations[path].axes, shape)
            )
            return jax.ShapeDtypeStruct(shape, dtype, sharding=array_sharding)

        return {path: parameter_spec(path) for path in self.declarations}

    def read(self, folder: pathlib.Path, specs: ParameterSpecs) -> dict[str, jax.Array]:
        """The parameters, from a folder whose tensors are checked first.

        Each process reads the parts that its own devices hold, each of them once, into the memory
        that becomes the parameter's: there is never a second copy of the model.
        """
        tensors = safetensors_files.open_tensors(folder)
        with about(str(folder)):
            return self.build(tensors, self.check_tensors(tensors), specs)

    def check_tensors(self, tensors: safetensors_files.Tensors) -> dict[str, str]:
        """`checkpoint_names`, of tensors that are this model's and no others."""
        checkpoint_names = self.checkpoint_names(tensors)
        self._check_unused_tensors(tensors, checkpoint_names)
        return checkpoint_names

    def build(
        self,
        tensors: safetensors_files.Tensors,
        checkpoint_names: Mapping[str, str],
        specs: ParameterSpecs,
    ) -> dict[str, jax.Array]:
        """The parameters, from tensors whose names here are `checkpoint_names`; see `read`."""
        return {
            path: _make_array(
                spec,
                functools.partial(
                    self._read_part, tensors, checkpoint_names, path, spec.dtype
                ),
            )
            for path, spec in specs.items()
        }

    def write(
        self,
        folder: pathlib.Path,
        params: Mapping[str, Any],
        dtype: np.dtype,
        shard_size: int,
    ) -> None:
        """Write the parameters as safetensors files, one tensor in memory at a time."""
        make_tensor = functools.partial(self.stored_tensor, params, dtype)
        safetensors_files.save_tensors(
            folder, self.tensor_shapes, dtype, make_tensor, shard_size
        )

    def stored_tensor(
        self, params: Mapping[str, Any], dtype: np.dtype, name: str
    ) -> np.ndarray:
        """The stored tensor of this name, filled from the parameters."""
        layer, paths = self.tensor_contents[name]
        values = np.empty(self.tensor_shapes[name], dtype)
        for path in paths:
            # Of an array that is used as it is, JAX would keep the copy that is fetched.
            stack = params[path] if self._is_stacked(path) else params[path][None]
            self._layer_view(path, values)[...] = np.asarray(stack[layer])
        return values

    def _read_part(
        self,
        tensors: safetensors_files.Tensors,
        checkpoint_names: Mapping[str, str],
        path: str,
        dtype: np.dtype,
        slices: Slices,
    ) -> np.ndarray:
        """The part `slices` of a parameter, cast on the way."""
        if not self._is_stacked(path):  # then it is a stack of one
            slices = (slice(None), *slices)
        layer_views = [
            self._layer_view(path, tensors[checkpoint_names[name]])
            for name in self._tensor_names(path)[slices[0]]
        ]
        parts = [layer_view[slices[1:]] for layer_view in layer_views]
        stack = _aligned_empty((len(parts), *parts[0].shape), dtype)
        _copy_parts(stack, parts)
        return stack if self._is_stacked(path) else stack[0]

    def _layer_view(self, path: str, tensor: np.ndarray) -> np.ndarray:
        """One layer of a parameter, as it lies in a stored tensor."""
        stored = self.tensors[path]
        if stored.axes is None:
            return tensor
        axes = self.declarations[path].axes
        layer_axes = axes[1:] if self._is_stacked(path) else axes
        return stored.view(tensor, layer_axes, self.sizes)

    def _stored_shape(self, path: str) -> tuple[int, ...]:
        """The shape of the stored tensors that a parameter lies in."""
        stored = self.tensors[path]
        if stored.axes is not None:
            return stored.shape(self.sizes)
        shape = self.declarations[path].shape
        return shape[1:] if self._is_stacked(path) else shape

    def _tensor_names(self, path: str) -> list[str]:
        """The stored names of a parameter's layers; one that is not of a layer counts as one."""
        num_layers = self.declarations[path].shape[0] if self._is_stacked(path) else 1
        name = self.tensors[path].name
        return [name.format(layer=layer) for layer in range(num_layers)]

    def _is_stacked(self, path: str) -> bool:
        return self.declarations[path].axes[0] in STACKED_AXES

    def checkpoint_names(self, tensors: safetensors_files.Tensors) -> dict[str, str]:
        """Raise InputError, before reading, for a tensor that is missing or misshapen.

        Returns:
          the name of each tensor in the layout's table -> its name in this checkpoint.
        """
        prefix, stored_names = self.tensor_prefix, tensors.names
        is_unprefixed = not any(name.startswith(prefix) for name in stored_names)
        checkpoint_names = {
            full_name: full_name.removeprefix(prefix) if is_unprefixed else full_name
            for full_name in self.tensor_shapes
        }
        for full_name, name in checkpoint_names.items():
            shape = self.tensor_shapes[full_name]
            if name not in stored_names:
                raise InputError(f"tensor {name} {list(shape)} is missing")
            if tensors.shape(name) != shape:
                raise InputError(
                    f"tensor {name} in {tensors.path(name).name} has shape"
                    f" {list(tensors.shape(name))}, but config.json asks for {list(shape)}"
                )
        return checkpoint_names

    def _check_unused_tensors(
        self, tensors: safetensors_files.Tensors, checkpoint_names: Mapping[str, str]
    ) -> None:
        """Raise InputError for a tensor that no parameter uses."""
        head_name = self.tensors["head"].name
        is_unprefixed = any(
            full_name != name for full_name, name in checkpoint_names.items()
        )
        for name in sorted(tensors.names - set(checkpoint_names.values())):
            full_name = self.tensor_prefix + name if is_unprefixed else name
            if any(
                re.fullmatch(pattern, full_name) for pattern in self.ignored_tensors
            ):
                continue
            if name == head_name and "head" not in self.declarations:
                # Some exporters write the tied table twice.
                embedding_name = checkpoint_names[self.tensors["embedding"].name]
                if are_equal(tensors[name], tensors[embedding_name]):
                    continue
                raise InputError(
                    f"tensor {name} is not the embedding table, as tie_word_embeddings says"
                )
            raise unused_tensor_error(tensors, name)


def check_parameters(params: Mapping[str, Any], declarations: ParameterTable) -> None:
    """Raise InputError unless the parameters are the model's and all on this host."""
    for path in sorted(set(params) ^ set(declarations)):
        raise InputError(
            f"parameter {path} is"
            f" {'missing' if path in declarations else 'left over: it has no place'}"
        )
    for path, declaration in declarations.items():
        value = params[path]
        if np.shape(value) != declaration.shape:
            raise InputError(
                f"parameter {path} has shape {np.shape(value)}; it must be"
                f" {declaration.shape}"
            )
        if isinstance(value, jax.Array) and not (
            value.is_fully_addressable or value.is_fully_replicated
        ):
            raise InputError(
                f"parameter {path} lies in part on devices of other processes; gather it first,"
                " with jax.experimental.multihost_utils.process_allgather(params, tiled=True)"
            )


def _make_array(
    spec: jax.ShapeDtypeStruct, read_part: Callable[[Slices], np.ndarray]
) -> jax.Array:
    """The array whose parts `read_part` gives; a part that several devices hold is read once."""
    if spec.sharding is None:  # not bound to its device, as jnp.array's results are not
        return jax.device_put(read_part((slice(None),) * spec.ndim))
    parts_by_index: dict[str, np.ndarray] = {}

    def read_once(index: Slices | None) -> np.ndarray:
        assert index is not None
        index_key = str(index)
        if index_key not in parts_by_index:
            parts_by_index[index_key] = read_part(index)
        return parts_by_index[index_key]

    return jax.make_array_from_callback(
        spec.shape, spec.sharding, read_once, dtype=spec.dtype
    )


def _copy_parts(stack: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    """Copy and cast each part into its row of the stack, in pieces, one for each core at a time.

    NumPy lets other threads run while it copies, and each of them waits for pages of its own.
    """
    pieces = [
        (
            destination[first_row : first_row + num_rows],
            part[first_row : first_row + num_rows],
        )
        for destination, part in zip(stack, parts, strict=True)
        for num_rows in [max(1, BYTES_PER_COPY * len(part) // part.nbytes)]
        for first_row in range(0, len(part), num_rows)
    ]
    copy_piece = functools.partial(np.copyto, casting="unsafe")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(copy_piece, *zip(*pieces, strict=True)))


def unused_tensor_error(tensors: safetensors_files.Tensors, name: str) -> InputError:
    """Return the error for a tensor that no parameter uses."""
    return InputError(
        f"tensor {name} in {tensors.path(name).name} is left over: it has no place"
    )


def are_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two tables are equal; comparing row by row needs no extra memory."""
    return first.shape == second.shape and all(map(np.array_equal, first, second))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that the CPU backend can take over as it is, instead of copying it."""
    dtype, alignment = jnp.dtype(dtype), 64
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    byte_buffer = np.empty(num_bytes + alignment, np.uint8)
    offset = -byte_buffer.ctypes.data % alignment
    return byte_buffer[offset : offset + num_bytes].view(dtype).reshape(shape)
