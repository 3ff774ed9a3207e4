"""Where results are kept: tracking URIs, checked before anything starts, and links into the MLflow UI."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote, urlsplit

from gpt2lab.basics.redaction import masked, shown
from gpt2lab.errors import ConfigError, EnvironmentFault, unknown

SERVERS = ("http", "https", "databricks")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient", "pymysql": "pymysql"}
MEANINGS = (
    ("Read timed out", "the server accepts connections but does not answer"),
    ("Connection refused", "no server listens there"),
    ("NameResolutionError", "there is no host of this name"),
    ("ConnectTimeoutError", "the host does not answer"),
    ("database is locked", "another process keeps the database locked"),
    ("out-of-date database schema", "the database belongs to another MLflow version (mlflow db upgrade URI)"),
)
DATABASE = "mlflow.db"
"""File in the store, where no other place is given."""
KEY_LIMIT = 250  # MLflow's own


def mlflow_name(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w.\-: /]", "_", name)[:KEY_LIMIT]


def default_uri(root: Path) -> str:
    """Where MLflow is: at MLFLOW_TRACKING_URI, else in the file `mlflow.db` in the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(root / DATABASE)


def is_server(uri: str) -> bool:
    """Whether a tracking URI is that of a server, rather than of a database."""
    return urlsplit(uri).scheme in SERVERS or uri in SERVERS


def check_uri(uri: str) -> None:
    """Refuse a URI that can never work, without connecting.

    Raises ConfigError; EnvironmentFault for a missing driver.
    """
    where, try_ = f"tracking URI {shown(uri)}", "sqlite:////absolute/path/mlflow.db or http://127.0.0.1:5000"
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 (the property checks the number)
    except ValueError as error:
        raise ConfigError(f"not a URI: {error}", where=where, hint=try_) from None
    dialect = parts.scheme.partition("+")[0]
    if uri == "databricks" or (dialect in SERVERS and parts.hostname):
        return
    if dialect not in DATABASES:
        what = "MLflow's file store is no longer supported" if dialect in ("", "file") else None
        what = what or (unknown("scheme", dialect, SERVERS + DATABASES) if dialect not in SERVERS else "no host given")
        raise ConfigError(what, where=where, hint=try_)
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise EnvironmentFault(
            f"the database driver {error.name} is not installed", where=where, hint=f"pip install {package}"
        ) from None
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ConfigError(f"not a database URI: {error}", where=where, hint=try_) from None


def sqlite_uri(path: Path) -> str:
    """The URI of a SQLite file for SQLAlchemy, which MLflow and Optuna pass it to. Only what would be read otherwise is
    quoted: MLflow takes what it sees for the path, and makes its folders."""
    return "sqlite:///" + re.sub(r"[%?]", lambda sign: quote(sign[0]), str(path.resolve()))


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, as SQLAlchemy reads it; None for everything else."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(uri).database
    except (ArgumentError, ValueError):
        return None
    return Path(database) if database else None


def runs_link(ui: str, experiment_id: str, parent_run_id: str) -> str:
    """Address in the MLflow UI at `ui` of the curves of a study or sweep, in the view that was stored with its run.

    A plain link to the parent shows nothing: MLflow collapses children, and opens an overview page of traces first.
    """
    view = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={quote(parent_run_id, safe='')}"
    return f"{ui.rstrip('/')}/#/experiments/{quote(experiment_id, safe='')}/runs?{view}"


def list_link(ui: str) -> str:
    """Address of the list of experiments in the MLflow UI at `ui`. MLflow 3 shows a list and its experiments for the
    kind of work that the address or the browser's last choice names, and does not read the experiment's own kind."""
    return f"{ui.rstrip('/')}/#/experiments?workflowType=machine_learning"


def reason(error: BaseException) -> str:
    """An error for people, in one line: no password, no length to drown in."""
    text = str(error)
    for sign, meaning in MEANINGS:
        if sign in text:
            return meaning
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return masked(line)[:300]


def dashboard_command(storage: str) -> str:
    """The command that opens optuna-dashboard on a storage, which is addressed as a sweep's record has it."""
    kind, _, rest = storage.partition(":")
    journal = rest.partition("?")[0].removeprefix("//")  # it wants the file alone
    return shlex.join(["optuna-dashboard", journal if kind == "journal" else storage])
