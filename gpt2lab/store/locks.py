"""Locks that the kernel keeps, freed when their process ends, however that happens; or claims, where a store uses
them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2lab.errors import EnvironmentFault, LockHeld, command
from gpt2lab.store.claims import MARKER, claim_holder, is_claimed, renewed, take_claim, uses_claims
from gpt2lab.store.files import disk_fault, make_folder, open_file

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
LOOK_SECONDS = 0.02
_held: set[int] = set()


def _forget_inherited() -> None:
    """A forked child must not keep its parent's locks alive after the parent is gone."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_inherited)


@contextlib.contextmanager
def file_lock(path: Path, patience_seconds: float | None = None) -> Iterator[None]:
    """Hold the kernel lock on `path`, waiting for it: as long as it takes, or at most `patience_seconds`.

    The kernel frees it when the process ends, however that happens, so a stale file or a reused process id never
    blocks. The holder's host, process and time are written in the file for people to read. Raises LockHeld.
    """
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
    by_claim = uses_claims(path)
    try:
        make_folder(path.parent)
        taken = _awaited(lambda: take_claim(path, holder) if by_claim else _take(path), path, patience_seconds)
    except OSError as error:
        if error.errno in NO_LOCKS and not by_claim:
            hint = command("touch", path.parent.parent / MARKER) + "; docs/cluster.md, disks without locks"
            raise EnvironmentFault("this disk carries no locks", where=str(path), hint=hint) from error
        raise disk_fault(error, path) from error
    with renewed(path, taken) if by_claim else _noted(taken, holder):
        yield


def _awaited(take: Callable[[], int | None], lock: Path, patience_seconds: float | None) -> int:
    """What `take` returns, once it is not None. Raises LockHeld."""
    deadline = None if patience_seconds is None else time.monotonic() + patience_seconds
    while (taken := take()) is None:
        if deadline is not None and time.monotonic() >= deadline:
            holder = lock_holder(lock)
            who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            what = f"in use by {who if holder else 'another process'}"
            raise LockHeld(what, where=str(lock.parent), hint="wait for it to end")
        time.sleep(LOOK_SECONDS)
    return taken


def _take(path: Path) -> int | None:
    """A descriptor that has the kernel lock; None where another process has it, or is replacing the file or folder."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link may lead anywhere
    except FileNotFoundError:
        make_folder(path.parent)
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if still_named(descriptor, path):
                stack.pop_all()
                return descriptor
    return None


@contextlib.contextmanager
def _noted(descriptor: int, holder: Mapping[str, Any]) -> Iterator[None]:
    """With the holder written in the file that is locked, which is freed at the end."""
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # a full disk makes the note impossible, not the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def still_named(descriptor: int, path: Path) -> bool:
    """Whether the file was not removed since it was opened: a lock on a nameless file protects nothing."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock on this file, or its claim. What is written in the file plays no part."""
    if uses_claims(path):
        return is_claimed(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place would wait for a writer
    except OSError:  # nor can anybody else open it
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_holder(lock: Path) -> dict[str, Any]:
    """What the last holder wrote into a lock file; {} when there is nothing to read."""
    if uses_claims(lock):
        return claim_holder(lock)
    try:
        with open_file(lock) as file:
            holder = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def now() -> str:
    """The present time, UTC, as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
