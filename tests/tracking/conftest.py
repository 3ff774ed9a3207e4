"""A small study on disk, and an MLflow database to copy (making one takes seconds)."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_server import postgres, postgres_cluster  # noqa: F401
from small_study import Lab, Look

from gpt2lab.tracking.mlflow import MlflowTracker, create_database


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh MLflow database. Importing mlflow warns about its own dependencies: not our errors."""
    environment = dict(os.environ)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tmp_path_factory.mktemp("mlflow")
        create_database(folder / "mlflow.db", folder / "artifacts")
    yield folder / "mlflow.db"
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def sink_factory(lab: Lab, template: Path) -> Callable[[], MlflowTracker]:
    """Makes sinks on one real SQLite store of its own."""
    shutil.copy(template, lab.store.root / "mlflow.db")
    uri = f"sqlite:///{lab.store.root}/mlflow.db"
    return lambda: MlflowTracker(uri, "gpt2lab", lab.store.root / "mlartifacts")


@pytest.fixture
def look(sink_factory: Callable[[], MlflowTracker]) -> Look:
    return Look(sink_factory())
