"""Many processes: how they join one computation, agree, and end together.

processes.initialize("10.0.0.1:1234", num_processes=4, process_id=2)    # before all else
if processes.is_first_process(): ...        # process 0 alone writes
"""

import json
import os
import sys
import time
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from continuous_lm.errors import InputError
from continuous_lm.parallel.watchdog import Watchdog

__all__ = [
    "any_process",
    "broadcast_from_first",
    "exit_all",
    "gather_to_hosts",
    "initialize",
    "is_first_process",
    "wait_for_all",
    "wait_for_watchdog",
]

Tree = TypeVar("Tree")


def is_first_process() -> bool:
    """Return whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def gather_to_hosts(tree: Tree) -> Tree:
    """The tree's arrays as NumPy arrays, whole, in every process; all of them must call it."""

    def gather_leaf(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(gather_leaf, tree)


def broadcast_from_first(value: Tree) -> Tree:
    """Return process 0's value, in JSON types, in all processes; all must call it."""
    if jax.process_count() == 1:
        return value
    encoded = np.frombuffer(
        json.dumps(value).encode() if is_first_process() else b"", np.uint8
    )
    num_bytes = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    encoded = encoded if is_first_process() else np.zeros(num_bytes, np.uint8)
    return json.loads(
        np.asarray(multihost_utils.broadcast_one_to_all(encoded)).tobytes()
    )


def any_process(condition: bool) -> bool:
    """Return whether the condition is true in any process; all must call it."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.bool_(condition))))


def wait_for_all(name: str) -> None:
    """Wait until every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    startup_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Join the processes of one computation by `jax.distributed`, before any other use of JAX.

    If the address is known, a watchdog runs on the port after the coordinator's. When a process
    ends early, or sends no heartbeat for a while, the others end with one line on stderr and exit
    status 1. (JAX would abort them from another thread, or leave them waiting.) A process that ends
    by an exception also ends the others.

    Args:
      coordinator: host:port of process 0, with that port and the next free; the environment
        variable JAX_COORDINATOR_ADDRESS if omitted. "auto": JAX's own detection (Slurm, Open MPI,
        TPU slices), without the watchdog.
      num_processes: number of processes; JAX_NUM_PROCESSES if omitted.
      process_id: index of this process, from 0; JAX_PROCESS_ID if omitted.
      startup_timeout: seconds to wait for all processes.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
      InputError: if an argument is missing, or not all processes start in time.
    """
    for name, seconds in {
        "startup_timeout": startup_timeout,
        "heartbeat_timeout": heartbeat_timeout,
    }.items():
        if seconds < 1:
            raise InputError(f"{name} must be at least 1 second, not {seconds}")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        raise InputError("coordinator is missing: host:port of process 0, or auto")
    timeouts: dict[str, Any] = dict(
        initialization_timeout=startup_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise InputError(
                "with coordinator auto leave out num_processes and process_id"
            )
        jax.distributed.initialize(
            heartbeat_timeout_seconds=heartbeat_timeout, **timeouts
        )
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise InputError(
            f"coordinator is {coordinator!r:.60}; it must be host:port, or auto"
        )
    process_count = _read_number("num_processes", num_processes)
    process_index = _read_number("process_id", process_id)
    if process_count < 1 or not 0 <= process_index < process_count:
        raise InputError(
            f"process_id is {process_index}; it must be one of 0 to num_processes - 1 ="
            f" {process_count - 1}"
        )
    if process_count == 1:
        return
    watchdog = Watchdog(process_index, process_count, heartbeat_timeout)
    watchdog.connect_all(host.strip("[]"), int(port) + 1, startup_timeout)
    jax.distributed.initialize(
        coordinator,
        process_count,
        process_index,
        # JAX's own watch aborts: it is to be slower than this one.
        heartbeat_timeout_seconds=10 * heartbeat_timeout,
        **timeouts,  # type: ignore[arg-type]
    )
    watchdog.start()
    wait_for_all(
        "joined"
    )  # on CPUs the first time must be within 30 seconds of each other


def _read_number(name: str, argument: int | None) -> int:
    """The number that is given, or that the environment says."""
    value = os.environ.get(f"JAX_{name.upper()}") if argument is None else argument
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        problem = "missing" if value is None else f"{value!r:.60}"
        raise InputError(
            f"{name} is {problem}; it goes with the coordinator's address"
        ) from None


def wait_for_watchdog() -> None:
    """Give the watch time to end this process, if an error of JAX's is that another was lost."""
    if jax.distributed.is_initialized():
        time.sleep(3.0)


def exit_all(message: str | None = None) -> NoReturn:
    """`sys.exit(message)`; one of several processes ends at once, which ends the others.

    (JAX would wait for them, and they for this one.)
    """
    if not jax.distributed.is_initialized():
        sys.exit(message)
    if message is not None:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
