"""The folder of a training run: its settings and its checkpoints.

settings.json     settings that must be equal to resume the run
checkpoints/N/    parameters, optimiser state and data position after N steps; the last two

`run_log` writes the logs in the same folder. With several processes, each writes the shards of its
devices, and process 0 writes the rest. Shardings are not stored: any mesh can resume a run.
"""

import contextlib
import functools
import hashlib
import json
import logging as python_logging
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import traverse_util

from continuous_lm.errors import InputError
from continuous_lm.io.atomic_files import (
    absolute_path,
    replace_atomically,
    write_atomically,
)
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.parallel import processes

SETTINGS_FILE = "settings.json"
STATE_FILE = "state.json"
CHECKPOINTS_FOLDER = "checkpoints"
PARAMS_FOLDER = "params"
OPTIMIZER_FOLDER = "optimizer"
# Should the last checkpoint be torn, by a loss of power, there is one before it.
_NUM_KEPT_CHECKPOINTS = 2
_TEMPORARY_PREFIX = ".writing-"  # of a folder that is being written or removed

NamedArrays = dict[str, jax.Array]  # by the path in a tree: "layers/attention/q"
Params = TypeVar("Params")
Batch_co = TypeVar("Batch_co", covariant=True)


class BatchIterator(Protocol[Batch_co]):
    """An endless iterator whose position JSON can hold; see `window_batches.shuffled_windows`."""

    def __next__(self) -> Batch_co:
        """A tree of arrays whose leading axis is that of the batch."""

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""

    def set_state(self, state: dict[str, Any], /) -> None:
        """Continue from a position."""


class TrainState(NamedTuple):
    """State of a run between two dispatches.

    Attributes:
      step: optimiser steps made.
      params: the trained parameters by their paths.
      optimizer_state: optimiser state of these parameters.
    """

    step: int
    params: NamedArrays
    optimizer_state: optax.OptState


def leaves_by_path(tree: object) -> NamedArrays:
    """The leaves by their paths: "layers/attention/q"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def dtype_and_shape(leaf: jax.Array) -> str:
    """Return dtype and shape as text, as in settings.json."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def replace_leaves(tree: Params, named_leaves: Mapping[str, jax.Array]) -> Params:
    """Return a tree with the structure of `tree` and other leaves."""
    ordered_leaves = [named_leaves[path] for path in leaves_by_path(tree)]
    replaced: Params = jax.tree.unflatten(jax.tree.structure(tree), ordered_leaves)
    return replaced


# --- Settings -------------------------------------------------------------------------------------


def checksum(arrays: Mapping[str, jax.Array]) -> str | None:
    """A checksum of arrays and their names; None if there are none."""
    if not arrays:
        return None
    sha256 = hashlib.sha256()
    for name, leaf in sorted(arrays.items()):
        sha256.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        sha256.update(processes.gather_to_hosts(leaf).tobytes())
    return sha256.hexdigest()


def check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run, or raise InputError for a run with other settings."""
    if (folder / SETTINGS_FILE).exists():
        _check_same_settings(folder, settings)
        return
    if (folder / CHECKPOINTS_FOLDER).exists():
        raise InputError(
            f"{folder} has checkpoints but no {SETTINGS_FILE}; choose another folder"
        )
    if processes.is_first_process():
        with write_atomically(folder) as staging_folder:
            write_json(staging_folder / SETTINGS_FILE, settings)


def _check_same_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    stored = _flatten_settings(read_json(folder / SETTINGS_FILE))
    current = _flatten_settings(json.loads(json.dumps(settings)))
    missing = "nothing"
    differing = [
        f"{name.removeprefix('settings/')} = {stored.get(name, missing)!r:.80}, not"
        f" {current.get(name, missing)!r:.80}"
        for name in sorted(stored.keys() | current.keys())
        if stored.get(name, missing) != current.get(name, missing)
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with {'; '.join(differing[:3])}; to resume it give the same"
            " settings, for a new one choose another folder"
        )


def _flatten_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings by their paths: "settings/data/sha256"."""
    flat_settings: dict[str, Any] = traverse_util.flatten_dict(settings, sep="/")
    return flat_settings


# --- Checkpoints ----------------------------------------------------------------------------------


def list_checkpoints(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """The checkpoints of a run, oldest first: number of steps, and path."""
    paths = (folder / CHECKPOINTS_FOLDER).glob("[0-9]*")
    return sorted((int(path.name), path) for path in paths if path.name.isdecimal())


def describe_last_checkpoint(folder: pathlib.Path) -> str:
    """The last checkpoint, for the message with which a run ends."""
    steps_and_paths = list_checkpoints(folder)
    if not steps_and_paths:
        return "there is no checkpoint yet"
    return f"the checkpoint of step {steps_and_paths[-1][0]} is kept"


def restore_params(
    folder: str | os.PathLike[str], params: Params
) -> tuple[Params, int]:
    """The parameters of a run's last checkpoint, for instance while it is running.

    Args:
      folder: folder of the run.
      params: a tree of the model's parameters; those that were frozen are taken from it.

    Returns:
      Parameters, and after how many steps.

    Raises:
      InputError: if there is no checkpoint, or it has other parameters than these.
    """
    folder = absolute_path(folder)
    steps_and_paths = list_checkpoints(folder)
    if not steps_and_paths:
        raise InputError(f"{folder} has no checkpoint")
    step, path = steps_and_paths[-1]
    named_params = {
        name: jnp.asarray(leaf) for name, leaf in leaves_by_path(params).items()
    }
    stored_kinds = read_json(folder / SETTINGS_FILE)["parameters"]
    for name, stored_kind in stored_kinds.items():
        model_kind = "without it"
        if name in named_params:
            model_kind = dtype_and_shape(named_params[name])
        if model_kind != stored_kind:
            raise InputError(
                f"{path} has {name} as {stored_kind}, the model is {model_kind}"
            )
    templates = {name: named_params[name] for name in stored_kinds}
    trained_params = _read_arrays(path / PARAMS_FOLDER, templates)
    return replace_leaves(params, named_params | trained_params), step


def save_checkpoint(
    folder: pathlib.Path, state: TrainState, data_position: dict[str, Any]
) -> None:
    """Write a checkpoint, whole or not at all, and remove those before the last two."""
    checkpoint_folder = folder / CHECKPOINTS_FOLDER / f"{state.step:08d}"
    with explain_write_errors(folder), _silence_orbax():
        with _replace_on_all_processes(checkpoint_folder) as temporary_folder:
            _write_arrays(temporary_folder / PARAMS_FOLDER, state.params)
            _write_arrays(
                temporary_folder / OPTIMIZER_FOLDER,
                _leaves_by_number(state.optimizer_state),
            )
            if processes.is_first_process():
                write_json(
                    temporary_folder / STATE_FILE,
                    {"step": state.step, "position": data_position},
                )
        if processes.is_first_process():
            _remove_old_checkpoints(folder)


def _remove_old_checkpoints(folder: pathlib.Path) -> None:
    """Remove all checkpoints but the last two, renamed first so that none is half-deleted."""
    for _, path in list_checkpoints(folder)[:-_NUM_KEPT_CHECKPOINTS]:
        temporary_folder = pathlib.Path(
            tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=path.parent)
        )
        path.rename(temporary_folder / path.name)
        shutil.rmtree(temporary_folder)


def restore_or_init(
    folder: pathlib.Path,
    initial_state: TrainState,
    batch_iterator: BatchIterator[object],
) -> TrainState:
    """The state of the last checkpoint that can be read, or `initial_state` if there is none.

    Args:
      folder: folder of the run.
      initial_state: whose shapes, dtypes and placement restored arrays have.
      batch_iterator: goes to the checkpoint's position.

    Raises:
      InputError: if there are checkpoints, but none that can be read.
    """
    if processes.is_first_process():
        _remove_leftovers(folder)
    # All processes use the list of process 0.
    steps_and_names = processes.broadcast_from_first(
        [(step, path.name) for step, path in list_checkpoints(folder)]
    )
    for step, name in reversed(steps_and_names):
        path = folder / CHECKPOINTS_FOLDER / name
        data_position: dict[str, Any] = {}
        error_line = None
        try:
            data_position = read_json(path / STATE_FILE)["position"]
            state = _read_state(path, step, initial_state)
        except Exception as error:  # noqa: BLE001 (Orbax raises any class for torn files)
            error_line = " ".join(str(error).split())
        if processes.any_process(error_line is not None):
            logging.warning(
                "%s cannot be read and is passed over: %.200s", path, error_line
            )
            continue
        batch_iterator.set_state(data_position)
        return state
    if steps_and_names:
        raise InputError(
            f"none of the checkpoints in {folder} can be read; choose another folder"
        )
    return initial_state


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Remove the temporary folders of a run that was killed."""
    for parent_folder in (folder, folder / CHECKPOINTS_FOLDER):
        for path in parent_folder.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def _read_state(path: pathlib.Path, step: int, initial_state: TrainState) -> TrainState:
    optimizer_state = initial_state.optimizer_state
    params = _read_arrays(path / PARAMS_FOLDER, initial_state.params)
    optimizer_leaves = _read_arrays(
        path / OPTIMIZER_FOLDER, _leaves_by_number(optimizer_state)
    )
    return TrainState(
        step,
        params,
        jax.tree.unflatten(
            jax.tree.structure(optimizer_state), list(optimizer_leaves.values())
        ),
    )


@contextlib.contextmanager
def _replace_on_all_processes(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`replace_atomically` for all processes, which write together; process 0 renames."""
    with contextlib.ExitStack() as stack:
        temporary_folder = None
        if processes.is_first_process():
            temporary_folder = stack.enter_context(replace_atomically(folder))
        yield pathlib.Path(processes.broadcast_from_first(str(temporary_folder)))
        processes.wait_for_all("written")
    processes.wait_for_all("renamed")


def _leaves_by_number(tree: object) -> NamedArrays:
    """The leaves by their number."""
    return {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


# Orbax is imported where it is used, since that takes seconds.


def _write_arrays(folder: pathlib.Path, arrays: NamedArrays) -> None:
    """Write arrays as Orbax does; all processes must call it."""
    from orbax import checkpoint as orbax

    tree = traverse_util.unflatten_dict(arrays, sep="/")
    handler = orbax.PyTreeCheckpointHandler(use_compression=False)
    with orbax.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, orbax.args.PyTreeSave(tree))


def _read_arrays(
    folder: pathlib.Path, templates: Mapping[str, jax.Array]
) -> NamedArrays:
    """Arrays of the names, shapes, dtypes and placement of `templates`, in its order.

    Raises:
      ValueError: if the arrays in the folder are others.
      KeyError: if one of them is not there.
    """
    from orbax import checkpoint as orbax

    restore_arguments = {
        name: orbax.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)
        for name, leaf in templates.items()
    }
    restore_options = orbax.args.PyTreeRestore(
        restore_args=traverse_util.unflatten_dict(restore_arguments, sep="/")
    )
    handler = orbax.PyTreeCheckpointHandler(use_compression=False)
    with orbax.Checkpointer(handler) as checkpointer:
        tree = checkpointer.restore(folder, restore_options)
    stored_arrays = traverse_util.flatten_dict(tree, sep="/")
    arrays = {name: stored_arrays.pop(name) for name in templates}
    if stored_arrays or any(
        dtype_and_shape(arrays[name]) != dtype_and_shape(template)
        for name, template in templates.items()
    ):
        raise ValueError("other arrays than the run's")
    return arrays


@contextlib.contextmanager
def explain_write_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turn errors of writing into one that names the file system's reason and the checkpoint."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore's for a full disk: ValueError
        cause = error.__cause__ if isinstance(error, InputError) else error
        message = getattr(cause, "strerror", None)
        message = message or " ".join(str(cause or error).split())
        raise InputError(
            f"cannot write to {folder}: {message:.200}; {describe_last_checkpoint(folder)}."
            " Make room and start again with the same settings"
        ) from error


@contextlib.contextmanager
def _silence_orbax() -> Iterator[None]:
    """Keep Orbax from printing tracebacks of an error that is reported in one line.

    A write that fails closes the event loop under the others of its checkpoint. TensorStore's
    threads give that to `sys.unraisablehook`, and asyncio logs the tasks that nobody waited for.
    Both may be as late as the end of the process, so after a failure they stay silenced.
    """
    previous_verbosity = logging.get_verbosity()
    previous_hook = sys.unraisablehook
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = functools.partial(_report_unless_loop_is_closed, previous_hook)
    try:
        yield
    except BaseException:
        python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
        raise
    else:
        sys.unraisablehook = previous_hook
    finally:
        logging.set_verbosity(previous_verbosity)


def _report_unless_loop_is_closed(
    hook: Callable[["sys.UnraisableHookArgs"], object],
    report: "sys.UnraisableHookArgs",
) -> None:
    """`hook(report)`, but for errors of writes under a closed event loop."""
    error = report.exc_value
    if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        hook(report)
