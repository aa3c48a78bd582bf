"""Many devices: the mesh that they form, and the processes that they belong to.

    mesh = devices.mesh("data=2,model=4")
    lm = clm.load(folder, mesh=mesh)            # parameters lie on it, and so what is made of them

    devices.initialize("10.0.0.1:1234", num_processes=4, process_id=2)      # before all else
    if devices.is_first(): ...                  # process 0 alone writes

Where parameters and activations lie is said by the letters of their axes: see `axes.RULES`.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError

AXES = ("data", "model")

# --- The mesh -------------------------------------------------------------------------------------


def mesh(description: str | None = None) -> Mesh:
    """The mesh that a text such as "data=2,model=4" describes.

    Args:
      description: sizes of the axes "data" (over which batches and points lie) and "model" (over
        which parameters do); an axis that is left out has size 1. All devices on "data", if None.

    Returns:
      a mesh of these two axes. A single process may leave devices over: the mesh has the first.

    Raises:
      InputError: if it is no such text, or the devices are not as many.
    """
    available = jax.device_count()
    sizes = {"data": available} if description is None else _sizes(description)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    wanted = math.prod(shape)
    if wanted > available or (wanted < available and jax.process_count() > 1):
        raise InputError(
            f"a mesh of {description} takes {wanted} devices, and there are {available}; on a CPU,"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={wanted} gives so many"
        )
    kinds = (AxisType.Auto,) * len(AXES)  # the compiler spreads the computation
    made = jax.make_mesh(shape, AXES, axis_types=kinds, devices=jax.devices()[:wanted])
    if jax.process_count() > 1:
        _introduce(made)
    return made


@functools.lru_cache
def _introduce(mesh: Mesh) -> None:
    """Lets the devices along each axis meet now, when the processes are at the same place.

    On CPUs (gloo) the first time must be within 30 seconds of each other, which it would not be
    after a compilation that takes longer in one process than in another.
    """
    where = PartitionSpec(AXES)
    ones = axes_lib.placed(mesh, np.ones(mesh.size, np.float32), "-")
    for axes in (*AXES, AXES):
        meet = functools.partial(jax.lax.psum, axis_name=axes)
        total = jax.shard_map(meet, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)
        jax.block_until_ready(jax.jit(total)(ones))


def _sizes(description: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in description.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"{description!r:.60} is not a mesh; say how many devices each axis has, as in"
                " data=2,model=4"
            )
        sizes[axis] = int(size)
    return sizes


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
    watch = _Watch(number, count, silent_for)
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


_ALIVE, _FAREWELL = b".", b"!"


class _Watch:
    """Keeps process 0 and each of the others informed that they live."""

    def __init__(self, number: int, count: int, silent_for: float):
        self.number, self.count, self.silent_for = number, count, silent_for
        self.peers: dict[int, socket.socket] = {}

    def meet(self, host: str, port: int, within: float) -> None:
        """Process 0 waits for the others there; each of them calls."""
        until = time.monotonic() + within
        if self.number:
            self.peers[0] = peer = self._call(host, port, until)
            peer.settimeout(within)
            if not peer.recv(1):
                raise InputError("process 0 has ended: not all processes have come")
        else:
            self._receive(host, port, until)
            self._say(_ALIVE)
        for peer in self.peers.values():
            peer.settimeout(None)

    def _call(self, host: str, port: int, until: float) -> socket.socket:
        """To process 0, which may not be there yet."""
        while True:
            try:
                peer = socket.create_connection((host, port), timeout=until - time.monotonic())
                peer.sendall(self.number.to_bytes(4))
                return peer
            except (OSError, ValueError) as error:
                if time.monotonic() + 0.2 >= until:
                    raise InputError(
                        f"process 0 does not answer at {host}, port {port} ({error}); is it"
                        " started, and are that port and the one before it open?"
                    ) from None
                time.sleep(0.2)

    def _receive(self, host: str, port: int, until: float) -> None:
        """From all others."""
        inside = host in ("localhost", "127.0.0.1")
        try:
            server = socket.create_server((host if inside else "", port))
        except OSError as error:
            raise InputError(f"port {port} cannot be opened: {error.strerror}") from None
        with server:
            while len(self.peers) < self.count - 1:
                try:
                    server.settimeout(max(until - time.monotonic(), 0.001))
                    peer, _ = server.accept()
                    peer.settimeout(5.0)
                    number = int.from_bytes(peer.recv(4))
                except TimeoutError:
                    if time.monotonic() < until:
                        continue
                    missing = sorted(set(range(1, self.count)) - set(self.peers))
                    raise InputError(
                        f"of {self.count} processes these have not come: {missing}"
                    ) from None
                except OSError:
                    continue
                if 0 < number < self.count and number not in self.peers:
                    self.peers[number] = peer
                else:  # something else that was looking for an open port, or a number given twice
                    peer.close()

    def start(self) -> None:
        """From now on to the end of the process."""
        if os.name == "posix":
            # An abort by JAX, which has seen the same, waits some seconds for this watch's line:
            # the handler is sleep, the number of the signal its seconds.
            library = ctypes.CDLL(None)
            library.signal(signal.SIGABRT, library.sleep)
        atexit.register(self._leave)
        for number, peer in self.peers.items():
            peer.settimeout(self.silent_for)
            threading.Thread(target=self._hear, args=(number, peer), daemon=True).start()
        threading.Thread(target=self._speak, daemon=True).start()

    def _speak(self) -> None:
        while True:
            self._say(_ALIVE)
            time.sleep(self.silent_for / 5)

    def _say(self, what: bytes) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):  # who hears nobody says so
                peer.send(what)

    def _hear(self, number: int, peer: socket.socket) -> None:
        try:
            while heard := peer.recv(64):
                if _FAREWELL in heard:
                    return
            self._tell(f"process {number} has ended early")
        except TimeoutError:
            self._tell(f"nothing was heard of process {number} for {self.silent_for:g} seconds")
        except OSError:
            self._tell(f"process {number} has ended early")

    def _tell(self, why: str) -> NoReturn:
        again = "start all again with the same flags to go on"
        told = f"error: {why}, so process {self.number} ends too; {again}"
        print(f"\n{told}", file=sys.stderr, flush=True)  # not behind a progress bar
        os._exit(1)

    def _leave(self) -> None:
        """Well, or else at once: the others are not waited for, as JAX would."""
        if getattr(sys, "last_value", None) is not None:
            sys.stderr.flush()
            os._exit(1)
        self._say(_FAREWELL)
