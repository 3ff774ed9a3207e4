"""Encodes a corpus as token ids: its text is divided into training and validation, cut into batches of pieces, and
tokenized in one thread or several.

Neither order nor ids depend on the number of threads, and the division depends on the documents only.
N ids of a batch, n pieces in it
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.corpora import SPLITS, Corpus, Document, Place, Several, SplitName, Stream, TextPass
from gpt2lab.data.tokenizers import Tokenizer, pieces
from gpt2lab.errors import ConfigError, Gpt2labError

WHOLE_DOCUMENTS_FROM = 10
"""Documents of a listed corpus from which on whole ones are taken for validation."""
MOST_VALIDATION_BYTES = 100_000_000
"""Of a stream: about twice the tokens that a validation scores by default."""
BATCH_CHARACTERS = 1 << 18
PENDING = 2
"""Batches per thread that are submitted at a time: one in work, and one queued."""

Encoded = tuple[NDArray[Any], NDArray[np.int64]]
"""Ids of all pieces, separators included (N,), and the number of ids of each piece (n,)."""


# --- training and validation ---


class Text(NamedTuple):
    """The text of a document, or a part of it, that belongs to `split`. name: of a listed document."""

    split: SplitName
    name: str | None
    chunks: Iterator[str]


class Pass(Protocol):
    """Texts in order."""

    def __iter__(self) -> Iterator[Text]: ...

    def place(self) -> Place:
        """The position at which a later pass continues, after the last text."""


@dataclass(frozen=True)
class DividedText:
    """All text of a corpus, divided into training and validation.

    size:   about how many bytes. open: starts a pass at a place.
    listed: whether documents have names that a manifest can hold.
    """

    size: int
    listed: bool
    open: Callable[[Place], Pass]


def division(corpus: Corpus | Stream, fraction: float) -> DividedText:
    """`corpus` with about `fraction` of its bytes for validation, of a stream MOST_VALIDATION_BYTES at most.

    A stream's documents are divided by a hash of their text: this needs no list of them, does not depend on their
    order, and puts copies of a document into the same split.
    """
    if isinstance(corpus, Stream):
        share = min(fraction, MOST_VALIDATION_BYTES / max(1, corpus.size))
        return DividedText(corpus.size, False, lambda place: _Streamed(corpus.open(place), share))
    if isinstance(corpus, Several):
        divided = [_renamed(name, divide(one.documents(), fraction)) for name, one in corpus.corpora.items()]
    else:
        divided = [divide(corpus.documents(), fraction)]
    in_order = [(split, part) for split in SPLITS for parts in divided for part in parts[split]]
    return DividedText(sum(part.size for _, part in in_order), True, lambda place: _Listed(in_order, place or 0))


def _renamed(name: str, parts: dict[SplitName, list[Part]]) -> dict[SplitName, list[Part]]:
    """Parts whose documents are named after their corpus, too."""
    return {
        split: [replace(part, document=replace(part.document, name=f"{name}/{part.document.name}")) for part in some]
        for split, some in parts.items()
    }


class _Listed:
    def __init__(self, parts: Sequence[tuple[SplitName, Part]], done: int) -> None:
        self.parts, self.done = parts, done

    def __iter__(self) -> Iterator[Text]:
        for split, part in self.parts[self.done :]:
            self.done += 1
            yield Text(split, part.document.name, part.chunks())

    def place(self) -> Place:
        return self.done


class _Streamed:
    def __init__(self, reading: TextPass, share: float) -> None:
        self.reading, self.border, self.place = reading, int(share * 2**64), reading.place

    def __iter__(self) -> Iterator[Text]:
        for text, split in self.reading:
            raw = text.encode("utf-8", "replace")  # lone surrogates, which JSON can hold, have no bytes of their own
            draw = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")
            chosen: SplitName = split or ("validation" if draw < self.border else "train")
            yield Text(chosen, None, iter([text if text.isascii() else raw.decode()]))


@dataclass(frozen=True)
class Part:
    """The text of `document` from byte `start` to byte `stop` (None: to its end)."""

    document: Document
    start: int = 0
    stop: int | None = None

    @property
    def size(self) -> int:
        """Bytes, by the document's size."""
        return (self.document.size if self.stop is None else self.stop) - self.start

    def chunks(self) -> Iterator[str]:
        """The part's text, from its beginning at each call."""
        if self.start == 0 and self.stop is None:
            return self.document.chunks()
        return between(self.document.chunks(), self.start, self.stop)


def divide(documents: Sequence[Document], fraction: float) -> dict[SplitName, list[Part]]:
    """Training and validation parts, `fraction` of the bytes for validation.

    With enough documents, whole ones, chosen by the sha256 of their names; otherwise the end of each.
    """
    chosen = _chosen_names(documents, fraction)
    if chosen:
        return {
            "train": [Part(d) for d in documents if d.name not in chosen],
            "validation": [Part(d) for d in documents if d.name in chosen],
        }
    borders = [(d, int(d.size * (1 - fraction))) for d in documents]
    return {
        "train": [Part(d, 0, border) for d, border in borders],
        "validation": [Part(d, border, None) for d, border in borders],
    }


def _chosen_names(documents: Sequence[Document], fraction: float) -> set[str]:
    """Names of the validation documents; none when there are few documents or they are too unequal."""
    if len(documents) < WHOLE_DOCUMENTS_FROM:
        return set()
    target = fraction * sum(document.size for document in documents)
    chosen: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest()):
        if size >= target:
            break
        # skip documents of twice the share or more, which would take too much training text
        if size + document.size < 2 * target:
            chosen.add(document.name)
            size += document.size
    return chosen if 2 * size >= target else set()


def between(chunks: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """The part of a text from byte `start` to byte `stop` of its UTF-8 form, both moved on to the next whole character.

    Adjacent parts neither overlap nor lose a character.
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


# --- batches and their ids ---


class Piece(NamedTuple):
    """Text of bounded length. size: its bytes. last: whether it ends its document. name: of a listed document."""

    split: SplitName
    name: str | None
    text: str
    size: int
    last: bool


@dataclass
class PieceBatch:
    """Neighbouring pieces. place: where reading continues after them; None inside a document and at the end."""

    pieces: list[Piece] = field(default_factory=list)
    place: Place = None

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(piece.size for piece in self.pieces)


def batches(texts: Pass) -> Iterator[PieceBatch]:
    """The pieces of a pass in batches of at least BATCH_CHARACTERS; an empty document is one empty piece."""
    batch, characters = PieceBatch(), 0
    for split, name, chunks in texts:
        parts = pieces(chunks)
        text = next(parts, "")
        last = False
        while not last:
            after = next(parts, None)
            last = after is None
            batch.pieces.append(Piece(split, name, text, len(text) if text.isascii() else len(text.encode()), last))
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                batch.place = texts.place() if last else None
                yield batch
                batch, characters = PieceBatch(), 0
            text = after or ""
    if batch.pieces:
        yield batch


def encode(tokenizer: Tokenizer, batch: Sequence[Piece]) -> Encoded:
    """Ids of the pieces, with the separator after each that ends a document with any text.

    Raises ConfigError that names the document when the tokenizer fails on a piece.
    """
    ids: list[NDArray[np.int64]] = []
    counts = np.zeros(len(batch), np.int64)
    end = None if tokenizer.separator is None else np.array([tokenizer.separator], dtype=np.int64)
    for i, piece in enumerate(batch):
        if not piece.text:
            continue
        try:
            ids.append(tokenizer.encode(piece.text))
        except (Gpt2labError, OSError, MemoryError):
            raise
        except Exception as error:
            where = piece.name or f"the document with {piece.text[:40]!r}"
            problem = f"the tokenizer fails on it: {type(error).__name__}: {error}"
            raise ConfigError(problem, where=where, hint="another tokenizer, or the corpus without it") from error
        counts[i] = len(ids[-1])
        if piece.last and end is not None:
            ids.append(end)
            counts[i] += 1
    return (np.concatenate(ids) if ids else np.empty(0, np.int64)), counts


def encoded(
    work: Iterable[PieceBatch], tokenizer: Tokenizer, threads: int
) -> Generator[tuple[PieceBatch, Encoded], None, None]:
    """Every batch with its ids, in order. Raises what `encode` raises.

    tiktoken and tokenizers leave Python's lock while they encode, so several threads use as many cores.
    """
    pending: deque[tuple[PieceBatch, Future[Encoded]]] = deque()
    pool = ThreadPoolExecutor(threads, "gpt2lab-encode")
    try:
        for batch in work:
            pending.append((batch, pool.submit(encode, tokenizer, batch.pieces)))
            if len(pending) >= PENDING * threads:
                first, ids = pending.popleft()
                yield first, ids.result()
        for first, ids in pending:
            yield first, ids.result()
    finally:
        pool.shutdown(cancel_futures=True)
