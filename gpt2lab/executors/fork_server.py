"""Workers that start at once: a server process has imported torch, and every worker is a fork of it.

The server reads requests from a socket and forks. It has one thread, holds no lock and has never called CUDA, so its
children start as clean as new processes. Plug-ins and the environment reach a child with its job; the server lives as
long as its executor has work, so no code in it gets old.

The server ends with the executor (by a signal of the kernel, and by the end of the socket), and workers stop when the
server is gone, as `StopRequest` has it. Exit codes come through a pipe whose other end only server and worker hold: if
it ends without a code, both are gone.

multiprocessing's fork server would import the caller's main module in every worker, and lives on when the caller is
killed as long as a worker of it does, so that workers would not notice.
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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NoReturn

from gpt2lab.basics import faults
from gpt2lab.basics.early import Server, take
from gpt2lab.basics.output import make_output_lossy
from gpt2lab.basics.redaction import masked
from gpt2lab.basics.signals import PARENT, STOP_SIGNALS, die_with_parent
from gpt2lab.errors import Gpt2labError
from gpt2lab.runner import Job, StopRequest, work

PRELOADED = ("numpy.random", "torch._dynamo")
"""What a run imports beyond the runner itself; the second, which every optimizer imports, takes a second."""

LOST = 1000
"""A return code that no process has: of a worker whose server ended first, so that its own is not known."""

CANNOT_FORK = 71  # EX_OSERR


# The executor's side


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


class ForkServer:
    """The server process as the executor sees it; one that was killed is replaced when the next worker is needed."""

    def __init__(self) -> None:
        self.launched = 0
        self._server: Server | None = None
        self._ending = ""

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """That of the present server."""
        return self._server.process if self._server else None

    def start(self, job: Job, environment: Mapping[str, str], log: IO[str]) -> Forked:
        """Request a worker in `environment` that prints into `log`. Returns before it runs."""
        if self._server is None or self._server.process.poll() is not None:
            self.close()
            self.launched += 1
            self._server = take()
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


# The server's side


def serve(connection: socket.socket) -> None:
    """Fork a worker for every request and report its process id and exit code, until the executor is gone."""
    die_with_parent(signal.SIGKILL)
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()  # a worker's collector need not look at, and so copy, what was imported
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are for workers, which unblock them when they listen
    ended, wake = os.pipe()
    for descriptor in (ended, wake):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    pipes: dict[int, int] = {}  # by process id, of workers that run
    while True:
        ready = wait_readable([connection.fileno(), ended], None)
        if ended in ready:
            os.read(ended, 4096)
        for pid in list(pipes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                report(pipes[pid], os.waitstatus_to_exitcode(status))
                os.close(pipes.pop(pid))
        if connection.fileno() not in ready:
            continue
        try:
            received, descriptors, _, _ = socket.recv_fds(connection, 1, 3, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return
        if not received:
            return
        request, log, pipe = descriptors
        try:
            pid = os.fork()
        except OSError as error:
            os.write(log, f"no worker can be started: {error.strerror}\n".encode())
            report(pipe, 0, CANNOT_FORK)
            os.close(pipe)
        else:
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                connection.close()
                for descriptor in (ended, wake, *pipes.values()):
                    os.close(descriptor)
                become_worker(request, log)
            report(pipe, pid)
            pipes[pid] = pipe
        os.close(request)
        os.close(log)


def report(pipe: int, *numbers: int) -> None:
    """Write to an executor that may be gone."""
    with contextlib.suppress(OSError):
        os.write(pipe, "".join(f"{number}\n" for number in numbers).encode())


def become_worker(request: int, log: int) -> NoReturn:
    """Execute the job of a request. Ends without tidying up the interpreter, which takes longer than to start: what a
    run leaves is in its files."""
    code = 1
    try:
        os.setsid()
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
        make_output_lossy()
        with os.fdopen(request) as file:
            fields = json.load(file)
        os.chdir(fields["folder"])
        os.environ.clear()
        os.environ.update(fields["environment"])
        os.environ[PARENT] = str(os.getppid())
        stop = StopRequest()
        stop.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        faults.arm_from_environment()
        code = work(Job.read(Path(fields["job"])), stop)
    except Gpt2labError as error:
        print(error.render(), file=sys.stderr)
        code = error.exit_code
    except BaseException:
        print(masked(traceback.format_exc()), file=sys.stderr)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
