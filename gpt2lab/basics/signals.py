"""Signals that stop a process, and the one that the kernel sends when its parent is gone.

Torch takes seconds to import, so what a process does first is here, without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from gpt2lab.errors import Preempted

PARENT = "GPT2LAB_PARENT"
"""The environment variable with the id of the process whose end is a worker's end."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LOOK_SECONDS = 0.5
ENDED = "ended at once; every run continues from its last checkpoint"


class Stopped(BaseException):
    """A command gets a stop signal while nothing trains. No error, so that no handler of errors keeps it."""


def parent_of() -> int:
    """The process whose end is to be this one's: from the environment, as getppid would not tell of a parent that died
    before this line."""
    return int(os.environ.get(PARENT, os.getppid()))


def die_with_parent(number: signal.Signals) -> None:
    """Get that signal when the parent dies, or now if it is gone: from the kernel where it offers that, else from a
    thread."""
    parent = parent_of()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    else:
        threading.Thread(target=_watch, args=(parent, number), name="gpt2lab-parent", daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _watch(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), number)


def stop_without_loss() -> None:
    """Until `StopRequest.listen`, end at once with the exit code of a saved stop: nothing was begun."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(Preempted.exit_code))
    die_with_parent(signal.SIGTERM)


class StopRequest:
    """Set by a signal, or when the parent is gone; the run then finishes its step, saves and ends with Preempted."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = parent_of()

    def listen(self) -> None:
        """Take over the stop signals, and that which comes when the parent dies."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        die_with_parent(signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and os.getppid() != self._parent:
            self.reason = "the process that started it is gone"
        return self.reason is not None


def stop_command() -> None:
    """Let a stop signal end a command with Stopped, and Ctrl-C with KeyboardInterrupt. Where runs train, the scheduler
    or the worker takes the signals over. While Preempted or Stopped is on its way, Ctrl-C alone hastens the end, since
    clusters send other signals twice."""
    for number in STOP_SIGNALS:
        signal.signal(number, _on_stop)


def _on_stop(number: int, frame: FrameType | None) -> None:
    is_stopping = isinstance(sys.exception(), (Preempted, Stopped))
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if not is_stopping:
        raise Stopped(signal.Signals(number).name)


def print_ended() -> None:
    """What a second Ctrl-C does; for a signal handler."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{ENDED}\n".encode())


def ignore_stops() -> None:
    """For a process that is ending."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
