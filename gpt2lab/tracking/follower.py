"""Follows the runs of a study or sweep: feeds the live table, and sends their rows to a tracker, each exactly once.

Training never waits for the tracker: runs write to their journals only, `Follower.poll` reads those, and a thread sends
from the same journals. So a tracker may lag, fail and catch up, and there is no queue that could overflow.

The tracker itself reports how far its copy of a run is, when the run is opened and again after every error; a batch is
stored as a whole or not at all. Rows are sent in order, so the greatest `tokens` of a copy is all that is needed. A run
that resumes writes some steps again; they are equal, and the tracker keeps the first.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2lab.basics.redaction import masked
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError, unknown
from gpt2lab.records import ArmRecord, SweepRecord, TrialRecord, labelled_runs
from gpt2lab.store import Row, RunFolder, Status, Store, file_lock, now, read_bytes, read_json, to_json, write_json
from gpt2lab.store.files import sha256
from gpt2lab.tracking import MetricPoint, RunGone, TrackedRun, Tracker, milliseconds, started_ms
from gpt2lab.tracking.addresses import reason
from gpt2lab.tracking.journal import Tail

log = logging.getLogger("gpt2lab.tracking")

Record = Mapping[str, Any]
Say = Callable[[str], None]

GATHER_SECONDS = 0.5  # a call costs the same for one row as for many
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0
HEARTBEAT_SECONDS, LOCK_PATIENCE_SECONDS = 30.0, 60.0
METRICS_PER_BATCH = 1000
OUTCOME = "gpt2lab.outcome"
ENDED = ("finished", "pruned", "diverged", "failed")
"""Final outcomes of a trial."""
STATUS_OF_OUTCOME: dict[str, Status] = {"pruned": "partial", "diverged": "diverged", "failed": "failed"}
"""Outcome -> what the tracker shows of the trial's runs, whatever they are now."""


@dataclass(frozen=True)
class News:
    """New rows of one run since the last poll."""

    arm: str
    seed: str
    run_id: str
    rows: list[Row]


class Follower:
    """Follows a study while it runs. `poll` is quick and never raises, whatever the tracker does. For one thread."""

    def __init__(
        self, store: Store, study: Record, make_tracker: Callable[[], Tracker] | None, say: Say = log.warning
    ) -> None:
        """make_tracker: must not connect; what it raises is raised here, before any training. None follows without a
        tracker. say: takes each message for the user, once, always from `poll` or `close`."""
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        delivery = Delivery(store, study, make_tracker(), self._messages.put) if make_tracker else None
        self._delivery = None if delivery and delivery.is_done() else delivery
        self._name, self._store = str(study["name"]), store
        self._tails = _tails(store, study)
        self._say, self._said = say, set[str]()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._sender: threading.Thread | None = None

    def update(self, study: Record) -> None:
        """Follow, from now on, also the runs that a newer record of the same study adds."""
        self._tails = _tails(self._store, study) | self._tails
        if self._delivery:
            self._delivery.update(study)
        self._wake.set()

    def poll(self) -> list[News]:
        """New rows of every run since the last call; wakes the sender."""
        news = []
        for (arm, seed, run_id), tail in self._tails.items():
            try:
                if rows := tail.new_rows():
                    news.append(News(arm, seed, run_id, rows))
            except (DataFault, OSError) as error:
                self._messages.put(f"{arm} seed {seed} cannot be followed: {error}")
        if self._delivery and self._sender is None and not self._closing.is_set():
            # A daemon: a call into a server that never answers must not keep the program from ending.
            self._sender = threading.Thread(
                target=self._send, args=(self._delivery,), name="gpt2lab-tracking", daemon=True
            )
            self._sender.start()
        self._wake.set()
        self._pass_on()
        return news

    def close(self, timeout: float = 10.0) -> int:
        """Send what is left, within `timeout` seconds; returns, with a message, how many rows are not delivered."""
        self.poll()
        self._closing.set()
        self._wake.set()
        if self._sender:
            self._sender.join(timeout)
        left = self._delivery.undelivered() if self._delivery else 0
        if self._delivery and (left or self._failing or (self._sender and self._sender.is_alive())):
            rows = f"{left:,} rows of {self._name} are" if left else f"the last state of {self._name} is"
            known = "" if self._delivery.answered else "known to be "  # they may have been sent before
            self._messages.put(
                f"{rows} not {known}delivered to {self._delivery.tracker.shown_uri}; everything is kept in "
                f"{self._store.root}, and `gpt2lab sync {self._name}` sends it later"
            )
        self._pass_on()
        return left

    def _pass_on(self) -> None:
        while not self._messages.empty():
            message = self._messages.get()
            if message not in self._said:
                self._said.add(message)
                self._say(masked(message))

    def _send(self, delivery: Delivery) -> None:
        """What the sender's thread executes."""
        pause, reported = FIRST_PAUSE_SECONDS, False
        while True:
            last = self._closing.is_set()  # the last pass has to begin after `close` was called
            self._wake.clear()
            try:
                delivery.send_new(over=last)
                self._failing, pause = False, FIRST_PAUSE_SECONDS
            except Exception as error:
                _log_trace(error)
                if not reported:
                    self._messages.put(
                        f"tracking at {delivery.tracker.shown_uri} does not work at present: {reason(error)}; training "
                        f"goes on, everything is kept in {self._store.root} and sent when it works again"
                    )
                self._failing = reported = True
            if last:
                return
            if self._failing:
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._wake.wait()
                self._closing.wait(GATHER_SECONDS)


def sync(store: Store, study: str | Record, make_tracker: Callable[[], Tracker], say: Say = log.warning) -> int:
    """Bring the tracker's copy of a study (its name or record, or a sweep's record as `as_study` makes it) up to date;
    returns the number of rows sent.

    Runs that a kill left as running are closed. Raises EnvironmentFault when the tracker does not work.
    """
    record = store.study(study).plain() if isinstance(study, str) else study
    delivery = Delivery(store, record, make_tracker(), say)
    try:
        return delivery.send_new(over=True)
    except Gpt2labError:
        raise
    except Exception as error:
        _log_trace(error)
        raise EnvironmentFault(
            f"tracking does not work: {reason(error)}",
            where=delivery.tracker.shown_uri,
            hint=f"gpt2lab sync {record['name']} when it does; nothing is lost",
        ) from None  # the cause may show a password


class Delivery:
    """Sends the journals of one study's runs to a tracker; may be slow and may raise."""

    def __init__(self, store: Store, study: Record, tracker: Tracker, say: Say = log.warning) -> None:
        self.tracker = tracker
        self._store, self._study, self._newest, self._say = store, study, study, say
        self._parent: TrackedRun | None = None
        self._failed = False
        self.answered = False
        """whether the tracker has said what it has"""
        self._links: dict[str, Any] = {}
        self._runs = [_Copied(arm, seed, run) for arm, seed, run in runs_of(store, study)]

    def update(self, study: Record) -> None:
        """Follow a newer record of the same study, from the next pass on. For any thread."""
        self._newest = study

    def send_new(self, over: bool = False) -> int:
        """Send everything that is new, and return the number of rows. Raises what the tracker raises.

        over: no process works on the study now, so what is unfinished was killed.

        After an error, and where a copy was deleted, the tracker is asked again for all of them: a server may come back
        with less than it had.
        """
        if self._failed:
            self._forget()
        self._failed, sent = True, 0
        try:
            try:
                for rows in self._pass(over):
                    sent += rows
            except RunGone:
                self._forget()
                for rows in self._pass(over):
                    sent += rows
        finally:
            notes, self.tracker.notes[:] = dict.fromkeys(self.tracker.notes), []
            for note in notes:
                self._say(masked(note))
        self._failed = False
        return sent

    def _forget(self) -> None:
        self._parent = None
        for run in self._runs:
            run.copy = None

    def _pass(self, over: bool) -> Iterator[int]:
        """Send what is new; yields the rows of each run.

        One run that the tracker refuses does not hold up the others: it goes last the next time. After two failures the
        pass ends, since a tracker that does not answer takes its time over each.
        """
        failures: list[Exception] = []
        if self._study is not self._newest:
            self._study, known = self._newest, {run.key for run in self._runs}
            new = [_Copied(arm, seed, run) for arm, seed, run in runs_of(self._store, self._study)]
            self._runs += [run for run in new if run.key not in known]
        self._open_study()
        for run in list(self._runs):
            try:
                yield self._send_run(run)
            except RunGone:
                raise
            except DataFault as damaged:
                run.status = "failed"
                self.tracker.notes.append(f"{damaged}; this run's rows are not sent")
            except Exception as error:
                self._runs.remove(run)
                self._runs.append(run)
                failures.append(error)
                if len(failures) == 2:
                    break
        if failures:
            raise failures[0]
        self._update_study(over)
        self._write_links(over)

    def is_done(self) -> bool:
        """Whether nothing has changed since all was sent: not the record, no file of its runs, and not what the tracker
        holds of them. Trackers that cannot tell without being asked for everything are asked."""
        known = links(self._store, str(self._study["name"]), str(self._study.get("kind", "study"))) or {}
        same_place = known.get("uri") == masked(self.tracker.shown_uri)
        return same_place and known.get("delivered") is not None and known["delivered"] == self._delivered(known)

    def _delivered(self, known: Record) -> str | None:
        """A sum over what has to be delivered and what the tracker holds; None while there may be more of it."""
        ended = all(run.folder.status() in ("finished", "diverged") for run in self._runs)
        parent, copies = known.get("parent_run_id"), list(known.get("runs", {}).values())
        held = self.tracker.held(parent, copies) if parent and hasattr(self.tracker, "held") else None
        if "open" in self._study or not ended or held is None:
            return None
        stamps = [(run.key, list(run.folder.stamps())) for run in self._runs]
        return sha256(repr((to_json(self._study), stamps, held)).encode())

    def undelivered(self) -> int:
        """Rows on the disk beyond what the tracker is known to have."""
        known = {run.key: run.tokens for run in list(self._runs)}
        left = 0
        for arm, seed, run in runs_of(self._store, self._newest):
            with contextlib.suppress(DataFault, OSError):
                left += sum(row["tokens"] > known.get((arm, seed, run.id), -1.0) for row in run.rows())
        return left

    def _open_study(self) -> TrackedRun:
        if self._parent is None:
            with self._locked():
                self._parent = self.tracker.open_study(self._study)
            self.answered = True
        return self._parent

    def _send_run(self, run: _Copied) -> int:
        run.status = run.folder.status()  # before the rows: a run that is over now writes no more of them
        if run.status == "damaged" and (damage := run.folder.damage()):
            raise damage
        if run.status == "absent" or (run.status in ("partial", "running") and run.folder.config() is None):
            return 0  # its worker is starting and has not written the config, which is sent with the copy
        if run.copy is None:
            parent = self._open_study()
            with self._locked():
                copy = self.tracker.open_run(self._study, parent, run.arm, run.seed, run.folder)
            run.begin(copy, started_ms(self._study, run.folder))
        assert run.copy
        new = [row for row in run.tail.new_rows() if row["tokens"] > run.tokens]
        for batch in batches(new):
            self.tracker.log(run.copy, [_point(row, run.started_ms) for row in batch])
            run.tokens = batch[-1]["tokens"]
        self._update_run(run, run.copy)
        return len(new)

    def _update_run(self, run: _Copied, copy: TrackedRun) -> None:
        """Bring status, heartbeat, tags and final numbers in line with the run's folder; cheap when nothing changed."""
        status = STATUS_OF_OUTCOME.get(self._outcome(run), run.status)
        result = run.folder.result() if status in ("finished", "diverged") else None
        if result:
            for name, point in _final_points(run, result, self._study.get("evaluation", {}).get("key")):
                if point.values:
                    self.tracker.log(copy, [point])
                run.sent.add(name)
        ending = result or run.folder.failure() or {}
        tags = {"gpt2lab.status": status, **self._study["arms"][run.arm].get("tags", {})}
        if ending.get("reason") is not None:
            tags["gpt2lab.reason"] = str(ending["reason"])
        changed = {key: tag for key, tag in tags.items() if copy.tags.get(key) != tag}
        if status == "running" and time.monotonic() - run.beat > HEARTBEAT_SECONDS:
            holder, run.beat = run.folder.holder(), time.monotonic()
            changed["gpt2lab.heartbeat"] = now()
            changed |= {f"gpt2lab.{key}": str(holder[key]) for key in ("host", "pid") if key in holder}
        if changed:
            self.tracker.update(copy, status, changed, ending.get("finished_at") or ending.get("at"))
            copy.tags |= changed

    def _update_study(self, over: bool) -> None:
        """The study's status follows from its runs'. A sweep is over when all its trials are, however they ended."""
        statuses: list[Status] = [run.status for run in self._runs]
        if "open" in self._study:
            at_work = any(run.status == "running" and not self._outcome(run) for run in self._runs)
            statuses = ["running" if at_work else "absent" if self._study["open"] else "finished"]
        parent, status = self._open_study(), study_status(statuses, over)
        if parent.tags.get("gpt2lab.status") != status:
            self.tracker.update(parent, status, {"gpt2lab.status": status}, None)
            parent.tags["gpt2lab.status"] = status

    def _outcome(self, run: _Copied) -> str:
        """How the run's trial has ended, as far as it is one and has."""
        outcome = str(self._study["arms"][run.arm].get("tags", {}).get(OUTCOME, ""))
        return outcome if outcome in ENDED else ""

    def _locked(self) -> Any:
        """Two commands that follow one study must not both make its runs in the tracker."""
        self._store.folder(*_folders(self._study))
        return file_lock(_beside(self._store, self._study, "lock"), LOCK_PATIENCE_SECONDS)

    def _write_links(self, over: bool) -> None:
        """Where things are in the tracker, for `gpt2lab ui` and reports, and for `is_done`."""
        links: dict[str, Any] = {
            "uri": masked(self.tracker.shown_uri),
            "experiment_id": self.tracker.experiment_id,
            "parent_run_id": self._parent.id if self._parent else None,
            "runs": {run.folder.id: run.copy.id for run in self._runs if run.copy},
        }
        links["delivered"] = self._delivered(links) if over else None
        if links != self._links:
            write_json(_beside(self._store, self._study, "json"), links, private=True)
            self._links = links


@dataclass(eq=False)
class _Copied:
    """One run and its copy in the tracker, None until it is opened, and again after an error. tokens: how far the
    tracker is known to be, kept when `copy` is dropped. sent: final numbers that need no second sending."""

    arm: str
    seed: str
    folder: RunFolder
    copy: TrackedRun | None = None
    status: Status = "absent"
    tokens: float = -1.0
    started_ms: int = 0
    beat: float = -math.inf
    sent: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.key = (self.arm, self.seed, self.folder.id)
        self.tail = Tail(self.folder.metrics)

    def begin(self, copy: TrackedRun, started_ms: int) -> None:
        """Start from what the tracker has."""
        self.copy, self.tokens, self.started_ms = copy, copy.tokens, started_ms
        self.tail, self.sent, self.beat = Tail(self.folder.metrics), set(), -math.inf


def study_status(statuses: Sequence[Status], over: bool) -> Status:
    """A study's status from its runs'; over: no process works on it. A diverged arm is no failure."""
    unfinished = {"partial", "absent"} & set(statuses)
    if "running" in statuses or (unfinished and not over):
        return "running"
    if unfinished:
        return "partial"
    return "failed" if "failed" in statuses else "finished"


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


def _point(row: Row, started: int) -> MetricPoint:
    """A row's time is the run's start plus its training seconds, never the time of sending, so that sending it again
    makes an equal point."""
    values = {"tokens": float(row["tokens"]), **{name: float(value) for name, value in row["metrics"].items()}}
    return MetricPoint(row["step"], started + round(row["seconds"] * 1000), values)


def _final_points(run: _Copied, result: Record, evaluation_key: str | None) -> Iterator[tuple[str, MetricPoint]]:
    """The numbers that belong to the whole run and were not sent yet, at its last step, by a name to remember: those of
    its end, its final evaluation, and what was measured afterwards, at the time of measuring, so that what is measured
    again after an edit is the newer point."""
    step, ended = int(result.get("steps", 0)), milliseconds(result.get("finished_at"))
    if "result" not in run.sent:
        numbers = {name: result.get(name) for name in ("tokens_per_second", "mfu", "peak_memory_bytes", "seconds")}
        yield "result", MetricPoint(step, ended, _known(numbers))
    evaluation = run.folder.evaluation(evaluation_key) if evaluation_key and "evaluation" not in run.sent else None
    if evaluation:
        contexts = {f"context_{length}": loss for length, loss in evaluation.get("contexts", {}).items()}
        numbers = {**evaluation.get("metrics", {}), **contexts}
        # user interfaces sort sections by name: what has one point only comes after the curves
        final = {f"val-final/{name.removeprefix('val/')}": value for name, value in numbers.items()}
        yield "evaluation", MetricPoint(step, ended, _known(final))
    for key in run.folder.evaluation_keys():
        if f"late:{key}" not in run.sent:
            late = run.folder.evaluation(key) or {}
            values = late["values"] if "values" in late and "measured_at" in late else {}
            numbers = {f"val-measured/{name}": value for name, value in values.items()}
            yield f"late:{key}", MetricPoint(step, milliseconds(late.get("measured_at")), _known(numbers))


def _tails(store: Store, study: Record) -> dict[tuple[str, str, str], Tail]:
    return {(arm, seed, run.id): Tail(run.metrics) for arm, seed, run in runs_of(store, study)}


def _known(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items() if value is not None}


def _log_trace(error: Exception) -> None:
    log.debug("delivery failed\n%s", masked("".join(traceback.format_exception(error))))


# --- records ---


def runs_of(store: Store, study: Record) -> list[tuple[str, str, RunFolder]]:
    """(arm, seed, run) of every run of a study as `labelled_runs` has them, seed-major as they are trained."""
    arms = {name: ArmRecord.read(entry, str(study["name"])) for name, entry in study["arms"].items()}

    def place(labelled: tuple[str, str, str]) -> float:
        seed, _, text = labelled[1].partition(" ")
        return -1.0 if text.startswith("lr") else float(seed)

    return [(arm, seed, store.run(run)) for arm, seed, run in sorted(labelled_runs(arms), key=place)]


def as_study(sweep: SweepRecord) -> dict[str, Any]:
    """A sweep's record as one of a study: arms are trials, `trial 007`, after the label of their search where there are
    several. `open` counts the trials that have not ended, those included that were never begun; `seeds`, the runs of
    each. An arm has two entries more than a study's: `tags`, which the tracker shows, and `params`, its settings."""
    searches = sweep.searches
    arms = {
        f"{label} trial {trial.index:03d}" if len(searches) > 1 else f"trial {trial.index:03d}": _arm(trial, label)
        for label, search in searches.items()
        for trial in search.trials
    }
    count = sum(search.count or sweep.trials for search in searches.values())
    ended = sum(trial.outcome in ENDED for search in searches.values() for trial in search.trials)
    about = {"name", "scale", "question", "evaluation", "stack", "reproduce", "hash", "created", "metric"}
    return {
        **sweep.model_dump(include=about),
        "kind": "sweep",
        "ablation": sweep.sweep,
        "baseline": None,
        "seeds": max((len(search.seeds or sweep.seeds) for search in searches.values()), default=0),
        "open": max(0, count - ended),
        "arms": arms,
    }


def _arm(trial: TrialRecord, label: str) -> dict[str, Any]:
    tags = {
        OUTCOME: trial.outcome,
        "gpt2lab.slot": trial.index,
        "gpt2lab.search": label,
        "gpt2lab.stopped_at": trial.stopped_at,
    }
    return {
        "runs": dict(trial.runs),
        "tags": {key: str(value) for key, value in tags.items() if value is not None},
        "params": dict(trial.settings),
    }


def tracked_records(
    store: Store, name: str | None = None, on_damage: Callable[[DataFault], None] | None = None
) -> list[dict[str, Any]]:
    """What a tracker is to show: the records of all studies and sweeps, or of those called `name`, at whichever scale.

    Raises ConfigError when nothing is called so, DataFault for a damaged record unless `on_damage` takes it.
    """
    known = [*(("study", full) for full in store.studies()), *(("sweep", full) for full in store.sweeps())]
    wanted = [(kind, full) for kind, full in known if name in (None, full, full.partition("@")[0])]
    if name is not None and not wanted:
        names = list(dict.fromkeys(full for _, full in known))
        raise ConfigError(unknown("study or sweep", name, names), hint="gpt2lab runs")
    records = []
    for kind, full in wanted:
        try:
            records.append(store.study(full).plain() if kind == "study" else as_study(store.sweep(full)))
        except DataFault as damage:
            if on_damage is None:
                raise
            on_damage(damage)
    return records


def links(store: Store, name: str, kind: str = "study") -> dict[str, Any] | None:
    """Where a study or `sweep` is in its tracker: {"uri", "experiment_id", "parent_run_id", "runs": {run id: copy's
    id}}."""
    return read_json(_beside(store, {"name": name, "kind": kind}, "json"))


def has_report(store: Store, name: str, file: Path) -> bool:
    """Whether the artifacts beside the store's runs have this file of a study's report."""
    parent = str((links(store, name) or {}).get("parent_run_id"))
    copy = store.root / "artifacts" / parent / "artifacts" / "report" / file.name
    return copy.is_file() and read_bytes(copy) == read_bytes(file)


def _beside(store: Store, study: Record, ending: str) -> Path:
    """A file about the copies of a study or sweep; those that share a name have one each."""
    return store.root.joinpath(*_folders(study), f"{study['name']}.{ending}")


def _folders(study: Record) -> tuple[str, ...]:
    return ("tracking", "sweeps") if study.get("kind") == "sweep" else ("tracking",)
