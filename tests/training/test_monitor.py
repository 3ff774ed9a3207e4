"""What one rank concludes from what the others say, at moments that the test chooses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from gpt2lab.errors import RankLost
from gpt2lab.training.ranks import Monitor, RankPosition, call_within, join_world

TIMEOUT = 10.0


class Ranks:
    """Three ranks in one process over a real store, without their threads."""

    def __init__(self, hosted: bool = False) -> None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        self.monitors = [
            Monitor(dist.PrefixStore("m", store), rank, 3, TIMEOUT, lambda error: None, hosted=hosted)  # type: ignore[attr-defined]
            for rank in range(3)
        ]
        self.at(0, 0, 0)
        self.at(1, 1, 1)  # the first step is over

    def at(self, *entered: int, phase: str = "backward") -> None:
        """Ranks say that they have begun so many phases."""
        for rank, count in enumerate(entered):
            self.monitors[rank].position = lambda count=count: RankPosition(count, phase, count)  # type: ignore[misc]
            self.monitors[rank].publish()
        for monitor in self.monitors:
            monitor.read_others()

    def verdict(self, seconds: float, rank: int = 0, beating: tuple[int, ...] = (0, 1, 2)) -> str | None:
        """What a rank reports after so many seconds in which no rank made a step and only some sent a sign of life."""
        watch = self.monitors[rank]
        later = time.monotonic() + seconds
        for other in beating:
            watch._ranks[other].heard = later
        watch._answered = later
        found = watch.verdict(later)
        return None if found is None else str(found)


def test_a_silent_rank_is_named_with_its_last_place() -> None:
    ranks = Ranks()
    ranks.at(7, 7, 6)
    assert ranks.verdict(9, beating=(0, 1)) is None
    for rank in (0, 1):
        verdict = ranks.verdict(11, rank=rank, beating=(0, 1))
        assert verdict == "rank 2 has been silent for 11 s, last seen at step 6 in backward"


def test_a_rank_that_stands_still_while_others_wait_is_named() -> None:
    ranks = Ranks()
    ranks.at(7, 6, 7)
    assert ranks.verdict(9) is None
    assert str(ranks.verdict(11)).startswith(
        "rank 1 has not moved for 11 s while others wait for it: at step 6 in backward"
    )


def test_saving_evaluating_and_the_first_step_may_take_longer() -> None:
    ranks = Ranks()
    ranks.at(7, 6, 7, phase="saving")
    assert ranks.verdict(99) is None
    assert ranks.verdict(101) is not None
    ranks = Ranks()
    ranks.monitors[0]._ranks[1].first_step = 6
    ranks.at(7, 6, 7)
    assert ranks.verdict(99) is None


def test_ranks_that_are_equally_far_and_all_stuck_are_all_told() -> None:
    ranks = Ranks()
    ranks.at(7, 7, 7)
    assert ranks.verdict(9) is None
    assert str(ranks.verdict(11)).startswith("no rank has moved for 10 s: rank 0 at step 7 in backward")
    assert "rank 2 at step 7 in backward" in str(ranks.verdict(11))
    ranks.at(7, 7, 7, phase="evaluation")  # may take all of them for as long as it takes
    assert ranks.verdict(1000) is None


def test_a_rank_that_left_is_not_missed() -> None:
    ranks = Ranks()
    ranks.at(8, 8, 7)
    ranks.monitors[2].leave()
    ranks.monitors[0].read_others()
    assert ranks.verdict(1000, beating=(0, 1)) is not None  # those two wait for each other
    assert "rank 2" not in str(ranks.verdict(1000, beating=(0, 1)))


def test_a_silent_store_counts_as_the_loss_of_rank_0_only_where_rank_0_hosts_it() -> None:
    for hosted in (False, True):
        ranks = Ranks(hosted)
        ranks.at(7, 7, 7)
        watch = ranks.monitors[1]
        found = watch.verdict(time.monotonic() + 11)
        assert (found is not None) == hosted
        assert not hosted or str(found) == "rank 0 has been silent for 11 s, last seen at step 7 in backward"


def test_a_rank_that_was_stopped_itself_reports_no_other() -> None:
    ranks = Ranks()
    ranks.at(7, 7, 7)
    watch = ranks.monitors[0]
    watch.discount(100)
    assert watch.verdict(time.monotonic() + 105) is None


def test_the_first_to_speak_is_the_first_for_all() -> None:
    ranks = Ranks()
    assert ranks.monitors[1].first_to_fail() is None
    assert ranks.monitors[1].is_first_to_fail()
    assert not ranks.monitors[0].is_first_to_fail()
    assert ranks.monitors[1].is_first_to_fail()
    assert ranks.monitors[2].first_to_fail() == 1


def test_what_takes_too_long_or_raises_is_none() -> None:
    assert call_within(5, lambda: 3) == 3
    assert call_within(0.05, lambda: time.sleep(1)) is None

    def fail() -> int:
        raise ValueError

    assert call_within(5, fail) is None


def test_the_process_ends_though_its_main_thread_is_blocked(tmp_path: object) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        told: Callable[[RankLost], None] = lambda error: os.write(writing, str(error).encode()) and None  # noqa: E731
        store = dist.HashStore()  # type: ignore[attr-defined]
        watch = Monitor(store, 0, 2, 0.5, told)
        watch.start()
        Monitor(store, 1, 2, 0.5, told).publish()  # once, and never again
        time.sleep(60)
        os._exit(0)
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert time.monotonic() - began < 5
    assert os.read(reading, 1000).decode() == "rank 1 has been silent for 1 s, last seen at step 0 in start"
    os.close(reading)
    os.close(writing)


def test_a_process_whose_starter_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.training.ranks.ORPHAN_SECONDS", 0.3)
    pid = os.fork()
    if pid == 0:
        Monitor(dist.HashStore(), 0, 1, 1.0, lambda error: None, parent=1).start()  # type: ignore[attr-defined]
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_the_first_rank_to_fail_raises_its_error_without_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gpt2lab.training.ranks.host_store", lambda size: dist.HashStore())  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    bug = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug") as caught, join_world("cpu", TIMEOUT):
        raise bug
    assert caught.value is bug
    assert bug.__cause__ is None
