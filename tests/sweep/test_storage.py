"""Opening what is shared: addresses, damage, locks and torn files; one line of error for each."""

from __future__ import annotations

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
from small_search import check_whole, slots_of, work_all

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.sweep.journal import KernelLock, MendedJournal
from gpt2lab.sweep.patience import Patience
from gpt2lab.sweep.storage import default_address, open_storage


def refused(address: str, kind: type[Gpt2labError]) -> Gpt2labError:
    with pytest.raises(kind) as caught:
        open_storage(address, print, patience_seconds=0.5)
    lines = caught.value.render().splitlines()
    assert len(lines) <= 2 and "s3cret" not in caught.value.render()
    return caught.value


def test_every_kind_is_opened_twice_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for address in (default_address(tmp_path), f"journal:{tmp_path}/a/b.log", f"journal:{tmp_path}/c.log?lock=symlink"):
        for count in (2, 3):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                work_all(slots_of(open_storage(address, print), count))
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "sweeps" / "optuna.db").is_file() and not list(tmp_path.rglob("*.partial"))


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
    slots_of(storage, 3)
    storage.inner._backend.engine.dispose()  # type: ignore[attr-defined]
    with good.open("r+b") as file:  # the pages behind the first, which holds the names of the tables
        file.seek(4096)
        file.write(os.urandom(good.stat().st_size - 4096))
    with pytest.raises(DataFault, match="damaged"):
        slots_of(open_storage(f"sqlite:///{good}", print), 3)


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "optuna.db").touch()
    work_all(slots_of(open_storage(f"sqlite:///{tmp_path}/optuna.db", print), 2))


# Locks


def test_a_locked_database_is_waited_for_and_explained_once(tmp_path: Path) -> None:
    said: list[str] = []
    address = f"sqlite:///{tmp_path}/optuna.db"
    storage = open_storage(address, said.append)
    storage.patience._tell_after = 0.3
    mine = slots_of(storage, 2)
    other = sqlite3.connect(tmp_path / "optuna.db", check_same_thread=False)
    for _ in range(2):
        other.execute("begin immediate")
        release = threading.Timer(0.9, other.rollback)
        release.start()
        begun = time.monotonic()
        turn = mine.claim()
        assert turn is not None and time.monotonic() - begun > 0.5
        mine.finish(turn, 1.0)
        release.join()
    other.close()
    assert len(said) == 1
    assert "is locked by other workers" in said[0] and "PostgreSQL suits many workers better" in said[0]
    assert [one["retries"] for one in mine.trials()] == [0, 0]


def test_a_database_that_stays_locked_is_told_in_one_line(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/optuna.db"
    mine = slots_of(open_storage(address, print, patience_seconds=1.0), 1)
    other = sqlite3.connect(tmp_path / "optuna.db")
    other.execute("begin immediate")
    with pytest.raises(EnvironmentFault, match="stayed locked or out of reach for 1 seconds") as caught:
        mine.claim()
    assert str(tmp_path) in str(caught.value) and "PostgreSQL" in str(caught.value.hint)
    other.rollback()
    other.close()
    work_all(mine)  # and can go on afterwards


def test_two_workers_never_get_one_trial_of_sqlite(tmp_path: Path) -> None:
    """What `begin immediate` is there for: Optuna reads the state of a trial before it changes it."""
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db", print)
    slots_of(storage, 30)
    ready, taken = threading.Barrier(3), []

    def take() -> None:
        ready.wait()
        for trial in range(1, 31):
            if storage.set_trial_state_values(trial, optuna.trial.TrialState.RUNNING):
                taken.append(trial)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 31))


def holder(path: Path, held: Any) -> None:
    KernelLock(path, Patience("journal", print)).acquire()
    held.set()
    time.sleep(60)


def test_the_lock_of_a_killed_worker_is_free_at_once(tmp_path: Path) -> None:
    context = get_context("fork")
    held = context.Event()
    process = context.Process(target=holder, args=(tmp_path / "lock", held))
    process.start()
    assert held.wait(20)
    lock = KernelLock(tmp_path / "lock", Patience("journal", print, seconds=0.2))
    with pytest.raises(EnvironmentFault, match="stayed locked"):
        lock.acquire()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begun = time.monotonic()
    assert KernelLock(tmp_path / "lock", Patience("journal", print)).acquire()
    assert time.monotonic() - begun < 1


# Torn journals


@pytest.mark.parametrize("torn", [b'{"op_code":5,"wor', b"\x00" * 70_000, b'{"op_code":4}', b"{"])
def test_a_torn_last_line_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "optuna.log"
    address = f"journal:{path}"
    storage = open_storage(address, print)
    mine = slots_of(storage, 3)
    turn = mine.claim()
    assert turn is not None
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn)  # another worker, killed in the middle of writing, while this one goes on
    mine.finish(turn, 1.0)
    assert path.read_bytes().startswith(whole + b'{"op_code":8,"worker_id":')
    with path.open("ab") as file:
        file.write(torn)
    again = open_storage(address, print)
    later = slots_of(again, 3)
    work_all(later)
    check_whole(again, later, 3)
    work_all(mine)  # who had it open all the while sees the same
    for line in path.read_text().splitlines():
        json.loads(line)


def test_optuna_itself_breaks_for_good_there(tmp_path: Path) -> None:
    """Should this fail, MendedJournal is needed no more."""
    path = str(tmp_path / "optuna.log")
    backend = optuna.storages.journal.JournalFileBackend(path)
    storage = optuna.storages.JournalStorage(backend)
    storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "s")
    with open(path, "ab") as file:
        file.write(b'{"op_code":5,"wor')
    storage.set_study_user_attr(0, "key", "value")
    assert storage.get_study_user_attrs(0) == {}  # lost without a word
    for _ in range(2):
        with pytest.raises(ValueError):
            storage.set_study_user_attr(0, "key", "value")


@pytest.mark.parametrize("line", [b"not json\n", b'{"op_code": 4}\n', b"[1, 2]\n", b'{"op_code": 99}\n'])
def test_a_damaged_line_within_is_told(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "optuna.log"
    slots_of(open_storage(f"journal:{path}", print), 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], line, *lines[3:]]))
    refused(f"journal:{path}", DataFault)


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "optuna.log"
    storage = open_storage(f"journal:{path}", print)
    mine = slots_of(storage, 1)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EnvironmentFault, match="disk is full"):
            mine.claim()
    assert path.read_bytes() == before
    work_all(mine)
    assert MendedJournal(path, KernelLock(tmp_path / "l", Patience("j", print)))


# PostgreSQL


@pytest.mark.service
def test_postgresql_tells_what_is_wrong_in_one_line(postgres: str) -> None:
    error = refused(postgres.replace(":s3cret@", ":s3cret-wrong@"), EnvironmentFault)
    assert "password authentication failed" in str(error) and error.exit_code == 3
    error = refused(postgres + "_nowhere", EnvironmentFault)
    assert "does not exist" in str(error)


@pytest.mark.service
def test_a_lost_connection_to_postgresql_is_made_again(postgres: str) -> None:
    import sqlalchemy

    storage = open_storage(postgres, print)
    mine = slots_of(storage, 3)
    for _ in range(3):
        turn = mine.claim()
        assert turn is not None
        engine = sqlalchemy.create_engine(postgres)
        with engine.connect() as connection:  # as a server that was started again
            connection.execute(
                sqlalchemy.text("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
            )
        engine.dispose()
        assert mine.finish(turn, 1.0)
    check_whole(storage, mine, 3)
