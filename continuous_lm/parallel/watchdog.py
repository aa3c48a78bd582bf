"""The watchdog: each of several processes ends when another is lost."""

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

_ALIVE, _FAREWELL = b".", b"!"


class Watchdog:
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
