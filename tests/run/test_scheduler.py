"""The scheduler: which jobs it submits when, and what it makes of how they end. With an executor that does what a test
says, and with real runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workers import folder_of, jobs_of

from gpt2lab.errors import Preempted
from gpt2lab.executors import Ending
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.executors.scheduler import MOST_LOSSES, Scheduler
from gpt2lab.runner import Job
from gpt2lab.store import Store


class Actor:
    """A job that ends when it is cancelled, with `answer`, or when a test sets its ending."""

    def __init__(self, run_id: str) -> None:
        self.run_id, self.cancelled = run_id, 0
        self.answer: Ending = "preempted"
        self.ending: Ending | None = None


class FakeExecutor:
    """Executes nothing: a test decides how jobs end."""

    label = "nowhere"

    def __init__(self, capacity: int, events: list[str]) -> None:
        self.capacity, self.events, self.actors = capacity, events, list[Actor]()

    def _working(self, run_id: str) -> Actor:
        return next(actor for actor in reversed(self.actors) if actor.run_id == run_id)

    def submit(self, job: Job) -> None:
        assert job.path.is_file()
        self.events.append(f"{job.run_id[0]} begins")
        self.actors.append(Actor(job.run_id))
        assert sum(actor.run_id != "" for actor in self.actors) <= self.capacity

    def poll(self, seconds: float) -> list[str]:
        return [actor.run_id for actor in self.actors if actor.run_id and actor.ending]

    def cancel(self, run_id: str) -> None:
        actor = self._working(run_id)
        actor.cancelled += 1
        actor.ending = actor.ending or actor.answer

    def collect(self, run_id: str) -> Ending:
        actor = self._working(run_id)
        actor.run_id = ""
        assert actor.ending is not None
        return actor.ending

    def close(self) -> None:
        for actor in self.actors:
            if actor.run_id:
                self.cancel(actor.run_id)

    def kill(self) -> None:
        raise AssertionError("asked twice")


class Stage:
    """A scheduler with a fake executor. events: what happened, in order. at: what is done at which tick."""

    def __init__(self, root: Path, places: int, finished: set[str]) -> None:
        self.root, self.events, self.ticks = root, list[str](), 0
        self.at: Callable[[int], None] = lambda tick: None
        self.fake = FakeExecutor(places, self.events)
        self.actors = self.fake.actors
        self.scheduler = Scheduler(self.fake, self._tick, finished.__contains__)

    def job(self, name: str) -> Job:
        return Job(str(self.root), name * 16, "", {}, "", 1.0, 1)

    def run(self, jobs: Any) -> dict[str, Ending]:
        endings = self.scheduler.run(jobs, lambda run_id, ending: self.events.append(f"{run_id[0]} {ending}"))
        return {run_id[0]: ending for run_id, ending in endings.items()}

    def finish(self, index: int, ending: Ending = "done") -> None:
        self.actors[index].ending = ending

    def one_by_one(self, names: str) -> Iterator[Job | None]:
        """Jobs by name; `-` is none at this moment."""
        for name in names:
            self.events.append(f"asked for {name}")
            yield None if name == "-" else self.job(name)

    def _tick(self) -> None:
        self.ticks += 1
        assert self.ticks < 1000, self.events
        self.at(self.ticks)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    monkeypatch.setattr("gpt2lab.executors.scheduler.LOCKED_PAUSE_SECONDS", 0.005)

    def make(places: int = 1, finished: set[str] | None = None) -> Stage:
        return Stage(tmp_path, places, set() if finished is None else finished)

    return make


def test_a_job_is_taken_when_a_place_is_free_after_the_ended_one_is_reported(stage: Callable[..., Stage]) -> None:
    play = stage(places=2)

    def at(tick: int) -> None:
        if tick == 3:
            play.finish(1, "failed")
        elif tick == 6:
            play.finish(0)
            play.finish(2, "found")

    play.at = at
    assert play.run(play.one_by_one("abc")) == {"a": "done", "b": "failed", "c": "found"}
    assert play.events == ["asked for a", "a begins", "asked for b", "b begins", "b failed", "asked for c", "c begins",
                           "a done", "c found"]  # fmt: skip


def test_with_nothing_to_do_at_this_moment_it_ticks_and_asks_again(stage: Callable[..., Stage]) -> None:
    play = stage(places=2)
    seen: list[int] = []

    def at(tick: int) -> None:
        seen.append(len(play.events))
        for actor in play.actors:
            actor.ending = "done"

    play.at = at
    assert play.run(play.one_by_one("--a---")) == {"a": "done"}
    assert play.events[:2] == ["asked for -", "asked for -"] and play.events.count("asked for -") == 5
    assert seen[:2] == [1, 2]  # a tick after each time
    assert play.run(iter(())) == {}


def test_a_list_is_taken_whole_and_a_stop_counts_what_was_not_begun(stage: Callable[..., Stage]) -> None:
    play = stage()
    play.at = lambda tick: play.finish(-1) if tick < 3 else play.scheduler.stop()
    with pytest.raises(Preempted, match=r"^stopped: 3 runs ended or saved, 2 not begun; nothing is lost"):
        play.run([play.job(name) for name in "abcde"])
    assert play.events == ["a begins", "a done", "b begins", "b done", "c begins", "c preempted"]


def test_a_stop_ends_all_jobs_and_takes_no_more(stage: Callable[..., Stage]) -> None:
    play = stage(places=2)
    play.at = lambda tick: play.scheduler.stop() if tick == 2 else None
    with pytest.raises(Preempted, match=r"^stopped: 2 runs ended or saved; nothing is lost"):
        play.run(play.one_by_one("abc"))
    assert play.events[-2:] == ["a preempted", "b preempted"] and "asked for c" not in play.events
    assert [actor.cancelled for actor in play.actors] == [1, 1]


def test_a_stop_ends_an_executor_that_waits_for_jobs(stage: Callable[..., Stage]) -> None:
    play = stage()
    play.at = lambda tick: play.scheduler.stop() if tick == 2 else None
    with pytest.raises(Preempted, match="0 runs"):
        play.run(play.one_by_one("-" * 100))
    assert play.ticks == 2


def test_one_run_is_ended_and_the_others_go_on(stage: Callable[..., Stage]) -> None:
    play = stage(places=2)

    def at(tick: int) -> None:
        if tick == 2:
            play.scheduler.cancel("a" * 16)
            play.scheduler.cancel("a" * 16)
        elif tick == 4:
            play.finish(1)
            play.finish(2)

    play.at = at
    assert play.run(play.one_by_one("abc")) == {"a": "preempted", "b": "done", "c": "done"}
    assert [actor.cancelled for actor in play.actors] == [1, 0, 0]


def test_to_end_a_run_that_is_over_changes_nothing(stage: Callable[..., Stage]) -> None:
    play = stage()

    def at(tick: int) -> None:
        play.finish(-1)
        play.scheduler.cancel("a" * 16)  # it has ended, though that is not known yet

    play.at = at
    assert play.run(play.one_by_one("aa")) == {"a": "done"}
    assert play.events.count("a begins") == 2


def test_a_lost_job_is_begun_again_but_not_for_ever(stage: Callable[..., Stage]) -> None:
    play = stage()
    folder = Store(play.root).run("a" * 16)
    play.at = lambda tick: [play.finish(-1, "lost")] if play.actors else None  # type: ignore[assignment]
    assert play.run(play.one_by_one("a")) == {"a": "failed"}
    assert play.events.count("a begins") == 1 + MOST_LOSSES
    assert "lost 4 times" in (folder.failure() or {})["reason"]


def test_a_lost_job_that_was_cancelled_or_had_finished_is_not_begun_again(stage: Callable[..., Stage]) -> None:
    finished: set[str] = set()
    play = stage(places=2, finished=finished)

    def at(tick: int) -> None:
        if tick == 1:
            play.actors[0].answer = "lost"
            play.scheduler.cancel("a" * 16)
            finished.add("b" * 16)
            play.finish(1, "lost")

    play.at = at
    assert play.run(play.one_by_one("ab")) == {"a": "preempted", "b": "done"}
    assert len(play.actors) == 2


def test_a_job_that_waits_for_another_process_can_be_dropped_and_holds_its_place_only(
    stage: Callable[..., Stage],
) -> None:
    play = stage(places=2)

    def at(tick: int) -> None:
        if tick % 4 == 0:
            for index in range(len(play.actors)):
                play.finish(index)
        if tick == 20:
            play.scheduler.cancel("a" * 16)

    play.at = at
    with Store(play.root).run("a" * 16).lock():
        assert play.run(play.one_by_one("abcdef01"))["a"] == "preempted"
    assert "a begins" not in play.events
    dropped = play.events.index("a preempted")
    begun = sum(event.endswith("begins") for event in play.events[:dropped])
    assert 4 <= begun <= 6  # one after another, as two places less one have it


def test_the_same_run_twice_is_trained_once(stage: Callable[..., Stage]) -> None:
    finished: set[str] = set()
    play = stage(places=3, finished=finished)

    def at(tick: int) -> None:
        if tick == 3:
            finished.add("a" * 16)
            play.finish(0)
        elif tick == 5:
            play.finish(1)

    play.at = at
    assert play.run(play.one_by_one("aba")) == {"a": "found", "b": "done"}
    assert play.events.count("a begins") == 1
    assert play.events.index("a done") < play.events.index("a found")


def test_the_same_run_twice_is_tried_again_where_the_first_did_not_finish_it(stage: Callable[..., Stage]) -> None:
    play = stage(places=2)

    def at(tick: int) -> None:
        if tick == 3:
            play.scheduler.cancel("a" * 16)  # a run at work is signalled, a waiting one is not
        elif tick > 3:
            play.finish(-1)

    play.at = at
    assert play.run(play.one_by_one("aa")) == {"a": "done"}
    told = [event for event in play.events if not event.startswith("asked")]
    assert told == ["a begins", "a preempted", "a begins", "a done"]


def test_what_the_source_of_jobs_raises_ends_the_workers(stage: Callable[..., Stage]) -> None:
    play = stage(places=2)

    def jobs() -> Iterator[Job]:
        yield play.job("a")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        play.run(jobs())
    assert play.actors[0].cancelled == 1


@pytest.mark.slow
def test_real_runs_come_one_by_one_end_one_by_one_and_go_on(tiny: Path) -> None:
    short, other = jobs_of(tiny)[:2]
    endless, sudden = jobs_of(tiny, "training.steps=100000")[2:]
    ended: list[tuple[str, Ending]] = []

    def jobs() -> Iterator[Job | None]:
        yield endless
        yield short
        yield sudden
        scheduler.cancel(sudden.run_id)  # before it has started
        while not any(run_id == endless.run_id for run_id, _ in ended):
            yield None
        yield other
        yield short

    def tick() -> None:
        if len(folder_of(endless).rows()) > 5:
            scheduler.cancel(endless.run_id)

    scheduler = Scheduler(LocalExecutor(3), tick, lambda run_id: Store(short.root).run(run_id).status() == "finished")
    endings = scheduler.run(jobs(), lambda run_id, ending: ended.append((run_id, ending)))
    assert dict(ended) == endings
    assert sorted(ending for _, ending in ended) == ["done", "done", "found", "preempted", "preempted"]
    assert endings[sudden.run_id] == endings[endless.run_id] == "preempted"
    assert ended.index((endless.run_id, "preempted")) < ended.index((other.run_id, "done"))
    assert (
        folder_of(endless).status() == "partial"
        and max(folder_of(endless).checkpoints.iterdir()).name == f"step_{folder_of(endless).last_step():06}"
    )
    assert folder_of(sudden).failure() is None


def test_a_job_is_written_while_another_process_clears_leftovers_out_of_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands at one study: the other one's worker takes the run's lock in the very moment."""
    job = Job(str(tmp_path), "a" * 16, "", {}, "", 1.0, 1)
    replace = os.replace

    def late(source: Any, target: Any) -> None:
        with Store(tmp_path).run(job.run_id).lock():
            pass
        replace(source, target)

    (tmp_path / job.run_id).mkdir()
    monkeypatch.setattr("os.replace", late)
    assert Job.read(job.write()) == job
