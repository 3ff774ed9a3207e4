"""Batches made ready in another thread."""

from __future__ import annotations

import threading

import pytest

from gpt2lab.training.clock import PHASES, Clock
from gpt2lab.training.loop import PREFETCHED, prefetched


def test_everything_comes_once_and_in_order() -> None:
    assert list(prefetched(lambda i: i * i, range(3, 20))) == [i * i for i in range(3, 20)]
    assert list(prefetched(lambda i: i, range(1))) == [0]
    assert list(prefetched(lambda i: i, range(0))) == []


def test_the_next_ones_are_made_while_one_is_used() -> None:
    made: list[int] = []
    enough = threading.Event()

    def make(i: int) -> int:
        made.append(i)
        if len(made) > PREFETCHED:
            enough.set()
        return i

    source = prefetched(make, range(10))
    assert next(source) == 0
    assert enough.wait(5), "nothing was made ahead"
    assert made[: PREFETCHED + 1] == list(range(PREFETCHED + 1))
    assert len(made) == PREFETCHED + 1  # and no further: memory is bounded
    source.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_comes_where_its_batch_would_have() -> None:
    def make(i: int) -> int:
        if i == 2:
            raise OSError("gone")
        return i

    source = prefetched(make, range(5))
    assert [next(source), next(source)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(source)


def test_time_is_counted_by_phase_and_goes_on_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    for phase, seconds in (("forward", 1.0), ("backward", 2.0), ("forward", 0.5)):
        with clock(phase):
            now[0] += seconds
        now[0] += 10.0  # nobody's
    assert clock.split() == dict.fromkeys(PHASES, 0.0) | {"forward": 1.5, "backward": 2.0}
    later = Clock()
    later.resume(clock.split() | {"a phase of later days": 1.0})
    with later("forward"):
        now[0] += 1.0
    assert later.split() == dict.fromkeys(PHASES, 0.0) | {"forward": 2.5, "backward": 2.0}
