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
from continuous_lm.io.atomic_files import as_path, replaced_whole, written_aside
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.parallel import processes

SETTINGS, STATE = "settings.json", "state.json"
METRICS, SPEED = "metrics.jsonl", "speed.jsonl"
CHECKPOINTS = "checkpoints"
_KEPT = 2  # should the last be torn, by a loss of power, there is one before it
_ASIDE = ".writing-"  # of what is not whole, or going


class Batches(Protocol):
    """An endless iterator whose position JSON can hold, such as `batches.shuffled` gives."""

    def __next__(self) -> Any:
        """A tree of arrays whose leading axis is that of the batch."""

    def get_state(self) -> Any:
        """Where it stands."""

    def set_state(self, state: Any) -> None:
        """Goes there."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths: "layers/attention/q"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def kind(leaf: Any) -> str:
    """Its dtype and shape, as settings keep them."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def rebuilt(tree: Any, named: Mapping[str, jax.Array]) -> Any:
    """A tree of the structure of `tree`, with other leaves."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [named[name] for name in named_leaves(tree)]
    )


# --- Settings -------------------------------------------------------------------------------------


def digest(named: Mapping[str, jax.Array]) -> str | None:
    """A checksum of arrays and their names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named.items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(processes.fetch(leaf).tobytes())
    return digest.hexdigest() if named else None


def check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; refuses a folder with a run of others, and says which."""
    if not (folder / SETTINGS).exists():
        if (folder / CHECKPOINTS).exists():
            raise InputError(f"{folder} has checkpoints but no {SETTINGS}; choose another folder")
        if processes.is_first():
            with written_aside(folder) as aside:
                write_json(aside / SETTINGS, settings)
        return
    old, new = (
        traverse_util.flatten_dict(values, sep="/", keep_empty_nodes=False)
        for values in (read_json(folder / SETTINGS), json.loads(json.dumps(settings)))
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


def checkpoints(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """The checkpoints of a run, oldest first: how many steps were made, and where it is."""
    paths = (folder / CHECKPOINTS).glob("[0-9]*")
    return sorted((int(path.name), path) for path in paths if path.name.isdecimal())


def restore(folder: str | os.PathLike, params: Any) -> tuple[Any, int]:
    """The parameters of a run's last checkpoint, for instance while it is running.

    Args:
      folder: of the run.
      params: a tree of the model's parameters; those that were frozen are taken from it.

    Returns:
      Parameters, and after how many steps.

    Raises:
      InputError: if there is no checkpoint, or it has other parameters than these.
    """
    folder = as_path(folder)
    found = checkpoints(folder)
    if not found:
        raise InputError(f"{folder} has no checkpoint")
    step, path = found[-1]
    named = {name: jnp.asarray(leaf) for name, leaf in named_leaves(params).items()}
    wanted = read_json(folder / SETTINGS)["parameters"]
    for name, stored in wanted.items():
        here = kind(named[name]) if name in named else "without it"
        if here != stored:
            raise InputError(f"{path} has {name} as {stored}, the model is {here}")
    return rebuilt(params, named | _read(path / "params", {n: named[n] for n in wanted})), step


def save(folder: pathlib.Path, step: int, position: Any, trained: Any, state: Any) -> None:
    """Writes a checkpoint, whole or not at all, and removes those before the last two."""
    with _writing(folder), _silence():
        with _replaced_by_all(folder / CHECKPOINTS / f"{step:08d}") as aside:
            for name, arrays in (("params", trained), ("optimizer", _numbered(state))):
                with _checkpointer() as checkpointer:
                    tree = traverse_util.unflatten_dict(arrays, sep="/")
                    checkpointer.save(aside / name, _orbax().args.PyTreeSave(tree))
            if processes.is_first():
                write_json(aside / STATE, {"step": step, "position": position})
        old = checkpoints(folder)[:-_KEPT] if processes.is_first() else []
        for _, path in old:  # renamed first: a torn one has no number
            aside = pathlib.Path(tempfile.mkdtemp(prefix=_ASIDE, dir=path.parent))
            os.rename(path, aside / path.name)
            shutil.rmtree(aside)


def resume(folder: pathlib.Path, trained: Any, state: Any, batches: Batches) -> Any:
    """Steps made, parameters and optimiser state of the last good checkpoint, or of the start."""
    aside = [*folder.glob(f"{_ASIDE}*"), *folder.glob(f"{CHECKPOINTS}/{_ASIDE}*")]
    for path in aside if processes.is_first() else ():  # it was killed
        shutil.rmtree(path, ignore_errors=True)
    # What process 0 sees counts for all.
    found = processes.from_first([(step, path.name) for step, path in checkpoints(folder)])
    for step, name in reversed(found):
        path, why = folder / CHECKPOINTS / name, None
        try:
            position = read_json(path / STATE)["position"]
            new = _read(path / "params", trained)
            leaves = _read(path / "optimizer", _numbered(state))
        except Exception as error:  # whatever Orbax makes of torn files
            why = " ".join(str(error).split())
        if processes.anywhere(why is not None):
            logging.warning("%s cannot be read and is passed over: %.200s", path, why)
            continue
        batches.set_state(position)
        return step, new, jax.tree.unflatten(jax.tree.structure(state), list(leaves.values()))
    if found:
        raise InputError(f"none of the checkpoints in {folder} can be read; choose another folder")
    return 0, trained, state


@contextlib.contextmanager
def _replaced_by_all(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`replaced_whole` for all processes, which write together; process 0 renames."""
    with replaced_whole(folder) if processes.is_first() else contextlib.nullcontext() as aside:
        yield pathlib.Path(processes.from_first(str(aside)))
        processes.wait_for_all("written")
    processes.wait_for_all("renamed")


def _numbered(tree: Any) -> dict[str, jax.Array]:
    """The leaves by their number."""
    return {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _read(folder: pathlib.Path, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays of the names, shapes, dtypes and places of `like`, in its order."""
    ocp = _orbax()
    wanted = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)
        for name, leaf in like.items()
    }
    arguments = ocp.args.PyTreeRestore(restore_args=traverse_util.unflatten_dict(wanted, sep="/"))
    with _checkpointer() as checkpointer:
        tree = checkpointer.restore(folder, arguments)
    found = traverse_util.flatten_dict(tree, sep="/")
    arrays = {name: found.pop(name) for name in like}
    if found or any(
        arrays[n].shape != x.shape or arrays[n].dtype != x.dtype for n, x in like.items()
    ):
        raise ValueError("other arrays than the run's")
    return arrays


def _orbax() -> Any:
    """Imported only if it is used, since it takes seconds."""
    return importlib.import_module("orbax.checkpoint")


def _checkpointer() -> Any:
    ocp = _orbax()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def kept(folder: pathlib.Path) -> str:
    """What is left of a run that ends."""
    found = checkpoints(folder)
    return (
        f"the checkpoint of step {found[-1][0]} is kept" if found else "there is no checkpoint yet"
    )


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Says what could not be written, and that the last good checkpoint is."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError
        cause = error.__cause__ if isinstance(error, InputError) else error
        line = getattr(cause, "strerror", None) or " ".join(str(cause or error).split())
        raise InputError(
            f"cannot write to {folder}: {line:.200}; {kept(folder)}. Make room and start again"
            " with the same settings"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of an error that is told in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- Logs and signals -----------------------------------------------------------------------------


class Log:
    """The two JSONL files and TensorBoard's, cut back to the step from which a run goes on.

    Process 0 alone writes them.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        self.folder, self.board = folder, None
        if not processes.is_first():
            return
        with _writing(folder):
            for name in (METRICS, SPEED):
                _cut_back(folder / name, step)
            self.board = _Board.opened(folder / "tensorboard", step)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()

    def write(self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Adds what a dispatch gave."""
        if not processes.is_first():
            return
        with _writing(self.folder):
            for name, values in ((METRICS, metrics), (SPEED, speed)):
                finite = {k: x if math.isfinite(x) else None for k, x in values.items()}
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step} | finite) + "\n")
            if self.board is not None:
                self.board.write(step, {**metrics, **speed})


def _cut_back(path: pathlib.Path, step: int) -> None:
    """Removes the lines of later steps, and one that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(values, dict) or values["step"] > step:
            break
        kept.append(line)
    with written_aside(path.parent) as aside:
        (aside / path.name).write_bytes(b"".join(kept))


class _Board:
    """TensorBoard's event files, written at once.

    tensorboardX's own writer has a thread, which dies of a full disk and leaves the program waiting
    for its queue; so only what makes and frames the events is used of it.
    """

    @classmethod
    def opened(cls, folder: pathlib.Path, step: int) -> "_Board | None":
        """A file of its own for each start, or None without tensorboardX."""
        try:
            writer = importlib.import_module("tensorboardX.event_file_writer").EventsWriter
        except ImportError:
            logging.warning("tensorboardX is not installed: nothing is written for TensorBoard")
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return cls(writer(str(folder / "events"), f".{os.getpid()}.{step}"), step)

    def __init__(self, writer: Any, step: int):
        self.writer = writer
        self.events = importlib.import_module("tensorboardX.proto.event_pb2")
        self.scalar = importlib.import_module("tensorboardX.summary").scalar
        if step:  # TensorBoard forgets what an earlier start said of later steps
            start = self.events.SessionLog(status=self.events.SessionLog.START)
            self._event(step + 1, session_log=start)

    def _event(self, step: int, **what: Any) -> None:
        self.writer.write_event(self.events.Event(wall_time=time.time(), step=step, **what))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._event(step, summary=self.scalar(name, value))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that the number of a signal to stop enters; a second signal takes effect at once."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def remember(number, _):
        asked.append(number)
        signal.signal(number, before[number])  # a second one takes effect at once

    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):
            before[stop] = signal.getsignal(stop) or signal.SIG_DFL
            signal.signal(stop, remember)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
