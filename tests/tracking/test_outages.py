"""A real MLflow server over PostgreSQL that fails in twelve ways while a study trains: every point arrives, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_server import PASSWORD, Postgres
from servers import Proxy, Server, until
from small_study import Lab, row

from gpt2lab.tracking.follower import Follower, sync
from gpt2lab.tracking.mlflow import MlflowTracker

pytestmark = [pytest.mark.service, pytest.mark.slow]
DATABASE = "outages"


@pytest.fixture(scope="module")
def backend(postgres_cluster: Postgres) -> str:
    postgres_cluster.execute(f"create database {DATABASE}")
    return f"{postgres_cluster.uri}/{DATABASE}"


@pytest.fixture(scope="module")
def shared_server(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("artifacts"))
    made.start(backend)
    yield made
    made.stop()


class Scene:
    """A study of four runs, one of them finished before and one in training, that is followed to a server."""

    def __init__(self, lab: Lab, server: Server, postgres: Postgres, backend: str, name: str) -> None:
        self.lab, self.server, self.postgres, self.backend, self.name = lab, server, postgres, backend, name
        self.uri, self.said = server.uri, list[str]()
        self.live = lab.begin(lab.run("rotary", 1))
        self.written = 0
        lab.train(lab.run("learned", 0))

    def tracker(self) -> MlflowTracker:
        return MlflowTracker(self.uri, self.name, self.lab.store.root / "artifacts")

    def write(self, count: int = 3) -> None:
        """Some steps of training."""
        self.lab.write(self.live, [row(self.written + i) for i in range(count)])
        self.written += count

    def follow(self, follower: Follower, seconds: float) -> None:
        """Train on for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.write(1)
            begun = time.monotonic()
            follower.poll()
            assert time.monotonic() - begun < 0.5, "training waited for the server"
            time.sleep(0.3)

    def stored(self) -> dict[str, list[int]]:
        """Run id -> steps of its losses, as they lie in the database, without what was deleted."""
        rows = self.postgres.execute(
            "select t.value, m.step from metrics m join runs r on r.run_uuid = m.run_uuid "
            "join tags t on t.run_uuid = r.run_uuid and t.key = 'gpt2lab.run_id' "
            "join experiments e on e.experiment_id = r.experiment_id "
            f"where e.name = '{self.name}' and r.lifecycle_stage = 'active' and m.key = 'train/loss' order by m.step",
            DATABASE,
        )
        found: dict[str, list[int]] = {}
        for run, step in rows:
            found.setdefault(str(run), []).append(int(str(step)))
        return found

    def living(self) -> list[tuple[object, ...]]:
        """Name and status of every run."""
        return self.postgres.execute(
            "select r.name, r.status from runs r join experiments e on e.experiment_id = r.experiment_id "
            f"where e.name = '{self.name}' and r.lifecycle_stage = 'active'",
            DATABASE,
        )

    def expected(self) -> dict[str, list[int]]:
        return {self.lab.run("learned", 0).id: [0, 1, 2, 3, 4], self.live.id: list(range(self.written))}


def restarted(scene: Scene, follower: Follower) -> None:
    scene.server.stop()
    scene.follow(follower, 3)
    scene.server.start(scene.backend)


def down_at_the_start(scene: Scene, follower: Follower) -> None:
    """The server was stopped before the first poll."""
    scene.server.start(scene.backend)


def frozen(scene: Scene, follower: Follower) -> None:
    """It accepts connections and never answers."""
    scene.server.send(signal.SIGSTOP)
    scene.follow(follower, 6)
    scene.server.send(signal.SIGCONT)


def database_restarted(scene: Scene, follower: Follower) -> None:
    scene.postgres.stop()
    scene.follow(follower, 3)
    scene.postgres.start()


def connections_cut(scene: Scene, follower: Follower) -> None:
    for _ in range(6):
        scene.postgres.execute(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{DATABASE}'")
        scene.follow(follower, 0.5)


def table_locked(scene: Scene, follower: Follower) -> None:
    """By another program, for longer than a call waits."""
    held = "begin; lock table metrics in access exclusive mode; select pg_sleep(8); commit"
    locking = threading.Thread(target=scene.postgres.execute, args=(held, DATABASE))
    locking.start()
    scene.follow(follower, 7)
    locking.join()


def through_proxy(spoil: Callable[[bytes, int], str]) -> Callable[[Scene], Proxy]:
    def make(scene: Scene) -> Proxy:
        made = Proxy(scene.server.port, spoil)
        made.start()
        return made

    return make


def for_a_while(scene: Scene, follower: Follower) -> None:
    scene.follow(follower, 6)


Trouble = Callable[[Scene, Follower], None]
PATTERNS: dict[str, tuple[Trouble, Callable[[Scene], Proxy] | None]] = {
    "down at the start": (down_at_the_start, None),
    "restarted midway": (restarted, None),
    "never answers": (frozen, None),
    "database restarted": (database_restarted, None),
    "connections cut": (connections_cut, None),
    "table locked": (table_locked, None),
    "answers lost": (for_a_while, through_proxy(lambda line, n: "lost" if n % 2 else "")),
    "requests cut": (for_a_while, through_proxy(lambda line, n: "cut" if n % 2 and b"POST" in line else "")),
    "overloaded": (for_a_while, through_proxy(lambda line, n: "refused" if n < 40 and n % 4 else "")),
    "answers late": (for_a_while, through_proxy(lambda line, n: "late" if n % 4 == 0 else "")),
}


@pytest.fixture
def scene(
    lab: Lab, shared_server: Server, postgres_cluster: Postgres, backend: str, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Scene:  # fmt: skip
    monkeypatch.setattr("gpt2lab.tracking.follower.FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr("gpt2lab.tracking.follower.LONGEST_PAUSE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    return Scene(lab, shared_server, postgres_cluster, backend, str(abs(hash(request.node.name))))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_point_arrives_once(scene: Scene, pattern: str) -> None:
    trouble, make_proxy = PATTERNS[pattern]
    proxy = make_proxy(scene) if make_proxy else None
    scene.uri = proxy.uri if proxy else scene.uri
    if trouble is down_at_the_start:
        scene.server.stop()
    follower = Follower(scene.lab.store, scene.lab.record, scene.tracker, scene.said.append)
    with scene.live.lock():
        scene.follow(follower, 2)
        trouble(scene, follower)
        scene.follow(follower, 1)
        until(lambda: follower.poll() is not None and scene.stored() == scene.expected(), 90)
        scene.write(2)
    scene.lab.finish(scene.live)
    until(lambda: follower.poll() is not None and scene.stored() == scene.expected(), 90)
    follower.close(60)
    sync(scene.lab.store, scene.lab.record, scene.tracker) if not proxy else None
    assert scene.stored() == scene.expected()
    assert sorted(scene.living()) == [
        ("learned seed 0", "FINISHED"), ("posenc@nano", "KILLED"), ("rotary seed 1", "FINISHED")
    ]  # fmt: skip
    assert proxy is None or proxy.spoiled > 3
    assert len(scene.said) <= 1 and PASSWORD not in "".join(scene.said)


def test_what_a_server_that_is_gone_for_ever_missed_is_delivered_by_sync(scene: Scene) -> None:
    follower = Follower(scene.lab.store, scene.lab.record, scene.tracker, scene.said.append)
    with scene.live.lock():
        scene.follow(follower, 2)
        until(lambda: bool(scene.stored()))
        scene.server.stop()
        scene.follow(follower, 2)
        assert follower.close(3) > 0
    scene.lab.finish(scene.live)
    assert any("gpt2lab sync posenc@nano" in message for message in scene.said)
    scene.server.start(scene.backend)
    sync(scene.lab.store, scene.lab.record, scene.tracker)
    assert scene.stored() == scene.expected()


def test_a_follower_that_is_killed_again_and_again_repeats_nothing(scene: Scene) -> None:
    scene.write(400)
    scene.lab.finish(scene.live)
    code = (
        "import sys; from gpt2lab.store import Store; from gpt2lab.tracking.mlflow import MlflowTracker\n"
        "from gpt2lab.tracking.follower import sync, tracked_records; from gpt2lab.tracking import follower\n"
        "follower.METRICS_PER_BATCH = 12; root, uri, name = sys.argv[1:]; store = Store(root)\n"
        "print('begins', flush=True)\n"
        "for record in tracked_records(store): sync(store, record, lambda: MlflowTracker(uri, name, store.root / 'a'))"
    )
    command = [sys.executable, "-c", code, str(scene.lab.store.root), scene.uri, scene.name]
    for _ in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"begins\n"
            before = len(scene.stored().get(scene.live.id, []))
            until(lambda before=before: len(scene.stored().get(scene.live.id, [])) > before)
            process.kill()
    assert 0 < len(scene.stored()[scene.live.id]) < 400
    sync(scene.lab.store, scene.lab.record, scene.tracker)
    assert scene.stored() == scene.expected()
    assert len(scene.living()) == 3


def test_a_database_behind_no_server_works_too_and_its_password_stays_secret(
    lab: Lab,
    postgres_cluster: Postgres,
    tmp_path: Path,
) -> None:
    """As MLFLOW_TRACKING_URI, while it is up and while it is down."""
    postgres_cluster.execute("create database direct")
    lab.train_all()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"{postgres_cluster.uri}/direct"}
    command = [
        sys.executable,
        "-m",
        "gpt2lab",
        "sync",
        "--runs",
        str(lab.store.root),
        "--out",
        str(tmp_path / "reports"),
    ]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    first = run()
    assert (first.returncode, first.stdout) == (0, "posenc@nano: 20 rows sent\n"), first.stderr
    postgres_cluster.stop()
    down = run()
    postgres_cluster.start()
    again = run()
    assert down.returncode == 3 and "Traceback" not in down.stderr
    assert (again.returncode, again.stdout) == (0, "posenc@nano: 0 rows sent\n"), again.stderr
    counted = postgres_cluster.execute("select count(*) from metrics where key = 'train/loss'", "direct")
    assert counted == [(20,)]
    said = "".join(part for one in (first, down, again) for part in (one.stdout, one.stderr))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert PASSWORD not in said and len(files) > 5
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []
