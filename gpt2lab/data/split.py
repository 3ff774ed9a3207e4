"""Documents as bounded chunks of text, and which text is for training and which for validation.

Chunks hold whatever bytes a document has: long lines, NULs, CRLF, byte order marks, bad UTF-8. The division depends on
the documents alone, not on a seed or run.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gpt2lab.data.files import READ_BYTES
from gpt2lab.errors import ConfigError

WHOLE_DOCUMENTS_FROM = 10
OnBadBytes = Literal["strict", "replace"]
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


@dataclass(frozen=True)
class Document:
    """One text that belongs together, such as a play or a file.

    name:   unique within its corpus and the same on every machine: the split into training and validation rests on it.
    size:   bytes, for progress and for the size of the split.
    chunks: starts reading anew at each call; the chunks joined are the document, and each fits easily into memory.
    """

    name: str
    size: int
    chunks: Callable[[], Iterator[str]]


def decoded(blocks: Iterable[bytes], *, where: str, errors: OnBadBytes = "strict") -> Iterator[str]:
    """UTF-8 blocks as text, without the byte order mark; line ends and NULs stay as they are.

    Raises ConfigError with `where`, line and byte at the first byte that is not UTF-8, unless `errors` is "replace".
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done, lines, first = 0, 1, True  # bytes and lines before what the decoder still holds
    for block, final in _with_end(blocks):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            before = bytes(error.object[: error.start])
            raise ConfigError(
                f"byte {done + error.start} (0x{error.object[error.start]:02x}) is not UTF-8",
                where=f"{where}:{lines + before.count(10)}",
                hint="convert it to UTF-8, or choose the corpus with `errors: replace`",
            ) from None
        done += len(block) + held - len(decoder.getstate()[0])
        lines += text.count("\n")
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text


def blocks_of(data: bytes) -> Iterator[bytes]:
    """Bytes in memory, block by block."""
    return (data[i : i + READ_BYTES] for i in range(0, len(data), READ_BYTES))


def between(chunks: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """The part of a text from byte `start` to byte `stop` of its UTF-8 form, both moved on to the next whole character.

    Parts that share a border share no character and lose none.
    """
    position = 0
    for chunk in chunks:
        size = len(chunk) if chunk.isascii() else len(chunk.encode())
        if stop is not None and position >= stop:
            return
        inside = stop is None or position + size <= stop
        if position >= start and inside:
            yield chunk
        elif position + size > start:
            raw = chunk.encode()
            low = _whole(raw, max(0, start - position))
            high = size if stop is None else _whole(raw, min(size, stop - position))
            if low < high:
                yield raw[low:high].decode()
        position += size


def _whole(raw: bytes, index: int) -> int:
    while index < len(raw) and raw[index] & 0xC0 == 0x80:  # a continuation byte: still inside a character
        index += 1
    return index


def _with_end(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True


@dataclass(frozen=True)
class DocumentPart:
    """The text of `document` from byte `start` to byte `stop` (None: to its end)."""

    document: Document
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes, as far as the document's size tells."""
        return (self.document.size if self.stop is None else self.stop) - self.start

    def chunks(self) -> Iterator[str]:
        """The part's text; starts anew at each call."""
        if self.start == 0 and self.stop is None:
            return self.document.chunks()
        return between(self.document.chunks(), self.start, self.stop)


def divide(documents: Sequence[Document], fraction: float) -> dict[SplitName, list[DocumentPart]]:
    """Training and validation parts, `fraction` of the bytes for validation.

    With enough documents, whole ones, chosen by the sha256 of their names; otherwise the end of each.
    """
    chosen = _by_name(documents, fraction)
    if chosen:
        return {
            "train": [DocumentPart(d) for d in documents if d.name not in chosen],
            "validation": [DocumentPart(d) for d in documents if d.name in chosen],
        }
    borders = [(d, int(d.size * (1 - fraction))) for d in documents]
    return {
        "train": [DocumentPart(d, 0, border) for d, border in borders],
        "validation": [DocumentPart(d, border, None) for d, border in borders],
    }


def _by_name(documents: Sequence[Document], fraction: float) -> set[str]:
    """Names of the validation documents; none when there are few documents or they are too unequal."""
    if len(documents) < WHOLE_DOCUMENTS_FROM:
        return set()
    wanted = fraction * sum(d.size for d in documents)
    chosen: set[str] = set()
    held = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest()):
        if held >= wanted:
            break
        # One huge document must not eat the training text: pass over what would take twice the share or more.
        if held + document.size < 2 * wanted:
            chosen.add(document.name)
            held += document.size
    return chosen if 2 * held >= wanted else set()
