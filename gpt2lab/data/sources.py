"""What a corpus can be: documents that are listed, documents that stream by, or tokens made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpt2lab.data.split import SplitName
from gpt2lab.data.text import Document
from gpt2lab.registry import Slot

corpus = Slot("data.corpus", "where the text comes from", default="shakespeare")

Place = Any
"""Plain JSON that says where reading goes on; None is the start."""


@dataclass(frozen=True)
class Corpus:
    """A set of documents, few enough to be listed.

    source:    where they come from, in words, without machine paths.
    identity:  changes whenever names or content of the documents do; known without reading more than it must.
    documents: fetches (if need be) and lists them.
    """

    source: str
    identity: str
    documents: Callable[[], Sequence[Document]]


class Reading(Protocol):
    """One pass over a stream."""

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        """Each document's text, and the split that the corpus itself puts it into, if it does."""

    def place(self) -> Place:
        """Where the next pass goes on if it should begin behind the document that came last."""


@dataclass(frozen=True)
class Stream:
    """Documents too many to be listed, always in the same order.

    source, identity: as of a Corpus.
    size:             about how many bytes of text, for progress and for the share of validation; the same for an equal
                      identity.
    open:             starts reading at a place. Called anew for each pass.
    """

    source: str
    identity: str
    size: int
    open: Callable[[Place], Reading]
