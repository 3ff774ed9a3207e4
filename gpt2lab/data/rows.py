"""Documents that are rows of tables, streamed by Hugging Face `datasets`: web corpora from the hub, and local files.

Both go the same way: a stream of parts, each a streamed dataset that can be resumed where it stopped.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gpt2lab.data.files import canonical_sha256
from gpt2lab.data.hashes import known_sha256
from gpt2lab.data.paths import matching, named
from gpt2lab.data.sources import Place, Stream, corpus
from gpt2lab.data.split import SplitName
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError

REACH_SECONDS = 20.0
KINDS = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".gz": "json", ".zst": "json",
    ".arrow": "arrow",
}  # fmt: skip
"""How files are read, by how their names end."""


@dataclass(frozen=True)
class Part:
    """Some of a stream's documents. split: where the corpus itself puts them, if it does. open: a streamed dataset."""

    split: SplitName | None
    open: Callable[[], Any]


class Rows:
    """One pass over parts: see `sources.Reading`. `failed` says in our words what went wrong on the way, `after` is
    called at the end."""

    def __init__(
        self, parts: Sequence[Part], field: str, place: Place, commit: str | None,
        failed: Callable[[Exception], Gpt2labError], after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.parts, self.field, self.commit, self.failed, self.after = parts, field, commit, failed, after
        self._first: int = place["part"] if place else 0
        self._state: dict[str, Any] | None = place["state"] if place else None
        self._now, self._dataset = self._first, cast(Any, None)

    def __iter__(self) -> Iterator[tuple[str, SplitName | None]]:
        for index, part in list(enumerate(self.parts))[self._first :]:
            self._now = index
            try:
                self._dataset = self._opened(part)
                for row in self._dataset:
                    if (text := self._text(row)) is not None:
                        yield text, part.split
            except Gpt2labError:
                raise
            except Exception as error:  # whatever the libraries below let through
                raise self.failed(error) from error
        self.after()

    def place(self) -> Place:
        """The part, the state of its dataset, and which version of the hub's it is."""
        assert self._dataset is not None
        return {"part": self._now, "state": self._dataset.state_dict(), "commit": self.commit}

    def _opened(self, part: Part) -> Any:
        dataset = part.open()
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
        text = row.get(self.field)
        if text is None:
            self._check(row)
        elif not isinstance(text, str):
            what = f"column '{self.field}' holds {type(text).__name__}, not text"
            raise ConfigError(what, where="data.corpus.field", hint="the name of a column of text")
        return text

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


def _check_documents(section: object, options: Mapping[str, Any]) -> list[str]:
    return [] if options["paths"] else ["corpus documents needs at least one path"]


@corpus.register("documents", source="local files", check=_check_documents)
def documents(*, paths: list[str], field: str = "text", validation_paths: list[str] | None = None) -> Stream:
    """Local Parquet, JSON lines or Arrow files, one document a row: `paths` are files or globs.

    field: the column that holds the text; rows without any are passed over.
    validation_paths: files that are for validation only; null takes documents by the hash of their text.
    """
    own = [] if validation_paths is None else matching(validation_paths, key="validation_paths", example="*.parquet")
    files = [file for file in matching(paths, example="*.parquet") if file not in own]
    facts = [(name, path.stat().st_size, known_sha256(path)) for name, path in named([*own, *files]).items()]
    groups: list[tuple[SplitName | None, list[Path]]] = [("validation", own), ("train" if own else None, files)]
    parts = [
        Part(split, _local(kind, list(some)))
        for split, group in groups
        for kind, some in itertools.groupby(group, key=_kind)
    ]
    times = {path: path.stat().st_mtime_ns for path in (*own, *files)}

    def failed(error: Exception) -> Gpt2labError:
        return DataFault(f"cannot be read: {_told(error)}", where=str(files[0].parent), hint=f"ls -l {files[0].parent}")

    def unchanged() -> None:
        for path, then in times.items():
            if not path.exists() or path.stat().st_mtime_ns != then:
                hint = "the same command, once it is at rest"
                raise DataFault("changed while it was being read", where=str(path), hint=hint)

    return Stream(
        source=f"{len(facts)} file{'s' * (len(facts) != 1)} of documents",
        identity=canonical_sha256(["documents", field, facts, len(own)]),
        size=sum(_text_bytes(path, field) for path in (*own, *files)),
        open=lambda place: Rows(parts, field, place, None, failed, unchanged),
    )


def _kind(path: Path) -> str:
    kind = KINDS.get(path.suffix)
    if kind is None:
        what = f"'{path.name}' does not end in one of {', '.join(KINDS)}"
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
        told = parquet.read_metadata(path)
    except (OSError, ValueError) as error:
        raise DataFault(f"is no Parquet: {_told(error)}", where=str(path), hint=f"ls -l {path}") from error
    groups = [told.row_group(i) for i in range(told.num_row_groups)]
    columns = [group.column(j) for group in groups for j in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def hub(name: str, config: str | None, revision: str, *, size: int, validation: bool = False) -> Stream:
    """A dataset of the Hugging Face hub with a column `text`. size: about how many bytes of text it holds.

    validation: whether it has a split of that name; the split `train` is for training only then. Which commit
    `revision` stood for is settled at the first pass, and kept in places and manifest.
    """

    def opened(place: Place) -> Rows:
        library()
        commit = place["commit"] if place else _commit(name, revision)

        def part(split: str) -> Callable[[], Any]:
            return lambda: library().load_dataset(name, config, split=split, revision=commit, streaming=True)

        own = [Part("validation", part("validation"))] if validation else []
        parts = [*own, Part("train" if own else None, part("train"))]
        return Rows(parts, "text", place, commit, lambda error: _unreachable(name, error))

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
        f"cannot be read from the Hugging Face hub: {_told(error)}",
        where=name,
        hint="the same command once you are online continues; or files that you have: "
        "--set 'data.corpus={name: documents, paths: [FOLDER/*.parquet]}'",
    )


def _told(error: Exception) -> str:
    """The first line of what a library says."""
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
