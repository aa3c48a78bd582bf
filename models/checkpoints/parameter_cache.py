"""Converted parameters kept with Orbax, to be read back straight onto any devices.

A cache is a folder with Orbax's files and a fingerprint. The fingerprint describes the source and
lists the cache's files with their sizes. A cache is used only if both still match.
"""

import hashlib
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from continuous_lm.errors import InputError
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import check_writable, replace_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints.parameter_layout import ParameterSpecs

__all__ = [
    "FINGERPRINT_FILE",
    "load_or_build",
]

FINGERPRINT_FILE = "fingerprint.json"
_FORMAT_VERSION = 1  # to be raised when the same parameters come to mean something else
_PARAMS_FOLDER = "params"


def load_or_build(
    cache_dir: str | os.PathLike[str],
    source: pathlib.Path,
    specs: ParameterSpecs,
    build: Callable[[], dict[str, jax.Array]],
) -> dict[str, jax.Array]:
    """Return the parameters that `build` makes from the folder `source`, cached if possible.

    Args:
      cache_dir: folder of caches, with one sub-folder for each source and dtype.
      source: folder of the checkpoint.
      specs: parameter path -> its shape, dtype and sharding.
      build: function that makes the parameters, which are then cached.

    Raises:
      InputError: if the cache has to be written and cannot be.
    """
    if jax.process_count() > 1:
        raise InputError(
            "cache_dir serves a single process; leave it out when there are several"
        )
    source_state = _describe_source(source, specs)
    folder = pathlib.Path(cache_dir).absolute() / _cache_name(
        source, source_state["dtype"]
    )
    if os.path.exists(folder):  # noqa: PTH110 (False for a name that no file can have)
        cached_params = _restore_if_valid(folder, source_state, specs)
        if cached_params is not None:
            return cached_params
    check_writable(folder)
    params = build()
    _store(folder, source_state, params)
    return params


def _cache_name(source: pathlib.Path, dtype: str) -> str:
    """The name of the source's folder, and what sets it apart from others of that name."""
    source_path = source.resolve()
    digest = hashlib.sha256(
        f"{source_path}\0{dtype}".encode(errors="surrogateescape")
    ).hexdigest()
    return f"{source_path.name[:100]}-{digest[:12]}"


def _describe_source(source: pathlib.Path, specs: ParameterSpecs) -> dict[str, Any]:
    """Return the properties of the source that must be unchanged for a cache to be valid."""
    config_path = source / "config.json"
    paths = {
        config_path,
        source / safetensors_files.INDEX_FILE,
        *source.glob("*.safetensors"),
    }
    file_stats = {path.name: path.stat() for path in sorted(paths) if path.exists()}
    (dtype,) = {spec.dtype.name for spec in specs.values()}
    return {
        "format": _FORMAT_VERSION,
        "dtype": dtype,
        "parameters": {path: list(spec.shape) for path, spec in specs.items()},
        "config_sha256": hashlib.sha256(config_path.read_bytes()).hexdigest(),
        "files": {
            name: {"size": file_stat.st_size, "mtime_ns": file_stat.st_mtime_ns}
            for name, file_stat in file_stats.items()
        },
    }


def _file_sizes(folder: pathlib.Path) -> dict[str, int]:
    """Size of each of a cache's files, except for the fingerprint."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FINGERPRINT_FILE
    }


def _restore_if_valid(
    folder: pathlib.Path, source_state: dict[str, Any], specs: ParameterSpecs
) -> dict[str, jax.Array] | None:
    """Return the cached parameters, or None if the cache is incomplete or out of date."""
    try:
        fingerprint = read_json(folder / FINGERPRINT_FILE)
        if fingerprint.get("origin") != source_state:
            logging.info(
                "%s is of an older state of its source and is made again", folder
            )
            return None
        if fingerprint.get("contents") != _file_sizes(folder):
            raise ValueError("files are missing or not of their size")
        return _restore_params(folder / _PARAMS_FOLDER, specs)
    except Exception as error:  # noqa: BLE001 (Orbax raises any class for torn files)
        message = " ".join(str(error).split())
        logging.warning("%s cannot be used and is made again: %.200s", folder, message)
        return None


def _restore_params(
    folder: pathlib.Path, specs: ParameterSpecs
) -> dict[str, jax.Array]:
    ocp = _import_orbax()

    def restore_args(target):
        if target.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape)

    restore_args_tree = traverse_util.unflatten_dict(
        {
            param_path: restore_args(param_spec)
            for param_path, param_spec in specs.items()
        },
        sep="/",
    )
    with _make_checkpointer(ocp) as checkpointer:
        tree = checkpointer.restore(
            folder, ocp.args.PyTreeRestore(restore_args=restore_args_tree)
        )
    params = traverse_util.flatten_dict(tree, sep="/")
    del tree
    for path, spec in specs.items():
        if (
            spec.sharding is None
        ):  # waits for each, so that its NumPy array goes at once
            params[path] = jax.block_until_ready(jax.device_put(params[path]))
    if {
        param_path: (array.shape, array.dtype) for param_path, array in params.items()
    } != {
        param_path: (param_spec.shape, param_spec.dtype)
        for param_path, param_spec in specs.items()
    }:
        raise ValueError("other parameters than the model's")
    return params


def _store(
    folder: pathlib.Path, source_state: dict[str, Any], params: dict[str, jax.Array]
) -> None:
    ocp = _import_orbax()
    try:
        with replace_atomically(folder) as staging_folder:
            with _make_checkpointer(ocp) as checkpointer:
                tree = traverse_util.unflatten_dict(params, sep="/")
                checkpointer.save(
                    staging_folder / _PARAMS_FOLDER, ocp.args.PyTreeSave(tree)
                )
            fingerprint = {
                "origin": source_state,
                "contents": _file_sizes(staging_folder),
            }
            write_json(staging_folder / FINGERPRINT_FILE, fingerprint)
    except ValueError as error:  # as which TensorStore reports a full disk
        if isinstance(error, InputError):
            raise
        message = " ".join(str(error).split())
        raise InputError(
            f"cannot write to {folder}: {message:.200}; choose another folder"
        ) from error


def _import_orbax():
    """Imported only if it is used, since it takes seconds."""
    return importlib.import_module("orbax.checkpoint")


def _make_checkpointer(ocp):
    # With compression, writing took three times as long, and reading no less than without.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
