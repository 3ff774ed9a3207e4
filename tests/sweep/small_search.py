"""A search that trains nothing: a space, an objective, workers, and storages in which any call can be the last."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from gpt2lab.planning.space import Dimension, SearchSettings, Space
from gpt2lab.sweep.sampling import REPORTS, distribution
from gpt2lab.sweep.storage import open_storage
from gpt2lab.sweep.trials import FORMAT, Attempt, Trials

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
DEAD = f"{socket.gethostname()}:{2**22 + 7}:1"  # above the largest process id that Linux gives out


def trials_of(
    storage: BaseStorage, count: int = 4, *, space: Space = SPACE, study: str = "s", **options: Any
) -> Trials:
    own = {key: options.pop(key) for key in ("worker", "points", "say", "grace_seconds") if key in options}
    settings = SearchSettings(space={"lr": {"low": 1e-4, "high": 1e-1, "log": True}}, **options)
    return Trials(storage, study, space=space, settings=settings, count=count, tokens=TOKENS, **own)


def stored_trial(
    index: int, outcome: str, params: dict[str, Any], value: float | None = None, *,
    curve: dict[int, float] | None = None, rungs: dict[str, Any] | None = None, space: Space = SPACE,
) -> FrozenTrial:  # fmt: skip
    """A trial as a storage has it. curve: percent of training -> value."""
    states = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "running": TrialState.RUNNING}
    trial = create_trial(
        state=states.get(outcome, TrialState.PRUNED), value=value, params=params, intermediate_values=curve,
        distributions={d.name: distribution(d) for d in space.dimensions if d.name in params},
        user_attrs={"end": {"outcome": outcome}, REPORTS: {"curve": [], "rungs": rungs or {}, "stop_at": None}},
    )  # fmt: skip
    trial.number = index
    return trial


def objective(params: dict[str, Any]) -> float:
    return math.log10(params["lr"] / 0.01) ** 2


def work(trials: Trials, attempt: Attempt, reports: int = 3) -> None:
    """One attempt from start to end."""
    value = objective(attempt.params)
    for step in range(1, reports + 1):
        if trials.report(attempt, step, TOKENS * step // (reports + 1), value + 1 / step):
            trials.end(attempt, "pruned", step=step)
            return
    trials.end(attempt, "finished", value)


def work_all(trials: Trials, patience_seconds: float = 20.0) -> None:
    """Until every trial has ended."""
    deadline = time.monotonic() + patience_seconds
    while trials.unfinished():
        trials.take_back()
        while attempt := trials.claim():
            work(trials, attempt)
        assert time.monotonic() < deadline, trials.records()


def claimed(trials: Trials) -> Attempt:
    attempt = trials.claim()
    assert attempt is not None
    return attempt


def check_whole(storage: BaseStorage, trials: Trials, results: int) -> None:
    """Every trial ended, and none runs; one that was created too many waits for a larger total."""
    assert trials.unfinished() == 0
    trials.take_back()
    stored = storage.get_all_trials(storage.get_study_id_from_name(f"s/{FORMAT}"))
    begun, surplus = stored[: trials.count], stored[trials.count :]
    assert {trial.state for trial in begun} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert {trial.state for trial in surplus} <= {TrialState.WAITING}
    assert sum(trial.state != TrialState.FAIL for trial in begun) == results


class Killed(BaseException):
    """The end of a process, as far as a test in one process can have it."""


class Counted:
    """A storage that does something before its call number `at`, or after it."""

    def __init__(self, inner: BaseStorage, at: int = -1, then: Callable[[], Any] | None = None, after: bool = False):
        self.inner, self.at, self.then, self.after, self.calls = inner, at, then, after, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            due = self.calls - 1 == self.at and self.then is not None
            if due and not self.after:
                self.then()  # type: ignore[misc]
            result = getattr(self.inner, name)(*args, **options)
            if due and self.after:
                self.then()  # type: ignore[misc]
            return result

        return call


def kill() -> None:
    raise Killed


def in_memory() -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.storages.InMemoryStorage()


# Processes


def worker(address: str, count: int, seed: int, at_work: int) -> None:
    """One worker process, until every trial has ended."""
    chance = random.Random(seed)
    trials = trials_of(open_storage(address, print), count, sampler="random")
    while trials.unfinished():
        trials.take_back()
        attempt = trials.claim()
        if attempt is None:
            time.sleep(0.05)
            continue
        os.write(at_work, b".")
        value = objective(attempt.params)
        for step in range(1, 4):
            time.sleep(chance.uniform(0.015, 0.065))
            trials.report(attempt, step, TOKENS * step // 4, value + 1 / step)
        trials.end(attempt, "finished", value)


def storm(address: str, *, count: int, kills: int, seed: int, patience_seconds: float = 120.0) -> int:
    """Four workers of which some are killed at random moments; half of the time others take their place. Checks that
    every trial has one result; -> how many attempts were lost."""
    chance, context = random.Random(seed), get_context("fork")
    claims, at_work = os.pipe()

    def start(number: int) -> Any:
        process = context.Process(target=worker, args=(address, count, seed * 100 + number, at_work))
        process.start()
        return process

    living = [start(number) for number in range(4)]
    os.read(claims, 1)  # the first of them has begun
    for number in range(kills):
        time.sleep(chance.uniform(0.05, count * 0.02))
        victim = living.pop(chance.randrange(len(living)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        if seed % 2:
            living.append(start(10 + number))
    for process in living:
        process.join(patience_seconds)
        assert process.exitcode == 0, process.exitcode
    os.close(claims)
    os.close(at_work)
    storage = open_storage(address, print)
    trials = trials_of(storage, count, sampler="random")
    assert [row["outcome"] for row in trials.records()] == ["finished"] * count
    check_whole(storage, trials, count)
    return sum(row["retries"] for row in trials.records())
