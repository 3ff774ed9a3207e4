"""Output that may be lost without stopping the work: a reader that goes away, a full disk, a terminal that is gone or
has no sign for a character."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

LOG_WIDTH = 140
"""Columns where there is no terminal."""


class Lossy(io.RawIOBase):
    """A file descriptor that is written as far as that is possible. error: why something was dropped first."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any, /) -> int:
        while True:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.error = self.error or error
                return len(data)


def lossy(stream: TextIO) -> TextIO:
    """A stream that writes where `stream` does and raises nothing; the same one where it is lossy already, or is
    nothing that Python opened, as in a notebook."""
    if type(stream) is not io.TextIOWrapper or isinstance(raw_of(stream), Lossy):
        return stream
    try:
        stream.flush()
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(Lossy(descriptor)),
        encoding=stream.encoding,
        errors="replace" if stream.errors in ("strict", "surrogateescape") else stream.errors,
        line_buffering=stream.line_buffering,
    )


def raw_of(stream: TextIO) -> object:
    return getattr(getattr(stream, "buffer", None), "raw", None)


def lost(stream: TextIO) -> OSError | None:
    """Why something that was written to a lossy stream is lost, if anything is."""
    stream.flush()
    raw = raw_of(stream)
    return raw.error if isinstance(raw, Lossy) else None


def open_closed_streams() -> None:
    """Connect standard streams that the caller closed (`>&-`) to nothing: the next files that are opened would take
    their numbers, and with them what this process and its children print."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            stream = os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def make_output_lossy() -> None:
    """For this process, whose work is worth more than its words."""
    open_closed_streams()
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)


def console_for(*, to_stderr: bool = False) -> Console:
    """A console as wide as its terminal; where there is none, wide enough for tables to keep their lines."""
    from rich.console import Console

    file = lossy(sys.stderr if to_stderr else sys.stdout)
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=LOG_WIDTH)
