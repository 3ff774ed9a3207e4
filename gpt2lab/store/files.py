"""Files that are either old or new: a kill or a power cut at any moment leaves one of the two, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Unreadable, command

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SEAL = "seal"
"""The last key of every JSON file that is written here: a hash of all other keys. Files of older versions have none."""
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
LIKE_A_NUMBER = re.compile(r"\"'*(NaN|-?Infinity)\"")


def temporary_beside(final: Path) -> Path:
    """A fresh name in the same folder that `sweep_leftovers` recognises; nothing is created."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")


def write_atomically(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Replace the file `path` in one step; the content is on the disk when this returns. private: only this user may
    read it.

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
                if private:
                    os.fchmod(file.fileno(), 0o600)
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
    what, remedy = _cause(error, existing)
    needs = "" if needed_bytes is None else f"{needed_bytes:,} bytes needed, "
    return EnvironmentFault(
        f"{what}: {needs}{shutil.disk_usage(existing).free:,} free",
        where=str(path),
        hint=f"{remedy}, then run the same command again",
    )


def _cause(error: OSError, folder: Path) -> tuple[str, str]:
    """Why there is no room, and what helps."""
    if error.errno == errno.EFBIG:
        return "the file size limit of this process is reached", "ulimit -f unlimited"
    if error.errno == errno.EDQUOT:
        return "the disk quota is used up", "free some space"
    inodes = os.statvfs(folder)
    if inodes.f_files and not inodes.f_favail:
        return f"the disk holds as many files as it can ({inodes.f_files:,})", "delete some files"
    return "the disk is full", "free some space"


class NoRegularFile(OSError):
    """A folder, a pipe or a device in the place of a file. A pipe would wait for a writer, a device may have no end."""


def open_file(path: Path) -> io.BufferedReader:
    """A file to read. Raises OSError: NoRegularFile where something else is in its place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NoRegularFile(errno.EINVAL, "is a directory" if stat.S_ISDIR(mode) else "is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path) -> bytes | None:
    """The content of a file, None when there is none. Raises DataFault where something else is in its place, and
    Unreadable when the machine does not let us read it."""
    try:
        with open_file(path) as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (NoRegularFile, NotADirectoryError) as error:
        raise DataFault(f"cannot be read: {str(error.strerror).lower()}", where=str(path)) from None
    except OSError as error:
        what = f"cannot be read: {str(error.strerror).lower()}"
        raise Unreadable(what, where=str(path), hint=command("ls", "-l", path)) from None


def to_json(value: Any, **options: Any) -> str:
    """Plain data as JSON text, which `from_json` reads back exactly. JSON has no form for numbers that are not finite:
    they become the texts of NOT_FINITE, and a text that reads like one of these gets an apostrophe before it.

    options: of json.dumps. Raises TypeError for what is not plain.
    """
    with contextlib.suppress(ValueError):
        text = json.dumps(value, allow_nan=False, **options)
        if not LIKE_A_NUMBER.search(text):
            return text
    return json.dumps(_mapped(value, _marked), allow_nan=False, **options)


def from_json(text: str | bytes) -> Any:
    """The data of `to_json`, or of Python's json, whose NaN and Infinity older versions wrote. Raises ValueError, and
    RecursionError for what is nested too deeply."""
    return _restored(json.loads(text), text)


def _restored(data: Any, text: str | bytes) -> Any:
    words = (b"NaN", b"Infinity") if isinstance(text, bytes) else ("NaN", "Infinity")
    return _mapped(data, _unmarked) if any(word in text for word in words) else data  # type: ignore[operator]


def _marked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return f"'{value}" if isinstance(value, str) and value.lstrip("'") in NOT_FINITE else value


def _unmarked(value: Any) -> Any:
    if not isinstance(value, str) or value.lstrip("'") not in NOT_FINITE:
        return value
    return NOT_FINITE[value] if value in NOT_FINITE else value[1:]


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    return [_mapped(value, change) for value in tree] if isinstance(tree, (list, tuple)) else change(tree)


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any] | None:
    """A JSON object without its seal, or None when there is no such file. Raises DataFault when it is not as it was
    written; sealed: also when it has no seal."""
    data = read_bytes(path)
    if data is None:
        return None
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataFault(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(record, dict):
        raise DataFault("a JSON object is expected", where=str(path))
    seal = record.pop(SEAL, None)
    ending = f',"{SEAL}":"{seal}"}}\n'.encode()  # of a file in one line, whose text is what the seal is of
    is_intact = seal == sha256(data.removesuffix(ending) + b"}")[:32] or seal == seal_of(record)
    if not is_intact and (sealed or seal is not None):
        what = "has no seal" if seal is None else "does not agree with its seal"
        raise DataFault(f"{what}: it was changed after it was written", where=str(path))
    restored: dict[str, Any] = _restored(record, data)
    return restored


def write_json(path: Path, record: Mapping[str, Any], *, indent: int | None = 1, private: bool = False) -> None:
    """Write a JSON object and its seal atomically, as `to_json` does. indent: None for one line. private: as
    `write_atomically`."""
    separators = (",", ":") if indent is None else None
    plain = json.loads(to_json(record))  # the seal is of what the file says
    sealed = {**plain, SEAL: seal_of(plain)}
    write_atomically(path, json.dumps(sealed, indent=indent, separators=separators) + "\n", private=private)


def seal_of(record: Mapping[str, Any]) -> str:
    """128 bits of the sha256 of a JSON object as it is in its file, independent of the layout there."""
    return sha256(json.dumps(record, separators=(",", ":")).encode())[:32]


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


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


def refuse_link(folder: Path) -> None:
    """Raises ConfigError for a symbolic link in the place of a folder of the store."""
    if folder.is_symlink():
        hint = command("rm", folder) + "; to keep runs on another disk, give --runs a folder there"
        raise ConfigError("is a symbolic link; runs are never written through one", where=str(folder), hint=hint)


@contextlib.contextmanager
def remedy(hint: str, *words: object) -> Iterator[None]:
    """What to try when a file turns out to be damaged: a command, with a place for each of the words."""
    try:
        yield
    except DataFault as fault:
        fault.hint = fault.hint or hint.format(*map(command, words))
        raise


def names_of_json(folder: Path) -> list[str]:
    """Names of the JSON files in a folder, which need not exist."""
    return sorted(path.stem for path in folder.glob("*.json") if NAME.fullmatch(path.stem))


def json_file(folder: Path, name: str, kind: str = "evaluation key") -> Path:
    """The file of a record. Raises ConfigError for what cannot be its name."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot be a {kind}: letters, digits and _ . @ + - only")
    return folder / f"{name}.json"
