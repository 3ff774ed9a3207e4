"""A real MLflow server that comes back with another database, and answers that get lost on the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_study import Lab, row

from gpt2lab.tracking.follower import Follower
from gpt2lab.tracking.mlflow import MlflowTracker

pytestmark = pytest.mark.slow


class Server:
    """`mlflow server` at one port, over a database that changes."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder, self.template, self.count = folder, template, 0
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"

    def start_empty(self) -> Any:
        """Start over a new database; -> a client."""
        from mlflow import MlflowClient

        self.count += 1
        home = self.folder / f"server-{self.count}"
        home.mkdir()
        shutil.copy(self.template, home / "mlflow.db")
        words = ["--artifacts-destination", str(home), "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home}/mlflow.db",
                 "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )  # fmt: skip
        until(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() or True)
        client = MlflowClient(self.uri)
        until(lambda: bool(client.search_experiments()))
        return client

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until it holds; an error means that it does not yet."""
    deadline = time.monotonic() + seconds
    holds = False
    while not holds:
        assert time.monotonic() < deadline, "it did not happen in time"
        with contextlib.suppress(Exception):
            holds = bool(condition())
        time.sleep(0.1)


@pytest.fixture
def server(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("gpt2lab.tracking.follower.FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr("gpt2lab.tracking.follower.LONGEST_PAUSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    made = Server(tmp_path, template)
    yield made
    made.stop()


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


def test_a_server_that_comes_back_with_another_database_gets_all_and_spoils_nothing(lab: Lab, server: Server) -> None:
    client = server.start_empty()
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
        client = server.start_empty()
        theirs = client.create_experiment("theirs")
        lab.write(live, [row(2)])
        until(lambda: follower.poll() is not None and copies(client, lab) == {**expected, live.id: [0, 1, 2]})
    assert follower.close() == 0
    assert client.search_runs([theirs]) == []
    assert "does not work at present" in said[0] and len(said) == 1


class Dropping(threading.Thread):
    """A proxy that passes requests on, but loses the first answer to each that creates a run."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self.target, self.lost = target, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        """One request, then the connection ends."""
        with client, socket.create_connection(("127.0.0.1", self.target)) as target:
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(65536) or b"\r\n\r\n"
            head, _, body = request.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            while length and len(body) < int(length[0].split(b":")[1]):
                body += client.recv(65536)
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            target.sendall(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            answer = b""
            while part := target.recv(65536):
                answer += part
            if b"runs/create" in lines[0]:
                self.lost += 1
                if self.lost % 2:
                    return
            client.sendall(answer)


def test_answers_that_are_lost_leave_no_doubles(lab: Lab, server: Server) -> None:
    client = server.start_empty()
    proxy = Dropping(server.port)
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
    assert proxy.lost >= 5 and len(runs) == 5 and {run.info.status for run in runs} == {"FINISHED"}
