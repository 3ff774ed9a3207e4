"""The one process that follows every run of a study: feeds the live table and carries rows to the mirror.

Training never waits for the mirror: runs write to their journals only, `poll` reads those, and a thread of its own
talks to MLflow, from the same journals. So it may lag, fail and catch up, and needs no queue that could overflow.

Each row arrives exactly once. How far a copy got is asked of the mirror itself when a run is opened, again after every
error, and a batch is one transaction there: no note of ours can be out of step with what was stored. Rows are stored in
order, so the greatest `tokens` of a copy says it all. A run that resumes writes some steps again; they are equal, and
the mirror keeps the first.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.errors import DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.store import Row, RunFolder, Status, Store, file_lock, read_json, write_json
from gpt2lab.tracking import masked
from gpt2lab.tracking.addresses import reason
from gpt2lab.tracking.journal import Tail
from gpt2lab.tracking.mirror import Copy, CopyGone, Mirror

log = logging.getLogger("gpt2lab.tracking")

METRICS_PER_BATCH = 1000
GATHER_SECONDS = 0.5  # a call costs the same for one row as for many
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0
LOCK_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class News:
    """New rows of one run since the last poll."""

    arm: str
    seed: str
    run_id: str
    rows: list[Row]


class Delivery:
    """Carries the journals of one study's runs to a mirror; may be slow and may raise."""

    def __init__(self, store: Store, record: Mapping[str, Any], mirror: Mirror) -> None:
        self._store, self._record, self._mirror = store, record, mirror
        self._parent: str | None = None
        self._links: dict[str, Any] = {}
        self._runs = [_Carried(arm, seed, run) for arm, seed, run in runs_of(store, record)]
        self.notes: list[str] = []

    def once(self, over: bool = False) -> int:
        """Carry everything that is new, and return the number of rows. Raises what the mirror raises.

        over: nobody works on the study now, so what is unfinished was killed.

        One run that the mirror refuses does not hold up the others: it goes last the next time. After two failures the
        pass ends, since a mirror that does not answer takes its time over each.
        """
        failures: list[Exception] = []
        carried = 0
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
        return sum(row["tokens"] > one.tokens for one in self._runs for row in _readable_rows(one.run))

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
        if one.status == "absent":
            return 0
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
        self._mirror.settle(one.copy, one.status, one.run, self._record.get("evaluation", {}).get("key"))
        return len(fresh)

    def _settle_study(self, over: bool) -> None:
        assert self._parent is not None
        try:
            self._mirror.settle_study(self._parent, [one.status for one in self._runs], over)
        except CopyGone:
            self._parent = None
            for one in self._runs:
                one.copy = None

    def _alone(self) -> Any:
        """Two commands that follow one study must not both make its runs in the mirror."""
        return file_lock(self._store.root / "tracking" / f"{self._record['name']}.lock", LOCK_PATIENCE_SECONDS)

    def _keep_links(self) -> None:
        """Remember where things are in the mirror, for `gpt2lab ui` and reports; nothing here is read back."""
        links = {
            "uri": self._mirror.shown_uri,
            "experiment_id": self._mirror.experiment_id,
            "parent_run_id": self._parent,
            "runs": {one.run.id: one.copy.id for one in self._runs if one.copy},
        }
        if links != self._links:
            write_json(self._store.root / "tracking" / f"{self._record['name']}.json", links)
            self._links = links

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class Follower:
    """Follows a study while it runs. `poll` is quick and never raises, whatever the mirror does."""

    def __init__(
        self,
        store: Store,
        study_record: Mapping[str, Any],
        sink_factory: Callable[[], Mirror] | None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """sink_factory: makes the mirror, without connecting; what it raises is raised here, before any training.
        None follows without a mirror. say: takes each message for the user, once, always from `poll` or `close`."""
        self._mirror = sink_factory() if sink_factory else None
        self._delivery = Delivery(store, study_record, self._mirror) if self._mirror else None
        self._name, self._root = str(study_record["name"]), store.root
        self._tails = [(arm, seed, run, Tail(run.metrics)) for arm, seed, run in runs_of(store, study_record)]
        self._say, self._said = say, set[str]()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._sender: threading.Thread | None = None

    def poll(self) -> list[News]:
        """New rows of every run since the last call; wakes the sender."""
        news = []
        for arm, seed, run, tail in self._tails:
            try:
                rows = tail.new_rows()
            except (DataFault, OSError) as error:
                self._messages.put(f"{arm} seed {seed} cannot be followed: {error}")
                continue
            if rows:
                news.append(News(arm, seed, run.id, rows))
        if self._delivery and self._sender is None and not self._closing.is_set():
            # A daemon: a call into a server that never answers must not keep the program from ending.
            self._sender = threading.Thread(target=self._send, name="gpt2lab-tracking", daemon=True)
            self._sender.start()
        self._wake.set()
        self._pass_on()
        return news

    def close(self, timeout: float = 10.0) -> int:
        """Send what is left, within `timeout` seconds; returns, and says, how many rows are not delivered."""
        self.poll()
        self._closing.set()
        self._wake.set()
        if self._sender:
            self._sender.join(timeout)
        left = self._delivery.undelivered() if self._delivery else 0
        if self._mirror and (left or self._failing or (self._sender and self._sender.is_alive())):
            rows = f"{left:,} rows of {self._name} are" if left else f"the last state of {self._name} is"
            self._messages.put(
                f"{rows} not delivered to {self._mirror.shown_uri}; everything is kept in {self._root}, and "
                f"`gpt2lab sync {self._name}` sends it later"
            )
        self._pass_on()
        return left

    def _pass_on(self) -> None:
        while not self._messages.empty():
            message = self._messages.get()
            if message not in self._said:
                self._said.add(message)
                self._say(message)

    def _send(self) -> None:
        assert self._delivery
        pause = FIRST_PAUSE_SECONDS
        while True:
            last = self._closing.is_set()  # the last pass has to begin after `close` was called
            self._wake.clear()
            try:
                self._delivery.once(over=last)
            except Exception as error:
                _log_trace(error)
                self._report_failure(error)
            else:
                self._failing, pause = False, FIRST_PAUSE_SECONDS
            for note in self._delivery.notes:
                self._messages.put(note)
            if last:
                return
            if self._failing:
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._wake.wait()
                self._closing.wait(GATHER_SECONDS)

    def _report_failure(self, error: Exception) -> None:
        assert self._mirror
        if not self._failing and "outage" not in self._said:
            self._said.add("outage")
            self._messages.put(
                f"tracking at {self._mirror.shown_uri} does not work at present: {reason(error)}; training goes on, "
                f"everything is kept in {self._root} and sent when it works again"
            )
        self._failing = True


def sync(
    store: Store,
    study: str | Mapping[str, Any],
    sink_factory: Callable[[], Mirror],
    say: Callable[[str], None] = log.warning,
) -> int:
    """Bring the mirror of a study (its name or record) up to date, once; returns the number of rows sent.

    Runs that a kill left as running are closed. Raises EnvironmentFault when the mirror does not work.
    """
    record = store.study(study) if isinstance(study, str) else study
    mirror = sink_factory()
    delivery = Delivery(store, record, mirror)
    try:
        return delivery.once(over=True)
    except Gpt2labError:
        raise
    except Exception as error:
        _log_trace(error)
        raise EnvironmentFault(
            f"tracking does not work: {reason(error)}",
            where=mirror.shown_uri,
            hint=f"gpt2lab sync {record['name']} when it does; nothing is lost",
        ) from None  # the cause may show a password
    finally:
        for note in delivery.notes:
            say(note)


def links(store: Store, name: str) -> dict[str, Any] | None:
    """Where a study is in its mirror: {"uri", "experiment_id", "parent_run_id", "runs": {run id: copy's id}}."""
    return read_json(store.root / "tracking" / f"{name}.json")


def runs_of(store: Store, record: Mapping[str, Any]) -> list[tuple[str, str, RunFolder]]:
    """(arm, seed, run) of every run of a study, seed-major as they are trained."""
    found = [(arm, seed, run) for arm, one in record["arms"].items() for seed, run in one["runs"].items()]
    return [(arm, seed, store.run(run)) for arm, seed, run in sorted(found, key=lambda item: int(item[1]))]


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
        self.copy: Copy | None = None
        self.tail = Tail(run.metrics)
        self.status: Status = "absent"
        self.tokens = -1.0
        """How far the mirror is known to be; kept when `copy` is dropped after an error."""


def _log_trace(error: Exception) -> None:
    log.debug("delivery failed\n%s", masked("".join(traceback.format_exception(error))))


def _readable_rows(run: RunFolder) -> list[Row]:
    try:
        return run.rows()
    except (DataFault, OSError):
        return []
