"""URIs that cannot work are refused in one line, passwords are never shown, links are MLflow's."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from gpt2lab.basics.redaction import masked
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.tracking.addresses import check_uri, dashboard_command, default_uri, reason, runs_link, sqlite_path
from gpt2lab.tracking.follower import study_status
from gpt2lab.tracking.mlflow import MlflowTracker, create_database


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("./mlruns", "file store is no longer supported"),
        ("file:///tmp/mlruns", "file store is no longer supported"),
        ("htp://host:5000", "did you mean 'http'"),
        ("http://", "no host given"),
        ("http://host:99999999", "not a URI"),
        ("http://[::1", "not a URI"),
        ("postgres://user:hunter2@host/db", "did you mean 'postgresql'"),
        ("sqlite+nodriver:///x.db", "not a database URI"),
        ("", "file store is no longer supported"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_in_one_line(uri: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check_uri(uri)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in caught.value.render()


def test_a_missing_driver_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(EnvironmentFault, match="driver psycopg2 is not installed") as caught:
        MlflowTracker("postgresql+psycopg2://user:hunter2@host/db", "gpt2lab", tmp_path)
    assert caught.value.hint == "pip install psycopg2-binary"
    assert "hunter2" not in caught.value.render()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "https://host/path", "sqlite:////tmp/a.db", "databricks"])
def test_good_uris_pass(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pass@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p@ss/w:rd@host/db", "postgresql://me:***@host/db"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://:pass@host/x", "https://***@host/x"),
        ("mysql://host/db?user=a&password=b&x=1", "mysql://host/db?user=a&password=***&x=1"),
        (
            "cannot reach http://a:b@c:1, nor postgresql://d:e@f",
            "cannot reach http://***@c:1, nor postgresql://d:***@f",
        ),
        ("http://host:5000/a", "http://host:5000/a"),
        ("sqlite:////home/me/a.db", "sqlite:////home/me/a.db"),
    ],
)
def test_passwords_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_reasons_are_one_short_line_without_passwords() -> None:
    text = reason(OSError("\n  no answer from http://me:secret@host " + "x" * 1000 + "\nmore"))
    assert text.startswith("no answer from http://***@host x")
    assert len(text) == 300
    assert reason(TimeoutError()) == "TimeoutError"


def test_the_default_is_a_database_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("runs")) == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    assert sqlite_path(default_uri(Path("runs"))) == tmp_path.resolve() / "runs" / "mlflow.db"
    assert sqlite_path("http://host") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert default_uri(Path("runs")) == "http://host:5000"


@pytest.mark.parametrize("name", ["a%41", "st?x=1", "a#b", "[x] (y)", "ü@:+&", "a%3Fb?"])
def test_any_folder_has_its_own_sqlite_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    uri = default_uri(tmp_path / name)
    check_uri(uri)
    assert sqlite_path(uri) == tmp_path / name / "mlflow.db"
    sqlalchemy.create_engine(uri).connect().close()
    assert [path.name for path in tmp_path.rglob("*.db")] == ["mlflow.db"] and (tmp_path / name / "mlflow.db").exists()


def test_links_open_the_curves_of_a_study() -> None:
    assert runs_link("http://127.0.0.1:5000/", "1", "abc") == (
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
        "&viewStateShareKey=abc"
    )


@pytest.mark.parametrize(
    ("statuses", "over", "expected"),
    [
        (["finished", "diverged"], True, "finished"),
        (["finished", "failed"], True, "failed"),
        (["finished", "partial"], True, "partial"),
        (["failed", "absent"], True, "partial"),
        (["finished", "absent"], False, "running"),
        (["running", "failed"], True, "running"),
    ],
)
def test_a_study_takes_its_status_from_its_runs(statuses: list[Any], over: bool, expected: str) -> None:
    assert study_status(statuses, over) == expected


@pytest.mark.usefixtures("template")
def test_a_database_is_built_once_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight askers at the same time, after a builder that was killed half-way."""
    import sqlite3

    import mlflow.store.tracking.sqlalchemy_store as real

    built: list[str] = []

    class Slow:
        def __init__(self, uri: str, artifact_root: str) -> None:
            built.append(uri)
            path = uri.removeprefix("sqlite:///")
            connection = sqlite3.connect(path)
            connection.execute("create table runs (id)")
            connection.close()
            time.sleep(0.1)
            self.engine = self

        def dispose(self) -> None:
            pass

    monkeypatch.setattr(real, "SqlAlchemyStore", Slow)
    path = tmp_path / "mlflow.db"
    (tmp_path / ".mlflow.db.0123abcd.partial").write_text("half a database")
    (tmp_path / ".0123.job.0123abcd.partial").write_text("what another process is about to lock and write")
    threads = [threading.Thread(target=create_database, args=(path, tmp_path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert "partial" in built[0], "the final name may exist only once the database is complete"
    assert {p.name for p in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock", ".0123.job.0123abcd.partial"}


def test_neither_torch_nor_mlflow_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nimport gpt2lab.store, gpt2lab.tracking.follower\n"
        "from gpt2lab.tracking.mlflow import MlflowTracker\n"
        f"MlflowTracker('http://127.0.0.1:1', 'x', Path({str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'mlflow', 'sqlalchemy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("storage", "command"),
    [
        ("sqlite:////data/my runs/optuna.db", "optuna-dashboard 'sqlite:////data/my runs/optuna.db'"),
        ("journal:/shared/optuna.log", "optuna-dashboard /shared/optuna.log"),
        ("journal:///shared/optuna.log?lock=symlink", "optuna-dashboard /shared/optuna.log"),
        ("postgresql://me:***@host/db", "optuna-dashboard 'postgresql://me:***@host/db'"),
    ],
)
def test_the_dashboards_command_names_what_it_opens(storage: str, command: str) -> None:
    assert dashboard_command(storage) == command
