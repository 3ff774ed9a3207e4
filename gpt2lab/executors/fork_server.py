"""Workers that start at once: a server process has imported torch, and every worker is a fork of it.

The server reads requests from a socket (gpt2lab/basics/forks.py sends them) and forks. It has one thread, holds no lock
and has never called CUDA, so its children start as clean as new processes. Plug-ins and the environment reach a child
with its job; the server lives as long as its executor has work, so no code in it gets old.

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
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from gpt2lab.basics import faults
from gpt2lab.basics.forks import wait_readable
from gpt2lab.basics.output import make_output_lossy
from gpt2lab.basics.redaction import masked
from gpt2lab.basics.signals import PARENT, STOP_SIGNALS, die_with_parent
from gpt2lab.errors import Gpt2labError
from gpt2lab.runner import Job, StopRequest, work

PRELOADED = ("numpy.random", "torch._dynamo")
"""What a run imports beyond the runner itself; the second, which every optimizer imports, takes a second."""

CANNOT_FORK = 71  # EX_OSERR


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
