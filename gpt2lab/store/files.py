"""Files that are either old or new: a kill or a power cut at any moment leaves one of the two, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2lab.errors import DataFault, EnvironmentFault

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def temporary_beside(final: Path) -> Path:
    """A fresh name in the same folder that `sweep_leftovers` recognises; nothing is created."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file `path` in one step; the content is on the disk when this returns.

    Raises EnvironmentFault (disk full, no permission), with the old file intact and no temporary left.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_beside(path)
    try:
        make_folder(path.parent)
        while True:
            with temporary.open("xb") as file:
                # Held while writing, so that a sweep by another process leaves this file alone.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not temporary.exists():  # swept in the moment before the lock
                    continue
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                break
        fsync_folder(path.parent)
    except OSError as error:
        raise disk_fault(error, path, len(data)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a complete folder its final name, after everything in it has reached the disk.

    `final` must not exist: replacing a folder cannot be done in one step. Raises EnvironmentFault.
    """
    try:
        if final.exists():
            raise FileExistsError(errno.EEXIST, "a folder of this name exists already", str(final))
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            fsync_folder(Path(folder))
        os.replace(temporary, final)
        fsync_folder(final.parent)
    except OSError as error:
        raise disk_fault(error, final) from error


def sweep_leftovers(folder: Path) -> list[str]:
    """Remove what interrupted writes left directly in `folder`, and return the names.

    A file that a living process is still writing is skipped. Folders carry no such mark: sweep where temporary folders
    are made only while holding the lock under which they are made.
    """
    swept = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not LEFTOVER.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.is_symlink():
            entry.unlink(missing_ok=True)
        elif not _unlink_unlocked(entry):
            continue
        swept.append(entry.name)
    return swept


def make_folder(folder: Path) -> None:
    """`mkdir -p` that is on the disk when it returns."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without it a finished rename can be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def disk_fault(error: OSError, path: Path, needed_bytes: int | None = None) -> EnvironmentFault:
    """An operating-system error while writing `path`, in plain words."""
    if error.errno not in DISK_FULL:
        reason = error.strerror or str(error)
        return EnvironmentFault(
            f"cannot write: {reason[:1].lower()}{reason[1:]}",
            where=str(path),
            hint="check that the folder exists and can be written, then run the same command again",
        )
    existing = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    needs = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    cause = "the file size limit of this process is reached" if error.errno == errno.EFBIG else "the disk is full"
    return EnvironmentFault(
        f"{cause}: {needs}{shutil.disk_usage(existing).free:,} free",
        where=str(path),
        hint="free some space, then run the same command again",
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file. Raises DataFault when it cannot be read as one."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DataFault(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        raise DataFault("a JSON object is expected", where=str(path))
    return found


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; NaN and infinities as Python's json writes them."""
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def _unlink_unlocked(path: Path) -> bool:
    """Remove a file unless a process holds its lock, which none can take meanwhile; -> whether it is gone."""
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether some process holds the kernel lock on this file. What is written in the file plays no part."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
