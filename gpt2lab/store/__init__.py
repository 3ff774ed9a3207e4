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
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from gpt2lab.errors import ConfigError, unknown
from gpt2lab.records import NUMBERED, StudyRecord, SweepRecord
from gpt2lab.store.files import (
    DISK_FULL,
    disk_fault,
    from_json,
    fsync_folder,
    json_file,
    make_folder,
    names_of_json,
    open_file,
    publish_folder,
    read_bytes,
    read_json,
    refuse_link,
    remedy,
    sha256,
    sweep_leftovers,
    temporary_beside,
    to_json,
    write_atomically,
    write_json,
)
from gpt2lab.store.locks import file_lock, now, still_named
from gpt2lab.store.run_folder import RUN_ID, Row, RunFolder, Status, parse_rows

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

Kept = TypeVar("Kept", StudyRecord, SweepRecord)


@dataclass(frozen=True)
class _Records(Generic[Kept]):
    """Records of one kind, `study` or `sweep`, each a file in `folder` under its name. Those that were replaced are in
    `earlier/`, as <name>#1, <name>#2, ..."""

    folder: Path
    kind: str
    type: type[Kept]

    def names(self) -> list[str]:
        return names_of_json(self.folder)

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
        with remedy("restore {} from a copy, or mv it away: the same command then declares anew", path):
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
        path = json_file(self.folder, record.name, f"{self.kind} name")
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
        with remedy("rm {}", path):
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
