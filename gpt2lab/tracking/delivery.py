"""Carries the journals of one study, or of one sweep as trials.py has it, to its mirror.

Each row arrives exactly once. How far a copy got is asked of the mirror itself when a run is opened, again after every
error, and a batch is one transaction there: no note of ours can be out of step with what was stored. Rows are stored in
order, so the greatest `tokens` of a copy says it all. A run that resumes writes some steps again; they are equal, and
the mirror keeps the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2lab.errors import DataFault
from gpt2lab.store import Row, RunFolder, Status, Store, file_lock, write_json
from gpt2lab.tracking.journal import Tail
from gpt2lab.tracking.mirror import Copy, CopyGone, Mirror
from gpt2lab.tracking.trials import ENDED, OUTCOME

OUTCOMES: dict[str, Status] = {"pruned": "partial", "diverged": "diverged", "failed": "failed"}
"""What the mirror shows of a run whose trial has ended so, whatever the run is now."""
METRICS_PER_BATCH = 1000
LOCK_PATIENCE_SECONDS = 60.0


class Delivery:
    """Carries the journals of one study's runs to a mirror; may be slow and may raise."""

    def __init__(self, store: Store, record: Mapping[str, Any], mirror: Mirror) -> None:
        self._store, self._record, self._mirror = store, record, mirror
        self._parent: str | None = None
        self._links: dict[str, Any] = {}
        self._newest = record
        self._runs = [_Carried(arm, seed, run) for arm, seed, run in runs_of(store, record)]
        self.notes: list[str] = []

    def update(self, record: Mapping[str, Any]) -> None:
        """Follow what a newer record of the same study says, from the next pass on. For any thread."""
        self._newest = record

    def once(self, over: bool = False) -> int:
        """Carry everything that is new, and return the number of rows. Raises what the mirror raises.

        over: nobody works on the study now, so what is unfinished was killed.

        One run that the mirror refuses does not hold up the others: it goes last the next time. After two failures the
        pass ends, since a mirror that does not answer takes its time over each.
        """
        failures: list[Exception] = []
        carried = 0
        self._take_record()
        try:
            self._open_study()
            for one in list(self._runs):
                try:
                    carried += self._carry(one)
                except DataFault as damaged:
                    one.status = "failed"
                    self._note(f"{damaged}; this run's rows are not sent")
                except Exception as error:
                    one.copy = None
                    self._runs.remove(one)
                    self._runs.append(one)
                    failures.append(error)
                    if len(failures) == 2:
                        break
            if failures:
                raise failures[0]
            self._settle_study(over)
            self._keep_links()
        finally:
            while self._mirror.notes:
                self._note(self._mirror.notes.pop(0))
        return carried

    def undelivered(self) -> int:
        """Rows on the disk beyond what the mirror is known to have."""
        known = {one.key: one.tokens for one in list(self._runs)}
        runs = runs_of(self._store, self._newest)
        return sum(
            row["tokens"] > known.get((arm, which, run.id), -1.0)
            for arm, which, run in runs
            for row in _readable_rows(run)
        )

    def _take_record(self) -> None:
        """Take over the newest record, and begin to carry the runs that it has more."""
        if self._record is self._newest:
            return
        self._record = self._newest
        runs, known = runs_of(self._store, self._record), {one.key for one in self._runs}
        self._runs += [_Carried(arm, which, run) for arm, which, run in runs if (arm, which, run.id) not in known]

    def _open_study(self) -> None:
        if self._parent is None:
            with self._alone():
                self._parent = self._mirror.open_study(self._record)

    def _carry(self, one: _Carried) -> int:
        try:
            return self._carry_to_copy(one)
        except CopyGone:  # deleted in the UI: new copies, below a new parent if that went too
            before, self._parent, one.copy = self._parent, None, None
            self._open_study()
            if self._parent != before:
                for other in self._runs:
                    other.copy = None
            return self._carry_to_copy(one)

    def _carry_to_copy(self, one: _Carried) -> int:
        one.status = one.run.status()  # before the rows: a run that is over now writes no more of them
        if one.status == "absent" or (one.status in ("partial", "running") and one.run.config() is None):
            return 0  # its worker is starting and has not written what the mirror is to say of it
        if one.copy is None:
            assert self._parent is not None
            with self._alone():
                one.copy = self._mirror.open_run(self._record, self._parent, one.arm, one.seed, one.run)
            one.tail = Tail(one.run.metrics)
        one.tokens = one.copy.tokens
        fresh = [row for row in one.tail.new_rows() if row["tokens"] > one.copy.tokens]
        for batch in batches(fresh):
            self._mirror.send(one.copy, batch)
            one.tokens = one.copy.tokens
        shown = OUTCOMES.get(self._outcome(one), one.status)
        self._mirror.settle(one.copy, shown, one.run, self._record.get("evaluation", {}).get("key"))
        if tags := self._record["arms"][one.arm].get("tags"):
            self._mirror.mark(one.copy, tags)
        return len(fresh)

    def _outcome(self, one: _Carried) -> str:
        """How the run's trial has ended, as far as it is one and has."""
        outcome = str(self._record["arms"][one.arm].get("tags", {}).get(OUTCOME, ""))
        return outcome if outcome in ENDED else ""

    def _statuses(self) -> list[Status]:
        """What the state of the whole follows from. A sweep is over when all its trials are, however they ended."""
        if "open" not in self._record:
            return [one.status for one in self._runs]
        at_work = [one for one in self._runs if one.status == "running" and not self._outcome(one)]
        return ["running"] if at_work else ["absent" if self._record["open"] else "finished"]

    def _settle_study(self, over: bool) -> None:
        assert self._parent is not None
        try:
            self._mirror.settle_study(self._parent, self._statuses(), over)
        except CopyGone:
            self._parent = None
            for one in self._runs:
                one.copy = None

    def _alone(self) -> Any:
        """Two commands that follow one study must not both make its runs in the mirror."""
        return file_lock(kept_at(self._store, self._record, "lock"), LOCK_PATIENCE_SECONDS)

    def _keep_links(self) -> None:
        """Remember where things are in the mirror, for `gpt2lab ui` and reports; nothing here is read back."""
        links = {
            "uri": self._mirror.shown_uri,
            "experiment_id": self._mirror.experiment_id,
            "parent_run_id": self._parent,
            "runs": {one.run.id: one.copy.id for one in self._runs if one.copy},
        }
        if links != self._links:
            write_json(kept_at(self._store, self._record, "json"), links)
            self._links = links

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def kept_at(store: Store, record: Mapping[str, Any], ending: str) -> Path:
    """A file of ours about the copies of a study or sweep; those that share a name have one each."""
    folder = store.root / "tracking"
    return (folder / "sweeps" if record.get("kind") == "sweep" else folder) / f"{record['name']}.{ending}"


def runs_of(store: Store, record: Mapping[str, Any]) -> list[tuple[str, str, RunFolder]]:
    """(arm, which, run) of every run of a study, seed-major as they are trained; `which` is the seed, with the learning
    rate's or budget's multiple for runs that are there to find a rate or a curve, and with `shared` for those at the
    settings as written of an arm that was tuned."""
    found = []
    for arm, one in record["arms"].items():
        trials = (one.get("bracket") or {}).get("trials", [])
        found += [(-1.0, arm, f"{t['seed']} lr x{t['factor']:g}", t["run"]) for t in trials]
        found += [(float(seed), arm, seed, run) for seed, run in one["runs"].items()]
        shared = (one.get("shared") or {}).get("runs", {})
        found += [(float(s), arm, f"{s} shared", run) for s, run in shared.items() if run != one["runs"].get(s)]
        for point in one.get("curve", []):
            found += [(float(s), arm, f"{s} {point['budget']:g}x", run) for s, run in point["runs"].items()]
    return [(arm, which, store.run(run)) for _, arm, which, run in sorted(found, key=lambda item: item[0])]


def batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Whole rows, in order, in groups of at most METRICS_PER_BATCH metrics (a row's `tokens` is one of them)."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        count = len(row["metrics"]) + 1
        if batch and size + count > METRICS_PER_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += count
    if batch:
        yield batch


class _Carried:
    """One run on its way to the mirror."""

    def __init__(self, arm: str, seed: str, run: RunFolder) -> None:
        self.arm, self.seed, self.run = arm, seed, run
        self.key = (arm, seed, run.id)
        self.copy: Copy | None = None
        self.tail = Tail(run.metrics)
        self.status: Status = "absent"
        self.tokens = -1.0
        """How far the mirror is known to be; kept when `copy` is dropped after an error."""


def _readable_rows(run: RunFolder) -> list[Row]:
    try:
        return run.rows()
    except (DataFault, OSError):
        return []
