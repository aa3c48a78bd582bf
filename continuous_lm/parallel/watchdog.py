"""Watchdog of a multi-process computation: each process ends when another is lost."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from continuous_lm.errors import InputError

__all__ = [
    "Watchdog",
]

_HEARTBEAT, _GOODBYE = b".", b"!"


class Watchdog:
    """Connection between process 0 and each other process, with heartbeats."""

    def __init__(
        self, process_index: int, num_processes: int, heartbeat_timeout: float
    ) -> None:
        self.process_index: int = process_index
        self.num_processes: int = num_processes
        self.heartbeat_timeout: float = heartbeat_timeout
        self.peers: dict[int, socket.socket] = {}

    def connect_all(self, host: str, port: int, timeout: float) -> None:
        """Process 0 waits for the others there; each of them calls."""
        deadline = time.monotonic() + timeout
        if self.process_index:
            self.peers[0] = peer = self._connect(host, port, deadline)
            peer.settimeout(timeout)
            if not peer.recv(1):
                raise InputError("process 0 has ended: not all processes have come")
        else:
            self._accept(host, port, deadline)
            self._send(_HEARTBEAT)
        for peer in self.peers.values():
            peer.settimeout(None)

    def _connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """Connect to process 0, waiting until it listens."""
        while True:
            try:
                peer = socket.create_connection(
                    (host, port), timeout=deadline - time.monotonic()
                )
                peer.sendall(self.process_index.to_bytes(4))
                return peer
            except (OSError, ValueError) as error:
                if time.monotonic() + 0.2 >= deadline:
                    raise InputError(
                        f"process 0 does not answer at {host}, port {port} ({error}); is it"
                        " started, and are that port and the one before it open?"
                    ) from None
                time.sleep(0.2)

    def _accept(self, host: str, port: int, deadline: float) -> None:
        """From all others."""
        is_local = host in ("localhost", "127.0.0.1")
        try:
            server = socket.create_server((host if is_local else "", port))
        except OSError as error:
            raise InputError(
                f"port {port} cannot be opened: {error.strerror}"
            ) from None
        with server:
            while len(self.peers) < self.num_processes - 1:
                try:
                    server.settimeout(max(deadline - time.monotonic(), 0.001))
                    peer, _ = server.accept()
                    peer.settimeout(5.0)
                    process_index = int.from_bytes(peer.recv(4))
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    missing_processes = sorted(
                        set(range(1, self.num_processes)) - set(self.peers)
                    )
                    raise InputError(
                        f"of {self.num_processes} processes these have not come:"
                        f" {missing_processes}"
                    ) from None
                except OSError:
                    continue
                if (
                    0 < process_index < self.num_processes
                    and process_index not in self.peers
                ):
                    self.peers[process_index] = peer
                else:  # something else that was looking for an open port, or a number given twice
                    peer.close()

    def start(self) -> None:
        """Start watching; it lasts until the process ends."""
        if os.name == "posix":
            # An abort by JAX, which has seen the same, waits some seconds for this watch's line:
            # the handler is sleep, the number of the signal its seconds.
            libc = ctypes.CDLL(None)
            libc.signal(signal.SIGABRT, libc.sleep)
        atexit.register(self._finish)
        for process_index, peer in self.peers.items():
            peer.settimeout(self.heartbeat_timeout)
            threading.Thread(
                target=self._listen, args=(process_index, peer), daemon=True
            ).start()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def _heartbeat(self) -> None:
        while True:
            self._send(_HEARTBEAT)
            time.sleep(self.heartbeat_timeout / 5)

    def _send(self, message: bytes) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(
                OSError
            ):  # the peer is gone; its own watchdog reports it
                peer.send(message)

    def _listen(self, process_index: int, peer: socket.socket) -> None:
        try:
            while received := peer.recv(64):
                if _GOODBYE in received:
                    return
            self._abort(f"process {process_index} has ended early")
        except TimeoutError:
            self._abort(
                f"nothing was heard of process {process_index} for {self.heartbeat_timeout:g}"
                " seconds"
            )
        except OSError:
            self._abort(f"process {process_index} has ended early")

    def _abort(self, reason: str) -> NoReturn:
        advice = "start all again with the same flags to go on"
        message = f"error: {reason}, so process {self.process_index} ends too; {advice}"
        print(f"\n{message}", file=sys.stderr, flush=True)  # not behind a progress bar
        os._exit(1)

    def _finish(self) -> None:
        """Well, or else at once: the others are not waited for, as JAX would."""
        if getattr(sys, "last_value", None) is not None:
            sys.stderr.flush()
            os._exit(1)
        self._send(_GOODBYE)
