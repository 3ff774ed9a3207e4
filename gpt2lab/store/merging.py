"""A study from another store: its record and its runs, copied into this one.

Run ids are the same in every store, so stores may also be merged by copying folders: what is there twice is the same
run, and whichever copy is finished will do.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpt2lab.errors import ConfigError, EnvironmentFault, LockHeld
from gpt2lab.records import StudyRecord, SweepRecord, run_ids
from gpt2lab.store import RunFolder, Store, disk_fault, make_folder, publish_folder, temporary_beside
from gpt2lab.store.files import fsync_folder
from gpt2lab.store.ledger import read_ledger

NOT_COPIED = shutil.ignore_patterns("lock*", "job.json", "*.partial")
NAMES_AT_A_TIME = 500
"""Runs in one call of ssh."""


@dataclass
class Merged:
    """What became of a study's runs. there: finished here before. missing: not in the other store either."""

    copied: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    at_work: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def merge(name: str, source: Store, target: Store) -> Merged:
    """Copy a study or sweep, and its runs that are further than those of `target`. A run at work in either store is
    left alone; the same call copies it later. Raises ConfigError for an unknown name, DataFault, EnvironmentFault."""
    record: StudyRecord | SweepRecord
    record = source.study(name) if source.kind(name) == "study" else source.sweep(name)
    merged = Merged()
    for run in run_ids(record):
        ours, theirs = target.run(run), source.run(run)
        if ours.status() in ("finished", "diverged"):
            merged.there.append(run)
        elif not theirs.path.is_dir():
            merged.missing.append(run)
        elif "running" in (ours.status(), theirs.status()):
            merged.at_work.append(run)
        else:
            with contextlib.suppress(LockHeld):
                copy_run(theirs, ours)
                merged.copied.append(run)
    for folder in ("code", "noise"):
        if (source.root / folder).is_dir():
            _copy_new(source.root / folder, target.folder(folder))
    if isinstance(record, SweepRecord):
        target.write_sweep(record)
    else:
        here = any(line["hash"] == record.ledger for line in read_ledger(target.root).lines)
        target.write_study(record if here else record.with_(ledger=""))  # else its line is in the other store's ledger
    return merged


def copy_run(theirs: RunFolder, ours: RunFolder) -> None:
    """Copy a run, in place of an unfinished one that is not further. A kill leaves the old files or the new ones."""
    if ours.path.is_dir() and theirs.status() not in ("finished", "diverged"):
        if theirs.saved_step() <= ours.saved_step():
            return
    draft = temporary_beside(ours.path)
    try:
        shutil.copytree(theirs.path, draft, ignore=NOT_COPIED)
        if ours.path.is_dir():
            with ours.lock():
                gone = temporary_beside(ours.path)
                ours.path.rename(gone)
                publish_folder(draft, ours.path)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            publish_folder(draft, ours.path)
    except OSError as error:
        raise disk_fault(error, ours.path) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_new(source: Path, target: Path) -> None:
    """Files that `target` does not have."""
    make_folder(target)
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_file() and not place.exists():
            make_folder(place.parent)
            shutil.copyfile(path, place)
    fsync_folder(target)


@contextlib.contextmanager
def store_of(address: str, name: str) -> Iterator[Store]:
    """The store in a folder; or, for HOST:FOLDER, a copy by ssh of what belongs to a study there, while inside. Raises
    ConfigError, EnvironmentFault."""
    host, colon, folder = address.partition(":")
    if not colon or Path(address).exists():
        if not Path(address).is_dir():
            raise ConfigError("there is no such folder of runs", where=address, hint="FOLDER, or HOST:FOLDER by ssh")
        yield Store(address)
        return
    with tempfile.TemporaryDirectory(prefix="gpt2lab-pull-") as kept:
        store = Store(kept)
        _fetch(host, folder, ["studies", "sweeps", "code", "noise"], store.root)
        record = store.study(name) if store.kind(name) == "study" else store.sweep(name)
        runs = run_ids(record)
        for start in range(0, len(runs), NAMES_AT_A_TIME):
            _fetch(host, folder, runs[start : start + NAMES_AT_A_TIME], store.root)
        yield store


def _fetch(host: str, folder: str, names: list[str], root: Path) -> None:
    """Copy those of the named folders that exist below `folder` of a host."""
    # names are those of the store's folders and run ids, none of which has a space
    script = (
        f"cd {shlex.quote(folder)} && tar -cf - --exclude=lock $(ls -d {shlex.join(names)} 2>/dev/null) < /dev/null"
    )
    try:
        with subprocess.Popen(["ssh", "--", host, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ssh:
            assert ssh.stdout is not None and ssh.stderr is not None
            with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=ssh.stdout, mode="r|") as archive:
                archive.extractall(root, filter="data")
            said = ssh.stderr.read().decode(errors="replace").strip().splitlines()
        if ssh.returncode:
            raise EnvironmentFault("; ".join(said) or f"ssh: exit code {ssh.returncode}", where=f"{host}:{folder}",
                                   hint=f"ssh {host} ls {shlex.quote(folder)}")  # fmt: skip
    except OSError as error:
        raise EnvironmentFault(f"ssh: {error.strerror or error}", where=host, hint="copy the folder of runs") from error
