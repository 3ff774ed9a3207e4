"""A search that trains nothing: a space, an objective, workers, and storages in which any call can be the last."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from gpt2lab.planning.search import SearchSettings
from gpt2lab.planning.space import Dimension, Space
from gpt2lab.sweep.liveness import this_host
from gpt2lab.sweep.slots import Slots, Turn
from gpt2lab.sweep.storage import open_storage

LR = Dimension(name="lr", kind="float", low=1e-4, high=1e-1, log=True, when={})
SPACE = Space((LR,))
BRANCHED = Space(
    (
        LR,
        Dimension(name="norm", kind="categorical", choices=("a", "b"), values=("a", "b"), when={}),
        Dimension(name="groups", kind="int", low=1, high=9, step=2, when={"norm": "b"}),
    )
)
TOKENS = 1000
DEAD = f"{this_host()}:{2**22 + 7}:1"  # above the largest process id that Linux gives out


def search_settings(**changed: Any) -> SearchSettings:
    return SearchSettings(space={"lr": {"low": 1e-4, "high": 1e-1, "log": True}}, **changed)


def slots_of(storage: BaseStorage, slots: int = 4, *, space: Space = SPACE, study: str = "s", **options: Any) -> Slots:
    known = {
        key: options.pop(key)
        for key in ("worker", "known", "direction", "say", "grace_seconds", "unowned_seconds")
        if key in options
    }
    return Slots(storage, study, space=space, settings=search_settings(**options), slots=slots, tokens=TOKENS, **known)


def objective(params: dict[str, Any]) -> float:
    return math.log10(params["lr"] / 0.01) ** 2


def work(slots: Slots, turn: Turn, reports: int = 3) -> None:
    """One turn from start to end."""
    value = objective(turn.params)
    for step in range(1, reports + 1):
        if slots.report(turn, step, TOKENS * step // (reports + 1), value + 1 / step):
            slots.prune(turn, step)
            return
    slots.finish(turn, value)


def work_all(slots: Slots, reports: int = 3, patience_seconds: float = 20.0) -> None:
    """Until every slot has ended."""
    deadline = time.monotonic() + patience_seconds
    while slots.unfinished():
        slots.repair()
        while turn := slots.claim():
            work(slots, turn, reports)
        assert time.monotonic() < deadline, slots.trials()


def states(storage: BaseStorage, study: str = "s") -> list[TrialState]:
    return [trial.state for trial in storage.get_all_trials(storage.get_study_id_from_name(study))]


def check_whole(storage: BaseStorage, slots: Slots, results: int, study: str = "s") -> None:
    """Every slot ended, nothing runs or waits, and no slot has two results."""
    assert slots.unfinished() == 0
    trials = storage.get_all_trials(storage.get_study_id_from_name(study))
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    with_result = [t.user_attrs["slot"] for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(with_result) == len(set(with_result)) == results


class Killed(BaseException):
    """The end of a process, as far as a test in one process can have it."""


class Counted(BaseStorage):
    """A storage that does something before its call number `at`, or after it."""

    def __init__(self, inner: BaseStorage, at: int = -1, then: Callable[[], None] | None = None, after: bool = False):
        self.inner, self.at, self.then, self.after, self.calls = inner, at, then, after, 0


def _counted(name: str) -> Callable[..., Any]:
    def call(self: Counted, *args: Any, **options: Any) -> Any:
        self.calls += 1
        due = self.calls - 1 == self.at
        if due and not self.after and self.then:
            self.then()
        result = getattr(self.inner, name)(*args, **options)
        if due and self.after and self.then:
            self.then()
        return result

    return call


for _name in BaseStorage.__abstractmethods__:
    setattr(Counted, _name, _counted(_name))
Counted.__abstractmethods__ = frozenset()


def kill() -> None:
    raise Killed


def in_memory() -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.storages.InMemoryStorage()


# Processes


def worker(address: str, slots: int, seed: int, at_work: int) -> None:
    """One worker process, until every slot has ended."""
    chance = random.Random(seed)
    mine = slots_of(open_storage(address, print), slots, unowned_seconds=1.0, sampler="random")
    while mine.unfinished():
        mine.repair()
        turn = mine.claim()
        if turn is None:
            time.sleep(0.05)
            continue
        os.write(at_work, b".")
        value = objective(turn.params)
        for step in range(1, 4):
            time.sleep(chance.uniform(0.015, 0.065))
            mine.report(turn, step, TOKENS * step // 4, value + 1 / step)
        mine.finish(turn, value)


def storm(address: str, *, slots: int, kills: int, seed: int, patience_seconds: float = 120.0) -> float:
    """Four workers of which some are killed at random moments; half of the time others take their place.

    -> seconds until every worker had ended
    """
    chance, context, begun = random.Random(seed), get_context("fork"), time.monotonic()
    claims, at_work = os.pipe()

    def start(number: int) -> Any:
        process = context.Process(target=worker, args=(address, slots, seed * 100 + number, at_work))
        process.start()
        return process

    living = [start(number) for number in range(4)]
    replaced = seed % 2
    os.read(claims, 1)  # the first of them has begun
    for number in range(kills):
        time.sleep(chance.uniform(0.05, slots * 0.02))
        victim = living.pop(chance.randrange(len(living)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        if replaced:
            living.append(start(10 + number))
    for process in living:
        process.join(patience_seconds)
        assert process.exitcode == 0, process.exitcode
    os.close(claims)
    os.close(at_work)
    return time.monotonic() - begun


def check_storm(address: str, slots: int) -> int:
    """-> how many turns were lost"""
    storage = open_storage(address, print)
    mine = slots_of(storage, slots, sampler="random")
    assert [one["outcome"] for one in mine.trials()] == ["finished"] * slots
    check_whole(storage, mine, slots)
    return sum(one["retries"] for one in mine.trials())
