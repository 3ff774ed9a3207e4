"""Keep freed memory in the process, because the next training step needs it again.

glibc returns large blocks to the kernel at once, and the kernel zeroes every page that it returns: about a hundred
thousand page faults per step with a large vocabulary.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
NEVER = (1 << 31) - 1
TOP_PAD = 1 << 26  # smallest growth of the heap in bytes


def keep_memory() -> bool:
    """Make this process keep the memory that it frees. Returns whether its allocator supports this (glibc's does).
    Results do not change: torch aligns its tensors itself."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_MMAP_THRESHOLD, 1 << 30), mallopt(M_TRIM_THRESHOLD, NEVER), mallopt(M_TOP_PAD, TOP_PAD)])


def high_water() -> int:
    """Peak memory of this process in bytes. Linux's ru_maxrss would include that of its parent at the fork."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
