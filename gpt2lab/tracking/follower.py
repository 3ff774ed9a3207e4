"""The one process that follows every run of a study or sweep: feeds the live table and carries rows to the mirror.

Training never waits for the mirror: runs write to their journals only, `poll` reads those, and a thread of its own
talks to MLflow, from the same journals. So it may lag, fail and catch up, and needs no queue that could overflow.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2lab.errors import DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.store import Row, Store, read_json
from gpt2lab.tracking import masked
from gpt2lab.tracking.addresses import reason
from gpt2lab.tracking.delivery import Delivery, kept_at, runs_of
from gpt2lab.tracking.journal import Tail
from gpt2lab.tracking.mirror import Mirror

log = logging.getLogger("gpt2lab.tracking")

GATHER_SECONDS = 0.5  # a call costs the same for one row as for many
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0


@dataclass(frozen=True)
class News:
    """New rows of one run since the last poll."""

    arm: str
    seed: str
    run_id: str
    rows: list[Row]


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
        self._store, self._updating = store, threading.Lock()
        self._tails = [(arm, seed, run, Tail(run.metrics)) for arm, seed, run in runs_of(store, study_record)]
        self._say, self._said = say, set[str]()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._sender: threading.Thread | None = None

    def update(self, study_record: Mapping[str, Any]) -> None:
        """Follow, from now on, also the runs that a newer record of the same study has more. For any thread."""
        with self._updating:
            known = {(arm, seed, run.id) for arm, seed, run, _ in self._tails}
            found = runs_of(self._store, study_record)
            new = [(arm, seed, run, Tail(run.metrics)) for arm, seed, run in found if (arm, seed, run.id) not in known]
            self._tails = [*self._tails, *new]  # never changed in place: `poll` may be at it
            if self._delivery:
                self._delivery.update(study_record)
        self._wake.set()

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
    """Bring the mirror of a study (its name or record, or a sweep's as trials.py has it) up to date, once; returns the
    number of rows sent.

    Runs that a kill left as running are closed. Raises EnvironmentFault when the mirror does not work.
    """
    record = store.study(study).plain() if isinstance(study, str) else study
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


def links(store: Store, name: str, kind: str = "study") -> dict[str, Any] | None:
    """Where a study or `sweep` is in its mirror: {"uri", "experiment_id", "parent_run_id", "runs": {run id: copy's
    id}}."""
    return read_json(kept_at(store, {"name": name, "kind": kind}, "json"))


def _log_trace(error: Exception) -> None:
    log.debug("delivery failed\n%s", masked("".join(traceback.format_exception(error))))
