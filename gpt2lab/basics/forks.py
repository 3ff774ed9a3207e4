"""Workers that start at once: forks of a server process that has imported torch; this is the side that asks for them.

It imports no torch itself. The server is gpt2lab/executors/fork_server.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Protocol

from gpt2lab.basics.early import Server, launch, take

LOST = 1000
"""A return code that no process has: of a worker whose server ended first, so that its own is not known."""


class Forked:
    """A worker that the server forks as soon as it can, with those methods of subprocess.Popen that executors need."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.pid: int | None = None
        self.returncode: int | None = None
        self._received = b""
        self._pending_signal: int | None = None

    def poll(self) -> int | None:
        """The return code; None while it runs or is still to start."""
        while self.returncode is None and wait_readable([self.pipe], 0):
            data = os.read(self.pipe, 64)
            self._received += data
            numbers = self._received.split(b"\n")[:-1]  # process id, exit code
            if numbers and self.pid is None:
                self.pid = int(numbers[0])
                if self._pending_signal is not None:
                    self.send_signal(self._pending_signal)
            if len(numbers) == 2 or not data:
                self.returncode = int(numbers[1]) if len(numbers) == 2 else LOST
                os.close(self.pipe)
        return self.returncode

    def wait(self) -> int:
        """The return code, when it has ended."""
        while (code := self.poll()) is None:
            wait_readable([self.pipe], None)
        return code

    def send_signal(self, sig: int, /) -> None:
        """Signal the worker; one that is still to start gets the signal then."""
        self._pending_signal = sig
        if self.pid and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)


class Described(Protocol):
    """A job, by its job.json."""

    @property
    def path(self) -> Path: ...


class ForkServer:
    """The server process as the executor sees it; one that was killed is replaced when the next worker is needed.

    environment: what its own differs in from this process's."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = environment
        self.launched = 0
        self._server: Server | None = None
        self._ending = ""

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """That of the present server."""
        return self._server.process if self._server else None

    def start(self, job: Described, environment: Mapping[str, str], log: IO[str]) -> Forked:
        """Request a worker in `environment` that prints into `log`. Returns before it runs."""
        if self._server is None or self._server.process.poll() is not None:
            self.close()
            self.launched += 1
            self._server = launch(self.environment) if self.environment else take()
        ours, theirs = os.pipe()
        with tempfile.TemporaryFile("w+") as request:
            json.dump({"job": str(job.path), "environment": dict(environment), "folder": os.getcwd()}, request)
            request.seek(0)
            with contextlib.suppress(OSError):  # the server is gone, and so the pipe will end
                socket.send_fds(self._server.connection, [b"."], [request.fileno(), log.fileno(), theirs])
        os.close(theirs)
        return Forked(ours)

    def ending(self) -> str:
        """How the last server that ended did so, with the last line that it printed: it prints only when it fails."""
        if self._server is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its pipes end a moment before itself
                code = self._server.process.wait(1)
                self._server.output.seek(0)
                lines = self._server.output.read().decode(errors="replace").strip().splitlines()
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                self._ending = f"{how}: {lines[-1]}" if lines else how
        return self._ending

    def kill(self) -> None:
        """End the server at once; may be called from a signal handler."""
        if self._server is not None:
            self._server.process.kill()

    def close(self) -> None:
        """End the server; the kernel then signals workers that still run."""
        if self._server is not None:
            self._server.end()
            self._server = None


def wait_readable(descriptors: Iterable[int], seconds: float | None) -> list[int]:
    """Those that can be read from, or have come to their end; waits for the first of them, at most so long."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)]


@functools.cache
def server_with(python_path: str) -> ForkServer:
    """The server of this process that imports from these folders; it ends with this process."""
    return ForkServer({"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1"})
