"""Whatever call to the storage is a worker's last, another worker brings every slot to its one end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from small_search import (
    BRANCHED,
    DEAD,
    TOKENS,
    Counted,
    Killed,
    check_whole,
    in_memory,
    kill,
    objective,
    slots_of,
    states,
    work,
    work_all,
)

from gpt2lab.sweep import ledger
from gpt2lab.sweep.slots import Slots
from gpt2lab.sweep.turns import LOSSES

SLOTS = 6


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is there to be waited for."""
    monkeypatch.setattr(ledger, "ELECTION_SECONDS", 0.0)


def every_ending(storage: BaseStorage) -> None:
    """A worker that does everything that a worker can do: six slots, of which one is finished as its second turn."""
    mine = slots_of(storage, SLOTS, space=BRANCHED, worker=DEAD, pruner="median", known=[{"lr": 0.01, "norm": "a"}])
    mine.repair()
    for end in ("finish", "release", "finish", "prune", "diverge", "finish", "fail"):
        turn = mine.claim()
        assert turn is not None
        mine.note(turn, settings={"lr": 0.1}, runs={"100": "0" * 16})
        mine.report(turn, 1, TOKENS // 2, objective(turn.params))
        match end:
            case "finish":
                mine.finish(turn, objective(turn.params), tokens=5)
            case "release":
                mine.release(turn)
            case "prune":
                mine.prune(turn, 1)
            case "diverge":
                mine.diverge(turn, "not finite")
            case "fail":
                mine.fail(turn, "out of memory")
    assert mine.unfinished() == 0


def calls_of(scene: Callable[[BaseStorage], None]) -> int:
    counted = Counted(in_memory())
    scene(counted)
    return counted.calls


def test_a_worker_killed_between_any_two_calls_is_survived() -> None:
    total = calls_of(every_ending)
    assert total > 100
    for at in range(total):
        storage = in_memory()
        with contextlib.suppress(Killed):
            every_ending(Counted(storage, at, kill, after=True))
        heir = slots_of(storage, SLOTS, space=BRANCHED, unowned_seconds=0.0, known=[{"lr": 0.01, "norm": "a"}])
        work_all(heir)
        failed = heir.failures()
        assert failed == sum("out of memory" in (one["reason"] or "") for one in heir.trials()), at
        check_whole(storage, heir, SLOTS - failed)
        assert [one["slot"] for one in heir.trials()] == list(range(SLOTS))
        assert heir.trials()[0]["enqueued"] and heir.trials()[0]["settings"]["lr"] in (0.01, 0.1)


def test_two_workers_that_repair_at_the_same_time_make_one_turn() -> None:
    def lost_slots() -> BaseStorage:
        storage = in_memory()
        mine = slots_of(storage, 2, worker=DEAD)
        assert mine.claim() and mine.claim()
        return storage

    counted = Counted(lost_slots())
    slots_of(counted, 2, worker="a").repair()
    for at in range(counted.calls + 1):
        storage = lost_slots()
        other = slots_of(storage, 2, worker="b")
        told: list[str] = []
        one = slots_of(Counted(storage, at, lambda o=other, t=told: t.extend(o.repair())), 2, worker="a")
        told += one.repair()
        assert sum("is tried once more" in line for line in told) == 2, told
        work_all(other)
        check_whole(storage, other, 2)
        assert [trial["retries"] for trial in other.trials()] == [1, 1]


def test_two_workers_that_claim_at_the_same_time_get_two_slots() -> None:
    at, met = 0, True
    while met:
        storage, first = in_memory(), []
        a = slots_of(storage, 3, worker="a")
        counted = Counted(storage)
        b = slots_of(counted, 3, worker="b")
        counted.at, counted.then = counted.calls + at, lambda a=a, first=first: first.append(a.claim())
        second = b.claim()
        met = bool(first)
        assert second is not None
        if met:
            assert {first[0].slot, second.slot} == {0, 1}
            assert states(storage).count(TrialState.RUNNING) == 2
        at += 1
    assert at > 5


def test_who_was_thought_dead_and_comes_back_has_no_second_result() -> None:
    for at in range(6):
        storage, said = in_memory(), []
        counted = Counted(storage)
        slow = slots_of(counted, 1, worker=DEAD, say=said.append)
        turn = slow.claim()
        assert turn is not None
        heir = slots_of(storage, 1)

        def take_over(heir: Slots = heir) -> None:
            heir.repair()
            work_all(heir)

        counted.at, counted.then = counted.calls + at, take_over
        slow.report(turn, 1, 250, 1.0)
        accepted = slow.finish(turn, 0.5)
        if counted.calls <= counted.at:  # it was through before
            take_over()
            assert accepted
        check_whole(storage, heir, 1)
        record = heir.trials()[0]
        assert accepted == (record["value"] == 0.5)
        assert bool(said) == (not accepted) and all("not counted" in line for line in said)


def test_a_result_that_was_told_is_taken_when_its_worker_dies_before_the_end() -> None:
    storage = in_memory()
    counted = Counted(storage)
    mine = slots_of(counted, 1, worker=DEAD)
    turn = mine.claim()
    assert turn is not None
    counted.at, counted.then = counted.calls + 1, kill  # between what came of it and that it is over
    with pytest.raises(Killed):
        mine.finish(turn, 0.25, tokens=77)
    told = slots_of(storage, 1).repair()
    assert "had told what came of it: finished" in told[0]
    record = slots_of(storage, 1).trials()[0]
    assert (record["value"], record["tokens"], record["retries"]) == (0.25, 77, 0)


def test_a_slot_that_is_lost_again_and_again_has_failed() -> None:
    storage = in_memory()
    for loss in range(1, LOSSES + 1):
        assert slots_of(storage, 1, worker=DEAD).claim()
        told = slots_of(storage, 1).repair()
        assert told[0].endswith("slot 0 is tried once more" if loss < LOSSES else "slot 0 has failed")
    mine = slots_of(storage, 1)
    assert (mine.unfinished(), mine.failures(), mine.claim()) == (0, 1, None)
    assert mine.trials()[0]["reason"].startswith(f"lost {LOSSES} times, at last because its worker")
    assert mine.trials()[0]["retries"] == LOSSES - 1


def test_stopping_in_good_order_is_no_loss() -> None:
    storage = in_memory()
    params = []
    for _ in range(5):
        mine = slots_of(storage, 1)
        turn = mine.claim()
        assert turn is not None
        params.append(turn.params)
        mine.release(turn)
        assert mine.unfinished() == 1
    mine = slots_of(storage, 1)
    work_all(mine)
    assert all(one == params[0] for one in params)
    assert mine.trials()[0]["retries"] == 0 and mine.trials()[0]["outcome"] == "finished"


def test_a_living_worker_is_left_alone_and_a_silent_one_elsewhere_is_not() -> None:
    storage, clock = in_memory(), [0.0]
    here = slots_of(storage, 2)
    assert here.claim()
    elsewhere = slots_of(storage, 2, worker="other:boot:12:99")
    away = elsewhere.claim()
    assert away is not None
    watcher = slots_of(storage, 2, worker="third:boot:5:5", grace_seconds=100)
    watcher._watch._clock = lambda: clock[0]
    assert watcher.repair() == []  # seen for the first time
    clock[0] = 99
    assert watcher.repair() == []
    elsewhere._beat_at = float("-inf")
    elsewhere.beat()
    storage.set_study_user_attr(0, "beat:other:boot:12:99", "later")
    clock[0] = 150
    assert watcher.repair() == []  # it has moved
    clock[0] = 251
    told = watcher.repair()  # both were silent, as seen from a third machine
    assert any("other:12 is gone" in line for line in told)


def test_another_workers_turn_can_be_worked_on_at_once_by_its_params() -> None:
    storage = in_memory()
    first = slots_of(storage, 1, worker=DEAD).claim()
    heir = slots_of(storage, 1)
    heir.repair()
    second = heir.claim()
    assert first is not None and second is not None
    assert second.params == first.params and (second.turn, second.retries) == (1, 1)
    work(heir, second)
    assert heir.trials()[0]["retries"] == 1
