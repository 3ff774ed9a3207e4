"""The start of the process that forks workers, apart from all that imports torch: so a command can start it first, and
both import torch at the same time."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from gpt2lab.basics.signals import PARENT

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""For the server: a pool of threads would not survive the fork. A run sets its own number."""


@dataclass(frozen=True)
class Server:
    """A process of executors/fork_server.py, the socket that takes its requests, and the file that it prints to."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    output: IO[bytes]

    def end(self) -> None:
        """End it; the kernel then signals workers that still run."""
        self.process.kill()  # before the socket ends, which an idle server may answer with exit code 0
        self.process.wait()
        self.connection.close()
        self.output.close()


_early: list[Server] = []
"""At most one, started and not taken yet."""


def launch(environment: Mapping[str, str] | None = None) -> Server:
    """A server that begins to import torch. environment: what its own differs in. Raises OSError."""
    ours, theirs = socket.socketpair()
    output = tempfile.TemporaryFile()  # noqa: SIM115
    with theirs, contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        stack.callback(output.close)
        process = subprocess.Popen(
            [sys.executable, "-m", "gpt2lab.executors.fork_server", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {}), **ONE_THREAD, PARENT: str(os.getpid())},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        stack.pop_all()
    return Server(process, ours, output)


def take() -> Server:
    """The server that was started early, else a new one. Raises OSError."""
    return _early.pop() if _early else launch()


@contextlib.contextmanager
def started_early(*, wanted: bool) -> Iterator[None]:
    """With a server for the first executor inside, if `wanted` and if torch is still to be imported here, so enter it
    before any import that needs torch. A server that nothing took is ended."""
    if wanted and sys.platform == "linux" and "torch" not in sys.modules:
        with contextlib.suppress(OSError):  # who needs it starts one, and reports the error
            _early.append(launch())
    try:
        yield
    finally:
        while _early:
            _early.pop().end()
