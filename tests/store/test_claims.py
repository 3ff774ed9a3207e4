"""Claims in place of locks: one holder at a time, a heartbeat, and what becomes of one that falls silent."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.errors import EnvironmentFault, LockHeld
from gpt2lab.store import Store, claims

RACE = """
import multiprocessing, sys, time
from gpt2lab.store import Store
from gpt2lab.errors import LockHeld

def race(_):
    run, won = Store(sys.argv[1]).run("a" * 16), 0
    together.wait()
    for _ in range(40):
        try:
            with run.lock():
                inside = run.path / "inside"
                inside.touch(exist_ok=False)  # fails where two are inside
                time.sleep(0.002)
                inside.unlink()
                won += 1
        except LockHeld:
            pass
    return won

context = multiprocessing.get_context("fork")
together = context.Barrier(6)
with context.Pool(6) as racers:
    print(sum(racers.map(race, range(6), chunksize=1)))
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """On a disk that grants every lock to everybody."""
    (tmp_path / claims.MARKER).touch()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    return Store(tmp_path)


def test_a_claim_is_held_by_one_until_it_is_given_back_or_falls_silent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.run("a" * 16)
    with run.lock():
        assert run.status() == "running" and run.holder()["pid"] == os.getpid()
        with pytest.raises(LockHeld, match=f"in use by process {os.getpid()} on "), run.lock():
            pass
    assert run.status() == "absent" and run.holder() == {}
    with run.lock():
        [claimed] = run.path.glob("lock.claim.*")
        monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that is wrong is not asked
        assert run.status() == "running"
        os.utime(claimed, (0, claimed.stat().st_mtime - claims.STALE_SECONDS - 5))
        assert run.status() == "absent"
        with run.lock():  # by another process, as the holder was killed or is suspended
            assert run.status() == "running"
        assert [path.name for path in run.path.glob("lock.claim.*")] == ["lock.claim.3"]
    assert run.status() == "absent"


def test_a_holder_that_was_silent_too_long_ends_before_it_writes_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit())  # of its thread
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    run = store.run("a" * 16)
    with run.lock():
        [claimed] = run.path.glob("lock.claim.*")
        before = claimed.stat().st_mtime_ns
        while claimed.stat().st_mtime_ns == before:  # it is renewed
            time.sleep(0.01)
        (run.path / "lock.claim.2").write_text(claimed.read_text())
        while not ended:
            time.sleep(0.01)
    assert ended == [LockHeld.exit_code]


def test_of_many_processes_one_is_inside_at_a_time(tmp_path: Path) -> None:
    (tmp_path / claims.MARKER).touch()
    done = subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_disk_without_locks_is_named_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run: Callable[[], Any] = Store(tmp_path).run("a" * 16).lock
    with pytest.raises(EnvironmentFault, match="this disk carries no locks") as refused, run():
        pass
    assert str(refused.value.hint).startswith(f"touch {tmp_path / claims.MARKER}")
    (tmp_path / claims.MARKER).touch()
    with run():
        pass
