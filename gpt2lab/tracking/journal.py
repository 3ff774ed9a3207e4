"""The local truth of a run's numbers: metrics.jsonl, written by the run, followed by anyone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2lab.basics.faults import point
from gpt2lab.errors import DataFault, EnvironmentFault, Unreadable, command
from gpt2lab.store import (
    DISK_FULL,
    Row,
    disk_fault,
    fsync_folder,
    make_folder,
    open_file,
    parse_rows,
    read_bytes,
    still_named,
    to_json,
    write_atomically,
)

log = logging.getLogger("gpt2lab.tracking")

BUFFER_LIMIT_BYTES = 1_000_000


class Journal:
    """Append-only writer of one metrics.jsonl. Written only by the process that holds the run's lock.

    Each row reaches the operating system at once, so a killed process loses none; `sync()` makes rows survive a power
    cut too, and belongs before every checkpoint: a resumed run starts at a checkpoint and writes no earlier row again.

    On a full disk rows wait in memory, with one warning; when BUFFER_LIMIT_BYTES of them wait, `append` raises
    EnvironmentFault so that training stops before numbers are lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step = -1
        self._waiting = b""
        self._warned = False
        try:
            make_folder(path.parent)
            self._descriptor = self._open()
            fsync_folder(path.parent)
        except OSError as error:
            raise disk_fault(error, path) from error
        rows, end = parse_rows(read_bytes(path) or b"", str(path))
        if end < path.stat().st_size:
            os.ftruncate(self._descriptor, end)  # a torn last line would swallow the next row
        self.last_step = rows[-1]["step"] if rows else -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises ValueError unless its step is greater than every step before; EnvironmentFault."""
        if row["step"] <= self.last_step:
            raise ValueError(f"a row of step {row['step']} after one of step {self.last_step}")
        point("journal.append")
        self._waiting += to_json(row).encode() + b"\n"
        self.last_step = row["step"]
        fault = self._write()
        if fault and len(self._waiting) > BUFFER_LIMIT_BYTES:
            lost = f"{len(self._waiting):,} bytes of metrics wait in memory; stopping before any is lost"
            raise EnvironmentFault(f"{fault.problems[0].what}; {lost}", where=str(self.path), hint=fault.hint)
        if fault and not self._warned:
            self._warned = True
            log.warning("%s; training goes on, metrics wait in memory until there is room", fault)

    def sync(self) -> None:
        """Every row so far is on the disk when this returns. Raises EnvironmentFault when it cannot be, DataFault when
        the file was removed meanwhile: what is written into a nameless file is lost."""
        fault = self._write()
        if fault:
            raise fault
        if not still_named(self._descriptor, self.path):
            raise DataFault(
                "was removed or replaced while the run trained",
                where=str(self.path),
                hint=command("mv", self.path.parent, f"{self.path.parent}.damaged")
                + "; the same command trains it again",
            )
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise disk_fault(error, self.path) from error

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, in one step: what a run does that continues from the checkpoint of `step`."""
        self.sync()
        data = read_bytes(self.path) or b""
        rows, end = parse_rows(data, str(self.path))
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            lines = data[:end].split(b"\n")[: len(kept)]
            os.close(self._descriptor)
            write_atomically(self.path, b"".join(line + b"\n" for line in lines))
            self._descriptor = self._open()
        self.last_step = kept[-1]["step"] if kept else -1

    def close(self) -> None:
        """Write what waits, make it durable, and let go of the file; closing twice is harmless."""
        if self._descriptor < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)

    def _write(self) -> EnvironmentFault | None:
        """Hand what waits to the operating system; a full disk is returned, every other fault raised."""
        try:
            while self._waiting:  # a nearly full disk takes part of a line: the rest follows when there is room
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            fault = disk_fault(error, self.path, len(self._waiting))
            if error.errno not in DISK_FULL:
                raise fault from error
            return fault
        return None


class Tail:
    """Follows a metrics.jsonl that another process writes, across kills and resumes of that process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step = -1
        self._offset = 0
        self._last_line = b""

    def new_rows(self) -> list[Row]:
        """Whole rows written since the last call, each step once. Raises DataFault for a damaged line.

        A resumed run truncates the file and writes some steps again. The file then no longer has our last line where
        we read it (its `seconds` differ), so it is read from the start, and only later steps than ours are returned.
        """
        try:
            with open_file(self.path) as file:
                file.seek(self._offset - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._offset, self._last_line = 0, b""
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}", where=str(self.path)) from None
        rows, length = parse_rows(data, str(self.path))
        if length:
            self._offset += length
            self._last_line = data[:length].splitlines(keepends=True)[-1]
        rows = [row for row in rows if row["step"] > self.last_step]
        if rows:
            self.last_step = rows[-1]["step"]
        return rows
