"""Logs of a training run: two JSONL files and TensorBoard's.

metrics.jsonl     means over each dispatch: loss, metrics of the loss, learning rate
speed.jsonl       seconds of each dispatch; apart, as they differ from run to run
tensorboard/      both for TensorBoard, if tensorboardX is installed
"""

import contextlib
import importlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from continuous_lm.experiments.training.run_folder import explain_write_errors
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.parallel import processes

METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class RunLog:
    """Writer of the logs. Lines after the step from which a run is resumed are removed first.

    Only process 0 writes.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        self.folder = folder
        self.tensorboard: _TensorBoard | None = None
        if not processes.is_first_process():
            return
        with explain_write_errors(folder):
            for file_name in (METRICS_FILE, SPEED_FILE):
                _truncate_log(folder / file_name, step)
            self.tensorboard = _TensorBoard.create(folder / TENSORBOARD_FOLDER, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception_info: object) -> None:
        if self.tensorboard is not None:
            with contextlib.suppress(OSError):
                self.tensorboard.close()

    def write(
        self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]
    ) -> None:
        """Add the numbers of the dispatch that ended with `step`."""
        if not processes.is_first_process():
            return
        with explain_write_errors(self.folder):
            _append_line(self.folder / METRICS_FILE, step, metrics)
            _append_line(self.folder / SPEED_FILE, step, speed)
            if self.tensorboard is not None:
                self.tensorboard.write(step, {**metrics, **speed})


def _append_line(path: pathlib.Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line of JSON, in which a number that is not finite is null."""
    json_values: dict[str, float | None] = {"step": step}
    for name, value in values.items():
        json_values[name] = value if math.isfinite(value) else None
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(json_values) + "\n")


def _truncate_log(path: pathlib.Path, step: int) -> None:
    """Remove the lines of later steps, and a line that was cut off."""
    if not path.exists():
        return
    kept_lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not _is_record_until(line, step):
            break
        kept_lines.append(line)
    with write_atomically(path.parent) as staging_folder:
        (staging_folder / path.name).write_bytes(b"".join(kept_lines))


def _is_record_until(line: bytes, step: int) -> bool:
    """Return whether a line is whole and of a step up to `step`."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return False
    return bool(record["step"] <= step)


class _TensorBoard:
    """Writer of TensorBoard's event files, without a thread.

    The thread of tensorboardX's own writer ends when the disk is full, and the program then waits
    for its queue forever. So only its functions that encode events are used.
    """

    @classmethod
    def create(cls, folder: pathlib.Path, step: int) -> "_TensorBoard | None":
        """A file of its own for each start, or None without tensorboardX."""
        try:
            event_files = importlib.import_module("tensorboardX.event_file_writer")
        except ImportError:
            logging.warning(
                "tensorboardX is not installed: nothing is written for TensorBoard"
            )
            return None
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{step}"
        return cls(event_files.EventsWriter(str(folder / "events"), suffix), step)

    def __init__(self, writer: Any, step: int):
        self.writer = writer
        self.event_protos = importlib.import_module("tensorboardX.proto.event_pb2")
        self.scalar_summary = importlib.import_module("tensorboardX.summary").scalar
        if step:  # TensorBoard forgets the later steps of an earlier start
            session_start = self.event_protos.SessionLog(
                status=self.event_protos.SessionLog.START
            )
            self.writer.write_event(
                self.event_protos.Event(
                    wall_time=time.time(), step=step + 1, session_log=session_start
                )
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.write_event(
                self.event_protos.Event(
                    wall_time=time.time(),
                    step=step,
                    summary=self.scalar_summary(name, value),
                )
            )
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
