"""Opening what is shared: addresses, damage, locks and torn files; one line of error for each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
import threading
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
from small_search import check_whole, claimed, trials_of, work_all

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.sweep import storage as storages
from gpt2lab.sweep.storage import JournalLock, default_address, open_storage
from gpt2lab.sweep.trials import FORMAT


def refused(address: str, kind: type[Gpt2labError]) -> Gpt2labError:
    with pytest.raises(kind) as caught:
        open_storage(address, print, patience_seconds=0.5)
    lines = caught.value.render().splitlines()
    assert len(lines) <= 2 and "s3cret" not in caught.value.render()
    return caught.value


def test_every_kind_is_opened_twice_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "st?x=%41"
    journals = f"journal:{tmp_path}/a/b.log", f"journal:{tmp_path}/c.log?lock=symlink"
    for address in (default_address(tmp_path), default_address(odd), *journals):
        for count in (2, 3):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                work_all(trials_of(open_storage(address, print), count))
    assert capfd.readouterr() == ("", "")
    assert all((root / "sweeps" / "optuna.db").is_file() for root in (tmp_path, odd)) and not list(
        tmp_path.rglob("*.partial")
    )


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgres://me:s3cret@host/db", "did you mean 'postgresql'?"),
        ("mysql://me:s3cret@host/db", "unknown kind of storage 'mysql'"),
        ("optuna.db", "unknown kind of storage"),
        ("", "unknown kind of storage"),
        ("sqlite:relative.db", "not the address of a SQLite file"),
        ("sqlite:///:memory:", "lost with its process"),
        ("journal:", "a file is expected"),
        ("journal:/tmp", "a file is expected"),
        ("journal:/tmp/x.log?lock=flok", "did you mean 'flock'?"),
        ("journal:/tmp/x.log?look=flock", "did you mean 'lock'?"),
        ("postgresql://me:s3cret@host:port/db", "not the address of a database"),
    ],
)
def test_an_address_that_cannot_be(address: str, told: str) -> None:
    assert told in str(refused(address, ConfigError))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for address in (f"sqlite:///{tmp_path}/file/optuna.db", f"journal:{tmp_path}/file/optuna.log"):
        error = refused(address, EnvironmentFault)
        assert "cannot write" in str(error) and str(tmp_path) in str(error)


def test_a_server_that_is_not_there() -> None:
    error = refused("postgresql://me:s3cret@127.0.0.1:9/db", EnvironmentFault)
    assert error.exit_code == 3 and "postgresql://me:***@127.0.0.1:9/db: the database cannot be reached" in str(error)
    assert "no server listens there" in str(error)


def test_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    error = refused("postgresql://me:s3cret@127.0.0.1:9/db", EnvironmentFault)
    assert error.hint == "pip install 'gpt2lab[postgres]'"


def test_a_damaged_database_and_one_of_another_program(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(os.urandom(8192))
    assert "damaged" in str(refused(f"sqlite:///{damaged}", DataFault))
    others = tmp_path / "mlflow.db"
    with sqlite3.connect(others) as connection:
        connection.execute("create table experiments (id int)")
    connection.close()
    assert "MLflow's" in str(refused(f"sqlite:///{others}", DataFault))
    good = tmp_path / "good.db"
    storage = open_storage(f"sqlite:///{good}", print)
    trials_of(storage, 3)
    with good.open("r+b") as file:  # the pages behind the first, which holds the names of the tables
        file.seek(4096)
        file.write(os.urandom(good.stat().st_size - 4096))
    with pytest.raises(DataFault, match="damaged"):
        trials_of(open_storage(f"sqlite:///{good}", print), 3)


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "optuna.db").touch()
    work_all(trials_of(open_storage(f"sqlite:///{tmp_path}/optuna.db", print), 2))


# Locks


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    mine = trials_of(open_storage(f"sqlite:///{tmp_path}/optuna.db", print), 1)
    other = sqlite3.connect(tmp_path / "optuna.db", check_same_thread=False)
    other.execute("begin immediate")
    release = threading.Timer(0.9, other.rollback)
    release.start()
    begun = time.monotonic()
    attempt = claimed(mine)
    assert time.monotonic() - begun > 0.5
    assert mine.end(attempt, "finished", 1.0) and mine.records()[0]["retries"] == 0
    release.join()
    other.close()


def test_a_database_that_stays_locked_is_an_error_of_one_line(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/optuna.db"
    mine = trials_of(open_storage(address, print, patience_seconds=1.0), 1)
    other = sqlite3.connect(tmp_path / "optuna.db")
    other.execute("begin immediate")
    with pytest.raises(EnvironmentFault, match="stayed locked or out of reach for 1 seconds") as caught:
        mine.claim()
    assert str(tmp_path) in str(caught.value) and "PostgreSQL" in str(caught.value.hint)
    other.rollback()
    other.close()
    work_all(mine)  # and can go on afterwards


def end_all(address: str, ready: Any, accepted: Any) -> None:
    storage = open_storage(address, print)
    study = storage.get_study_id_from_name(f"s/{FORMAT}")
    ready.wait()
    for trial in storage.get_all_trials(study):
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL):
                accepted.put(trial.number)


def test_an_attempt_in_sqlite_is_never_ended_twice(tmp_path: Path) -> None:
    """What `begin immediate` is there for: Optuna reads the state of a trial before it changes it."""
    address, context = f"sqlite:///{tmp_path}/optuna.db", get_context("fork")
    mine = trials_of(open_storage(address, print), 20)
    for _ in range(20):
        claimed(mine)
    del mine
    ready, accepted = context.Barrier(3), context.Queue()
    processes = [context.Process(target=end_all, args=(address, ready, accepted)) for _ in range(3)]
    for process in processes:
        process.start()
    ended = [accepted.get(timeout=30) for _ in range(20)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(ended) == list(range(20)) and accepted.empty()


def holder(path: Path, held: Any) -> None:
    lock = JournalLock(path, "flock")
    lock.acquire()
    held.set()
    time.sleep(60)


def test_the_lock_of_a_killed_worker_is_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, context = tmp_path / "optuna.log", get_context("fork")
    storage = open_storage(f"journal:{path}", print)
    held = context.Event()
    process = context.Process(target=holder, args=(path, held))
    process.start()
    assert held.wait(20)
    with monkeypatch.context() as patched:
        patched.setattr(storages, "PATIENCE_SECONDS", 0.2)
        with pytest.raises(EnvironmentFault, match=f"stayed locked .*{process.pid}"):
            trials_of(storage)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begun = time.monotonic()
    work_all(trials_of(storage, 1))
    assert time.monotonic() - begun < 1


# Torn journals


@pytest.mark.parametrize("torn", [b'{"op_code":5,"wor', b"\x00" * 70_000, b'{"op_code":4}', b"{"])
def test_a_torn_last_line_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "optuna.log"
    address = f"journal:{path}"
    mine = trials_of(open_storage(address, print), 3)
    attempt = claimed(mine)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)  # another worker, killed in the middle of writing, while this one goes on
    mine.end(attempt, "finished", 1.0)
    assert path.read_bytes().startswith(whole + b'{"op_code":8,"worker_id":')
    with path.open("ab") as file:
        file.write(torn)
    again = open_storage(address, print)
    later = trials_of(again, 3)
    work_all(later)
    check_whole(again, later, 3)
    work_all(mine)  # who had it open all the while sees the same
    for line in path.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("line", [b"not json\n", b'{"op_code": 4}\n', b"[1, 2]\n", b'{"op_code": 99}\n'])
def test_a_damaged_line_in_the_middle_is_an_error(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "optuna.log"
    claimed(trials_of(open_storage(f"journal:{path}", print), 2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    assert "damaged" in str(refused(f"journal:{path}", DataFault))


def test_a_full_disk_leaves_a_journal_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = trials_of(open_storage(f"journal:{tmp_path}/optuna.log", print), 1)

    def full(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size - 5)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentFault, match="disk is full"):
            mine.claim()
    work_all(mine)
    again = open_storage(f"journal:{tmp_path}/optuna.log", print)
    check_whole(again, trials_of(again, 1), 1)


# PostgreSQL


@pytest.mark.service
def test_errors_of_postgresql_are_one_line(postgres: str) -> None:
    error = refused(postgres.replace(":s3cret@", ":s3cret-wrong@"), EnvironmentFault)
    assert "password authentication failed" in str(error) and error.exit_code == 3
    error = refused(postgres + "_nowhere", EnvironmentFault)
    assert "does not exist" in str(error)


@pytest.mark.service
def test_a_lost_connection_to_postgresql_is_made_again(postgres: str) -> None:
    import sqlalchemy

    storage = open_storage(postgres, print)
    mine = trials_of(storage, 3)
    for _ in range(3):
        attempt = claimed(mine)
        engine = sqlalchemy.create_engine(postgres)
        with engine.connect() as connection:  # as a server that was started again
            connection.execute(
                sqlalchemy.text("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
            )
        engine.dispose()
        assert mine.end(attempt, "finished", 1.0)
    check_whole(storage, mine, 3)
