"""Four workers, three of which are killed at random moments: every trial has one result, and nothing is left behind."""

from __future__ import annotations

import sqlite3
from multiprocessing import get_context
from pathlib import Path

import pytest
from small_search import storm, trials_of

from gpt2lab.sweep.storage import open_storage

FILES = pytest.mark.parametrize("kind", ["sqlite:///{}/optuna.db", "journal:{}/optuna.log"], ids=["sqlite", "journal"])


@FILES
def test_workers_are_killed(kind: str, tmp_path: Path) -> None:
    sqlite = kind.startswith("sqlite")
    storm(kind.format(tmp_path), count=8 if sqlite else 12, kills=2 if sqlite else 3, seed=1 + sqlite)
    if sqlite:
        assert sqlite3.connect(tmp_path / "optuna.db").execute("pragma journal_mode").fetchone() == ("wal",)


@pytest.mark.slow
@FILES
@pytest.mark.parametrize("seed", range(20))
def test_forty_trials_survive_three_kills(kind: str, seed: int, tmp_path: Path) -> None:
    storm(kind.format(tmp_path), count=40, kills=3, seed=seed)


@pytest.mark.service
@pytest.mark.parametrize("seed", range(5))
def test_forty_trials_survive_three_kills_over_postgresql(seed: int, postgres: str) -> None:
    storm(postgres, count=40, kills=3, seed=seed)


def claim_two(address: str) -> None:
    trials = trials_of(open_storage(address, print), 10)
    assert trials.claim() and trials.claim()


def check_opened_together(address: str) -> None:
    context = get_context("fork")
    processes = [context.Process(target=claim_two, args=(address,)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    trials = trials_of(open_storage(address, print), 10)
    assert trials.claim() is None
    assert [row["outcome"] for row in trials.records()] == ["running"] * 10


@FILES
def test_several_processes_make_the_storage_at_the_same_time(kind: str, tmp_path: Path) -> None:
    check_opened_together(kind.format(tmp_path))


@pytest.mark.service
def test_several_processes_make_the_tables_of_postgresql_at_the_same_time(postgres: str) -> None:
    check_opened_together(postgres)
