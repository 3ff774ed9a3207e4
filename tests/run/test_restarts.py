"""PostgreSQL behind Optuna and behind MLflow restarts while runs train: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import Postgres
from servers import Server
from workers import SWEEP, rows_of

from gpt2lab import api
from gpt2lab.basics.progress import Event
from gpt2lab.executors.inline import InlineExecutor
from gpt2lab.executors.local import LocalExecutor
from gpt2lab.store import Store
from gpt2lab.tracking.follower import sync

pytestmark = pytest.mark.service
STEPS, TIMES, DOWN_SECONDS = 300, 3, 1.5
LONG = [f"training.steps={STEPS}"]
SEARCH = "trials: 4\nsampler: {name: tpe, startup: 2}\nenqueue: [{}]\n"


class Restarts:
    """A listener that stops the server in the middle of each of the first runs of a store, and starts it again."""

    def __init__(self, postgres: Postgres, root: Path) -> None:
        self.postgres, self.store = postgres, Store(root)
        self.seen = set[str]()
        self.starting: threading.Timer | None = None

    def __call__(self, event: Event) -> None:
        begun = {run.id for run in self.store.runs() if run.status() == "running" and run.last_step() > STEPS // 3}
        if begun - self.seen and len(self.seen) < TIMES:
            self.wait()
            self.seen |= begun
            self.postgres.stop()
            self.starting = threading.Timer(DOWN_SECONDS, self.postgres.start)
            self.starting.start()

    def wait(self) -> None:
        """Until the server has started again."""
        if self.starting:
            self.starting.join()


@pytest.fixture
def restarts(postgres_cluster: Postgres, tiny: Path) -> Iterator[Restarts]:
    made = Restarts(postgres_cluster, tiny.parent / "there")
    yield made
    made.wait()


def test_a_sweep_finds_what_it_finds_undisturbed(postgres: str, restarts: Restarts, tiny: Path) -> None:
    file = tiny.with_name("lr.yaml")
    file.write_text(SWEEP.format(base=tiny.with_name("tiny.yaml")) + SEARCH)

    def found(root: Path, **options: object) -> list[tuple[object, ...]]:
        result = api.run_sweep(file, overrides=LONG, runs=root, tracking=False, jobs=1, **options)  # type: ignore[arg-type]
        [search] = result.record.searches.values()
        return [(trial.index, trial.outcome, trial.settings, trial.value) for trial in search.trials]

    disturbed = found(restarts.store.root, storage=postgres, executor=LocalExecutor(1), on_event=restarts)
    assert len(restarts.seen) == TIMES
    assert disturbed == found(tiny.parent / "here", executor=InlineExecutor()) and len(disturbed) == 4
    assert len(restarts.store.runs()) == 4  # no trial was trained a second time


def test_an_ablation_arrives_in_mlflow_once(
    postgres: str, postgres_cluster: Postgres, restarts: Restarts, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tiny.parent / "artifacts")
    try:
        server.start(postgres)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        result = api.run_ablation(
            tiny, seeds=2, overrides=LONG, runs=restarts.store.root, executor=LocalExecutor(1), on_event=restarts
        )
        restarts.wait()
        sync(result.store, "tiny@tiny", api.tracker_of(result.store, "tiny"))  # what is left
    finally:
        server.stop()
    assert not result.failed and len(restarts.seen) == TIMES
    stored = postgres_cluster.execute(
        "select t.value, m.step, m.value from metrics m join tags t on t.run_uuid = m.run_uuid "
        "where t.key = 'gpt2lab.run_id' and m.key = 'train/loss' order by t.value, m.step",
        postgres.rpartition("/")[2],
    )
    rows = {run.id: rows_of(run) for run in sorted(restarts.store.runs(), key=lambda run: run.id)}
    losses = [(run, row["step"], row["metrics"].get("train/loss")) for run in rows for row in rows[run]]
    assert stored == [point for point in losses if point[2] is not None] and len(rows) == 4
