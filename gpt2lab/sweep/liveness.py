"""Which workers live: at once for those on this machine, by a heartbeat for those elsewhere."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

GRACE_SECONDS = 120.0
"""A worker elsewhere whose heartbeat has stood still for so long is taken to be gone."""


def this_host() -> str:
    """Host, boot and space of process ids: where a process id means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")  # containers of one machine share its boot
    except OSError:
        boot, space = str(int(psutil.boot_time())), "0"
    return f"{socket.gethostname().replace(':', '_')}:{boot}-{space}"


def worker_id(pid: int | None = None) -> str:
    """`host:boot:pid:start` of a process of this machine, of this one unless told."""
    pid = os.getpid() if pid is None else pid
    return f"{this_host()}:{pid}:{started(pid)}"


def shown(worker: str) -> str:
    """A worker as people read it: `host:pid`."""
    parts = worker.split(":")
    return f"{parts[0]}:{parts[2]}" if len(parts) == 4 else worker


def started(pid: int) -> int | None:
    """When a process started, in units of its system; None when there is none, or it has ended and nobody took notice.

    Together with the process id it names one process for ever: ids are used again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(100 * process.create_time())
    except psutil.NoSuchProcess:
        return None


class Watch:
    """What one worker knows of the others. Heartbeats are compared with themselves, by the clock of who looks: clocks
    of other machines may be wrong."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace_seconds = grace_seconds
        self._clock = clock
        self._host = this_host()
        self._seen: dict[str, tuple[object, float]] = {}

    def gone(self, worker: str, beat: object) -> bool:
        """Whether a worker is certainly gone (on this machine), or silent for long (elsewhere). `beat`: what it last
        wrote, anything that changes."""
        host, _, process = worker.rpartition(":")
        host, _, pid = host.rpartition(":")
        if host == self._host and pid.isdigit():
            return str(started(int(pid))) != process
        return self.silent(worker, beat)

    def silent(self, name: str, beat: object) -> bool:
        """Whether `beat` is what it was a grace period ago. The first look never finds silence."""
        before, since = self._seen.get(name, (None, 0.0))
        if name not in self._seen or before != beat:
            self._seen[name] = (beat, self._clock())
            return False
        return self._clock() - since >= self.grace_seconds
