"""Where searches are kept while any number of workers is at them: SQLite, a journal file, or PostgreSQL.

They are Optuna's storages, whose calls wait for other workers, and are tried again where that may help.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import sqlite3
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from gpt2lab.basics.redaction import shown
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, Gpt2labError, LockHeld, causes, command, unknown
from gpt2lab.store import Store, disk_fault, file_lock, make_folder
from gpt2lab.tracking.addresses import reason, sqlite_path, sqlite_uri

LOCKS = ("flock", "symlink")
EXAMPLES = "sqlite:////absolute/path/optuna.db, journal:/shared/disk/optuna.log or postgresql://user@host/db"
ADVICE = "end what keeps it locked, or use another storage (PostgreSQL suits many workers: postgresql://user@host/db)"
START_ANEW = "move it away, and run the same command again: finished runs are found, not trained again"
PATIENCE_SECONDS = 60.0
"""How long one call waits for others, or for a server to come back."""
LONGEST_NAP_SECONDS = 1.0
CREATION_KEY = 0x67707432
"""Number of the PostgreSQL lock under which tables are made."""
CONNECT_SECONDS = 10
DAMAGED = ("malformed", "not a database", "no such table", "no such column", "does not exist")
TRANSIENT_ERRNO = (errno.EAGAIN, errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT, errno.EINTR)


def default_address(root: Path) -> str:
    """Where the searches of a run store are kept unless an address is given. Never MLflow's file: both would make their
    tables in it, and each find the other's version there."""
    return sqlite_uri(Store(root).folder("sweeps") / "optuna.db")


def open_storage(
    address: str, say: Callable[[str], None], *, patience_seconds: float = PATIENCE_SECONDS
) -> BaseStorage:
    """The storage at an address, made if there is none, safely when several processes come at once.

    say: takes the message that the storage is out of reach, sent once. Raises ConfigError (an address that cannot mean
    anything), EnvironmentFault (driver, permission, connection), DataFault (damaged, or another program's).
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.disable_default_handler()  # its warnings are for people who call it themselves
    clear = shown(address)
    scheme = address.partition(":")[0].partition("+")[0]
    openers = {"journal": _open_journal, "postgresql": _open_postgresql, "sqlite": _open_sqlite}
    if ":" not in address or scheme not in openers:
        what = unknown("kind of storage", scheme, list(openers))
        raise ConfigError(what, where=f"storage {clear}", hint=EXAMPLES)
    storage = PatientStorage(clear, say, patience_seconds)
    storage.inner = storage.call(openers[scheme], address, clear, patience_seconds)
    if scheme == "postgresql":
        weakref.finalize(storage, _close_here, os.getpid(), storage.inner._backend.engine)  # type: ignore[attr-defined]
    return cast(BaseStorage, storage)


def _close_here(pid: int, engine: sqlalchemy.Engine) -> None:
    """A forked child must not close the connections of its parent, which it inherits."""
    if os.getpid() == pid:
        engine.dispose()


class PatientStorage:
    """A storage, `inner`, whose calls are made again while it is out of reach. The unit is one method, never a sequence
    of them: what went before was stored, and must not be done twice.

    A call whose answer was lost on the way is made again although it was carried out. Optuna's calls bear that, but for
    creating a trial, of which there are two then, and changing a state, which is then refused; trials.py bears both.
    """

    inner: BaseStorage

    def __init__(self, address: str, say: Callable[[str], None], seconds: float) -> None:
        """address: without secrets. seconds: how long one call waits."""
        self.address, self._say, self._seconds, self._warned = address, say, seconds, False

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, getattr(self.inner, name))

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function, again while that may help. Raises EnvironmentFault after too long, and for what waiting does
        not heal; DataFault."""
        begun, nap = time.monotonic(), 0.01
        while True:
            try:
                return function(*args, **options)
            except (StorageInternalError, SQLAlchemyError, OSError, json.JSONDecodeError) as error:
                root, transient = _root(error), is_transient(error)
                locked = isinstance(root, sqlite3.Error) and "locked" in str(root)  # for which SQLite itself has waited
                if locked or (transient and time.monotonic() - begun >= self._seconds):
                    raise self._unreachable(reason(root)) from error
                if not transient:
                    raise storage_fault(error, self.address) from error
            except LockHeld as error:
                raise self._unreachable(error.problems[0].what) from error
            if not self._warned:
                self._warned = True
                self._say(f"the storage {self.address} is out of reach: waiting")
            time.sleep(nap * random.uniform(0.5, 1))  # workers that failed together must not come back together
            nap = min(LONGEST_NAP_SECONDS, 2 * nap)

    def _unreachable(self, cause: str) -> EnvironmentFault:
        what = f"the storage of the sweep stayed locked or out of reach for {self._seconds:.0f} seconds: {cause}"
        return EnvironmentFault(what, where=self.address, hint=ADVICE)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a little later: after a deadlock, a lost connection."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNO:
            return True
        if isinstance(cause, (OperationalError, InterfaceError)) and not isinstance(cause.orig, sqlite3.Error):
            return True
    return False


def storage_fault(error: BaseException, address: str) -> Gpt2labError:
    """An error of a storage that waiting does not heal, in one line. `address`: without secrets."""
    root = _root(error)
    if isinstance(root, OSError):
        fault = disk_fault(root, Path(address.partition(":")[2].removeprefix("//") or "."))
        return EnvironmentFault(fault.problems[0].what, where=address, hint=fault.hint)
    text = reason(root)
    if not isinstance(root, (SQLAlchemyError, sqlite3.Error)) or any(sign in text for sign in DAMAGED):
        what = f"the storage of the sweep is damaged, or none of Optuna's: {text}"
        return DataFault(what, where=address, hint=START_ANEW)
    return EnvironmentFault(f"the storage of the sweep cannot be used: {text}", where=address)


def _root(error: BaseException) -> BaseException:
    *_, root = causes(error)
    return root


# SQLite


def _open_sqlite(address: str, shown_address: str, patience_seconds: float) -> BaseStorage:
    path, where = sqlite_path(address), f"storage {shown_address}"
    if path is None or path.name == ":memory:":
        what = "a database in memory is lost with its process" if path else "not the address of a SQLite file"
        raise ConfigError(what, where=where, hint=EXAMPLES)
    make_folder(path.parent)
    with file_lock(path.with_name(f".{path.name}.lock"), PATIENCE_SECONDS):  # others would meet half of the tables
        if path.exists():
            _refuse_others(path, shown_address)
        # a connection for every transaction: none is left open, nor inherited by a fork
        options = {"poolclass": NullPool, "connect_args": {"timeout": patience_seconds}}
        database = _database(sqlite_uri(path), shown_address, options)
    _begin_ourselves(database.engine)
    return get_storage(database)


def _refuse_others(path: Path, where: str) -> None:
    """Raises DataFault for a file that is no database, or not Optuna's; EnvironmentFault where it cannot be written."""
    if not os.access(path, os.R_OK | os.W_OK):
        raise EnvironmentFault("the database cannot be written", where=where, hint=command("ls", "-l", path))
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            tables = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.Error as error:
        raise StorageInternalError(str(error)) from error
    if tables and not tables & {"studies", "version_info"}:
        what = "MLflow's" if "experiments" in tables else "another program's"
        raise DataFault(f"this database is {what}: a sweep needs one of its own", where=where, hint=EXAMPLES)


def _begin_ourselves(engine: sqlalchemy.Engine) -> None:
    """Python's sqlite3 begins a transaction before the first change only, so what Optuna reads before it (has this
    trial ended?) may be out of date when it writes. `begin immediate` takes the lock before anything is read, and
    waits for it."""

    @sqlalchemy.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("pragma journal_mode=WAL")  # readers and a writer do not block each other
        connection.execute("pragma synchronous=normal")  # a power cut loses the last moments only

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("begin immediate")


# Journal


class JournalLock(BaseJournalFileLock):
    """The lock under which a journal is written. Taking it cuts off a torn last line, which a worker left that was
    killed while it wrote: Optuna would append the next line to it, and no reader would ever get past that.

    It is the kernel's lock, on a file beside the journal, and free as soon as its process ends; Optuna's are files
    whose being there is the lock. Linux passes flock on to an NFS server (since 2.6.12), so it holds across machines;
    a file system that has none refuses it, and takes Optuna's symbolic link.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._held = path, contextlib.ExitStack()
        self._link = JournalFileSymlinkLock(str(path)) if kind == "symlink" else None

    def acquire(self) -> bool:
        """Wait for the lock. Raises LockHeld (too long), OSError."""
        if self._link:
            self._link.acquire()
            self._held.callback(self._link.release)
        else:
            self._held.enter_context(file_lock(self._path.with_name(f".{self._path.name}.lock"), PATIENCE_SECONDS))
        try:
            self._mend()
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Free the lock."""
        self._held.close()

    def _mend(self) -> None:
        with self._path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def _open_journal(address: str, shown_address: str, _patience_seconds: float) -> BaseStorage:
    written, _, query = address.partition(":")[2].partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    lock, where = options.pop("lock", LOCKS[0]), f"storage {shown_address}"
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
            backend = JournalFileBackend(str(path), JournalLock(path, lock))
            return JournalStorage(backend)
    except OSError as error:
        raise disk_fault(error, path) from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:  # not JSON, or no operation
        raise storage_fault(error, shown_address) from error


# PostgreSQL


def _open_postgresql(address: str, shown_address: str, _patience_seconds: float) -> BaseStorage:
    where = f"storage {shown_address}"
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}  # to connect takes long
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
            return get_storage(_database(address, shown_address, options))
    except SQLAlchemyError as error:
        # psycopg's message has one line per address that it tried, each ending in what the server said
        cause = reason(getattr(error, "orig", None) or error)
        raise EnvironmentFault(
            "the database cannot be reached: "
            + cause.removesuffix("Multiple connection attempts failed. All failures were:").strip(),
            where=where,
            hint="check host, port, user, password and database, and that the server runs (pg_isready)",
        ) from None
    finally:
        engine.dispose()


def _database(url: str, where: str, options: dict[str, Any]) -> RDBStorage:
    """Optuna's storage in a database. Raises EnvironmentFault for one of another version, and what the driver does."""
    try:
        return RDBStorage(url, engine_kwargs=options)
    except RuntimeError as error:
        raise EnvironmentFault(
            f"the storage belongs to another version of Optuna: {reason(error)}",
            where=where,
            hint=command("optuna", "storage", "upgrade", "--storage", where),
        ) from None
