"""Streams that are read row by row and go on from any row, and those of local files, whatever their format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gpt2lab.basics.text import plural
from gpt2lab.data.corpora import Place, SplitName, Stream
from gpt2lab.data.files import canonical_sha256, changed, known_sha256, named
from gpt2lab.errors import DataFault, Gpt2labError, command


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
                what = f"cannot be read behind document {self._row:,}: {first_line(error)}"
                raise DataFault(what, where=str(path), hint=command("ls", "-l", path)) from error

    def state(self) -> Any:
        return {"file": self._file, "row": self._row}


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
        source=f"{plural(len(facts), 'file')} of {what}",
        identity=canonical_sha256([*about, facts, len(validation)]),
        size=sum(map(size, all_files)),
        open=lambda place: RowPass(segments, place, None, lambda error: DataFault(first_line(error)), unchanged),
    )


def first_line(error: Exception) -> str:
    """The first line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
