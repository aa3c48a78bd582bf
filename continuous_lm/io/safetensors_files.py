"""Reading and writing the weights of a checkpoint folder in the Hugging Face layout.

Nothing in a folder is trusted. Pickles are never opened, and an index may name only files in its
own folder. Every defect raises an `InputError` that names the file, the field or the tensor.
"""

import json
import math
import pathlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from continuous_lm.errors import InputError
from continuous_lm.io.atomic_files import check_regular_file
from continuous_lm.io.json_files import read_json, reject_duplicate_names, write_json

__all__ = [
    "CHECKPOINT_FILES",
    "INDEX_FILE",
    "MAX_SHARD_BYTES",
    "WEIGHTS_FILE",
    "Tensors",
    "open_tensors",
    "save_file",
    "save_tensors",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHECKPOINT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
)  # all that is written here
MAX_SHARD_BYTES = 5_000_000_000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Tensors:
    """The tensors of a folder's safetensors files, by name, mapped into memory.

    `tensors[name]` is a read-only array whose elements are read from the file when they are used,
    and only those: a slice, a transposition or a reshaping of it costs nothing by itself. It is
    shared with the file, so it takes no memory that the system could not take back.
    """

    def __init__(self):
        self._tensors: dict[str, tuple[Mapping[str, Any], np.ndarray]] = {}
        self._paths: dict[str, pathlib.Path] = {}

    def add(self, path: pathlib.Path) -> set[str]:
        """Add the tensors of a file, and return their names."""
        header, data = _map_file(path)
        for name, entry in header.items():
            if name in self._paths:
                raise InputError(
                    f"tensor {name} is both in {self._paths[name]} and in {path}"
                )
            self._tensors[name], self._paths[name] = (entry, data), path
        return set(header)

    def alias(self, name: str, existing_name: str) -> None:
        """Make a tensor known by a second name."""
        self._tensors[name], self._paths[name] = (
            self._tensors[existing_name],
            self._paths[existing_name],
        )

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name][0]["shape"])

    def path(self, name: str) -> pathlib.Path:
        """The file that holds it, for messages."""
        return self._paths[name]

    def __getitem__(self, name: str) -> np.ndarray:
        entry, data = self._tensors[name]
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{self.path(name)}: tensor {name} is stored as {entry['dtype']}; quantized and"
                " integer weights are not handled, convert them to"
                f" one of {', '.join(sorted(_DTYPES))}"
            )
        begin, end = entry["data_offsets"]
        return data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(self.shape(name))


def open_tensors(folder: pathlib.Path) -> Tensors:
    """Open model.safetensors, or the shards that its index names.

    Raises:
      InputError: if weights are missing, in a pickle, torn, given twice, or not in this folder.
    """
    shards: dict[str, set[str]]
    if (folder / WEIGHTS_FILE).exists():
        shards = {WEIGHTS_FILE: set()}
    elif (folder / INDEX_FILE).exists():
        shards = _read_index(folder)
    else:
        pickles = sorted(
            p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES
        )
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is opened;"
                " convert the checkpoint to safetensors"
            )
        raise InputError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    tensors = Tensors()
    for shard, expected in shards.items():
        for name in sorted(expected - tensors.add(folder / shard)):
            raise InputError(
                f"{folder / INDEX_FILE} says that tensor {name} is in {shard}, but it is not there"
            )
    return tensors


def _read_index(folder: pathlib.Path) -> dict[str, set[str]]:
    """File name -> the tensors that it should hold."""
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{folder / INDEX_FILE} has no weight_map from tensor names to files"
        )
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]+", file) is None
        ):
            raise InputError(
                f"{folder / INDEX_FILE} puts tensor {name} into {file!r}, not a file of this folder"
            )
        shards.setdefault(file, set()).add(name)
    return shards


def _map_file(path: pathlib.Path) -> tuple[dict[str, Any], np.ndarray]:
    """Return header and data of a safetensors file; an error names the file's actual format."""
    try:
        check_regular_file(path)
        with path.open("rb") as file:
            first_bytes = file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path} is missing, although the index names it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{str(path)!a} is not a name that a file can have") from None
    try:
        if path.suffix in _PICKLE_SUFFIXES:
            raise safetensors.SafetensorError
        with safetensors.safe_open(
            path, framework="numpy"
        ):  # checks the header against the file
            pass
    except (safetensors.SafetensorError, OSError) as error:
        # Not sooner: the length of a safetensors header may look like the start of a pickle.
        if (
            path.suffix in _PICKLE_SUFFIXES
            or first_bytes == b"PK\x03\x04"
            or re.match(rb"\x80[\x02-\x05]", first_bytes)
        ):
            raise InputError(
                f"{path} is a pickle, which can run code when it is opened;"
                " convert the checkpoint to safetensors"
            ) from None
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); copy or convert it again"
        ) from None
    file_bytes = np.asarray(np.memmap(path, np.uint8, "r"))
    (header_length,) = struct.unpack("<Q", file_bytes[:8].tobytes())
    try:
        header = json.loads(
            file_bytes[8 : 8 + header_length].tobytes(),
            object_pairs_hook=reject_duplicate_names,
        )
    except ValueError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header, file_bytes[8 + header_length :]


def save_tensors(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    get_tensor: Callable[[str], np.ndarray],
    shard_size: int = MAX_SHARD_BYTES,
) -> None:
    """Write model.safetensors, or shards and their index if it would be too large.

    Args:
      folder: to write into.
      shapes: shapes of all tensors, by their names.
      dtype: dtype of all tensors.
      get_tensor: name -> values; called once for each name, when it is to be written, so that only
        one tensor has to be in memory.
      shard_size: the most bytes of tensors in one file; a larger tensor has a file for itself.
    """
    if type(shard_size) is not int or shard_size < 1:
        raise InputError(
            f"shard_size is {shard_size!r}; it must be a positive number of bytes"
        )
    if dtype not in _DTYPES.values():
        raise InputError(
            f"parameters of dtype {dtype} cannot be saved; cast them to a float type"
        )
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_size:
            shards.append([])
        shards[-1].append(name)
    file_of_tensor: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = (
            f"model-{i:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else WEIGHTS_FILE
        )
        save_file(
            folder / file, {name: shapes[name] for name in names}, dtype, get_tensor
        )
        file_of_tensor |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(sizes.values())}
        write_json(
            folder / INDEX_FILE, {"metadata": metadata, "weight_map": file_of_tensor}
        )


def save_file(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    get_tensor: Callable[[str], np.ndarray],
) -> None:
    """Write one safetensors file: the header's length, the header, then the tensors in order.

    Arguments as in `save_tensors`.
    """
    dtype_name = next(name for name, candidate in _DTYPES.items() if candidate == dtype)
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses others
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": dtype_name,
            "shape": shape,
            "data_offsets": [begin, end],
        }
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header_bytes)) + header_bytes)
        for name, shape in shapes.items():
            values = np.asarray(get_tensor(name), dtype, order="C")
            assert values.shape == shape, (name, values.shape, shape)
            file.write(values.reshape(-1).view(np.uint8).data)
