"""Works on searches from start to end: opens their storage, follows their runs, and drives them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from gpt2lab.events import Listener, Message
from gpt2lab.executors.driver import TrackerFactory
from gpt2lab.planning.search import Search
from gpt2lab.store import Store
from gpt2lab.sweep.drive import Drive
from gpt2lab.sweep.liveness import worker_id
from gpt2lab.sweep.slots import Slots
from gpt2lab.sweep.storage import default_address, open_storage
from gpt2lab.tracking import masked
from gpt2lab.tracking.follower import Follower, as_study


def run_searches(
    searches: Mapping[str, Search],
    head: Mapping[str, Any],
    store: Store,
    *,
    on_event: Listener,
    tracker: TrackerFactory | None,
    storage: str | None = None,
    nproc: int = 1,
    seconds: float | None = None,
    stays: bool = True,
) -> dict[str, Any]:
    """Work on all searches until every slot has come to its end; -> the record, which is also in the store.

    head:    the record without its searches, of record.py.
    storage: where the searches are kept; beside the runs unless given.
    nproc:   ranks of every run.
    seconds: no trial is begun after that time.
    stays:   whether to wait while other workers are at the last trials, in case they die.
    Raises Preempted when stopped, with everything saved; ConfigError, EnvironmentFault, DataFault of the storage.
    """

    def say(text: str) -> None:
        on_event(Message(text))

    address = storage or default_address(store.root)
    kept = open_storage(address, say)
    worker = worker_id()
    slots = {
        label: Slots(
            kept, search.study, space=search.space, settings=search.settings, slots=search.slots,
            known=search.known_points, tokens=search.tokens, direction=search.settings.direction, worker=worker,
            say=say,
        )
        for label, search in searches.items()
    }  # fmt: skip
    whole = {**head, "storage": masked(address)}
    follower = Follower(store, as_study({**whole, "searches": {}}), tracker, say)
    deadline = time.monotonic() + seconds if seconds else math.inf
    try:
        return Drive(searches, slots, whole, store, on_event, follower, nproc, deadline, stays).run()
    finally:
        follower.close(timeout=30.0)
