"""Tests on many devices and in many processes, each of them an interpreter of its own."""

import contextlib
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests import tiny


def environment(devices: int) -> dict[str, str]:
    """Of a process that has so many simulated devices."""
    return tiny.ENVIRONMENT | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def on_devices(program: str, devices: int = 8, *arguments: str) -> str:
    """What a program says that runs on so many simulated devices and must not fail."""
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(devices),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def free_port() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.create_server(("localhost", 0)) as server, contextlib.suppress(OSError):
            port = server.getsockname()[1]
            socket.create_server(("localhost", port + 1)).close()
            return int(port)


@contextlib.contextmanager
def processes(
    arguments: Sequence[Sequence[str]], devices: int = 4, cwd: pathlib.Path | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Interpreters that run at once, with so many devices each; what is left of them is killed."""
    made = [
        subprocess.Popen(
            [sys.executable, *each],
            env=environment(devices),
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in arguments
    ]
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.communicate()
