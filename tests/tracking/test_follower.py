"""The follower is quick and quiet whatever the tracker does, and what it could not deliver is delivered later."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from servers import free_ports
from small_study import Lab, Recorder, row

from gpt2lab.errors import EnvironmentFault
from gpt2lab.tracking.follower import Delivery, Follower, batches, sync
from gpt2lab.tracking.mlflow import MlflowTracker


@pytest.fixture
def tracker() -> Recorder:
    return Recorder()


@pytest.fixture
def said() -> list[str]:
    return []


def wait_for(condition: Callable[[], bool], follower: Follower, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        follower.poll()
        time.sleep(0.01)


def slowest_poll(follower: Follower, seconds: float) -> float:
    slowest, deadline = 0.0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = time.monotonic()
        follower.poll()
        slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.01)
    return slowest


def test_polling_gives_news_and_delivers(lab: Lab, tracker: Recorder, said: list[str]) -> None:
    follower = Follower(lab.store, lab.record, lambda: tracker, said.append)
    assert follower.poll() == []
    run = lab.begin(lab.run("rotary", 1))
    lab.write(run, [row(0), row(1)])
    (news,) = follower.poll()
    assert (news.arm, news.seed, news.run_id) == ("rotary", "1", run.id)
    assert news.rows == [row(0), row(1)]
    wait_for(lambda: tracker.steps(run) == [0, 1], follower)
    lab.write(run, [row(2)])
    lab.finish(run)
    assert follower.close() == 0
    assert tracker.steps(run) == [0, 1, 2]
    assert tracker.statuses[run.id] == "finished"
    assert tracker.statuses["parent"] == "partial"
    assert said == []


def test_what_is_kept_of_copies_is_for_this_user_alone_and_never_written_through_a_link(
    lab: Lab, tracker: Recorder, said: list[str]
) -> None:
    lab.train_all()
    assert Follower(lab.store, lab.record, lambda: tracker, said.append).close() == 0
    (kept,) = (lab.store.root / "tracking").glob("*.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    outside = kept.parent.rename(lab.store.root.parent / "outside")
    kept.parent.symlink_to(outside)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in outside.iterdir()}
    assert Follower(lab.store, lab.record, Recorder, said.append).close() > 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in outside.iterdir()} == before
    assert "tracking: is a symbolic link" in said[0]


def test_following_works_without_a_tracker(lab: Lab, said: list[str]) -> None:
    lab.train_all()
    follower = Follower(lab.store, lab.record, None, said.append)
    news = follower.poll()
    assert [(n.arm, n.seed) for n in news] == [("learned", "0"), ("rotary", "0"), ("learned", "1"), ("rotary", "1")]
    assert follower.close() == 0
    assert said == []


def test_a_wrong_tracker_is_refused_before_training(lab: Lab) -> None:
    def factory() -> Recorder:
        raise EnvironmentFault("the database driver psycopg is not installed")

    with pytest.raises(EnvironmentFault, match="psycopg"):
        Follower(lab.store, lab.record, factory)


def test_a_tracker_that_fails_and_recovers_gets_every_row_once(
    lab: Lab, tracker: Recorder, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.tracking.follower.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("gpt2lab.tracking.follower.GATHER_SECONDS", 0.01)
    run = lab.begin(lab.run())
    lab.write(run, [row(0)])
    failures: list[str] = []

    def fail_before_and_after(call: str) -> None:
        if call in ("log", "logged") and len(failures) < 6:
            failures.append(call)
            raise OSError(f"no route to http://me:secret@host ({call})")

    tracker.trouble = fail_before_and_after
    follower = Follower(lab.store, lab.record, lambda: tracker, said.append)
    for step in range(1, 30):
        lab.write(run, [row(step)])
        follower.poll()
        time.sleep(0.01)
    wait_for(lambda: tracker.steps(run) == list(range(30)), follower)
    assert follower.close() == 0
    assert tracker.steps(run) == list(range(30))
    assert len(failures) == 6
    assert len(said) == 1, "one warning, however often it fails"
    assert "training goes on" in said[0]
    assert "secret" not in said[0]


def test_a_store_that_was_written_but_did_not_say_so_repeats_nothing(lab: Lab, tracker: Recorder) -> None:
    run = lab.begin(lab.run())
    lab.write(run, [row(step) for step in range(1200)])

    def cut(call: str) -> None:
        if call == "logged":
            raise ConnectionError("cut off after storing")

    tracker.trouble = cut
    delivery = Delivery(lab.store, lab.record, tracker)
    for stored in (333, 666, 999, 1200):
        with pytest.raises(ConnectionError):
            delivery.send_new()
        assert len(tracker.steps(run)) == stored
    tracker.trouble = lambda call: None
    assert delivery.send_new() == 0
    assert tracker.steps(run) == list(range(1200))


def test_one_refused_run_does_not_hold_up_the_others(lab: Lab, tracker: Recorder) -> None:
    lab.train_all()

    def refuse(call: str) -> None:
        if call in ("open learned 0", "open rotary 0"):
            raise ValueError("refused")

    tracker.trouble = refuse
    delivery = Delivery(lab.store, lab.record, tracker)
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            delivery.send_new()
    assert tracker.steps(lab.run("learned", 1)) == tracker.steps(lab.run("rotary", 1)) == [0, 1, 2, 3, 4]
    assert delivery.undelivered() == 10


def test_a_damaged_journal_is_said_and_the_rest_goes_on(lab: Lab, tracker: Recorder, said: list[str]) -> None:
    lab.train_all()
    damaged = lab.run("learned", 0)
    damaged.metrics.write_text("nonsense\n" + damaged.metrics.read_text())
    follower = Follower(lab.store, lab.record, lambda: tracker, said.append)
    assert len(follower.poll()) == 3
    follower.poll()
    follower.close()
    assert tracker.steps(lab.run("rotary", 1)) == [0, 1, 2, 3, 4]
    assert len([text for text in said if "cannot be followed" in text]) == 1
    assert all("damaged" in text for text in said)


def test_a_tracker_that_hangs_never_slows_polling(lab: Lab, tracker: Recorder, said: list[str]) -> None:
    lab.train_all()
    release = threading.Event()

    def hang(call: str) -> None:
        release.wait(20)

    tracker.trouble = hang
    follower = Follower(lab.store, lab.record, lambda: tracker, said.append)
    assert slowest_poll(follower, 0.3) < 1.0
    before = time.monotonic()
    assert follower.close(timeout=0.2) == 20
    assert time.monotonic() - before < 2.0
    assert follower._sender
    assert follower._sender.daemon, "the program must be able to end while the call hangs"
    assert said == [
        "20 rows of posenc@nano are not known to be delivered to http://tracker; everything is kept in "
        f"{lab.store.root}, and `gpt2lab sync posenc@nano` sends it later"
    ]
    release.set()


@pytest.fixture
def closed_port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield int(server.getsockname()[1])


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize("kind", ["closed_port", "silent_port"])
def test_training_does_not_notice_a_dead_server(
    lab: Lab,
    said: list[str],
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    sink_factory: Callable[[], MlflowTracker],
) -> None:
    """The real client against a real socket; afterwards `sync` delivers to a store that works."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lab.train_all()
    uri = f"http://me:secret@127.0.0.1:{request.getfixturevalue(kind)}"
    before = time.monotonic()
    follower = Follower(
        lab.store, lab.record, lambda: MlflowTracker(uri, "gpt2lab", lab.store.root / "art"), said.append
    )
    assert time.monotonic() - before < 0.8
    assert slowest_poll(follower, 0.5) < 0.8
    wait_for(lambda: bool(said), follower, 6.0)
    assert follower.close(timeout=3.0) == 20
    assert len(said) == 2
    plain = {"closed_port": "no server listens there", "silent_port": "accepts connections but does not answer"}
    assert f"{plain[kind]}; training goes on" in said[0]
    assert "gpt2lab sync posenc@nano" in said[1]
    assert "secret" not in "".join(said)
    with pytest.raises(EnvironmentFault, match="tracking does not work") as caught:
        sync(lab.store, "posenc@nano", lambda: MlflowTracker(uri, "gpt2lab", lab.store.root / "art"))
    assert "secret" not in caught.value.render()
    assert caught.value.__cause__ is None
    assert sync(lab.store, "posenc@nano", sink_factory) == 20


def test_batches_keep_rows_whole_and_in_order() -> None:
    rows = [row(step, **{f"m{i}": 1.0 for i in range(99)}) for step in range(25)] + [row(25)]
    found = list(batches(rows))
    assert [len(batch) for batch in found] == [10, 10, 6]
    assert [one for batch in found for one in batch] == rows
    assert list(batches([])) == []
    assert [len(b) for b in batches([row(0, **{f"m{i}": 1.0 for i in range(2000)}), row(1)])] == [1, 1]
