"""The files of one run: config, identity, journal, result, evaluations, checkpoints; each checked when it is read."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from gpt2lab.errors import DataFault
from gpt2lab.records import EvaluationRecord, IdentityRecord, Record, ResultRecord
from gpt2lab.store.files import (
    disk_fault,
    from_json,
    json_file,
    names_of_json,
    read_bytes,
    read_json,
    refuse_link,
    remedy,
    sha256,
    sweep_leftovers,
    write_atomically,
    write_json,
)
from gpt2lab.store.locks import file_lock, is_locked, lock_holder

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
LOCK_PATIENCE_SECONDS = 0.3


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
            return _read(self.path / "run.json", IdentityRecord)

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        self._write("run.json", identity)

    def remarks(self) -> dict[str, Any]:
        """{"tags": [...], "note": "..."}: what the user has written about the run. Raises DataFault."""
        with remedy("rm {}", self.path / REMARKS):
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
        with remedy("rm -r {}; the same command continues from the last checkpoint", path):
            result = _read(path, ResultRecord)
        if result is None:
            return None, {}, {}
        with self._remedy_again():
            identity = self._verify(result)
        return result, identity, {key: self._verify_evaluation(key, result) for key in self.evaluation_keys()}

    def _verify(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Journal, config and identity of a run that has ended, against its result; -> the identity."""
        sealed = JOURNAL_SUM in result
        journal, identity = read_bytes(self.metrics), _read(self.path / "run.json", IdentityRecord, sealed=sealed)
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
        with remedy("rm -rf {}/{{,windows/,parts/}}{}.json; the same command measures again", self._evaluations, key):
            windows = read_json(json_file(self._windows, key), sealed=sealed)
            read_json(json_file(self._parts, key), sealed=sealed)
            if is_final and windows is None:
                raise DataFault("is missing from a run that has ended", where=str(json_file(self._windows, key)))
            loss = record.get("metrics", {}).get("val/loss")
            mean, final = (
                _mean_of(windows, str(json_file(self._windows, key))),
                result.get("metrics", {}).get("val/loss"),
            )
            if is_final and not _alike(loss, final):
                what = f"val/loss is {loss}, at the end of the run it was {final}"
                raise DataFault(what, where=str(json_file(self._evaluations, key)))
            if mean is not None and loss is not None and not _alike(loss, mean):
                what = f"val/loss is {loss}, the mean of its windows {mean:.7g}"
                raise DataFault(what, where=str(json_file(self._evaluations, key)))
        return record

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record the end of training, with a sum of the journal; a failure recorded earlier is cleared."""
        if result.get("status") not in ("finished", "diverged"):
            raise ValueError(f"a result is finished or diverged, not {result.get('status')!r}")
        self._write("result.json", {**result, JOURNAL_SUM: sha256(read_bytes(self.metrics) or b"")})
        self.clear_failure()

    def failure(self) -> dict[str, Any] | None:
        path = self.path / "failure.json"
        with remedy("rm -r {}; the same command tries again", path):
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
        path = json_file(self._evaluations, key)
        with remedy("rm -r {}; the same command measures again", path):
            return _read(path, EvaluationRecord, sealed=sealed)

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self.refuse_links()
        write_json(json_file(self._evaluations, str(evaluation["key"])), evaluation)

    def evaluation_keys(self) -> list[str]:
        """Keys of all that was measured of the run at its end."""
        return names_of_json(self._evaluations)

    def windows(self, key: str) -> dict[str, Any] | None:
        """The losses per window of the evaluation `key`; in a folder of their own, so that they are not listed."""
        return read_json(json_file(self._windows, key))

    def write_windows(self, windows: Mapping[str, Any]) -> None:
        self._write_compact(self._windows, windows)

    def parts(self, key: str) -> dict[str, Any] | None:
        """The losses of the evaluation `key` by position, token frequency and work."""
        return read_json(json_file(self._parts, key))

    def write_parts(self, parts: Mapping[str, Any]) -> None:
        self._write_compact(self._parts, parts)

    def samples(self) -> dict[str, str]:
        """Prompt -> how the trained model continues it; empty without a request."""
        return {str(k): str(v) for k, v in (read_json(self.path / "samples.json") or {}).items()}

    def write_samples(self, samples: Mapping[str, str]) -> None:
        write_json(self.path / "samples.json", samples)

    def _write_compact(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.refuse_links()
        write_json(json_file(folder, str(record["key"])), record, indent=None)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        self.refuse_links()
        write_json(self.path / name, record)

    def _remedy_again(self) -> contextlib.AbstractContextManager[None]:
        """Where only another training helps."""
        return remedy("mv {} {}; the same command trains it again", self.path, f"{self.path}.damaged")

    def refuse_links(self) -> None:
        """Raises ConfigError for a symbolic link in the place of one of the run's folders."""
        for folder in self._folders:
            refuse_link(folder)


def _read(path: Path, kind: type[Record], *, sealed: bool = False) -> dict[str, Any] | None:
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
