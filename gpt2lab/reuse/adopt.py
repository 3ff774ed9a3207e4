"""Keep finished runs when only code changed, if it still trains the same bits.

A run's id names its code, so every edit of what trains makes new ids, also an edit that changes no bit: a faster kernel
call, a renamed variable. `adopt` puts that to the test: it replays one old run of each kind with the code that is there
now. Only if all bits are equal, the old runs of that kind are kept under their new ids, with a note of where they are
from. What happens between the first and the last steps is not replayed: the note says so by being there.

Layer: beside the executors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.errors import EnvironmentFault, LockHeld
from gpt2lab.identity import digest
from gpt2lab.planning.plan import Plan
from gpt2lab.planning.runs import Run, is_finished
from gpt2lab.reuse.replay import can_be_replayed, replay
from gpt2lab.reuse.why import CODE, without_code
from gpt2lab.store import RunFolder, Store, now, publish_folder, temporary_beside, write_json

ONE_FOR_ALL = ("optim.lr", "optim.warmup_steps", "training.steps")
"""Settings in which runs of one kind may differ, besides their seeds: they choose numbers, not code."""

COPIED = ("metrics.jsonl", "run.log", "error.log")
"""Files that are appended to; the others are replaced as a whole, so two runs can share them."""

OF_ITS_OWN = ("run.json", "lock")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A run of the plan that is not there, and a finished one that differs from it in code alone."""

    new: Run
    old: RunFolder


@dataclass(frozen=True)
class Kind:
    """Candidates that one replay speaks for, and the old run to be replayed; None when none can be."""

    candidates: tuple[Candidate, ...]
    witness: RunFolder | None

    def __str__(self) -> str:
        """The arms."""
        return ", ".join(dict.fromkeys(one.new.arm for one in self.candidates))


@dataclass(frozen=True)
class Outcome:
    """How one kind of runs came out: `adopted` new ids, or why none was."""

    kind: str
    adopted: tuple[str, ...] = ()
    refused: str = ""


def candidates(plan: Plan, store: Store) -> list[Candidate]:
    """What could be adopted for the runs that are due and not there; the newest old run for each."""
    wanted = [run for run in plan.runs() if _is_absent(run, store)]
    known: dict[str, list[tuple[str, RunFolder]]] = {}
    for folder in store.runs() if wanted else ():
        record = folder.identity() or {}
        if "identity" in record and folder.status() == "finished":
            key = digest(without_code(record["identity"]))
            known.setdefault(key, []).append((str(record.get("created", "")), folder))
    found = []
    for run in wanted:
        olds = known.get(digest(without_code(run.identity)), [])
        if olds:
            found.append(Candidate(run, max(olds, key=lambda item: item[0])[1]))
    return found


def _is_absent(run: Run, store: Store) -> bool:
    return not is_finished(run, store) and store.run(run.id).status() == "absent"


def without_old_runs(plan: Plan, store: Store) -> list[str]:
    """For each arm with runs that are due and for which nothing can be adopted: how many, and why."""
    found = {one.new.id for one in candidates(plan, store)}
    reasons: dict[tuple[str, str], int] = {}
    for run in plan.runs():
        if run.id not in found and not is_finished(run, store):
            nothing = "no finished run differs in code alone"
            reason = nothing if _is_absent(run, store) else "already begun under its new id"
            reasons[run.arm, reason] = reasons.get((run.arm, reason), 0) + 1
    return [f"{arm}: {count} due, {reason}" for (arm, reason), count in reasons.items()]


def kinds(plan: Plan, store: Store) -> list[Kind]:
    """The candidates, put together where one replay speaks for all: same old code, same recipe, same new code."""
    groups: dict[str, list[Candidate]] = {}
    for one in candidates(plan, store):
        key = digest([_kind(_identity(one.old)), {part: one.new.identity[part] for part in CODE}])
        groups.setdefault(key, []).append(one)
    return [Kind(tuple(group), _witness(group[0].old, [one.old for one in group], store)) for group in groups.values()]


def _witness(first: RunFolder, group: list[RunFolder], store: Store) -> RunFolder | None:
    """A run of the old code that can be replayed: one of the group, else any of its kind."""
    kind = _kind(_identity(first))
    others = (run for run in store.runs() if _identity(run) and _kind(_identity(run)) == kind)
    return next((run for runs in (group, others) for run in runs if can_be_replayed(run)), None)


def _identity(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = (run.identity() or {}).get("identity") or {}
    return found


def _kind(identity: Mapping[str, Any]) -> str:
    """Hash of all in an identity but the seed and what ONE_FOR_ALL names."""
    settings = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in ONE_FOR_ALL}
        for section, values in identity["settings"].items()
    }
    return digest({**identity, "settings": settings, "seed": None, "repeat": None})


def adopt(plan: Plan, store: Store, say: Say = lambda text: None) -> list[Outcome]:
    """Replay one old run of every kind, and keep all of its kind if its bits come out the same."""
    outcomes = []
    for kind in kinds(plan, store):
        if kind.witness is None:
            outcomes.append(Outcome(str(kind), refused="no run of this kind kept a checkpoint to replay from"))
            continue
        say(f"{kind}: replaying {kind.witness.id}")
        replayed = replay(kind.witness, plan.data, plan.machine.threads)
        if replayed.parted:
            outcomes.append(Outcome(str(kind), refused=replayed.parted))
            continue
        kept = [one.new.id for one in kind.candidates if keep(one, store, replayed.evaluation)]
        outcomes.append(Outcome(str(kind), adopted=tuple(kept)))
    return outcomes


def keep(one: Candidate, store: Store, evaluation: str | None) -> bool:
    """Put the old run's files under the new id, all at once; False when another process was there before.

    evaluation: key of the only evaluation to be kept, since it alone was repeated.
    """
    target = store.run(one.new.id)
    try:
        with target.lock():
            if _names(target.path) != {"lock"}:
                return False
            for left in store.root.glob(f".{target.id}.*.partial"):  # of one who was killed here; we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            temporary = temporary_beside(target.path)
            try:
                _fill(temporary, one, evaluation)
                return _put(temporary, target.path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except LockHeld:
        return False


def _put(temporary: Path, final: Path) -> bool:
    """Let a complete folder take the place of one that holds nothing but the lock, which we have; False when another
    process came in between. Whoever waits for that lock notices that it lost its name."""
    (final / "lock").unlink()
    try:
        final.rmdir()
        publish_folder(temporary, final)
    except (OSError, EnvironmentFault):
        if _names(final):
            return False
        raise
    return True


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _fill(folder: Path, one: Candidate, evaluation: str | None) -> None:
    """The old run in a fresh folder: its files, and a run.json of its own that says where they are from."""
    folder.mkdir()
    for path in _files(one.old.path, evaluation):
        _share(path, folder / path.relative_to(one.old.path))
    before = one.old.identity() or {}
    note = {"created": now(), "adopted_from": one.old.id}
    first = before.get("first_created", before.get("created"))
    write_json(
        folder / "run.json", {**before, **note, "first_created": first, "id": one.new.id, "identity": one.new.identity}
    )


def _files(old: Path, evaluation: str | None) -> Iterator[Path]:
    """Every file of the old run that counts for the new one."""
    for path in sorted(old.rglob("*")):
        inside = path.relative_to(old)
        hidden = any(part.startswith(".") for part in inside.parts)
        own = str(inside) in OF_ITS_OWN or (inside.parts[0] == "evaluations" and path.stem != evaluation)
        if path.is_file() and not (path.is_symlink() or hidden or own):
            yield path


def _share(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy of one that is, or across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name not in COPIED:
        try:
            os.link(source, target)
            return
        except OSError:  # some file systems have one name for each file
            pass
    shutil.copy2(source, target)
