"""Small operations on files that several parts of the data layer share: locks, hashes, durable writes.

Durable means: written under a temporary name, fsynced, renamed, and the folder fsynced; so a name that exists is whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lab.errors import EnvironmentFault

READ_BYTES = 1 << 20
Progress = Callable[[int, int, str], None]
"""Called now and then with bytes done, bytes in all, and what is being done."""


def data_home() -> Path:
    """Where corpora and token shards are kept: $GPT2LAB_DATA, or gpt2lab's place in the user's cache folder."""
    chosen = os.environ.get("GPT2LAB_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gpt2lab"
    # The XDG specification asks to ignore a relative value.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "gpt2lab"


@contextmanager
def disk(folder: Path, continues: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what the operating system refuses below `folder` into an EnvironmentFault that says what to do.

    continues: asked when the disk is full, whether what was begun goes on from there.
    """
    try:
        yield
    except OSError as error:
        where = str(error.filename or folder)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder if folder.exists() else folder.anchor).free
            raise EnvironmentFault(
                f"no room to write ({error.strerror}; {free:,} bytes free)",
                where=where,
                hint="free some space; the same command then continues"
                if continues()
                else "free some space, or set GPT2LAB_DATA to a folder on a larger disk",
            ) from error
        raise EnvironmentFault(
            error.strerror or str(error), where=where, hint="set GPT2LAB_DATA to a folder that can be written"
        ) from error


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None] | None = None, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` exclusively; yields False when `wait` is off and another process holds it.

    The kernel frees the lock when its holder dies, so there are no stale ones; the file stays, because removing it
    would let two processes hold locks on two files of one name. `waiting` is called once if somebody else is ahead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def file_sha256(path: Path, seen: Callable[[int], None] | None = None, *, skip: int = 0) -> str:
    """The file's sha256 in hex, but for its first `skip` bytes; `seen` is told the bytes read, chunk by chunk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(skip)
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            if seen:
                seen(len(chunk))
    return digest.hexdigest()


def canonical_sha256(value: Any) -> str:
    """sha256 of a plain value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync_file(path: Path) -> None:
    """Ask the disk to keep a file's content (or a folder's list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file, or a folder of fsynced files, its final name for good."""
    sync_file(temporary)
    os.rename(temporary, final)
    sync_file(final.parent)
