"""Large matrices in large pages of memory, where the system has them.

A matrix that is read from one end to the other in pages of 4 KiB costs the processor a look-up for each of them; in
pages of 2 MiB there are 512 times fewer. Linux gives them to memory that exists already by one system call.
"""

from __future__ import annotations

import ctypes
import sys

HUGE_BYTES = 1 << 21
MADV_COLLAPSE = 25
"""Of Linux 6.1 on (include/uapi/asm-generic/mman-common.h); Python's mmap has no name for it."""


def in_huge_pages(address: int, size_bytes: int) -> bool:
    """Ask that all whole huge pages within this memory be such; -> whether they are. What lies there stays as it is,
    and where the system cannot do it, all stays as it was."""
    begin = -(-address // HUGE_BYTES) * HUGE_BYTES
    length = (address + size_bytes) // HUGE_BYTES * HUGE_BYTES - begin
    if sys.platform != "linux" or length <= 0:
        return False
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    return advise is not None and advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_COLLAPSE) == 0
