"""Watches over the ranks of one training, from a thread of each rank, so that none waits for another for ever.

Every rank says about once a second where its training is, in the store that brought the ranks together: no shared disk
is needed. A collective can wait for ever for a rank that is stopped or stuck; the threads of the others notice, name
it, and end their process, though its main thread is blocked. They also end it when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from gpt2lab.errors import RankLost

BEAT_SECONDS = 1.0
ORPHAN_SECONDS = 7.0  # for the main thread to finish its step and save, when whoever started this process is gone
FIRST_STEP_PATIENCE = 10  # times the timeout: compiling, and opening files, take one rank longer than another
SLOW = ("start", "evaluation", "saving")  # phases that may take one rank, which writes for all, much longer than others
STORE_SECONDS = 2.0
CAUSE = "cause"
T = TypeVar("T")
HINT = "the same command continues from the last checkpoint"


@dataclass(frozen=True)
class Position:
    """Where a rank's training is. `entered`: phases of steps begun so far, the same on ranks that are equally far."""

    step: int = 0
    phase: str = "start"
    entered: int = 0

    def __str__(self) -> str:
        return f"at step {self.step} in {self.phase}"


@dataclass
class Seen:
    """What is known of a rank: where it is, the line of code there, and when it last beat and last moved."""

    position: Position = field(default_factory=Position)
    line: str = ""
    beat: int = -1
    left: bool = False
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    first_step: int | None = None

    def take(self, message: dict[str, Any], now: float) -> None:
        """Bring up to date with what the rank said last."""
        position = Position(**message["position"])
        if message["beat"] != self.beat:
            self.beat, self.heard = message["beat"], now
        if position != self.position:
            self.position, self.moved = position, now
        if self.first_step is None:
            self.first_step = position.step
        self.left, self.line = message["left"], message["line"]

    def patience(self, timeout: float) -> float:
        """Seconds for which it may stand still while others wait."""
        early = self.first_step is None or self.position.step == self.first_step
        return timeout * (FIRST_STEP_PATIENCE if early or self.position.phase in SLOW else 1)

    def is_stuck(self, now: float, timeout: float) -> bool:
        """Whether it should have moved by now, though no other is ahead of it: a phase of one step takes no minutes."""
        return self.position.phase not in SLOW and now - self.moved > self.patience(timeout)


class Monitor:
    """One rank's watch. `store`: a client of its own, as calls into one that is frozen never return.

    on_lost: hears why the process is about to end, if this rank is the first to know. hosted: whether rank 0 keeps the
    store, so that its silence is known by the store's.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout_seconds: float, on_lost: Callable[[RankLost], None],
        *, hosted: bool = False, parent: int | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.timeout, self.on_lost, self.hosted = rank, timeout_seconds, on_lost, hosted
        self.where: Callable[[], Position] = Position
        self.beat_seconds = min(BEAT_SECONDS, timeout_seconds / 5)
        self._store, self._parent = store, os.getppid() if parent is None else parent
        self._seen = {other: Seen() for other in range(size)}
        self._main = threading.get_ident()
        self._beat, self._left, self._answered = 0, False, time.monotonic()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Say hello and begin to watch. Called before any rank waits for another."""
        self.say()
        for name, work in (("beats", self._exchange), ("watch", self._watch)):
            self._threads.append(threading.Thread(target=work, name=f"gpt2lab-{name}", daemon=True))
            self._threads[-1].start()

    def leave(self) -> None:
        """Say that this rank is done: its silence means nothing from here on."""
        self._left = True
        within(STORE_SECONDS, self.say)
        self._closed.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)  # one that comes back from the store when Python is gone would crash

    def is_first(self) -> bool:
        """Whether this rank is the first with something to say about why the training ends; asked again, the answer is
        the same. Where the store does not answer, it is."""
        mine = str(self.rank)
        said: bytes | None = within(STORE_SECONDS, lambda: self._store.clone().compare_set(CAUSE, "", mine))
        return said is None or said.decode() == mine

    def named(self) -> int | None:
        """The rank that was the first to say why the training ends, if one was."""

        def ask() -> int | None:
            store = self._store.clone()
            return int(store.get(CAUSE)) if store.check([CAUSE]) else None

        return within(STORE_SECONDS, ask)

    def missing(self) -> str:
        """A sentence on the rank that most likely left the others waiting."""
        now = time.monotonic()
        others = {rank: seen for rank, seen in self._seen.items() if rank != self.rank and not seen.left}
        if not others:
            return "another rank does not answer any more"
        rank, seen = max(others.items(), key=lambda item: now - item[1].heard)
        if now - seen.heard > 2.5 * self.beat_seconds or len(others) == 1:
            return f"rank {rank} does not answer any more, last seen {seen.position}"
        seen_at = "; ".join(f"rank {rank} {seen.position}" for rank, seen in others.items())
        return f"a rank does not answer any more; last seen: {seen_at}"

    # --- the two threads ---

    def _exchange(self) -> None:
        """Say where this rank is and read where the others are; may hang in a store that is frozen."""
        while not self._closed.wait(self.beat_seconds):
            with contextlib.suppress(Exception):  # a store that is gone: its silence is judged by `_watch`
                self.say()
                self.listen()
                self._answered = time.monotonic()

    def _watch(self) -> None:
        """Judge, about once a beat; never calls anything that could block before it has made up its mind."""
        last, orphan_since = time.monotonic(), 0.0
        while not self._closed.wait(self.beat_seconds):
            now = time.monotonic()
            if now - last > 3 * self.beat_seconds:  # this process itself was stopped for a while: others were not heard
                self.forgive(now - last)
            last = now
            if os.getppid() != self._parent:
                orphan_since = orphan_since or now
                if now - orphan_since > ORPHAN_SECONDS:
                    self._end(RankLost("the process that started this one is gone", hint=HINT), alone=True)
            elif (verdict := self.judge(now)) is not None:
                self._end(verdict)

    def judge(self, now: float) -> RankLost | None:
        """What is wrong with another rank, or with all of them, at the moment `now`."""
        here = {rank: seen for rank, seen in self._seen.items() if not seen.left}
        silence = {rank: now - seen.heard for rank, seen in here.items() if rank != self.rank}
        if self.hosted and self.rank != 0 and now - self._answered > self.timeout:
            silence = {0: now - self._answered}
        elif now - self._answered > self.timeout:
            return None  # the store is silent, not the ranks: they may well be at work
        for rank, seconds in silence.items():
            if seconds > self.timeout:
                what = f"rank {rank} has been silent for {seconds:.0f} s, last seen {here[rank].position}"
                return RankLost(what, hint=HINT)
        farthest = max((seen.position.entered for seen in here.values()), default=0)
        behind = {rank: seen for rank, seen in here.items() if seen.position.entered < farthest}
        for rank, seen in behind.items():
            if now - seen.moved > seen.patience(self.timeout):
                what = f"rank {rank} has not moved for {now - seen.moved:.0f} s while others wait for it: "
                return RankLost(f"{what}{seen.position}{seen.line}", hint=HINT)
        if here and not behind and all(seen.is_stuck(now, self.timeout) for seen in here.values()):
            places = "; ".join(f"rank {rank} {seen.position}{seen.line}" for rank, seen in here.items())
            return RankLost(f"no rank has moved for {self.timeout:.0f} s: {places}", hint=HINT)
        return None

    def say(self) -> None:
        """Put where this rank is into the store."""
        self._beat += 1
        own = self._seen[self.rank]
        still = time.monotonic() - own.moved > self.timeout / 2
        message = {
            "beat": self._beat,
            "position": asdict(self.where()),
            "left": self._left,
            "line": f" ({line_of(self._main)})" if still else "",
        }
        self._store.set(f"rank/{self.rank}", json.dumps(message))
        own.take(message, time.monotonic())

    def listen(self) -> None:
        """Read where the others are."""
        for rank, seen in self._seen.items():
            if rank != self.rank and self._store.check([f"rank/{rank}"]):
                seen.take(json.loads(self._store.get(f"rank/{rank}")), time.monotonic())

    def forgive(self, seconds: float) -> None:
        """Leave a time in which nobody could be heard out of account."""
        self._answered += seconds
        for seen in self._seen.values():
            seen.heard += seconds
            seen.moved += seconds

    def _end(self, verdict: RankLost, alone: bool = False) -> None:
        """End this process at once: its main thread is, or soon will be, blocked for ever. What is on disk is whole.
        `alone`: the store is gone with whoever kept it, so nobody is asked who speaks first."""
        if self._closed.is_set():
            return
        with contextlib.suppress(Exception):
            if alone or self.is_first():
                within(STORE_SECONDS, lambda: self.on_lost(verdict))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RankLost.exit_code)


def within(seconds: float, call: Callable[[], T]) -> T | None:
    """What `call` returns, or None if it raises or takes longer; then its thread is left to itself."""
    found: list[T] = []

    def work() -> None:
        with contextlib.suppress(Exception):
            found.append(call())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def line_of(thread: int) -> str:
    """`file.py:12`, where that thread is now: the innermost line that is not torch's."""
    frame = sys._current_frames().get(thread)
    while frame is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
