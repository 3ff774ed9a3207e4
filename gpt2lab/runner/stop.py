"""When a run should end before its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from gpt2lab.runner.job import PARENT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel for that signal when the parent dies, where it offers that."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


class StopRequest:
    """Set by a signal, or when the parent is gone; the run then finishes its step, saves and ends with Preempted."""

    def __init__(self) -> None:
        self.reason: str | None = None
        # told by the parent, because one that died while we started is no longer to be asked for
        self._parent = int(os.environ.get(PARENT, os.getppid()))

    def listen(self) -> None:
        """Take over the stop signals, and ask the kernel for one when the parent dies (where it offers that)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        die_with_parent(signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and os.getppid() != self._parent:
            self.reason = "the process that started it is gone"
        return self.reason is not None
