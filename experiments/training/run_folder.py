"""The folder of a training run: what it is of, its checkpoints and its logs.

settings.json     what must be the same for a run to go on
checkpoints/N/    parameters, optimiser state and data position after N steps; the last two
metrics.jsonl     means over each dispatch: loss, what the loss reports, learning rate
speed.jsonl       seconds of each dispatch; apart, as they differ from run to run
tensorboard/      both for TensorBoard, if tensorboardX is installed

Of several processes each writes the parts of arrays that its devices hold, and process 0 the rest.
Where arrays lay is not kept: a run goes on on any mesh.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
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

SETTINGS_FILE, STATE_FILE = "settings.json", "state.json"
METRICS_FILE, SPEED_FILE = "metrics.jsonl", "speed.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
_NUM_KEPT_CHECKPOINTS = (
    2  # should the last be torn, by a loss of power, there is one before it
)
_TEMPORARY_PREFIX = ".writing-"  # of what is not whole, or going


class BatchIterator(Protocol):
    """An endless iterator whose position JSON can hold; see `window_batches.shuffled_windows`."""

    def __next__(self) -> Any:
        """A tree of arrays whose leading axis is that of the batch."""

    def get_state(self) -> Any:
        """Where it stands."""

    def set_state(self, state: Any) -> None:
        """Goes there."""


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their paths: "layers/attention/q"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def dtype_and_shape(leaf: Any) -> str:
    """Its dtype and shape, as settings keep them."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def replace_leaves(tree: Any, leaf_by_path: Mapping[str, jax.Array]) -> Any:
    """A tree of the structure of `tree`, with other leaves."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaf_by_path[name] for name in leaves_by_path(tree)]
    )


# --- Settings -------------------------------------------------------------------------------------


def checksum(arrays: Mapping[str, jax.Array]) -> str | None:
    """A checksum of arrays and their names."""
    sha256 = hashlib.sha256()
    for name, leaf in sorted(arrays.items()):
        sha256.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        sha256.update(processes.gather_to_hosts(leaf).tobytes())
    return sha256.hexdigest() if arrays else None


def check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; refuses a folder with a run of others, and says which."""
    if not (folder / SETTINGS_FILE).exists():
        if (folder / CHECKPOINTS_FOLDER).exists():
            raise InputError(
                f"{folder} has checkpoints but no {SETTINGS_FILE}; choose another folder"
            )
        if processes.is_first_process():
            with write_atomically(folder) as staging_folder:
                write_json(staging_folder / SETTINGS_FILE, settings)
        return
    old, new = (
        traverse_util.flatten_dict(values, sep="/", keep_empty_nodes=False)
        for values in (
            read_json(folder / SETTINGS_FILE),
            json.loads(json.dumps(settings)),
        )
    )
    missing = "nothing"
    differing = [
        f"{name.removeprefix('settings/')} = {old.get(name, missing)!r:.80}, not"
        f" {new.get(name, missing)!r:.80}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    ]
    if differing:
        raise InputError(
            f"{folder} holds a run with {'; '.join(differing[:3])}; to go on with it give the same"
            " settings, for a new one choose another folder"
        )


# --- Checkpoints ----------------------------------------------------------------------------------


def list_checkpoints(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """The checkpoints of a run, oldest first: how many steps were made, and where it is."""
    paths = (folder / CHECKPOINTS_FOLDER).glob("[0-9]*")
    return sorted((int(path.name), path) for path in paths if path.name.isdecimal())


def restore_params(folder: str | os.PathLike, params: Any) -> tuple[Any, int]:
    """The parameters of a run's last checkpoint, for instance while it is running.

    Args:
      folder: of the run.
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
    params_by_path = {
        name: jnp.asarray(leaf) for name, leaf in leaves_by_path(params).items()
    }
    stored_kinds = read_json(folder / SETTINGS_FILE)["parameters"]
    for name, stored_kind in stored_kinds.items():
        model_kind = (
            dtype_and_shape(params_by_path[name])
            if name in params_by_path
            else "without it"
        )
        if model_kind != stored_kind:
            raise InputError(
                f"{path} has {name} as {stored_kind}, the model is {model_kind}"
            )
    return replace_leaves(
        params,
        params_by_path
        | _read_arrays(path / "params", {n: params_by_path[n] for n in stored_kinds}),
    ), step


def save_checkpoint(
    folder: pathlib.Path,
    step: int,
    data_position: Any,
    trained_params: Any,
    optimizer_state: Any,
) -> None:
    """Writes a checkpoint, whole or not at all, and removes those before the last two."""
    with _explain_write_errors(folder), _silence_orbax():
        with _replace_on_all_processes(
            folder / CHECKPOINTS_FOLDER / f"{step:08d}"
        ) as temporary_folder:
            for name, arrays in (
                ("params", trained_params),
                ("optimizer", _leaves_by_number(optimizer_state)),
            ):
                with _make_checkpointer() as checkpointer:
                    tree = traverse_util.unflatten_dict(arrays, sep="/")
                    checkpointer.save(
                        temporary_folder / name, _import_orbax().args.PyTreeSave(tree)
                    )
            if processes.is_first_process():
                write_json(
                    temporary_folder / STATE_FILE,
                    {"step": step, "position": data_position},
                )
        old_checkpoints = (
            list_checkpoints(folder)[:-_NUM_KEPT_CHECKPOINTS]
            if processes.is_first_process()
            else []
        )
        for _, path in old_checkpoints:  # renamed first: a torn one has no number
            temporary_folder = pathlib.Path(
                tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=path.parent)
            )
            os.rename(path, temporary_folder / path.name)
            shutil.rmtree(temporary_folder)


def resume_run(
    folder: pathlib.Path,
    trained_params: Any,
    optimizer_state: Any,
    batch_iterator: BatchIterator,
) -> Any:
    """Steps made, parameters and optimiser state of the last good checkpoint, or of the start."""
    leftovers = [
        *folder.glob(f"{_TEMPORARY_PREFIX}*"),
        *folder.glob(f"{CHECKPOINTS_FOLDER}/{_TEMPORARY_PREFIX}*"),
    ]
    for path in leftovers if processes.is_first_process() else ():  # it was killed
        shutil.rmtree(path, ignore_errors=True)
    # What process 0 sees counts for all.
    steps_and_names = processes.broadcast_from_first(
        [(step, path.name) for step, path in list_checkpoints(folder)]
    )
    for step, name in reversed(steps_and_names):
        path, error_line = folder / CHECKPOINTS_FOLDER / name, None
        try:
            data_position = read_json(path / STATE_FILE)["position"]
            restored_params = _read_arrays(path / "params", trained_params)
            optimizer_leaves = _read_arrays(
                path / "optimizer", _leaves_by_number(optimizer_state)
            )
        except Exception as error:  # whatever Orbax makes of torn files
            error_line = " ".join(str(error).split())
        if processes.any_process(error_line is not None):
            logging.warning(
                "%s cannot be read and is passed over: %.200s", path, error_line
            )
            continue
        batch_iterator.set_state(data_position)
        return (
            step,
            restored_params,
            jax.tree.unflatten(
                jax.tree.structure(optimizer_state), list(optimizer_leaves.values())
            ),
        )
    if steps_and_names:
        raise InputError(
            f"none of the checkpoints in {folder} can be read; choose another folder"
        )
    return 0, trained_params, optimizer_state


@contextlib.contextmanager
def _replace_on_all_processes(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`replace_atomically` for all processes, which write together; process 0 renames."""
    with (
        replace_atomically(folder)
        if processes.is_first_process()
        else contextlib.nullcontext() as temporary_folder
    ):
        yield pathlib.Path(processes.broadcast_from_first(str(temporary_folder)))
        processes.wait_for_all("written")
    processes.wait_for_all("renamed")


def _leaves_by_number(tree: Any) -> dict[str, jax.Array]:
    """The leaves by their number."""
    return {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _read_arrays(
    folder: pathlib.Path, templates: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Arrays of the names, shapes, dtypes and places of `templates`, in its order."""
    orbax = _import_orbax()
    restore_arguments = {
        name: orbax.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)
        for name, leaf in templates.items()
    }
    restore_options = orbax.args.PyTreeRestore(
        restore_args=traverse_util.unflatten_dict(restore_arguments, sep="/")
    )
    with _make_checkpointer() as checkpointer:
        tree = checkpointer.restore(folder, restore_options)
    stored_arrays = traverse_util.flatten_dict(tree, sep="/")
    arrays = {name: stored_arrays.pop(name) for name in templates}
    if stored_arrays or any(
        arrays[n].shape != x.shape or arrays[n].dtype != x.dtype
        for n, x in templates.items()
    ):
        raise ValueError("other arrays than the run's")
    return arrays


def _import_orbax() -> Any:
    """Imported only if it is used, since it takes seconds."""
    return importlib.import_module("orbax.checkpoint")


def _make_checkpointer() -> Any:
    orbax = _import_orbax()
    return orbax.Checkpointer(orbax.PyTreeCheckpointHandler(use_compression=False))


def describe_last_checkpoint(folder: pathlib.Path) -> str:
    """What is left of a run that ends."""
    steps_and_paths = list_checkpoints(folder)
    return (
        f"the checkpoint of step {steps_and_paths[-1][0]} is kept"
        if steps_and_paths
        else "there is no checkpoint yet"
    )


@contextlib.contextmanager
def _explain_write_errors(folder: pathlib.Path) -> Iterator[None]:
    """Says what could not be written, and that the last good checkpoint is."""
    try:
        yield
    except (
        OSError,
        ValueError,
    ) as error:  # TensorStore reports a full disk as a ValueError
        cause = error.__cause__ if isinstance(error, InputError) else error
        message = getattr(cause, "strerror", None) or " ".join(
            str(cause or error).split()
        )
        raise InputError(
            f"cannot write to {folder}: {message:.200}; {describe_last_checkpoint(folder)}."
            " Make room and start again"
            " with the same settings"
        ) from error


@contextlib.contextmanager
def _silence_orbax() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of an error that is told in one line."""
    previous_verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(previous_verbosity)


# --- Logs and signals -----------------------------------------------------------------------------


class RunLog:
    """The two JSONL files and TensorBoard's, cut back to the step from which a run goes on.

    Process 0 alone writes them.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        self.folder, self.tensorboard = folder, None
        if not processes.is_first_process():
            return
        with _explain_write_errors(folder):
            for name in (METRICS_FILE, SPEED_FILE):
                _truncate_log(folder / name, step)
            self.tensorboard = _TensorBoard.create(folder / "tensorboard", step)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.tensorboard is not None:
            with contextlib.suppress(OSError):
                self.tensorboard.close()

    def write(
        self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]
    ) -> None:
        """Adds what a dispatch gave."""
        if not processes.is_first_process():
            return
        with _explain_write_errors(self.folder):
            for name, values in ((METRICS_FILE, metrics), (SPEED_FILE, speed)):
                json_values = {
                    metric: value if math.isfinite(value) else None
                    for metric, value in values.items()
                }
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step} | json_values) + "\n")
            if self.tensorboard is not None:
                self.tensorboard.write(step, {**metrics, **speed})


def _truncate_log(path: pathlib.Path, step: int) -> None:
    """Removes the lines of later steps, and one that was cut off."""
    if not path.exists():
        return
    kept_lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if (
            not line.endswith(b"\n")
            or not isinstance(record, dict)
            or record["step"] > step
        ):
            break
        kept_lines.append(line)
    with write_atomically(path.parent) as staging_folder:
        (staging_folder / path.name).write_bytes(b"".join(kept_lines))


class _TensorBoard:
    """TensorBoard's event files, written at once.

    tensorboardX's own writer has a thread, which dies of a full disk and leaves the program waiting
    for its queue; so only what makes and frames the events is used of it.
    """

    @classmethod
    def create(cls, folder: pathlib.Path, step: int) -> "_TensorBoard | None":
        """A file of its own for each start, or None without tensorboardX."""
        try:
            writer = importlib.import_module(
                "tensorboardX.event_file_writer"
            ).EventsWriter
        except ImportError:
            logging.warning(
                "tensorboardX is not installed: nothing is written for TensorBoard"
            )
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return cls(writer(str(folder / "events"), f".{os.getpid()}.{step}"), step)

    def __init__(self, writer: Any, step: int):
        self.writer = writer
        self.event_protos = importlib.import_module("tensorboardX.proto.event_pb2")
        self.scalar_summary = importlib.import_module("tensorboardX.summary").scalar
        if step:  # TensorBoard forgets what an earlier start said of later steps
            start = self.event_protos.SessionLog(
                status=self.event_protos.SessionLog.START
            )
            self._write_event(step + 1, session_log=start)

    def _write_event(self, step: int, **contents: Any) -> None:
        self.writer.write_event(
            self.event_protos.Event(wall_time=time.time(), step=step, **contents)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write_event(step, summary=self.scalar_summary(name, value))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """A list that the number of a signal to stop enters; a second signal takes effect at once."""
    stop_signals: list[int] = []
    previous_handlers: dict[int, Any] = {}

    def record_signal(number, _):
        stop_signals.append(number)
        signal.signal(
            number, previous_handlers[number]
        )  # a second one takes effect at once

    if threading.current_thread() is threading.main_thread():
        for stop_signal in (signal.SIGINT, signal.SIGTERM):
            previous_handlers[stop_signal] = (
                signal.getsignal(stop_signal) or signal.SIG_DFL
            )
            signal.signal(stop_signal, record_signal)
    try:
        yield stop_signals
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)
