"""Where searches are kept while any number of workers is at them: SQLite, a journal file, or PostgreSQL."""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, unknown
from gpt2lab.store import disk_fault, file_lock, fsync_folder, make_folder, sweep_leftovers, temporary_beside
from gpt2lab.sweep.journal import LOCKS, MendedJournal, journal_lock
from gpt2lab.sweep.patience import PATIENCE_SECONDS, Patience, PatientStorage, is_transient, storage_fault
from gpt2lab.tracking import masked
from gpt2lab.tracking.addresses import reason, sqlite_path

SCHEMES = ("journal", "postgresql", "sqlite")
EXAMPLES = "sqlite:////absolute/path/optuna.db, journal:/shared/disk/optuna.log or postgresql://user:password@host/db"
ADVICE = "PostgreSQL suits many workers better: --storage postgresql://user:password@host/db"
BUSY_MILLISECONDS = 500
"""How long SQLite itself waits for a lock; patience.py does the rest, and can say so."""
CREATION_KEY = 0x67707432
"""Number of the PostgreSQL lock under which tables are made."""
CONNECT_SECONDS = 10


def default_address(root: Path) -> str:
    """Where the searches of a run store are kept unless told. Never MLflow's file: both would make their tables in it,
    and each find the other's version there."""
    return f"sqlite:///{root.resolve()}/sweeps/optuna.db"


def open_storage(
    address: str, say: Callable[[str], None], *, patience_seconds: float = PATIENCE_SECONDS
) -> PatientStorage:
    """The storage at an address, made if there is none, safely when several processes come at once.

    say: takes the sentence that the storage is locked, told once. Raises ConfigError (an address that cannot mean
    anything), EnvironmentFault (driver, permission, connection), DataFault (damaged, or another program's).
    """
    _keep_optuna_quiet()
    shown = masked(address)
    scheme = address.partition(":")[0].partition("+")[0]
    patience = Patience(shown, say, advice="" if scheme == "postgresql" else ADVICE, seconds=patience_seconds)
    where = f"storage {shown}"
    if ":" not in address or scheme not in SCHEMES:
        raise ConfigError(unknown("kind of storage", masked(scheme), SCHEMES), where=where, hint=EXAMPLES)
    openers = {"sqlite": _open_sqlite, "journal": _open_journal, "postgresql": _open_postgresql}
    with patience.call(writes=True):
        while True:
            try:
                return openers[scheme](address, patience)
            except (StorageInternalError, SQLAlchemyError, OSError) as error:
                if not is_transient(error):
                    raise storage_fault(error, shown) from error
                patience.wait(error)


def _keep_optuna_quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.disable_default_handler()  # its warnings are for people who call it themselves


# SQLite


def _open_sqlite(address: str, patience: Patience) -> PatientStorage:
    path = sqlite_path(address)
    if path is None or path.name == ":memory:":
        what = "a database in memory is lost with its process" if path else "not the address of a SQLite file"
        raise ConfigError(what, where=f"storage {patience.address}", hint=EXAMPLES)
    try:
        _create_sqlite(path)
    except OSError as error:
        raise disk_fault(error, path) from error
    _refuse_others(path, patience)
    storage = _database(f"sqlite:///{path.resolve()}", patience, {"connect_args": {"timeout": BUSY_MILLISECONDS / 1e3}})
    _attend(storage.engine, patience)
    storage.engine.dispose()  # connections from before do not know of it
    return _cached(storage, patience)


def _create_sqlite(path: Path) -> None:
    """Make a complete database once, at a temporary name under a lock, then rename it: of several processes that open a
    missing file together, some would meet half of the tables."""
    if path.exists() and path.stat().st_size:
        return
    make_folder(path.parent)
    with file_lock(path.with_name(f".{path.name}.lock")):
        sweep_leftovers(path.parent)
        if path.exists() and path.stat().st_size:
            return
        temporary = temporary_beside(path)
        RDBStorage(f"sqlite:///{temporary.resolve()}").engine.dispose()
        connection = sqlite3.connect(temporary)
        connection.execute("pragma journal_mode=WAL")  # readers and a writer do not keep one another out
        connection.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


def _refuse_others(path: Path, patience: Patience) -> None:
    """Raises DataFault for a file that is no database, or not Optuna's; EnvironmentFault where it cannot be written."""
    where = patience.address
    if not os.access(path, os.R_OK | os.W_OK):
        raise EnvironmentFault("the database cannot be written", where=where, hint=f"ls -l {path}")
    try:
        connection = sqlite3.connect(path, timeout=BUSY_MILLISECONDS / 1e3)
        try:
            tables = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageInternalError(str(error)) from error
    if "version_info" not in tables:
        what = "MLflow's" if "experiments" in tables else "another program's"
        raise DataFault(f"this database is {what}: a sweep needs one of its own", where=where, hint=EXAMPLES)


def _attend(engine: sqlalchemy.Engine, patience: Patience) -> None:
    """Begin SQLite's transactions ourselves.

    Python's sqlite3 begins one before the first change only, so what Optuna reads before it (is this trial still
    waiting?) may be out of date when it writes, and two workers could both get a trial. `begin immediate` takes the
    lock before anything is read. It is also the one place where a lock is met, hence where to wait for it.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("pragma synchronous=normal")  # what a power cut takes with it are the last moments only

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        while True:
            try:
                connection.exec_driver_sql("begin immediate" if patience.writes else "begin")
                return
            except OperationalError as error:
                if "locked" not in str(error.orig):
                    raise
                patience.wait(error)


# Journal


def _open_journal(address: str, patience: Patience) -> PatientStorage:
    written, _, query = address.partition(":")[2].partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    lock, where = options.pop("lock", LOCKS[0]), f"storage {patience.address}"
    path = Path(written.removeprefix("//")).absolute()
    if options:
        raise ConfigError(unknown("option", next(iter(options)), ["lock"]), where=where, hint=f"journal:{path}")
    if lock not in LOCKS:
        raise ConfigError(unknown("lock", lock, LOCKS), where=where, hint=f"journal:{path}?lock=symlink")
    if not written.strip("/") or path.is_dir():
        raise ConfigError("a file is expected", where=where, hint=EXAMPLES)
    try:
        make_folder(path.parent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = JournalStorage(MendedJournal(path, journal_lock(lock, path, patience)))
        return PatientStorage(storage, patience)
    except OSError as error:
        raise disk_fault(error, path) from error
    except (AssertionError, AttributeError, KeyError, TypeError) as error:  # JSON that is no operation of Optuna's
        raise DataFault(f"not a journal of Optuna's: {reason(error)}", where=where, hint=EXAMPLES) from error


# PostgreSQL


def _open_postgresql(address: str, patience: Patience) -> PatientStorage:
    where = f"storage {patience.address}"
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
    try:
        engine = sqlalchemy.create_engine(address, **options)
    except ImportError as error:
        raise EnvironmentFault(
            f"the database driver {error.name} is not installed", where=where, hint="pip install 'gpt2lab[postgres]'"
        ) from None
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"not the address of a database: {reason(error)}", where=where, hint=EXAMPLES) from None
    try:
        with engine.connect() as connection:
            # held until the connection is given back: of several that make the tables together, some would fail
            connection.execute(sqlalchemy.text(f"select pg_advisory_xact_lock({CREATION_KEY})"))
            return _cached(_database(address, patience, options), patience)
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise EnvironmentFault(
            f"the database cannot be reached: {_first_cause(cause)}",
            where=where,
            hint="check host, port, user, password and database, and that the server runs (pg_isready)",
        ) from None
    finally:
        engine.dispose()


def _first_cause(error: BaseException) -> str:
    """psycopg's message tells one line per address that it tried, each ending in what the server said."""
    return reason(error).removesuffix("Multiple connection attempts failed. All failures were:").strip()


def _database(url: str, patience: Patience, options: dict[str, Any]) -> RDBStorage:
    """Optuna's storage in a database. Raises EnvironmentFault for one of another version, and what the driver does."""
    try:
        return RDBStorage(url, engine_kwargs=options)
    except RuntimeError as error:
        raise EnvironmentFault(
            f"the storage belongs to another version of Optuna: {reason(error)}",
            where=patience.address,
            hint=f"optuna storage upgrade --storage {patience.address}",
        ) from None


def _cached(storage: RDBStorage, patience: Patience) -> PatientStorage:
    """Behind Optuna's cache, which reads again only what has not ended. It lies within what is tried again, since it
    changes only after the database has."""
    return PatientStorage(_CachedStorage(storage), patience, storage.engine.dispose)
