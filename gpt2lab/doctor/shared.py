"""Whether a disk that several machines share carries what the run store relies on: locks, atomic creation, and files
that others see at once.

Processes with different names of hosts meet in a folder of that disk. Each holds a lock and a created file, and tries
to take those of every other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

from gpt2lab.doctor.machine import MachineCheck
from gpt2lab.errors import command
from gpt2lab.store import disk_fault, make_folder, write_json
from gpt2lab.store.claims import MARKER

FOLDER = ".gpt2lab-probe"
BEAT_SECONDS = 0.5
STILL_THERE_SECONDS = 5.0
"""After its last beat, for a process that looks at it twice."""


def check_shared(folder: Path, seconds: float) -> Iterator[MachineCheck]:
    """Probe the disk of `folder` from this process and a second one, for so many seconds; the same command on another
    host at the same time takes part. Leaves no files behind. Raises EnvironmentFault."""
    meeting, host = folder / FOLDER, socket.gethostname()
    own, second = f"{host}.{os.getpid()}", f"{host}.{os.getpid()}.second"
    partner = get_context("fork").Process(target=meet, args=(meeting, second, seconds + 2), daemon=True)
    try:
        make_folder(meeting)
        partner.start()
        try:
            faults = meet(meeting, own, seconds)
        finally:
            partner.kill()
            partner.join()
            for name in (own, second):
                leave(meeting, name)
            with contextlib.suppress(OSError):  # another host is still there
                meeting.rmdir()
    except OSError as error:
        raise disk_fault(error, meeting) from error
    uses_claims, carried = (folder / MARKER).exists(), True
    for name, (locked, created) in sorted(faults.items()):
        against, carried = f"against {'a second process here' if name == second else name}", carried and locked
        lost = "not carried" if not locked and not uses_claims else None
        yield MachineCheck("locks", f"flock, {against}{', not carried' if not locked else ''}", lost)
        yield MachineCheck("atomic creation", against, None if created else "granted twice")
    if second not in faults:
        yield MachineCheck("new files", "of a second process here", f"not seen within {seconds:g} s")
    if all(name.startswith(f"{host}.") for name in faults):
        yield MachineCheck("other hosts", "none met; give the same command there within the same seconds")
    needed = None if carried or uses_claims else command("touch", folder / MARKER)
    yield MachineCheck("claims", "in use" if uses_claims else "not in use", needed)


def meet(meeting: Path, own: str, seconds: float) -> dict[str, tuple[bool, bool]]:
    """Hold a lock and a file under the name `own`; name of another process -> whether its lock, and its created file,
    were refused to this one. Raises OSError."""
    found: dict[str, tuple[bool, bool]] = {}
    beats: dict[str, tuple[int, float]] = {}
    end, beat = time.monotonic() + seconds, 0
    with (meeting / f"{own}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks: others will find it free
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (meeting / f"{own}.created").touch()
        while time.monotonic() < end:
            beat += 1
            write_json(meeting / f"{own}.json", {"beat": beat})
            for file in meeting.glob("*.json"):
                name = file.stem
                if name == own or name in found:
                    continue
                with contextlib.suppress(OSError, ValueError, KeyError):
                    seen = int(json.loads(file.read_text())["beat"])
                    before, since = beats.setdefault(name, (seen, time.monotonic()))
                    if seen > before:  # and so it is alive now, and holds what it holds
                        found[name] = is_refused(meeting / f"{name}.lock"), is_granted_once(meeting / f"{name}.created")
                    elif time.monotonic() > since + STILL_THERE_SECONDS:
                        del beats[name]
            time.sleep(BEAT_SECONDS)
    return found


def is_refused(lock: Path) -> bool:
    """Whether a lock that another process holds is refused to this one."""
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks at all
            return False
    return False


def is_granted_once(created: Path) -> bool:
    """Whether a file that another process has created cannot be created again."""
    try:
        os.close(os.open(created, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return True
    return False


def leave(meeting: Path, own: str) -> None:
    """Remove the files of a process."""
    for path in meeting.glob(f"{own}.*"):
        path.unlink(missing_ok=True)
