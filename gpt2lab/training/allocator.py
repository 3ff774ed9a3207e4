"""Memory that a training gives back in one step it needs again in the next.

glibc returns large blocks to the kernel at once, and the kernel hands out every page anew and zeroed: some hundred
thousand page faults in a step with a large vocabulary. A process that only trains had better keep its memory.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
NEVER = (1 << 31) - 1
ROOM = 1 << 26  # bytes that the heap grows by at least


def keep_memory() -> bool:
    """Let this process keep what it frees, up to what it ever held; -> whether its allocator can be told (glibc's can).
    No number changes: torch aligns its tensors itself."""
    if sys.platform != "linux":
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is None:
        return False
    return all([tell(M_MMAP_THRESHOLD, 1 << 30), tell(M_TRIM_THRESHOLD, NEVER), tell(M_TOP_PAD, ROOM)])


def high_water() -> int:
    """The most bytes that this process has held. Linux's ru_maxrss would include what its parent held at the fork."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
