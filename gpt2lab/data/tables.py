"""Corpora of tables with one document a row: local files, and datasets of the Hugging Face hub, streamed by the package
`datasets`."""

from __future__ import annotations

import gzip
import importlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gpt2lab.data.corpora import Place, Stream, check_paths, corpus
from gpt2lab.data.files import canonical_sha256, matching, others
from gpt2lab.data.rows import BadRow, Reader, RowPass, Rows, Segment, first_line, local_stream
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, command

REACH_SECONDS = 20.0
TABLES = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".gz": "json", ".zst": "json",
    ".arrow": "arrow",
}  # fmt: skip
"""Suffix of a table file -> its format."""


class HubRows:
    """The column `text` of a streamed dataset of the hub."""

    def __init__(self, dataset: Any, state: Any) -> None:
        if dataset.column_names is not None:
            _check_column("text", dataset.column_names)
            dataset = dataset.select_columns(["text"])
        if state is not None:
            dataset.load_state_dict(state)
        self.dataset = dataset

    def __iter__(self) -> Iterator[str | None]:
        for row in self.dataset:
            content = row.get("text")
            if content is None:
                _check_column("text", row)
            elif not isinstance(content, str):
                raise ConfigError(_not_text("text", content), where="data.corpus.field", hint=A_COLUMN)
            yield content

    def state(self) -> Any:
        return self.dataset.state_dict()


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
                yield BadRow(f"no JSON: {first_line(error)}", where), where
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


@corpus.register("documents", source="local files", check=check_paths("documents"))
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
            f"is no Parquet: {first_line(error)}", where=str(path), hint=command("ls", "-l", path)
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
                return HubRows(dataset, state)

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
        f"cannot be read from the Hugging Face hub: {first_line(error)}",
        where=name,
        hint="the same command once you are online continues; or files that you have: "
        "--set 'data.corpus={name: documents, paths: [FOLDER/*.parquet]}'",
    )


@corpus.register("fineweb-edu-10b", source="arXiv:2406.17557; HuggingFaceFW/fineweb-edu, sample-10BT")
def fineweb_edu_10b(*, revision: str = "main") -> Stream:
    """10B tokens of educational web pages, from the Hugging Face hub: what build-nanogpt trains on.

    revision: a branch, tag or commit there.
    """
    return hub("HuggingFaceFW/fineweb-edu", "sample-10BT", revision, size=45 * 10**9)


@corpus.register("fineweb-10b", source="arXiv:2406.17557; HuggingFaceFW/fineweb, sample-10BT")
def fineweb_10b(*, revision: str = "main") -> Stream:
    """10B tokens of cleaned web pages, from the Hugging Face hub: what llm.c and modded-nanogpt train on.

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
