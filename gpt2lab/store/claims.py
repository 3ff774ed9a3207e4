"""Claims of files, for disks that do not carry locks between hosts: created atomically, kept by a heartbeat.

A folder of runs uses them once it holds a file named `claims`. The claims of a lock are numbered, and the one with the
largest number decides: it is held while its holder renews its modification time, and free once it says so or has not
been renewed for a while. To take a free one is to create the next number, which succeeds once on a disk. Ages compare
two times that the disk itself has set, so clocks of hosts may differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2lab.errors import LockHeld
from gpt2lab.store.files import open_file, temporary_beside, write_atomically

MARKER = "claims"
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
"""Between two renewals; and without one, after which a claim is free. A holder that finds a newer claim ends."""
FREE: dict[str, Any] = {}


def uses_claims(lock: Path) -> bool:
    """Whether `lock`, in a folder of the store, is claimed in place of being locked."""
    return (lock.parent.parent / MARKER).exists()


@contextlib.contextmanager
def renewed(lock: Path, mine: int) -> Iterator[None]:
    """With a heartbeat for the claim `mine`, which is given back at the end."""
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(lock, mine, ended), name="gpt2lab-claim", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if _newest(lock) == mine:
            write_atomically(_path(lock, mine), json.dumps(FREE))


def is_claimed(lock: Path) -> bool:
    """Whether some process holds the claim of `lock`."""
    return claim_holder(lock) != FREE


def claim_holder(lock: Path) -> dict[str, Any]:
    """{"host", "pid", "since"} of the process that holds the claim; {} where it is free."""
    path = _path(lock, _newest(lock))
    try:
        with open_file(path) as file:
            claim = json.loads(file.read())
        if not isinstance(claim, dict) or claim == FREE:
            return FREE
        renewed = path.stat().st_mtime
    except (OSError, ValueError, RecursionError):
        return FREE
    if abs(time.time() - renewed) < STALE_SECONDS / 2:
        return claim
    return FREE if _time_of_disk(lock) - renewed > STALE_SECONDS else claim


def take_claim(lock: Path, holder: Mapping[str, Any]) -> int | None:
    """The number of the claim that this process now holds; None where another one holds it."""
    number = _newest(lock)
    if is_claimed(lock):
        return None
    draft = temporary_beside(lock)
    try:
        draft.write_text(json.dumps(dict(holder)), encoding="utf-8")
        os.link(draft, _path(lock, number + 1))  # with its content, or not at all
    except (FileExistsError, FileNotFoundError):  # granted to another, or swept by its holder
        return None
    finally:
        draft.unlink(missing_ok=True)
    if _newest(lock) != number + 1:  # an older number, which was removed since it was looked at
        _path(lock, number + 1).unlink(missing_ok=True)
        return None
    for old in _numbers(lock):
        if old <= number:
            _path(lock, old).unlink(missing_ok=True)
    return number + 1


def _renew(lock: Path, mine: int, ended: threading.Event) -> None:
    """Keep a claim until `ended`. A process that lost it, as one that was suspended, ends before it writes more."""
    while not ended.wait(BEAT_SECONDS):
        if _newest(lock) > mine:
            print(f"{lock.parent}: another process has taken over, as this one was silent", file=sys.stderr, flush=True)
            os._exit(LockHeld.exit_code)
        with contextlib.suppress(OSError):  # the disk may be away for a while
            os.utime(_path(lock, mine))


def _numbers(lock: Path) -> list[int]:
    names = (path.name.rpartition(".")[2] for path in lock.parent.glob(f"{lock.name}.claim.*"))
    return [int(name) for name in names if name.isdecimal()]


def _newest(lock: Path) -> int:
    return max(_numbers(lock), default=0)


def _path(lock: Path, number: int) -> Path:
    return lock.with_name(f"{lock.name}.claim.{number}")


def _time_of_disk(lock: Path) -> float:
    """The present time by the clock that sets modification times in this folder."""
    probe = temporary_beside(lock)
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
