"""Sources of text: the slot `data.corpus`, what its corpora return, and the corpus `several`, which combines others.

A corpus is a function that returns a `Corpus` (documents that can be listed), a `Stream` (too many for a list) or
`TokenFiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from gpt2lab.data.files import Progress, canonical_sha256
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Misfit, Slot

corpus = Slot("data.corpus", "where the text comes from", default="shakespeare")
Place = Any
"""Position at which reading continues, as plain JSON; None is the start."""
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


@dataclass(frozen=True)
class Document:
    """One document, such as a play or a file.

    name:   unique within its corpus and the same on every machine: the training/validation split depends on it.
    size:   bytes, for progress and for the size of the split.
    chunks: starts reading from the beginning at each call; the joined chunks are the document, each of bounded size.
    """

    name: str
    size: int
    chunks: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Corpus:
    """A set of documents, few enough to be listed.

    source:      a description of their origin, without machine paths.
    identity:    changes whenever names or content of the documents do; computed with as little reading as possible.
    documents:   fetches them if necessary, and lists them.
    ready:       fetches them beforehand where that takes a while, with progress.
    composition: a row for each of several sources, for users; fetches them if necessary.
    """

    source: str
    identity: str
    documents: Callable[[], Sequence[Document]]
    ready: Callable[[Progress], object] = field(default=lambda progress: None, kw_only=True)
    composition: Callable[[], Sequence[Mapping[str, Any]]] = field(default=list, kw_only=True)


class TextPass(Protocol):
    """One pass over a stream."""

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        """Each document's text, and its split where the corpus defines one."""

    def place(self) -> Place:
        """The position at which a later pass continues, after the last document."""


@dataclass(frozen=True)
class Stream:
    """Documents too many to be listed, always in the same order.

    source, identity: as of a Corpus.
    size:             about how many bytes of text, for progress and for the share of validation; the same for an equal
                      identity.
    open:             starts reading at a place. Called for each pass.
    """

    source: str
    identity: str
    size: int
    open: Callable[[Place], TextPass]


@dataclass(frozen=True)
class Several(Corpus):
    """Several corpora one after another, each divided into training and validation as it is alone. The names of their
    documents begin with that of the corpus and a slash."""

    corpora: Mapping[str, Corpus]


def _check_several(data: object, options: Mapping[str, Any]) -> list[str]:
    """Names and choices of the corpora of `several`."""
    problems = [] if len(options["corpora"]) > 1 else ["at least two corpora are expected"]
    for name, written in options["corpora"].items():
        if "/" in name or not name:
            problems.append(f"the name of a corpus has no /: {name!r}")
        try:
            chosen = corpus.read(written)
        except Misfit as misfit:
            problems += [f"{name}: {what}" for _, what in misfit.problems]
        else:
            check = corpus[chosen.name].check
            problems += [f"{name}: {what}" for what in (check(data, chosen.options) if check else [])]
    return problems


@corpus.register("several", source="arXiv:2005.14165, section 2.2", check=_check_several)
def several(*, corpora: dict[str, Any]) -> Several:
    """Several corpora together; `data.batches: {name: mixture, weights: ...}` weighs them.

    corpora: name -> corpus, such as {prose: shakespeare, code: {name: text, paths: [...]}}; each must list documents.
    """
    built = {name: corpus.build(corpus.read(written)) for name, written in corpora.items()}
    streamed = [name for name, one in built.items() if not isinstance(one, Corpus)]
    if streamed:
        what = f"{', '.join(streamed)} cannot list documents: only text files and packed corpora can be combined"
        raise ConfigError(what, where="data.corpus.corpora")
    return Several(
        source="; ".join(f"{name}: {one.source}" for name, one in built.items()),
        identity=canonical_sha256(["several", [[name, one.identity] for name, one in built.items()]]),
        documents=lambda: [
            replace(document, name=f"{name}/{document.name}")
            for name, one in built.items()
            for document in one.documents()
        ],
        ready=lambda progress: [corpus.ready(progress) for corpus in built.values()],
        composition=lambda: [
            {**row, "name": f"{name}/{row['name']}"} for name, corpus in built.items() for row in corpus.composition()
        ],
        corpora=built,
    )


def check_paths(name: str) -> Callable[[object, Mapping[str, Any]], list[str]]:
    return lambda section, options: [] if options["paths"] else [f"corpus {name} needs at least one path"]
