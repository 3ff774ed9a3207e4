"""Files: where data lies, globs as a config writes them, locks, hashes, and writes that survive a crash.

Durable means: written under a temporary name, fsynced, renamed, and the folder fsynced; so a name that exists is whole.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lab.errors import ConfigError, EnvironmentFault

READ_BYTES = 1 << 20
FRESH_SECONDS = 2.0
"""A file changed so lately may change again without a new modification time: its hash is not kept."""
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
    would let two processes hold locks on two files of one name. `waiting` is called once if another process has it.
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
    """sha256 of a file in hex, without its first `skip` bytes; `seen` is called with the length of each chunk read."""
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


def known_sha256(path: Path, *, skip: int = 0, seen: Callable[[int], None] | None = None) -> str:
    """`file_sha256`, kept below `data_home()` for as long as the file's size and modification time stay the same.

    Raises EnvironmentFault for a file that cannot be read.
    """
    try:
        stat = os.stat(path)
        facts = {"path": str(path), "skip": skip, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        note = data_home() / "hashes" / f"{canonical_sha256([str(path), skip])[:32]}.json"
        kept = _read_note(note)
        if {k: v for k, v in kept.items() if k != "sha256"} == facts:
            return str(kept["sha256"])
        sha256 = file_sha256(path, seen, skip=skip)
    except OSError as error:
        raise unreadable(path, error) from error
    if time.time() - stat.st_mtime > FRESH_SECONDS:
        with disk(note.parent):
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({**facts, "sha256": sha256}))
            publish(temporary, note)
    return sha256


def _read_note(note: Path) -> dict[str, object]:
    try:
        kept = json.loads(note.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) and "sha256" in kept else {}


def unreadable(path: Path, error: OSError) -> EnvironmentFault:
    """The error for a file that the operating system does not let us read."""
    return EnvironmentFault(f"cannot be read: {error.strerror}", where=str(path), hint=f"ls -l {path}")


def matching(paths: Sequence[str], *, key: str = "paths", example: str = "*.txt") -> list[Path]:
    """Files that `paths` (names and globs, `~` allowed) match, each once, sorted.

    key: the corpus option that `paths` come from. Raises ConfigError for a pattern without a match.
    """
    files: set[Path] = set()
    for written in paths:
        pattern = os.path.expanduser(written)
        hits = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        matches = {Path(hit).resolve() for hit in hits if os.path.isfile(hit)}
        if not matches:
            folder = os.path.isdir(pattern)
            raise ConfigError(
                f"'{written}' {'is a folder' if folder else 'matches no file'}",
                where=f"data.corpus.{key}",
                hint=f"{key}: ['{written.rstrip('/')}/{example}']" if folder else f"ls {written}",
            )
        files |= matches
    return sorted(files)


def named(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their names below the deepest folder that holds all of them: the same wherever that folder lies."""
    if not files:
        raise ConfigError("no paths given", where="data.corpus.paths", hint="paths: ['folder/*.txt']")
    root = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(root).as_posix(): file for file in files}
