"""How processes become the ranks of one training, and how they watch each other, so that none waits forever.

The variables are those of torchrun and of most clusters' launchers: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, on one machine or several.

A collective can wait forever for a rank that is stopped or stuck. Therefore a thread of every rank publishes about once
a second where its training is, in the store in which the ranks met: no shared disk is needed. The threads of the others
notice a rank that is silent or stands still, name it, and end their process even though its main thread is blocked.
They also end it when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, Preempted, Problem, RankLost
from gpt2lab.training.distributed import ALONE, World

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set where the launcher of the ranks hosts the store that they meet in; otherwise rank 0 does."""

PREFIX = "gpt2lab"
"""Of our keys in that store."""
HINT = "the same command continues from the last checkpoint"
JOIN_SECONDS = 300.0  # between the first rank's arrival and the last one's
ANSWER_SECONDS = 5.0  # for a store whose host listens
FIND_SECONDS = 0.2  # between looks for its host
COLLECTIVE_PATIENCE = 10  # times the timeout: the monitor is to name the rank first
HEAD_START_SECONDS = 0.3  # by which rank 0 may report first an error that all ranks met: its log is read first
SHOWN = 20  # differences between ranks that are listed
LOST = re.compile(r"gloo|nccl|ProcessGroup|TCPStore|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)

BEAT_SECONDS = 1.0
ORPHAN_SECONDS = 7.0  # for the main thread to finish its step and save, when the process that started this one is gone
FIRST_STEP_PATIENCE = 10  # times the timeout: compiling, and opening files, take one rank longer than another
SLOW = ("start", "evaluation", "saving")  # phases that may take one rank, which writes for all, much longer than others
STORE_SECONDS = 2.0
CAUSE = "cause"
T = TypeVar("T")

_monitor: Monitor | None = None
_group: dist.ProcessGroup | None = None
"""The group, kept until the process ends. If the last reference to it were that of DDP's reducer, torch would end
gloo's threads with Python's lock held, and wait forever for one of them that waits for the lock."""


class OtherRankFailed(RankLost):
    """This rank ends because another one failed, which reports the cause."""

    @classmethod
    def after(cls, error: Exception) -> OtherRankFailed:
        """For a rank that met `error` but was not the first to fail; with the exit code of `error` where it has one."""
        failed = cls(f"another rank ended first; here: {_line(error)}")
        if isinstance(error, Gpt2labError):
            failed.exit_code = error.exit_code
        return failed


@dataclass(frozen=True)
class RankEnvironment:
    """Which rank this process is, as its environment variables say."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def read(cls) -> RankEnvironment:
        """Raises ConfigError for variables that cannot mean anything."""
        size = _number("WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        environment = cls(_number("RANK", None), size, _number("LOCAL_RANK", _number("RANK", None)))
        if not 0 <= environment.rank < size:
            raise ConfigError(f"rank {environment.rank} of {size} ranks cannot be", where="RANK")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError("is not set, though WORLD_SIZE is", where=name, hint="start the ranks with torchrun")
        return environment


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        what = "is not set, though WORLD_SIZE is" if text is None else f"'{text}' is not a number"
        raise ConfigError(what, where=name, hint="start the ranks with torchrun")
    return int(text)


@contextlib.contextmanager
def join_world(
    device: str,
    timeout_seconds: float,
    on_lost: Callable[[RankLost], None] = lambda error: None,
    parent: int | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[World]:
    """The world of the ranks that the environment names, while inside; ALONE where it names none.

    device: type of device to train on; a GPU is chosen by the local rank.
    timeout_seconds: after which a rank that is silent, or stands still, is named, and all processes end.
    on_lost: called with that error, in a thread of the one rank that reports it.
    parent: id of the process whose end is to be this one's; the present parent unless given.
    is_stopped: whether the training is to end before it begins, asked while the store of the ranks is out of reach.

    Raises EnvironmentFault for a port that another program has, and Preempted; and what is raised inside, but on all
    ranks except the first to fail OtherRankFailed, and RankLost for a rank that is gone.
    """
    global _monitor, _group
    environment = RankEnvironment.read()
    rank, size, local_rank = environment.rank, environment.size, environment.local_rank
    if size == 1:
        yield ALONE
        return
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"rank {rank} wants GPU {local_rank}, this machine has {torch.cuda.device_count()}",
                where="ranks",
                hint=f"--nproc {max(1, torch.cuda.device_count())}",
            )
        torch.cuda.set_device(local_rank)
    hosted = os.environ.get(AGENT_STORE) != "True"
    monitor: Monitor | None = None
    try:
        store = host_store(size) if hosted and rank == 0 else find_store(size if hosted else None, is_stopped)
        separate = PrefixStore(PREFIX, store.clone())  # type: ignore[attr-defined]
        monitor = _monitor = Monitor(separate, rank, size, timeout_seconds, on_lost, hosted=hosted, parent=parent)
        monitor.start()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore("ranks", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_PATIENCE * timeout_seconds + 60),
        )
        _group = dist.group.WORLD
        yield World(rank, size, local_rank)
        monitor.leave()
        dist.destroy_process_group()
    except Preempted:  # all ranks at the same step
        if monitor is not None:
            monitor.leave()
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    except Exception as error:
        if monitor is None and isinstance(error, Gpt2labError):
            raise
        if monitor is None:
            raise RankLost(f"the ranks did not find each other: {_line(error)}", hint=HINT) from error
        reported = _first_cause(error, monitor)
        if reported is error:  # which must not become its own cause
            raise
        raise reported from error
    finally:
        _monitor = None


def host_store(size: int) -> TCPStore:
    """The store in which the ranks meet, where rank 0 is to host it. Raises EnvironmentFault for a port in use."""
    try:
        return _store(size, JOIN_SECONDS, is_master=True)
    except Exception as error:
        what = f"the ranks cannot meet at port {os.environ['MASTER_PORT']}: {_line(error)}"
        raise EnvironmentFault(what, where="MASTER_PORT", hint="another port, and the same for all ranks") from error


def find_store(size: int | None, is_stopped: Callable[[], bool]) -> TCPStore:
    """The store in which the ranks meet, once its host listens. Raises Preempted; EnvironmentFault where another
    program listens; RankLost for a host that does not come.

    Torch would wait in one call, in which Python handles no signal.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + JOIN_SECONDS
    while True:
        if is_stopped():
            raise Preempted("stopped before the training began", hint="the same command begins it")
        try:
            socket.create_connection((host, port), STORE_SECONDS).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                what = f"rank 0 did not come to {host}:{port} within {JOIN_SECONDS:.0f} s: {error.strerror or error}"
                raise RankLost(what, hint=HINT) from error
        time.sleep(FIND_SECONDS)
    store = call_within(ANSWER_SECONDS, lambda: _store(size, ANSWER_SECONDS, is_master=False))
    if store is None:
        what = f"what listens at {host}:{port} is no store of ranks; another program has the port"
        raise EnvironmentFault(what, where="MASTER_PORT", hint="another port, and the same for all ranks")
    store.set_timeout(timedelta(seconds=JOIN_SECONDS))
    return store


def _store(size: int | None, seconds: float, *, is_master: bool) -> TCPStore:
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=is_master,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )


def has_joined(store: TCPStore, rank: int) -> bool:
    """Whether a rank has told the others, by the store in which they meet, that it is there."""
    return bool(PrefixStore(PREFIX, store).check([f"rank/{rank}"]))


def _first_cause(error: Exception, monitor: Monitor) -> Exception:
    """What this rank raises for `error`: the error itself, if this is the first rank to fail."""
    if not is_lost_rank(error):
        time.sleep(HEAD_START_SECONDS if monitor.rank else 0.0)
        first = monitor.is_first_to_fail()
        monitor.leave()
        return error if first else OtherRankFailed.after(error)
    end = time.monotonic() + 3 * monitor.beat_seconds  # the others need time to report why they ended
    while monitor.first_to_fail() is None and time.monotonic() < end:
        time.sleep(monitor.beat_seconds / 4)
    first = monitor.is_first_to_fail()
    monitor.leave()
    return RankLost(monitor.missing(), hint=HINT) if first else OtherRankFailed("another rank ended first")


def is_lost_rank(error: Exception) -> bool:
    """Whether `error` says that another rank does not answer, rather than that something went wrong here."""
    if isinstance(error, Gpt2labError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(LOST.search(str(error))))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def report_position(position: Callable[[], RankPosition]) -> None:
    """Let the monitor of this rank ask `position` where its training is; without effect where there is no monitor."""
    if _monitor is not None:
        _monitor.position = position


def require_equal(world: World, facts: Mapping[str, Any]) -> None:
    """Compare what all ranks are about to do. Raises ConfigError on every rank, naming each key and its values."""
    by_rank = world.gather({key: str(value) for key, value in facts.items()})
    problems = []
    for key in dict.fromkeys(key for known in by_rank for key in known):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, known in enumerate(by_rank):
            ranks_by_value.setdefault(known.get(key, "nothing"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = [f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {v}" for v, r in ranks_by_value.items()]
            problems.append(Problem(key, f"differs between ranks; {'; '.join(values)}"))
    if problems:
        raise ConfigError(problems[:SHOWN], hint="start every rank with the same command, code, files and packages")


@dataclass(frozen=True)
class RankPosition:
    """Where a rank's training is. `entered`: phases of steps begun so far, the same on ranks that are equally far."""

    step: int = 0
    phase: str = "start"
    entered: int = 0

    def __str__(self) -> str:
        return f"at step {self.step} in {self.phase}"


@dataclass
class RankStatus:
    """What is known of a rank: its position, the line of code there, and when it last published and last moved (in
    seconds of time.monotonic)."""

    position: RankPosition = field(default_factory=RankPosition)
    line: str = ""
    beat: int = -1
    left: bool = False
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    first_step: int | None = None

    def update(self, message: dict[str, Any], now: float) -> None:
        """Take over the last message of the rank."""
        position = RankPosition(**message["position"])
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
    """Publishes where this rank is and judges the others, in two threads.

    store: a client that nothing else uses, as calls into one that is frozen never return. on_lost: called with the
    reason before the process ends, if this rank is the first to know. hosted: whether rank 0 hosts the store, whose
    silence is then that of rank 0.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout_seconds: float, on_lost: Callable[[RankLost], None],
        *, hosted: bool = False, parent: int | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.timeout, self.on_lost, self.hosted = rank, timeout_seconds, on_lost, hosted
        self.position: Callable[[], RankPosition] = RankPosition
        self.beat_seconds = min(BEAT_SECONDS, timeout_seconds / 5)
        self._store, self._parent = store, os.getppid() if parent is None else parent
        self._ranks = {other: RankStatus() for other in range(size)}
        self._main = threading.get_ident()
        self._beat, self._left, self._answered = 0, False, time.monotonic()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Publish once and begin to watch. To be called before any rank waits for another."""
        self.publish()
        for name, work in (("beats", self._exchange), ("watch", self._watch)):
            self._threads.append(threading.Thread(target=work, name=f"gpt2lab-{name}", daemon=True))
            self._threads[-1].start()

    def leave(self) -> None:
        """Publish that this rank is done: its silence means nothing from here on."""
        self._left = True
        call_within(STORE_SECONDS, self.publish)
        self._closed.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)  # one that comes back from the store when Python is gone would crash

    def is_first_to_fail(self) -> bool:
        """Whether this rank is the first that has a cause to report; asked again, the answer is the same. Where the
        store does not answer, it is."""
        mine = str(self.rank)
        first: bytes | None = call_within(STORE_SECONDS, lambda: self._store.clone().compare_set(CAUSE, "", mine))
        return first is None or first.decode() == mine

    def first_to_fail(self) -> int | None:
        """The rank that was the first to report a cause, if one was."""

        def ask() -> int | None:
            store = self._store.clone()
            return int(store.get(CAUSE)) if store.check([CAUSE]) else None

        return call_within(STORE_SECONDS, ask)

    def missing(self) -> str:
        """A sentence on the rank that most likely left the others waiting."""
        now = time.monotonic()
        others = {rank: status for rank, status in self._ranks.items() if rank != self.rank and not status.left}
        if not others:
            return "another rank does not answer any more"
        rank, status = max(others.items(), key=lambda item: now - item[1].heard)
        if now - status.heard > 2.5 * self.beat_seconds or len(others) == 1:
            return f"rank {rank} does not answer any more, last seen {status.position}"
        last_seen = "; ".join(f"rank {rank} {status.position}" for rank, status in others.items())
        return f"a rank does not answer any more; last seen: {last_seen}"

    def publish(self) -> None:
        """Put where this rank is into the store."""
        self._beat += 1
        status = self._ranks[self.rank]
        still = time.monotonic() - status.moved > self.timeout / 2
        message = {
            "beat": self._beat,
            "position": asdict(self.position()),
            "left": self._left,
            "line": f" ({line_of(self._main)})" if still else "",
        }
        self._store.set(f"rank/{self.rank}", json.dumps(message))
        status.update(message, time.monotonic())

    def read_others(self) -> None:
        """Read where the others are."""
        for rank, status in self._ranks.items():
            if rank != self.rank and self._store.check([f"rank/{rank}"]):
                status.update(json.loads(self._store.get(f"rank/{rank}")), time.monotonic())

    def verdict(self, now: float) -> RankLost | None:
        """What is wrong with another rank, or with all of them, at the moment `now`."""
        here = {rank: status for rank, status in self._ranks.items() if not status.left}
        silence = {rank: now - status.heard for rank, status in here.items() if rank != self.rank}
        if self.hosted and self.rank != 0 and now - self._answered > self.timeout:
            silence = {0: now - self._answered}
        elif now - self._answered > self.timeout:
            return None  # the store is silent, not the ranks: they may well be at work
        for rank, seconds in silence.items():
            if seconds > self.timeout:
                what = f"rank {rank} has been silent for {seconds:.0f} s, last seen {here[rank].position}"
                return RankLost(what, hint=HINT)
        farthest = max((status.position.entered for status in here.values()), default=0)
        behind = {rank: status for rank, status in here.items() if status.position.entered < farthest}
        for rank, status in behind.items():
            if now - status.moved > status.patience(self.timeout):
                what = f"rank {rank} has not moved for {now - status.moved:.0f} s while others wait for it: "
                return RankLost(f"{what}{status.position}{status.line}", hint=HINT)
        if here and not behind and all(status.is_stuck(now, self.timeout) for status in here.values()):
            places = "; ".join(f"rank {rank} {status.position}{status.line}" for rank, status in here.items())
            return RankLost(f"no rank has moved for {self.timeout:.0f} s: {places}", hint=HINT)
        return None

    def discount(self, seconds: float) -> None:
        """Leave a time out of account in which this process could not listen."""
        self._answered += seconds
        for status in self._ranks.values():
            status.heard += seconds
            status.moved += seconds

    def _exchange(self) -> None:
        """The first thread: publish and read; may hang in a store that is frozen."""
        while not self._closed.wait(self.beat_seconds):
            with contextlib.suppress(Exception):  # a store that is gone: `_watch` judges its silence
                self.publish()
                self.read_others()
                self._answered = time.monotonic()

    def _watch(self) -> None:
        """The second thread: judge about once a beat. Calls nothing that could block before it has a verdict."""
        last, orphan_since = time.monotonic(), 0.0
        while not self._closed.wait(self.beat_seconds):
            now = time.monotonic()
            if now - last > 3 * self.beat_seconds:  # this process itself was stopped for a while
                self.discount(now - last)
            last = now
            if os.getppid() != self._parent:
                orphan_since = orphan_since or now
                if now - orphan_since > ORPHAN_SECONDS:
                    self._end(RankLost("the process that started this one is gone", hint=HINT), alone=True)
            elif (lost := self.verdict(now)) is not None:
                self._end(lost)

    def _end(self, lost: RankLost, alone: bool = False) -> None:
        """End this process at once: its main thread is, or soon will be, blocked forever. What is on disk is whole.
        alone: the store is gone with its host, so the other ranks are not asked which of them reports."""
        if self._closed.is_set():
            return
        with contextlib.suppress(Exception):
            if alone or self.is_first_to_fail():
                call_within(STORE_SECONDS, lambda: self.on_lost(lost))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RankLost.exit_code)


def call_within(seconds: float, call: Callable[[], T]) -> T | None:
    """What `call` returns, or None if it raises or takes longer; its thread then goes on by itself."""
    results: list[T] = []

    def work() -> None:
        with contextlib.suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def line_of(thread: int) -> str:
    """`file.py:12`, where that thread is now: the innermost line that is not torch's."""
    frame = sys._current_frames().get(thread)
    while frame is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
