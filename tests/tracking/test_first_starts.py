"""Several processes that open an empty store at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from postgres_server import Postgres
from small_study import Lab

CODE = """
import multiprocessing, os, sys
from gpt2lab.store import Store
from gpt2lab.tracking.follower import sync, tracked_records
from gpt2lab.tracking.mlflow import MlflowTracker, prepare_environment
prepare_environment()
import mlflow.store.tracking.sqlalchemy_store
root, uri, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store, fork = Store(root), multiprocessing.get_context("fork")
(record,) = tracked_records(store)
barrier = fork.Barrier(count)
def work(study):
    barrier.wait()
    sync(store, {**record, "name": study}, lambda: MlflowTracker(uri, study, store.root / "artifacts"))
started = [fork.Process(target=work, args=(f"study-{i % 4}@nano",)) for i in range(count)]
for process in started: process.start()
for process in started: process.join()
sys.exit(sum(process.exitcode != 0 for process in started))
"""


def start_together(lab: Lab, uri: str, count: int = 8) -> None:
    """Processes that begin at the same instant, two for each of several studies. They are forked, since each would
    import mlflow for seconds and none would meet another."""
    command = [sys.executable, "-c", CODE, str(lab.store.root), uri, str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def copies(uri: str) -> dict[str, list[tuple[str, int]]]:
    """Study -> name and number of points of every run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return {
        experiment.name: sorted(
            (run.info.run_name, len(client.get_metric_history(run.info.run_id, "train/loss")))
            for run in client.search_runs([experiment.experiment_id])
        )
        for experiment in client.search_experiments()
        if experiment.name != "Default"
    }


RUNS = [("learned seed 0", 5), ("learned seed 1", 5), ("rotary seed 0", 5), ("rotary seed 1", 5)]
EXPECTED = {f"study-{i}@nano": sorted([*RUNS, (f"study-{i}@nano", 0)]) for i in range(4)}


@pytest.mark.slow
def test_eight_processes_on_an_empty_store_make_one_database(lab: Lab, tmp_path: Path) -> None:
    lab.train_all()
    uri = f"sqlite:///{lab.store.root}/mlflow.db"
    start_together(lab, uri)
    assert copies(uri) == EXPECTED


@pytest.mark.slow
@pytest.mark.service
def test_eight_processes_on_an_empty_postgresql_make_its_tables_once(lab: Lab, postgres_cluster: Postgres) -> None:
    postgres_cluster.execute("create database together")
    lab.train_all()
    start_together(lab, f"{postgres_cluster.uri}/together")
    assert copies(f"{postgres_cluster.uri}/together") == EXPECTED
