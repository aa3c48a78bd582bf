"""Converted parameters kept with Orbax, to be read back straight onto any devices.

A cache is a folder with Orbax's own files and a fingerprint: what the source was, and which files
with how many bytes the cache consists of. It is used only if both are still true.
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
from continuous_lm.io.atomic_files import check_writable, replaced_whole
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints.parameter_layout import Targets

FINGERPRINT = "fingerprint.json"
_FORMAT = 1  # to be raised when the same parameters come to mean something else
_PARAMS = "params"


def through(
    cache_dir: str | os.PathLike,
    source: pathlib.Path,
    targets: Targets,
    build: Callable[[], dict[str, jax.Array]],
) -> dict[str, jax.Array]:
    """The parameters that `build` makes from the folder `source`, from the cache if they are there.

    Args:
      cache_dir: holds one folder for each source and dtype.
      source: the folder that they come from.
      targets: parameter path -> its shape, dtype and sharding.
      build: makes them; what it makes is then cached.

    Raises:
      InputError: if the cache has to be written and cannot be.
    """
    if jax.process_count() > 1:
        raise InputError("cache_dir serves a single process; leave it out when there are several")
    origin = _origin(source, targets)
    folder = pathlib.Path(cache_dir).absolute() / _name(source, origin["dtype"])
    if os.path.exists(folder):
        cached = _restore(folder, origin, targets)
        if cached is not None:
            return cached
    check_writable(folder)
    params = build()
    _store(folder, origin, params)
    return params


def _name(source: pathlib.Path, dtype: str) -> str:
    """The name of the source's folder, and what sets it apart from others of that name."""
    path = source.resolve()
    mark = hashlib.sha256(f"{path}\0{dtype}".encode(errors="surrogateescape")).hexdigest()
    return f"{path.name[:100]}-{mark[:12]}"


def _origin(source: pathlib.Path, targets: Targets) -> dict[str, Any]:
    """What must not have changed for a cache to be good."""
    config = source / "config.json"
    paths = {config, source / safetensors_files.INDEX, *source.glob("*.safetensors")}
    stats = {path.name: path.stat() for path in sorted(paths) if path.exists()}
    (dtype,) = {target.dtype.name for target in targets.values()}
    return {
        "format": _FORMAT,
        "dtype": dtype,
        "parameters": {path: list(target.shape) for path, target in targets.items()},
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
        "files": {
            name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            for name, stat in stats.items()
        },
    }


def _contents(folder: pathlib.Path) -> dict[str, int]:
    """Size of each of a cache's files, except for the fingerprint."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FINGERPRINT
    }


def _restore(
    folder: pathlib.Path, origin: dict[str, Any], targets: Targets
) -> dict[str, jax.Array] | None:
    """What is cached, or None if it is torn or of another state of the source."""
    try:
        fingerprint = read_json(folder / FINGERPRINT)
        if fingerprint.get("origin") != origin:
            logging.info("%s is of an older state of its source and is made again", folder)
            return None
        if fingerprint.get("contents") != _contents(folder):
            raise ValueError("files are missing or not of their size")
        return _read(folder / _PARAMS, targets)
    except Exception as error:  # whatever Orbax makes of torn files, the source still has it all
        line = " ".join(str(error).split())
        logging.warning("%s cannot be used and is made again: %.200s", folder, line)
        return None


def _read(folder: pathlib.Path, targets: Targets) -> dict[str, jax.Array]:
    ocp = _orbax()

    def arguments(target):
        if target.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape)

    wanted = traverse_util.unflatten_dict({p: arguments(t) for p, t in targets.items()}, sep="/")
    with _checkpointer(ocp) as checkpointer:
        tree = checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=wanted))
    found = traverse_util.flatten_dict(tree, sep="/")
    del tree
    for path, target in targets.items():
        if target.sharding is None:  # waits for each, so that its NumPy array goes at once
            found[path] = jax.block_until_ready(jax.device_put(found[path]))
    if {p: (x.shape, x.dtype) for p, x in found.items()} != {
        p: (t.shape, t.dtype) for p, t in targets.items()
    }:
        raise ValueError("other parameters than the model's")
    return found


def _store(folder: pathlib.Path, origin: dict[str, Any], params: dict[str, jax.Array]) -> None:
    ocp = _orbax()
    try:
        with replaced_whole(folder) as aside:
            with _checkpointer(ocp) as checkpointer:
                tree = traverse_util.unflatten_dict(params, sep="/")
                checkpointer.save(aside / _PARAMS, ocp.args.PyTreeSave(tree))
            fingerprint = {"origin": origin, "contents": _contents(aside)}
            write_json(aside / FINGERPRINT, fingerprint)
    except ValueError as error:  # as which TensorStore reports a full disk
        if isinstance(error, InputError):
            raise
        line = " ".join(str(error).split())
        raise InputError(f"cannot write to {folder}: {line:.200}; choose another folder") from error


def _orbax():
    """Imported only if it is used, since it takes seconds."""
    return importlib.import_module("orbax.checkpoint")


def _checkpointer(ocp):
    # With compression, writing took three times as long, and reading no less than without.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
