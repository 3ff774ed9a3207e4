"""Optuna's journal file, made to survive workers that are killed while they write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock

from gpt2lab.errors import DataFault
from gpt2lab.sweep.patience import Patience

LOCKS = ("flock", "symlink")
GRACE_SECONDS = 30
"""After which a symbolic link that serves as lock is taken to be left behind."""
LONGEST_LINE_BYTES = 1 << 16


class KernelLock(BaseJournalFileLock):
    """`flock` on a file beside the journal.

    Optuna's own locks are files whose being there is the lock: one that a killed worker left keeps everybody waiting
    for half a minute, and is then removed by whoever lost patience, perhaps under the hands of a slow but living
    owner. The kernel frees this one when its process ends. Linux passes flock on to an NFS server (since 2.6.12), so
    it holds across machines there; a file system that has none refuses, and takes `?lock=symlink`.
    """

    def __init__(self, path: Path, patience: Patience) -> None:
        self._path, self._patience = path, patience
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock. Raises EnvironmentFault (too long), OSError."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    self._patience.wait(error)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Free the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class MendedJournal(JournalFileBackend):
    """A journal whose torn last line is cut off before anything is written behind it.

    A line is torn when its worker was killed in the middle of writing. Nobody has read it, since readers stop at a last
    line without an end; but with the next line glued to it, no reader would ever get past it again.
    """

    def __init__(self, path: Path, lock: BaseJournalFileLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._path = path
        with self._locked():
            self._mend()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write operations at the end, whole or not at all. Raises OSError."""
        data = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._locked():
            self._mend()
            with open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    rest = memoryview(data)
                    while rest:  # a full disk takes what fits, and refuses the next
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.truncate(self._path, size)
                    raise

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Operations from a number on. Raises DataFault for a damaged line that is not the last."""
        logs = super().read_logs(log_number_from)
        while True:
            try:
                log = next(logs)
            except StopIteration:
                return
            except (ValueError, KeyError) as error:
                raise DataFault(
                    f"the journal is damaged behind operation {log_number_from}: {error}",
                    where=f"journal:{self._path}",
                    hint="move it away, and run the same command again: finished runs are found, not trained again",
                ) from None
            yield log

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _mend(self) -> None:
        with open(self._path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            kept = end
            while kept:
                start = max(0, kept - LONGEST_LINE_BYTES)
                file.seek(start)
                last = file.read(kept - start).rfind(b"\n")
                if last >= 0:
                    kept = start + last + 1
                    break
                kept = start
            if kept < end:
                file.truncate(kept)
                os.fsync(file.fileno())


def journal_lock(kind: str, path: Path, patience: Patience) -> BaseJournalFileLock:
    """The lock of a journal: the kernel's, or Optuna's symbolic link for file systems that have no other."""
    if kind == "symlink":
        return JournalFileSymlinkLock(str(path), grace_period=GRACE_SECONDS)
    return KernelLock(path.with_name(f".{path.name}.lock"), patience)
