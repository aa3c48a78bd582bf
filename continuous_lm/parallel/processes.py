"""Many devices: the mesh that they form, and the processes that they belong to.

    mesh = devices.mesh("data=2,model=4")
    lm = clm.load(folder, mesh=mesh)            # parameters lie on it, and so what is made of them

    devices.initialize("10.0.0.1:1234", num_processes=4, process_id=2)      # before all else
    if devices.is_first(): ...                  # process 0 alone writes

Where parameters and activations lie is said by the letters of their axes: see `axes.RULES`.
"""

import json
import os
import sys
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from continuous_lm.errors import InputError
from continuous_lm.parallel.watchdog import Watchdog

# --- The mesh -------------------------------------------------------------------------------------


# --- Many processes -------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is process 0, which alone writes."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """The tree's arrays as NumPy arrays, whole, in every process; all of them must call it."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def from_first(value: Any) -> Any:
    """What process 0 gives, in every process; JSON must be able to hold it. All must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = text if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())


def anywhere(truth: bool) -> bool:
    """Whether it is true in any process; all must call it."""
    if jax.process_count() == 1:
        return truth
    return bool(np.any(multihost_utils.process_allgather(np.bool_(truth))))


def wait_for_all(name: str) -> None:
    """Goes on when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_within: int = 300,
    silent_for: int = 100,
) -> None:
    """Joins the processes of one computation, by `jax.distributed`; before any other use of JAX.

    Where the address is known, the processes watch each other, over the port after the
    coordinator's: when one ends early, or has not been heard of for a while, the others end with
    one line on stderr and exit status 1, wherever they are. (JAX would abort them from another
    thread, or leave them waiting.) A process that ends by an exception ends the others too.

    Args:
      coordinator: host:port of process 0, where that and the next port must be free. The variable
        JAX_COORDINATOR_ADDRESS if left out. "auto": what JAX finds out by itself (Slurm, Open MPI,
        TPU slices), where JAX's own watch is all there is.
      num_processes: how many; JAX_NUM_PROCESSES if left out.
      process_id: the number of this one, from 0; JAX_PROCESS_ID if left out.
      start_within: seconds until all must have come.
      silent_for: seconds without a sign of life after which a process counts as lost.

    Raises:
      InputError: if it is not said who takes part, or not all have come.
    """
    for name, seconds in {"start_within": start_within, "silent_for": silent_for}.items():
        if seconds < 1:
            raise InputError(f"{name} must be at least 1 second, not {seconds}")
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None:
        raise InputError("coordinator is missing: host:port of process 0, or auto")
    times = dict(initialization_timeout=start_within, shutdown_timeout_seconds=silent_for)
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise InputError("with coordinator auto leave out num_processes and process_id")
        jax.distributed.initialize(heartbeat_timeout_seconds=silent_for, **times)  # type: ignore[arg-type]
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise InputError(f"coordinator is {coordinator!r:.60}; it must be host:port, or auto")
    count = _number("num_processes", num_processes)
    number = _number("process_id", process_id)
    if count < 1 or not 0 <= number < count:
        raise InputError(
            f"process_id is {number}; it must be one of 0 to num_processes - 1 = {count - 1}"
        )
    if count == 1:
        return
    watch = Watchdog(number, count, silent_for)
    watch.meet(host.strip("[]"), int(port) + 1, start_within)
    jax.distributed.initialize(
        coordinator,
        count,
        number,
        # JAX's own watch aborts: it is to be slower than this one.
        heartbeat_timeout_seconds=10 * silent_for,
        **times,  # type: ignore[arg-type]
    )
    watch.start()
    wait_for_all("joined")  # on CPUs the first time must be within 30 seconds of each other


def _number(name: str, given: int | None) -> int:
    """The number that is given, or that the environment says."""
    value = os.environ.get(f"JAX_{name.upper()}") if given is None else given
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        told = "missing" if value is None else f"{value!r:.60}"
        raise InputError(f"{name} is {told}; it goes with the coordinator's address") from None


def await_verdict() -> None:
    """Gives the watch time to end this process, if an error of JAX's is that another was lost."""
    if jax.distributed.is_initialized():
        time.sleep(3.0)


def leave(why: str | None = None) -> NoReturn:
    """`sys.exit(why)`; one of several processes ends at once, which ends the others.

    (JAX would wait for them, and they for this one.)
    """
    if not jax.distributed.is_initialized():
        sys.exit(why)
    if why is not None:
        print(why, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
