"""One pass over a corpus, listed or streamed: every text with its split, from any place on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gpt2lab.data.sources import Corpus, Place, Reading, Stream
from gpt2lab.data.split import SPLITS, Part, SplitName, divide

MOST_VALIDATION_BYTES = 100_000_000
"""Of a stream: about twice the tokens that a validation scores by default."""


class Text(NamedTuple):
    """The text of one document, or a part of it, that goes to `split`. name: of a listed document."""

    split: SplitName
    name: str | None
    chunks: Iterator[str]


class Pass(Protocol):
    """Texts in order; `place` is behind the one that came last."""

    def __iter__(self) -> Iterator[Text]: ...
    def place(self) -> Place: ...


@dataclass(frozen=True)
class Division:
    """All text of a corpus, divided. size: about how many bytes. listed: whether documents have names that a manifest
    can hold. open: starts a pass at a place."""

    size: int
    listed: bool
    open: Callable[[Place], Pass]


def division(corpus: Corpus | Stream, fraction: float) -> Division:
    """`corpus` with about `fraction` of its bytes for validation, of a stream MOST_VALIDATION_BYTES at most.

    A stream's documents are told apart by a hash of their text: it needs no list of them, does not depend on their
    order, and puts copies of one document on the same side.
    """
    if isinstance(corpus, Stream):
        share = min(fraction, MOST_VALIDATION_BYTES / max(1, corpus.size))
        return Division(corpus.size, False, lambda place: _Streamed(corpus.open(place), share))
    divided = divide(corpus.documents(), fraction)
    parts = [(split, part) for split in SPLITS for part in divided[split]]
    return Division(sum(part.size for _, part in parts), True, lambda place: _Listed(parts, place or 0))


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
    def __init__(self, reading: Reading, share: float) -> None:
        self.reading, self.border = reading, int(share * 2**64)

    def __iter__(self) -> Iterator[Text]:
        for text, split in self.reading:
            raw = text.encode("utf-8", "replace")  # lone surrogates, which JSON can hold, have no bytes of their own
            chosen: SplitName = split or ("validation" if _draw(raw) < self.border else "train")
            yield Text(chosen, None, iter([text if text.isascii() else raw.decode()]))

    def place(self) -> Place:
        return self.reading.place()


def _draw(raw: bytes) -> int:
    """A number below 2^64 that a text alone decides."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")
