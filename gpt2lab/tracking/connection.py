"""Opening MLflow: its settings, a database of its own where it is a file, and the experiment.

Nothing is imported from mlflow before the first call, which takes a second and more.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gpt2lab.errors import EnvironmentFault
from gpt2lab.store import file_lock, fsync_folder, sweep_leftovers, temporary_beside
from gpt2lab.tracking.addresses import DATABASES, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient


def prepare_environment() -> None:
    """Settings that mlflow reads from the environment; a user's own values win."""
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # on by default, and read at import
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default keeps a call to a dead server waiting for minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


def create_database(path: Path, artifact_root: Path) -> None:
    """Make a complete MLflow database, once: several processes that open a missing file at the same time break it, and
    so does a kill half-way. Built at a temporary name under a lock, then renamed."""
    if path.exists():
        return
    with file_lock(path.with_name(f".{path.name}.lock")):
        sweep_leftovers(path.parent)
        if path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        temporary = temporary_beside(path)
        SqlAlchemyStore(  # type: ignore[no-untyped-call]
            f"sqlite:///{temporary.resolve()}", str(artifact_root)
        ).engine.dispose()
        connection = sqlite3.connect(temporary)
        connection.execute("pragma journal_mode=WAL")
        connection.close()  # the last to close folds the write-ahead log back in: one file is the whole database
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


def connect(uri: str, shown_uri: str, experiment: str, artifact_root: Path) -> tuple[MlflowClient, str]:
    """A client of `uri`, and the id of the experiment of that name, made if there is none.

    shown_uri: without what is secret in it. Raises EnvironmentFault for an experiment that was deleted, and what mlflow
    raises.
    """
    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    if database:
        create_database(database, artifact_root)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        # Without an absolute place, artifacts would follow the working directory; a server has its own.
        keeps_artifacts = urlsplit(uri).scheme.partition("+")[0] in DATABASES
        try:
            place = artifact_root.as_uri() if keeps_artifacts else None
            return client, client.create_experiment(experiment, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise EnvironmentFault(
            f"the MLflow experiment '{experiment}' was deleted",
            where=shown_uri,
            hint=f"mlflow experiments restore --experiment-id {found.experiment_id}",
        )
    return client, found.experiment_id
