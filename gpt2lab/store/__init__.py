"""The run store: runs, studies and sweeps as plain files. A kill or a power cut at any moment leaves either the old
state or the new one. Imports no config class, torch or mlflow.

    runs/<run id>/{config.yaml, run.json, metrics.jsonl, result.json, failure.json, evaluations/, checkpoints/, replay/,
                   lock}
    runs/<run id>/evaluations/{<key>.json, windows/<key>.json, parts/<key>.json}
    runs/studies/<ablation>@<scale>.json
    runs/sweeps/<sweep>@<scale>.json
    runs/{studies,sweeps}/earlier/<name>#<n>.json    the nth declaration, which a later one has replaced
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from gpt2lab.errors import ConfigError, DataFault, command, unknown
from gpt2lab.records import NUMBERED, EvaluationRecord, IdentityRecord, Record, ResultRecord, StudyRecord, SweepRecord
from gpt2lab.store.files import (
    DISK_FULL,
    disk_fault,
    from_json,
    fsync_folder,
    make_folder,
    open_file,
    publish_folder,
    read_bytes,
    read_json,
    sha256,
    sweep_leftovers,
    temporary_beside,
    to_json,
    write_atomically,
    write_json,
)
from gpt2lab.store.locks import file_lock, is_locked, lock_holder, now, still_named

__all__ = [
    "DISK_FULL",
    "Row",
    "RunFolder",
    "Status",
    "Store",
    "disk_fault",
    "file_lock",
    "from_json",
    "fsync_folder",
    "make_folder",
    "now",
    "open_file",
    "parse_rows",
    "publish_folder",
    "read_bytes",
    "read_json",
    "refuse_link",
    "still_named",
    "sweep_leftovers",
    "temporary_beside",
    "to_json",
    "write_atomically",
    "write_json",
]

Row = dict[str, Any]
"""One line of metrics.jsonl: {"step": int, "tokens": int, "seconds": float, "metrics": {name: float}}, written by
`to_json`."""

Status = Literal["absent", "partial", "running", "finished", "diverged", "failed", "damaged"]

NUMBERS = {int, float}
JOURNAL_SUM = "journal_sha256"
"""What result.json says of metrics.jsonl. Runs of older versions lack it, and seals in their other files."""
REMARKS = "remarks.json"
CONFIG_SEAL = "# sha256: "
ALIKE = 1e-6
"""Relative; windows keep 7 decimals of a loss, and the order of sums may differ between two evaluations."""

RUN_ID = re.compile(r"[0-9a-f]{16}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
LOCK_PATIENCE_SECONDS = 0.3

Kept = TypeVar("Kept", StudyRecord, SweepRecord)


def parse_rows(data: bytes, where: str) -> tuple[list[Row], int]:
    """Rows of a metrics.jsonl and the number of bytes they take; what a kill left of a last line is not counted.

    Raises DataFault for a damaged line anywhere else.
    """
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    with contextlib.suppress(ValueError, RecursionError):  # all at once takes a third of the time
        rows = from_json(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines) and _are_rows(rows):
            return rows, sum(map(len, lines))
    rows, end = [], 0
    for index, line in enumerate(lines):
        row = _row(line)
        if row is None:
            if index == len(lines) - 1 and end + len(line) == len(data):
                break  # a power cut can leave the last block of a file as anything
            raise DataFault(f"line {len(rows) + 1} is damaged", where=where)
        rows.append(row)
        end += len(line)
    return rows, end


def _row(line: bytes) -> Row | None:
    try:
        row = from_json(line)
    except (ValueError, RecursionError):
        return None
    return row if _are_rows([row]) else None


def _are_rows(rows: list[Any]) -> bool:
    if not all(isinstance(row, dict) and isinstance(row.get("metrics"), dict) for row in rows):
        return False
    if not all(isinstance(row.get("step"), int) for row in rows):
        return False
    numbers = ((row.get("tokens", 0), row.get("seconds", 0), *row["metrics"].values()) for row in rows)
    return NUMBERS.issuperset(map(type, itertools.chain.from_iterable(numbers)))


def refuse_link(folder: Path) -> None:
    """Raises ConfigError for a symbolic link in the place of a folder of the store."""
    if folder.is_symlink():
        hint = command("rm", folder) + "; to keep runs on another disk, give --runs a folder there"
        raise ConfigError("is a symbolic link; runs are never written through one", where=str(folder), hint=hint)


class _Inside:
    """A path in a run's folder."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __get__(self, run: RunFolder, _: type[RunFolder]) -> Path:
        return run.path / self.place


class RunFolder:
    """The files of one run. Reading needs no lock; the process that trains holds `lock()`."""

    metrics, checkpoints, replay = _Inside("metrics.jsonl"), _Inside("checkpoints"), _Inside("replay")
    _evaluations, _windows = _Inside("evaluations"), _Inside("evaluations/windows")
    _parts = _Inside("evaluations/parts")

    def __init__(self, path: Path) -> None:
        self.path, self.id = path, path.name

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.path, self.checkpoints, self.replay, self._evaluations, self._windows, self._parts

    def status(self) -> Status:
        """`running` means that some process holds the lock now; `partial`, that there is something to continue;
        `damaged`, that a record cannot be trusted: `damage` says which."""
        try:
            result = self.result()
            if result is not None:
                return "diverged" if result["status"] == "diverged" else "finished"
            if is_locked(self.path / "lock"):
                return "running"
            if self.failure() is not None:
                return "failed"
        except DataFault:
            return "damaged"
        names = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        names = {name for name in names if not name.startswith("lock")}
        return "partial" if names - {"job.json", "run.log"} else "absent"

    def damage(self) -> DataFault | None:
        """Which file of the run cannot be trusted, and what to do about it; None while none is known."""
        try:
            self.result()
            self.failure()
            self.rows()
        except DataFault as fault:
            return fault
        return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that works on this run, and sweep what a killed one left.

        Raises LockHeld, naming host, process and since when. The kernel alone decides, so a lock of another host is
        respected where the file system carries kernel locks between hosts, and only there.
        """
        self.refuse_links()
        # a short patience: `status` of another process takes the lock for a moment, too
        with file_lock(self.path / "lock", LOCK_PATIENCE_SECONDS):
            for folder in self._folders:
                sweep_leftovers(folder)
            yield

    def holder(self) -> dict[str, Any]:
        """{"host", "pid", "since"} of the process at work on this run; {} when there is none."""
        lock = self.path / "lock"
        return lock_holder(lock) if is_locked(lock) else {}

    def stamps(self) -> Iterator[tuple[str | int, ...]]:
        """Every file but checkpoints, with what changes when it does."""
        folders = ["."]
        while folders:
            inside = folders.pop()
            with contextlib.suppress(OSError), os.scandir(self.path / inside) as entries:
                for entry in sorted(entries, key=operator.attrgetter("name")):
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in ("checkpoints", "replay"):
                            folders.append(entry.name if inside == "." else f"{inside}/{entry.name}")
                        continue
                    with contextlib.suppress(OSError):  # it was a temporary name, or cannot be read
                        stat = entry.stat()
                        yield inside, entry.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def identity(self) -> dict[str, Any] | None:
        """run.json: id, seed, repeat, identity, created. Raises DataFault."""
        with self._remedy_again():
            return _checked(self.path / "run.json", IdentityRecord)

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        self._write("run.json", identity)

    def remarks(self) -> dict[str, Any]:
        """{"tags": [...], "note": "..."}: what the user has written about the run. Raises DataFault."""
        with _remedy("rm {}", self.path / REMARKS):
            written = read_json(self.path / REMARKS) or {}
        return {"tags": list(written.get("tags", [])), "note": str(written.get("note", ""))}

    def remark(self, **changed: Any) -> None:
        """Change the `tags` or the `note` of the run."""
        self._write(REMARKS, self.remarks() | changed)

    def config(self, *, sealed: bool = False) -> str | None:
        """The resolved config as YAML text. Raises DataFault when it is not as it was written; sealed: also when it has
        no sum."""
        path = self.path / "config.yaml"
        with self._remedy_again():
            data = read_bytes(path)
            if data is None:
                return None
            text, mark, seal = data.rpartition(CONFIG_SEAL.encode())
            if not mark and not sealed:
                text = data
            elif seal.decode(errors="replace").strip() != sha256(text):
                raise DataFault("it was changed after it was written", where=str(path))
            try:
                return text.decode()
            except UnicodeDecodeError as error:
                raise DataFault(f"is not UTF-8: {error.reason}", where=str(path)) from None

    def write_config(self, text: str) -> None:
        self.refuse_links()
        text = text if text.endswith("\n") else text + "\n"
        write_atomically(self.path / "config.yaml", f"{text}{CONFIG_SEAL}{sha256(text.encode())}\n")

    def rows(self) -> list[Row]:
        """Every whole row of metrics.jsonl, in order of step. Raises DataFault for a damaged line before the last."""
        with self._remedy_again():
            return parse_rows(read_bytes(self.metrics) or b"", str(self.metrics))[0]

    def last_step(self) -> int:
        """The step of the newest row; 0 before there is one."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def saved_step(self) -> int:
        """The step from which a worker would go on: of the newest checkpoint, or the last one of a run that ended."""
        if self.result() is not None:
            return self.last_step()
        names = (path.name.removeprefix("step_") for path in self.checkpoints.glob("step_*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def result(self) -> dict[str, Any] | None:
        """result.json; None before the end of training. Raises DataFault, with a remedy, when it or another file that
        belongs to a run that has ended is missing, was changed, or does not agree with the others."""
        return self.verified()[0]

    def verified(self) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, dict[str, Any]]]:
        """`result()`, run.json and the evaluations by key, from one reading of the files; the last two are empty before
        the end of training. Raises DataFault as `result`."""
        path = self.path / "result.json"
        with _remedy("rm -r {}; the same command continues from the last checkpoint", path):
            result = _checked(path, ResultRecord)
        if result is None:
            return None, {}, {}
        with self._remedy_again():
            identity = self._verify(result)
        return result, identity, {key: self._verify_evaluation(key, result) for key in self.evaluation_keys()}

    def _verify(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Journal, config and identity of a run that has ended, against its result; -> the identity."""
        sealed = JOURNAL_SUM in result
        journal, identity = read_bytes(self.metrics), _checked(self.path / "run.json", IdentityRecord, sealed=sealed)
        parts: dict[str, Any] = {"metrics.jsonl": journal, "run.json": identity}
        if sealed:
            parts["config.yaml"] = self.config(sealed=True)
        for name, content in parts.items():
            if content is None:
                raise DataFault("is missing from a run that has ended", where=str(self.path / name))
        if sealed and sha256(journal or b"") != result[JOURNAL_SUM]:
            raise DataFault("it was changed after the run ended", where=str(self.metrics))
        if not sealed:
            self._compare_with_journal(result, parse_rows(journal or b"", str(self.metrics))[0])
        return identity or {}

    def _compare_with_journal(self, result: Mapping[str, Any], rows: list[Row]) -> None:
        """In the place of a sum, which older versions did not write."""
        steps, last = result.get("steps"), rows[-1]["step"] if rows else None
        if result["status"] == "finished" and steps is not None and last != steps:
            raise DataFault(f"it ends at step {last}, the run at step {steps}", where=str(self.metrics))
        values = {name: value for row in rows for name, value in row["metrics"].items()}
        for name, value in result.get("metrics", {}).items():
            if name in values and not _alike(value, values[name]):
                what = f"{name} is {values[name]} at its end, {value} in result.json"
                raise DataFault(what, where=str(self.metrics))

    def _verify_evaluation(self, key: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """One evaluation with the files that belong to it, against each other and the end of the journal; -> it."""
        sealed, is_final = JOURNAL_SUM in result, result.get("evaluation") == key
        record = self.evaluation(key, sealed=sealed) or {}
        with _remedy("rm -rf {}/{{,windows/,parts/}}{}.json; the same command measures again", self._evaluations, key):
            windows = read_json(_file(self._windows, key), sealed=sealed)
            read_json(_file(self._parts, key), sealed=sealed)
            if is_final and windows is None:
                raise DataFault("is missing from a run that has ended", where=str(_file(self._windows, key)))
            loss = record.get("metrics", {}).get("val/loss")
            mean, final = _mean_of(windows, str(_file(self._windows, key))), result.get("metrics", {}).get("val/loss")
            if is_final and not _alike(loss, final):
                what = f"val/loss is {loss}, at the end of the run it was {final}"
                raise DataFault(what, where=str(_file(self._evaluations, key)))
            if mean is not None and loss is not None and not _alike(loss, mean):
                what = f"val/loss is {loss}, the mean of its windows {mean:.7g}"
                raise DataFault(what, where=str(_file(self._evaluations, key)))
        return record

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record the end of training, with a sum of the journal; a failure recorded earlier is cleared."""
        if result.get("status") not in ("finished", "diverged"):
            raise ValueError(f"a result is finished or diverged, not {result.get('status')!r}")
        self._write("result.json", {**result, JOURNAL_SUM: sha256(read_bytes(self.metrics) or b"")})
        self.clear_failure()

    def failure(self) -> dict[str, Any] | None:
        path = self.path / "failure.json"
        with _remedy("rm -r {}; the same command tries again", path):
            return read_json(path)

    def fail(self, failure: Mapping[str, Any]) -> None:
        """Record why training stopped; the run can be tried again."""
        self._write("failure.json", failure)

    def clear_failure(self) -> None:
        path = self.path / "failure.json"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_fault(error, path) from error

    def evaluation(self, key: str, *, sealed: bool = False) -> dict[str, Any] | None:
        """What was measured under `key`. Raises DataFault; sealed: also when it has no seal."""
        path = _file(self._evaluations, key)
        with _remedy("rm -r {}; the same command measures again", path):
            return _checked(path, EvaluationRecord, sealed=sealed)

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self.refuse_links()
        write_json(_file(self._evaluations, str(evaluation["key"])), evaluation)

    def evaluation_keys(self) -> list[str]:
        """Keys of all that was measured of the run at its end."""
        return _names(self._evaluations)

    def windows(self, key: str) -> dict[str, Any] | None:
        """The losses per window of the evaluation `key`; in a folder of their own, so that they are not listed."""
        return read_json(_file(self._windows, key))

    def write_windows(self, windows: Mapping[str, Any]) -> None:
        self._write_compact(self._windows, windows)

    def parts(self, key: str) -> dict[str, Any] | None:
        """The losses of the evaluation `key` by position, token frequency and work."""
        return read_json(_file(self._parts, key))

    def write_parts(self, parts: Mapping[str, Any]) -> None:
        self._write_compact(self._parts, parts)

    def samples(self) -> dict[str, str]:
        """Prompt -> how the trained model continues it; empty where nobody asked."""
        return {str(k): str(v) for k, v in (read_json(self.path / "samples.json") or {}).items()}

    def write_samples(self, samples: Mapping[str, str]) -> None:
        write_json(self.path / "samples.json", samples)

    def _write_compact(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.refuse_links()
        write_json(_file(folder, str(record["key"])), record, indent=None)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        self.refuse_links()
        write_json(self.path / name, record)

    def _remedy_again(self) -> contextlib.AbstractContextManager[None]:
        """Where only another training helps."""
        return _remedy("mv {} {}; the same command trains it again", self.path, f"{self.path}.damaged")

    def refuse_links(self) -> None:
        """Raises ConfigError for a symbolic link in the place of one of the run's folders."""
        for folder in self._folders:
            refuse_link(folder)


@contextlib.contextmanager
def _remedy(hint: str, *words: object) -> Iterator[None]:
    """What to try when a file turns out to be damaged: a command, with a place for each of the words."""
    try:
        yield
    except DataFault as fault:
        fault.hint = fault.hint or hint.format(*map(command, words))
        raise


def _checked(path: Path, kind: type[Record], *, sealed: bool = False) -> dict[str, Any] | None:
    record = read_json(path, sealed=sealed)
    if record is not None:
        kind.check(record, str(path))
    return record


def _alike(a: Any, b: Any) -> bool:
    """Whether two stored numbers are the same measurement."""
    if None in (a, b) or math.isnan(a) or math.isnan(b):
        return (a is None or math.isnan(a)) and (b is None or math.isnan(b))
    return math.isclose(a, b, rel_tol=ALIKE)


def _mean_of(windows: Mapping[str, Any] | None, where: str) -> float | None:
    """The loss over all windows; None for none, or where their targets are not kept. Raises DataFault."""
    if windows is None:
        return None
    try:
        losses, targets = windows["losses"], windows["targets"]
        if len(losses) != len(targets):
            raise ValueError
        return math.fsum(map(operator.mul, losses, targets)) / float(sum(targets))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise DataFault("is no record of windows", where=where) from None


@dataclass(frozen=True)
class _Records(Generic[Kept]):
    """Records of one kind, `study` or `sweep`, each a file in `folder` under its name. Those that were replaced are in
    `earlier/`, as <name>#1, <name>#2, ..."""

    folder: Path
    kind: str
    type: type[Kept]

    def names(self) -> list[str]:
        return _names(self.folder)

    def earlier(self, name: str) -> list[str]:
        """Names of the declarations that were replaced, the first one first; those of all records for ""."""
        stems = (path.stem for path in (self.folder / "earlier").glob(f"{name or '*'}{NUMBERED}*.json"))
        numbered = [name.partition(NUMBERED) for name in stems]
        order = sorted((name, int(number)) for name, _, number in numbered if number.isdecimal())
        return [f"{name}{NUMBERED}{number}" for name, number in order]

    def read(self, name: str) -> Kept:
        known = self.names()
        plain, mark, number = name.partition(NUMBERED)
        matches = [plain] if plain in known else [full for full in known if full.partition("@")[0] == plain]
        if len(matches) > 1:
            raise ConfigError(f"'{name}' was run at several scales: {', '.join(matches)}", hint=f"use {matches[0]}")
        found = f"{matches[0]}{mark}{number}" if matches else name
        if mark and matches and found not in (earlier := self.earlier(matches[0])):
            raise ConfigError(unknown(f"earlier {self.kind}", found, earlier), hint="gpt2lab studies")
        path = self.folder / ("earlier" if mark else "") / f"{found}.json"
        with _remedy("restore {} from a copy, or mv it away: the same command then declares anew", path):
            data = read_json(path) if matches else None
            if data is None:
                raise ConfigError(unknown(self.kind, name, known), hint="gpt2lab studies")
            return self.type.read(data, str(path))

    def replaced_by(self, record: Kept) -> Kept | None:
        """The record that would be lost when `record` is written, under the name by which it is to stay."""
        before = self.read(record.name) if record.name in self.names() else None
        if before is None or not record.replaces(before):
            return None
        earlier = self.earlier(record.name)
        replaced = before.with_(name=f"{record.name}{NUMBERED}{len(earlier) + 1}")
        last = self.read(earlier[-1]) if earlier else None  # of a write that a kill has cut short
        return last if last == replaced.with_(name=earlier[-1] if earlier else "") else replaced

    def write(self, record: Kept) -> Path:
        path = _file(self.folder, record.name, f"{self.kind} name")
        refuse_link(self.folder)
        replaced = self.replaced_by(record)
        if replaced is not None:
            refuse_link(self.folder / "earlier")
            write_json(self.folder / "earlier" / f"{replaced.name}.json", replaced.plain())
        write_json(path, record.plain())
        return path


class Store:
    """All runs, and all records of studies and sweeps, below one folder, usually `runs`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._studies = _Records(self.root / "studies", "study", StudyRecord)
        self._sweeps = _Records(self.root / "sweeps", "sweep", SweepRecord)

    def folder(self, *names: str) -> Path:
        """A folder below the root that is going to be written to, whether it exists or not. Raises ConfigError for a
        symbolic link in its place."""
        folder = self.root
        for name in names:
            folder = folder / name
            refuse_link(folder)
        return folder

    def run(self, run_id: str) -> RunFolder:
        """The folder of a run, whether it exists or not. Raises ConfigError for what cannot be a run id."""
        if not RUN_ID.fullmatch(run_id):
            raise ConfigError(f"'{run_id}' is not a run id (16 hexadecimal digits)", hint="gpt2lab runs")
        return RunFolder(self.root / run_id)

    def runs(self) -> list[RunFolder]:
        """Every run that has left something, by id."""
        names = sorted(p.name for p in self.root.iterdir()) if self.root.is_dir() else []
        folders = (RunFolder(self.root / name) for name in names if RUN_ID.fullmatch(name))
        return [run for run in folders if run.path.is_dir()]

    def newest(self, most: int) -> list[RunFolder]:
        """At most so many of the runs that have ended, those that ended last."""
        ended = []
        for folder in self.runs():
            with contextlib.suppress(OSError):
                ended.append((os.stat(folder.path / "result.json").st_mtime_ns, folder.id))
        return [self.run(run) for _, run in sorted(ended)[-most:]]

    def find(self, start: str) -> RunFolder:
        """The run whose id begins so. Raises ConfigError when there is none or more than one."""
        known = [folder.id for folder in self.runs()]
        matches = [name for name in known if name.startswith(start)]
        if len(matches) != 1:
            if not matches:
                self.refuse_study(start)
            what = f"'{start}' begins {len(matches)} run ids" if matches else unknown("run", start, known[:20])
            raise ConfigError(what, hint="gpt2lab runs")
        return self.run(matches[0])

    def refuse_study(self, name: str) -> None:
        """Raises ConfigError where what should name a run names a study."""
        if name in self.studies():
            what = f"'{name}' is a study, not a run; `gpt2lab runs --where study={name}` lists its runs"
            raise ConfigError(what, hint=f"gpt2lab report {name}")

    def studies(self) -> list[str]:
        """Names of the recorded studies, `<ablation>@<scale>`."""
        return self._studies.names()

    def study(self, name: str) -> StudyRecord:
        """The record of a study; `posenc` alone will do while it has one scale only. Raises ConfigError for an unknown
        name, DataFault for a damaged record."""
        return self._studies.read(name)

    def write_study(self, record: StudyRecord) -> Path:
        """Record a study under its name; returns the file. What it replaces stays, as `replaced_by` names it."""
        return self._studies.write(record)

    def conclusion(self, record: StudyRecord) -> str:
        """What its author concludes from the runs of a study; "" for nothing. Raises DataFault."""
        path = self.root / "studies" / "conclusions" / f"{_sum_of(record)}.json"
        with _remedy("rm {}", path):
            return str((read_json(path) or {}).get("text", ""))

    def conclude(self, record: StudyRecord, text: str) -> None:
        """Write that conclusion. Of other runs under the same name nothing is concluded."""
        written = {"text": text, "study": record.name, "written": now()}
        write_json(self.folder("studies", "conclusions") / f"{_sum_of(record)}.json", written)

    def replaced_by(self, record: StudyRecord | SweepRecord) -> str | None:
        """The name under which the present record stays when this one is written; None where none would be lost."""
        replaced = (
            self._sweeps.replaced_by(record) if isinstance(record, SweepRecord) else self._studies.replaced_by(record)
        )
        return replaced.name if replaced else None

    def earlier(self, name: str = "", kind: str = "study") -> list[str]:
        """Names of the declarations of a study or sweep that were replaced, `posenc@nano#1` first; all without a
        name."""
        return (self._studies if kind == "study" else self._sweeps).earlier(name)

    def declaration(self, name: str, kind: str = "study") -> int:
        """Which declaration under its name `name` is: 2 for `posenc@nano#2`, and for `posenc@nano` after one that was
        replaced."""
        number = name.partition(NUMBERED)[2]
        return int(number) if number else len(self.earlier(name, kind)) + 1

    def sweeps(self) -> list[str]:
        """Names of the recorded sweeps, `<sweep>@<scale>`, those that belong to an ablation among them."""
        return self._sweeps.names()

    def sweep(self, name: str) -> SweepRecord:
        """The record of a sweep, as `study`. Raises ConfigError, DataFault."""
        return self._sweeps.read(name)

    def write_sweep(self, record: SweepRecord) -> Path:
        """Record a sweep under its name; returns the file. What it replaces stays."""
        return self._sweeps.write(record)

    def kind(self, name: str) -> str:
        """Whether a name, with or without its scale, is that of a `study` or of a `sweep`; of both, a study, which
        shows the sweep that it rests on. Raises ConfigError for one that is neither."""
        known = {"study": self.studies(), "sweep": self.sweeps()}
        for kind, names in known.items():
            if any(name.partition(NUMBERED)[0] in (full, full.partition("@")[0]) for full in names):
                return kind
        raise ConfigError(unknown("study or sweep", name, [*known["study"], *known["sweep"]]), hint="gpt2lab studies")


def _sum_of(record: StudyRecord) -> str:
    """A sum over a study's declaration and the ids of its runs."""
    runs = sorted(run for arm in record.arms.values() for run in arm.runs.values())
    return sha256("\n".join([record.hash, *runs]).encode())[:16]


def _names(folder: Path) -> list[str]:
    """Names of the JSON files in a folder, which need not exist."""
    return sorted(path.stem for path in folder.glob("*.json") if NAME.fullmatch(path.stem))


def _file(folder: Path, name: str, kind: str = "evaluation key") -> Path:
    """The file of a record. Raises ConfigError for what cannot be its name."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot be a {kind}: letters, digits and _ . @ + - only")
    return folder / f"{name}.json"
