"""Workers that start at once: a server process has imported torch, and every run is a fork of it.

The server reads requests from a socket and forks. It has one thread, holds no lock and has never called CUDA, so its
children start as clean as new processes. Plug-ins and whatever the environment says reach a child with its job; the
server lives as long as one executor's work, so no code in it gets old.

Who watches whom: the server ends with the executor (the kernel tells it, and so does the socket), and workers stop when
the server is gone, as `StopRequest` has it. Exit codes come through a pipe whose other end only server and worker hold:
its end without a code means that both are gone.

Not multiprocessing's fork server: that would import the caller's main module in every worker, and its children keep it
alive when the caller is killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from gpt2lab import faults
from gpt2lab.errors import Gpt2labError
from gpt2lab.runner import PARENT, Job, StopRequest, work
from gpt2lab.runner.job import STOP_SIGNALS, die_with_parent

PRELOADED = ("numpy.random", "torch._dynamo")
"""What a run imports beyond the runner itself; the second, which every optimizer imports, takes a second."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""For the server: a pool of threads would not survive the fork. A run sets its own number."""

LOST = 1000
"""A return code that no process has: a worker that ended after its server, so that nobody learned how."""

CANNOT_FORK = 71  # EX_OSERR
LENGTH = struct.Struct("!Q")


# The executor's side


class Forked:
    """A worker that the server forks, as soon as it can; of subprocess.Popen's methods those that an executor needs."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.pid: int | None = None
        self.returncode: int | None = None
        self._said = b""
        self._due: int | None = None

    def poll(self) -> int | None:
        """The return code; None while it runs or is still to start."""
        while self.returncode is None and wait_readable([self.pipe], 0):
            heard = os.read(self.pipe, 64)
            self._said += heard
            words = self._said.split(b"\n")[:-1]
            if words and self.pid is None:
                self.pid = int(words[0])
                if self._due is not None:
                    self.send_signal(self._due)
            if len(words) == 2 or not heard:
                self.returncode = int(words[1]) if len(words) == 2 else LOST
                os.close(self.pipe)
        return self.returncode

    def wait(self) -> int:
        """The return code, when it has ended."""
        while (code := self.poll()) is None:
            wait_readable([self.pipe], None)
        return code

    def send_signal(self, sig: int, /) -> None:
        """Signal the worker, or whichever process it will be."""
        self._due = sig
        if self.pid and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)


class ForkServer:
    """The server process as the executor sees it; a killed one is replaced when the next worker is asked for."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.launched = 0
        self._words = ""
        self._socket: socket.socket
        self._said: IO[bytes]

    def start(self, job: Job, environment: Mapping[str, str], log: IO[str]) -> Forked:
        """Ask for a worker in `environment` that prints into `log`. Returns before it runs."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self._launch()
        request = {"job": str(job.path), "environment": dict(environment), "folder": os.getcwd()}
        data = json.dumps(request).encode()
        ours, theirs = os.pipe()
        try:
            socket.send_fds(self._socket, [LENGTH.pack(len(data))], [theirs, log.fileno()])
            self._socket.sendall(data)
        except OSError:
            pass  # the server is gone, and the pipe's end will say so
        finally:
            os.close(theirs)
        return Forked(ours)

    def _launch(self) -> None:
        self.launched += 1
        self._socket, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpt2lab.executors.fork_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def last_words(self) -> str:
        """How the last server that ended did so, and the last line that it printed: it prints when it fails only."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its pipes end a moment before itself
                code = self.process.wait(1)
                self._said.seek(0)
                lines = self._said.read().decode(errors="replace").strip().splitlines()
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                self._words = f"{how}: {lines[-1]}" if lines else how
        return self._words

    def kill(self) -> None:
        """End the server at once, from a signal handler too."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End the server; workers that still run are told so by the kernel."""
        if self.process is not None:
            self._socket.close()
            self.process.kill()
            self.process.wait()
            self._said.close()
            self.process = None


def wait_readable(descriptors: Iterable[int], seconds: float | None) -> list[int]:
    """Those that can be read from, or have come to their end; waits for the first of them, at most so long."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)]


# The server's side


@dataclass(frozen=True)
class Request:
    """A worker that is asked for; `pipe` takes its process id and its exit code, `log` what it prints."""

    job: str
    environment: dict[str, str]
    folder: str
    pipe: int
    log: int


def serve(connection: socket.socket) -> None:
    """Fork a worker for every request, and say how each ended; until the executor is gone."""
    die_with_parent(signal.SIGKILL)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a worker's collector need not look at, and so copy, what was imported
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are for workers, which take them when they listen
    ended, wake = os.pipe()
    for descriptor in (ended, wake):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    pipes: dict[int, int] = {}
    while True:
        ready = wait_readable([connection.fileno(), ended], None)
        if ended in ready:
            os.read(ended, 4096)
        for pid in list(pipes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                tell(pipes[pid], os.waitstatus_to_exitcode(status))
                os.close(pipes.pop(pid))
        if connection.fileno() in ready:
            request = receive(connection)
            if request is None:
                return
            try:
                pid = os.fork()
            except OSError as error:
                os.write(request.log, f"no worker can be started: {error.strerror}\n".encode())
                tell(request.pipe, 0, CANNOT_FORK)
                os.close(request.pipe)
            else:
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    connection.close()
                    for descriptor in (ended, wake, *pipes.values()):
                        os.close(descriptor)
                    become(request)
                tell(request.pipe, pid)
                pipes[pid] = request.pipe
            os.close(request.log)


def tell(pipe: int, *numbers: int) -> None:
    """Write to an executor that may be gone."""
    with contextlib.suppress(OSError):
        os.write(pipe, "".join(f"{number}\n" for number in numbers).encode())


def receive(connection: socket.socket) -> Request | None:
    """The next request; None when the executor is gone."""
    try:
        head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 2, socket.MSG_CMSG_CLOEXEC)
        if not head:
            return None
        left, data = LENGTH.unpack(head)[0], b""
        while left > len(data):
            part = connection.recv(left - len(data))
            if not part:  # killed within a sentence
                return None
            data += part
    except OSError:
        return None
    return Request(**json.loads(data), pipe=descriptors[0], log=descriptors[1])


def become(request: Request) -> NoReturn:
    """Be the worker. Ends without tidying up the interpreter, which takes longer than to start: what a run leaves is in
    its files."""
    code = 1
    try:
        os.setsid()
        os.dup2(request.log, sys.stdout.fileno())
        os.dup2(request.log, sys.stderr.fileno())
        os.chdir(request.folder)
        os.environ.clear()
        os.environ.update(request.environment)
        os.environ[PARENT] = str(os.getppid())
        stop = StopRequest()
        stop.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        faults.arm_from_environment()
        code = work(Job.read(Path(request.job)), stop)
    except Gpt2labError as error:
        print(error.render(), file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
