"""Which text is for training and which for validation: fixed by the documents alone, whatever the seed or run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gpt2lab.data.text import Document, between

WHOLE_DOCUMENTS_FROM = 10
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


@dataclass(frozen=True)
class Part:
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


def divide(documents: Sequence[Document], fraction: float) -> dict[SplitName, list[Part]]:
    """Training and validation parts, `fraction` of the bytes for validation.

    With enough documents, whole ones, chosen by the sha256 of their names; otherwise the end of each.
    """
    chosen = _by_name(documents, fraction)
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
