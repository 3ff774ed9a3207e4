"""Four workers, three of which are killed at random moments: every slot has one result, and nothing is left behind."""

from __future__ import annotations

import sqlite3
from multiprocessing import get_context
from pathlib import Path

import pytest
from small_search import check_storm, slots_of, storm

from gpt2lab.sweep.storage import open_storage


def test_workers_are_killed_over_a_journal(tmp_path: Path) -> None:
    address = f"journal:{tmp_path}/optuna.log"
    storm(address, slots=12, kills=3, seed=1)
    check_storm(address, 12)


def test_workers_are_killed_over_sqlite(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/optuna.db"
    storm(address, slots=8, kills=2, seed=2)
    check_storm(address, 8)
    assert sqlite3.connect(tmp_path / "optuna.db").execute("pragma journal_mode").fetchone() == ("wal",)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite:///{}/optuna.db", "journal:{}/optuna.log"], ids=["sqlite", "journal"])
@pytest.mark.parametrize("seed", range(20))
def test_forty_slots_survive_three_kills(kind: str, seed: int, tmp_path: Path) -> None:
    address = kind.format(tmp_path)
    seconds = storm(address, slots=40, kills=3, seed=seed)
    print(f"{kind[:7]} seed {seed}: {seconds:.1f} s, {check_storm(address, 40)} turns lost")


@pytest.mark.service
@pytest.mark.parametrize("seed", range(5))
def test_forty_slots_survive_three_kills_over_postgresql(seed: int, postgres: str) -> None:
    seconds = storm(postgres, slots=40, kills=3, seed=seed)
    print(f"postgresql seed {seed}: {seconds:.1f} s, {check_storm(postgres, 40)} turns lost")


def open_together(address: str, slots: int) -> None:
    slots_of(open_storage(address, print), slots)


def check_opened_together(address: str) -> None:
    context = get_context("fork")
    processes = [context.Process(target=open_together, args=(address, 10)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    mine = slots_of(open_storage(address, print), 10)
    while mine.claim():
        pass
    assert [one["outcome"] for one in mine.trials()] == ["running"] * 10


@pytest.mark.parametrize("kind", ["sqlite:///{}/optuna.db", "journal:{}/optuna.log"], ids=["sqlite", "journal"])
def test_several_processes_make_the_storage_at_the_same_time(kind: str, tmp_path: Path) -> None:
    check_opened_together(kind.format(tmp_path))


@pytest.mark.service
def test_several_processes_make_the_tables_of_postgresql_at_the_same_time(postgres: str) -> None:
    check_opened_together(postgres)
