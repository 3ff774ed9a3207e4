"""Whatever call to the storage is a worker's last, another worker brings every trial to its one end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
from small_search import (
    BRANCHED,
    DEAD,
    TOKENS,
    Counted,
    Killed,
    check_whole,
    claimed,
    in_memory,
    kill,
    objective,
    trials_of,
    work,
    work_all,
)

from gpt2lab.planning.space import Dimension, Space
from gpt2lab.records import best_trial
from gpt2lab.sweep.sampling import STATES
from gpt2lab.sweep.trials import FORMAT, MOST_LOSSES, Trials

COUNT = 6


def every_ending(storage: Any) -> None:
    """A worker that does everything that a worker can do: six trials, of which one is finished by a second attempt."""
    mine = trials_of(storage, COUNT, space=BRANCHED, worker=DEAD, pruner="median", points=[{"lr": 0.01, "norm": "a"}])
    mine.take_back()
    for outcome in ("finished", "stopped", "finished", "pruned", "diverged", "finished", "failed"):
        attempt = claimed(mine)
        mine.note(attempt, settings={"lr": 0.1}, runs={"100": "0" * 16}, done=1)
        mine.report(attempt, 1, TOKENS // 2, objective(attempt.params))
        value = objective(attempt.params) if outcome == "finished" else None
        mine.end(attempt, outcome, value, reason="out of memory" if outcome == "failed" else None, tokens=5)
    assert mine.unfinished() == 0


def calls_of(scene: Callable[[Any], None]) -> int:
    counted = Counted(in_memory())
    scene(counted)
    return counted.calls


def test_a_worker_killed_between_any_two_calls_is_survived() -> None:
    total = calls_of(every_ending)
    assert total > 60
    for at in range(total):
        storage = in_memory()
        with contextlib.suppress(Killed):
            every_ending(Counted(storage, at, kill, after=True))
        heir = trials_of(storage, COUNT, space=BRANCHED, points=[{"lr": 0.01, "norm": "a"}])
        work_all(heir)
        rows, failed = heir.records(), heir.failures()
        assert failed == sum("out of memory" in (row["reason"] or "") for row in rows), at
        check_whole(storage, heir, COUNT - failed)
        assert [row["slot"] for row in rows] == list(range(COUNT))
        assert rows[0]["enqueued"] and rows[0]["settings"]["lr"] in (0.01, 0.1)


def test_two_workers_that_take_back_at_the_same_time_lose_each_trial_once() -> None:
    """Where the second takes back what the first has claimed by then, both are at that trial, and one has its result:
    the run store's locks let one of them train."""

    def left_behind() -> BaseStorage:
        storage = in_memory()
        mine = trials_of(storage, 2, worker=DEAD)
        assert mine.claim() and mine.claim()
        return storage

    counted: Any = Counted(left_behind())
    trials_of(counted, 2, worker="a").take_back()
    for at in range(counted.calls):
        storage, messages, held = left_behind(), list[str](), list[Any]()
        b = trials_of(storage, 2, worker="b")

        def between(b: Trials = b, messages: list[str] = messages, held: list[Any] = held) -> None:
            messages.extend(b.take_back())
            held.extend(filter(None, (b.claim(), b.claim())))

        a = trials_of(Counted(storage, at, between), 2, worker="a")
        messages += a.take_back()
        assert {line for line in messages if line.endswith("it is tried again")} == set(messages)
        assert {line[:7] for line in messages} == {"trial 0", "trial 1"}
        for attempt in held:
            work(b, attempt)
        work_all(b)
        check_whole(storage, b, 2)
        assert all(1 <= row["retries"] <= 2 for row in b.records())


def test_two_workers_that_claim_at_the_same_time_get_two_trials() -> None:
    at, met = 0, True
    while met:
        storage, first = in_memory(), []
        a = trials_of(storage, 3, worker="a")
        counted: Any = Counted(storage)
        b = trials_of(counted, 3, worker="b")
        counted.at, counted.then = counted.calls + at, lambda a=a, first=first: first.append(a.claim())
        second = claimed(b)
        met = bool(first)
        if met:
            assert {first[0].index, second.index} == {0, 1}
            assert [row["outcome"] for row in a.records()] == ["running", "running", "waiting"]
            states = [attempt.state for attempt in storage.get_all_trials(0)]
            assert states.count(TrialState.RUNNING) == 2
        at += 1
    assert at >= 4


def test_a_trial_that_another_worker_ends_while_it_is_being_claimed_is_left_to_it() -> None:
    """Until a claim has stored its worker, the trial is in the name of the one that is gone, and may be taken back."""
    met, at = 0, 0
    while met == at:
        storage = in_memory()
        gone = trials_of(storage, 2, worker=DEAD)
        gone.end(claimed(gone), "stopped")
        b = trials_of(storage, 2, worker="b")

        def work_it(b: Trials = b) -> None:
            nonlocal met
            met += 1
            b.take_back()
            while attempt := b.claim():
                work(b, attempt)

        counted: Any = Counted(storage)
        a = trials_of(counted, 2, worker="a")
        counted.at, counted.then = counted.calls + at, work_it
        attempt = a.claim()
        if attempt is not None:
            work(a, attempt)
        work_all(a)
        check_whole(storage, a, 2)
        at += 1
    assert at >= 5


def test_a_creation_whose_answer_was_lost_is_one_trial_more_that_waits() -> None:
    """A storage that is asked again, because a connection broke after it had done what it was asked for."""
    storage = in_memory()
    counted: Any = Counted(storage)
    mine = trials_of(counted, 2)
    template = create_trial(state=TrialState.RUNNING, user_attrs={"worker": mine.worker})
    counted.at, counted.then = counted.calls + 1, lambda: storage.create_new_trial(0, template)
    work(mine, claimed(mine))
    work_all(mine)
    check_whole(storage, mine, 2)


def test_a_worker_that_returns_after_being_declared_gone_has_no_second_result() -> None:
    for at in range(5):
        storage, said = in_memory(), list[str]()
        counted: Any = Counted(storage)
        slow = trials_of(counted, 1, worker=DEAD, say=said.append)
        attempt, heir = claimed(slow), trials_of(storage, 1)

        def take_over(heir: Trials = heir) -> None:
            heir.take_back()
            work_all(heir)

        counted.at, counted.then = counted.calls + at, take_over
        slow.report(attempt, 1, 250, 1.0)
        accepted = slow.end(attempt, "finished", 0.5)
        if counted.calls <= counted.at:  # it was through before
            take_over()
            assert accepted
        check_whole(storage, heir, 1)
        assert accepted == (heir.records()[0]["value"] == 0.5)
        assert bool(said) == (not accepted) and all("not counted" in line for line in said)


def test_a_trial_that_is_lost_again_and_again_without_progress_has_failed() -> None:
    storage, params = in_memory(), []
    for loss, done in enumerate((0, 5, 10, 15, 15, 12, 14), 1):
        mine = trials_of(storage, 1, worker=DEAD)
        attempt = claimed(mine)
        mine.note(attempt, settings={}, runs={}, done=done)
        params.append(attempt.params)
        fate = "it is tried again" if loss < 7 else "it has failed"
        if loss % 2:
            [message] = trials_of(storage, 1).take_back()
            assert message.startswith("trial 0 was lost: its worker") and message.endswith(fate)
        else:  # the worker lives, and the process that trained is gone
            assert mine.end(attempt, "lost", reason="killed by SIGKILL") and mine.has_failed(0) == (loss == 7)
    mine = trials_of(storage, 1)
    assert (mine.unfinished(), mine.failures(), mine.claim()) == (0, 1, None)
    [row] = mine.records()
    assert row.reason and row.reason.startswith(f"lost {MOST_LOSSES} times, at last because its worker")
    assert row.retries == 6 and all(one == params[0] for one in params)


def test_stopping_in_good_order_is_no_loss() -> None:
    storage, params = in_memory(), []
    for _ in range(5):
        mine = trials_of(storage, 1)
        attempt = claimed(mine)
        params.append(attempt.params)
        mine.end(attempt, "stopped")
        assert mine.unfinished() == 1
    mine = trials_of(storage, 1)
    work_all(mine)
    assert all(one == params[0] for one in params)
    assert mine.records()[0]["retries"] == 0 and mine.records()[0]["outcome"] == "finished"


def test_a_living_worker_is_left_alone_and_a_silent_one_elsewhere_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, clock = in_memory(), [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    claimed(trials_of(storage, 2))
    away = "other:12:99"
    claimed(trials_of(storage, 2, worker=away))
    watcher = trials_of(storage, 2, worker="third:5:5", grace_seconds=100)
    for seconds, beat in ((0, None), (99, "moved"), (51, None)):
        clock[0] += seconds
        if beat:
            storage.set_study_user_attr(0, f"beat:{away}", beat)
        assert watcher.take_back() == []
    clock[0] += 101
    [message] = watcher.take_back()  # the other one is a living process of this machine
    assert message.startswith("trial 1 was lost: its worker other:12 is gone")


def test_points_that_need_no_results_are_known_from_the_start() -> None:
    space = Space((Dimension(name="lr", kind="float", low=1e-4, high=1e-1, log=True, points=5, when={}),))
    for name in ("random", "grid", "qmc"):
        storage = in_memory()
        rows = trials_of(storage, 3, space=space, sampler=name, points=[{"lr": 0.02}]).records()
        more = trials_of(storage, 5, space=space, sampler=name, points=[{"lr": 0.02}])
        expected = [0.02, *(point["lr"] for point in space.points(name, 0, 4))]  # type: ignore[arg-type]
        assert [row["settings"]["lr"] for row in more.records()] == expected
        assert [row["enqueued"] for row in rows] == [True, False, False]
        assert [claimed(more).params["lr"] for _ in range(5)] == expected and more.claim() is None


def test_what_diverged_is_never_the_best() -> None:
    storage = in_memory()
    mine = trials_of(storage, 3)
    for outcome, value in (("diverged", None), ("diverged", None), ("finished", 2.0)):
        mine.end(claimed(mine), outcome, value)  # type: ignore[arg-type]
    best = best_trial(mine.records(), "minimize")
    assert best is not None and best.index == 2
    study = optuna.load_study(study_name=f"s/{FORMAT}", storage=storage)
    assert study.best_trial.number == 2 and study.trials[0].state == STATES["diverged"] == TrialState.PRUNED
    assert mine.records()[0]["value"] is None


def test_reporting_is_idempotent() -> None:
    mine = trials_of(in_memory(), 6, pruner={"name": "median", "startup_trials": 2, "warmup": 0.4})
    for _ in range(2):
        attempt = claimed(mine)
        assert not mine.report(attempt, 1, 250, 1.0) and not mine.report(attempt, 2, 500, 1.0)
        mine.end(attempt, "finished", 1.0)
    attempt = claimed(mine)
    assert not mine.report(attempt, 1, 250, 5.0)
    assert mine.report(attempt, 2, 500, 9.0)
    assert not mine.report(attempt, 1, 250, 99.0) and mine.report(attempt, 2, 500, 0.0)
    assert mine.report(attempt, 3, 750, 0.1)
    mine.end(attempt, "finished", 0.5)
    row = mine.records()[attempt.index]
    assert row.curve == [(1, 250, 5.0), (2, 500, 9.0), (3, 750, 0.1)]
    assert (row["outcome"], row["stopped_at"]) == ("finished", None)


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "hyperband"])
def test_one_worker_finds_the_same_however_often_it_is_killed(pruner: str) -> None:
    options = {
        "space": BRANCHED, "sampler": {"name": "tpe", "seed": 3, "startup": 3},
        "pruner": {"name": pruner, "warmup": 0.25, "startup_trials": 3},
    }  # fmt: skip

    def trials(every: int | None) -> list[tuple[Any, ...]]:
        storage = in_memory()
        for attempt in range(200):
            counted: Any = Counted(storage, at=-1 if every is None else every, then=kill)
            try:
                mine = trials_of(counted, 12, worker=f"elsewhere:{attempt}:1", grace_seconds=0.0, **options)
                mine.take_back()
                work_all(mine)
            except Killed:
                continue
            return [(row["settings"], row["outcome"], row["value"], row["stopped_at"]) for row in mine.records()]
        raise AssertionError("no end")

    undisturbed = trials(None)
    assert len({repr(row[0]) for row in undisturbed}) == 12
    assert {"finished", "pruned"} <= {row[1] for row in undisturbed}
    assert trials(97) == undisturbed
    assert trials(None) == undisturbed
    assert math.isfinite(min(row[2] for row in undisturbed if row[1] == "finished"))
