"""The weights of a checkpoint folder in the Hugging Face layout, read and written with care.

Nothing in a folder is trusted. No pickle is ever opened, an index may name files of its own folder
only, and whatever is wrong ends in an `InputError` that names the file, the field or the tensor.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
import safetensors
import safetensors.numpy

from continuous_lm.errors import InputError
from continuous_lm.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READABLE = {"F64", "F32", "F16", "BF16"}


class Tensors:
    """The tensors of a folder's safetensors files, by name; each is read when it is asked for."""

    def __init__(self, files: Mapping[str, Any], paths: Mapping[str, pathlib.Path]):
        self._files, self._paths = files, paths

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def path(self, name: str) -> pathlib.Path:
        """The file that holds it, for messages."""
        return self._paths[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor as it is stored: one copy, in memory of its own."""
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in _READABLE:
            raise InputError(
                f"{self.path(name)}: tensor {name} is stored as {kind}; quantized and"
                " integer weights are not handled, convert them to"
                f" one of {', '.join(sorted(_READABLE))}"
            )
        return self._files[name].get_tensor(name)


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[Tensors]:
    """Opens model.safetensors, or the shards that its index names.

    Raises:
      InputError: if weights are missing, in a pickle, torn, given twice, or not in this folder.
    """
    shards: dict[str, set[str]]
    if (folder / WEIGHTS).exists():
        shards = {WEIGHTS: set()}
    elif (folder / INDEX).exists():
        shards = _shards_of_index(folder)
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is opened;"
                " convert the checkpoint to safetensors"
            )
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        paths: dict[str, pathlib.Path] = {}
        for shard, expected in shards.items():
            opened = stack.enter_context(_open(folder / shard))
            held = set(opened.keys())
            for name in sorted(expected - held):
                raise InputError(
                    f"{folder / INDEX} says that tensor {name} is in {shard}, but it is not there"
                )
            for name in held:
                if name in files:
                    raise InputError(
                        f"tensor {name} is both in {paths[name]} and in {folder / shard}"
                    )
                files[name], paths[name] = opened, folder / shard
        yield Tensors(files, paths)


def _shards_of_index(folder: pathlib.Path) -> dict[str, set[str]]:
    """File name -> the tensors that it should hold."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} has no weight_map from tensor names to files")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]+", file) is None:
            raise InputError(
                f"{folder / INDEX} puts tensor {name} into {file!r}, not a file of this folder"
            )
        shards.setdefault(file, set()).add(name)
    return shards


def _open(path: pathlib.Path):
    """A safetensors file, or an error that says what the file is instead."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise InputError(f"{path} is missing, although the index names it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{str(path)!a} is not a name that a file can have") from None
    try:
        if path.suffix not in _PICKLES:
            return safetensors.safe_open(path, framework="numpy")
        raise safetensors.SafetensorError
    except (safetensors.SafetensorError, OSError) as error:
        # Not sooner: the length of a safetensors header may look like the start of a pickle.
        if (
            path.suffix in _PICKLES
            or start == b"PK\x03\x04"
            or re.match(rb"\x80[\x02-\x05]", start)
        ):
            raise InputError(
                f"{path} is a pickle, which can run code when it is opened;"
                " convert the checkpoint to safetensors"
            ) from None
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); copy or convert it again"
        ) from None


def save_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file."""
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
