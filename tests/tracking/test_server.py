"""A real MLflow server that comes back with another database, and answers that get lost on the way."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Proxy, Server, until
from small_study import Lab, row

from gpt2lab.tracking.follower import Follower
from gpt2lab.tracking.mlflow import MlflowTracker

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("gpt2lab.tracking.follower.FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr("gpt2lab.tracking.follower.LONGEST_PAUSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    made = Server(tmp_path / "artifacts")
    yield made
    made.stop()


def start_empty(server: Server, template: Path, folder: Path) -> Any:
    """Start over a new database in a new folder; -> a client."""
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    return server.start(f"sqlite:///{folder}/mlflow.db")


def copies(client: Any, lab: Lab) -> dict[str, list[int]]:
    """Run id -> steps of its one living copy."""
    found = client.get_experiment_by_name("gpt2lab")
    if found is None:
        return {}
    runs = [run for run in client.search_runs([found.experiment_id]) if "gpt2lab.run_id" in run.data.tags]
    assert len({run.data.tags["gpt2lab.run_id"] for run in runs}) == len(runs)
    return {
        run.data.tags["gpt2lab.run_id"]: [p.step for p in client.get_metric_history(run.info.run_id, "train/loss")]
        for run in runs
    }


def test_a_server_that_comes_back_with_another_database_gets_all_and_spoils_nothing(
    lab: Lab, server: Server, template: Path, tmp_path: Path
) -> None:
    client = start_empty(server, template, tmp_path / "first")
    for arm, seed in (("learned", 0), ("rotary", 0), ("learned", 1)):
        lab.train(lab.run(arm, seed))
    live = lab.begin(lab.run("rotary", 1))
    lab.write(live, [row(0)])
    said: list[str] = []
    make = lambda: MlflowTracker(server.uri, "gpt2lab", lab.store.root)  # noqa: E731
    follower = Follower(lab.store, lab.record, make, said.append)
    expected = {run.id: [0, 1, 2, 3, 4] for run in lab.store.runs() if run.id != live.id}
    with live.lock():
        until(lambda: follower.poll() is not None and copies(client, lab) == {**expected, live.id: [0]})
        server.stop()
        lab.write(live, [row(1)])
        until(lambda: follower.poll() is not None and bool(said))
        client = start_empty(server, template, tmp_path / "second")
        theirs = client.create_experiment("theirs")
        lab.write(live, [row(2)])
        until(lambda: follower.poll() is not None and copies(client, lab) == {**expected, live.id: [0, 1, 2]})
    assert follower.close() == 0
    assert client.search_runs([theirs]) == []
    assert "does not work at present" in said[0] and len(said) == 1


def test_answers_that_are_lost_leave_no_doubles(lab: Lab, server: Server, template: Path, tmp_path: Path) -> None:
    client = start_empty(server, template, tmp_path / "first")
    turns = itertools.count()
    proxy = Proxy(server.port, lambda line, _: "lost" if b"runs/create" in line and next(turns) % 2 == 0 else "")
    proxy.start()
    lab.train_all()
    make = lambda: MlflowTracker(proxy.uri, "gpt2lab", lab.store.root)  # noqa: E731
    follower = Follower(lab.store, lab.record, make, print)
    until(
        lambda: follower.poll() is not None and copies(client, lab) == {r.id: [0, 1, 2, 3, 4] for r in lab.store.runs()}
    )
    assert follower.close() == 0
    proxy.server.close()
    runs = client.search_runs([client.get_experiment_by_name("gpt2lab").experiment_id])
    assert proxy.spoiled >= 5 and len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}
