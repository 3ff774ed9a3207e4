"""A storage whose single calls are tried again while others keep it locked.

The unit is one method of the storage, never a sequence such as asking for a trial: what went before it was stored, and
must not be done twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from gpt2lab.errors import DataFault, EnvironmentFault, Gpt2labError
from gpt2lab.store import disk_fault
from gpt2lab.tracking.addresses import reason

PATIENCE_SECONDS = 60.0
TELL_AFTER_SECONDS = 4.0
LONGEST_NAP_SECONDS = 1.0
LOCKED = ("database is locked", "database table is locked", "database schema is locked")
DAMAGED = ("malformed", "not a database", "no such table", "no such column", "does not exist")
# connection trouble, serialization and deadlock, too many connections, shutting down, a lock not available
TRANSIENT_STATES = ("08", "40", "53300", "57P", "55P03")
TRANSIENT_ERRNO = (errno.EAGAIN, errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT, errno.EINTR)


class Patience:
    """How long one call may wait for others, and the sentence that is told once while it does.

    `address` is shown, so it must be masked; `advice` says which storage would suit more workers.
    """

    def __init__(
        self,
        address: str,
        say: Callable[[str], None],
        *,
        advice: str = "",
        seconds: float = PATIENCE_SECONDS,
        tell_after_seconds: float = TELL_AFTER_SECONDS,
    ) -> None:
        self.address = address
        self._say, self._advice = say, advice
        self._seconds, self._tell_after = seconds, tell_after_seconds
        self._told = False
        self._now = threading.local()

    @contextlib.contextmanager
    def call(self, writes: bool) -> Iterator[None]:
        """One call of a storage; the clock starts here."""
        self._now.started, self._now.writes, self._now.naps = time.monotonic(), writes, 0
        try:
            yield
        finally:
            self._now.started, self._now.writes = None, True

    @property
    def writes(self) -> bool:
        """Whether the call in progress changes anything. Outside of calls: yes."""
        return bool(getattr(self._now, "writes", True))

    def wait(self, cause: BaseException | None = None) -> None:
        """A short sleep before the next try. Raises EnvironmentFault when the call has waited long enough."""
        if getattr(self._now, "started", None) is None:
            self._now.started, self._now.naps = time.monotonic(), 0
        waited = time.monotonic() - self._now.started
        if waited >= self._seconds:
            raise EnvironmentFault(
                f"the storage of the sweep stayed locked or out of reach for {waited:.0f} seconds"
                + (f": {reason(_root(cause))}" if cause is not None else ""),
                where=self.address,
                hint="end what keeps it locked, or use another storage"
                + (f" ({self._advice})" if self._advice else ""),
            ) from cause
        if waited >= self._tell_after and not self._told:
            self._told = True
            advice = f"; {self._advice}" if self._advice else ""
            self._say(f"the storage {self.address} is locked by other workers or out of reach: waiting{advice}")
        nap = min(LONGEST_NAP_SECONDS, 0.005 * 2**self._now.naps)
        self._now.naps += 1
        time.sleep(nap * random.uniform(0.5, 1))  # workers that were refused together must not come back together


def is_transient(error: BaseException | None) -> bool:
    """Whether the same call may well succeed a little later."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO:
            return True
        if isinstance(error, sqlite3.OperationalError) and any(sign in str(error) for sign in LOCKED):
            return True
        if isinstance(error, DBAPIError) and not isinstance(error.orig, sqlite3.Error):
            state = getattr(error.orig, "sqlstate", None)
            broken = state is None and type(error.orig).__name__ in ("OperationalError", "InterfaceError")
            if error.connection_invalidated or broken or (state or "").startswith(TRANSIENT_STATES):
                return True
        error = error.__cause__
    return False


def storage_fault(error: BaseException, address: str) -> Gpt2labError:
    """An error of a storage that waiting does not heal, in one line. `address`: masked."""
    root = _root(error)
    if isinstance(root, OSError):
        fault = disk_fault(root, _path_of(address))
        return EnvironmentFault(fault.problems[0].what, where=address, hint=fault.hint)
    text = reason(root)
    if any(sign in text for sign in DAMAGED):
        return DataFault(
            f"the storage of the sweep is damaged, or none of Optuna's: {text}",
            where=address,
            hint="move it away, and run the same command again: finished runs are found, not trained again",
        )
    return EnvironmentFault(f"the storage of the sweep cannot be used: {text}", where=address)


def _root(error: BaseException | None) -> BaseException:
    assert error is not None
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _path_of(address: str) -> Path:
    return Path(address.partition(":")[2].removeprefix("//") or ".")


def _in_this_process(pid: int, close: Callable[[], None]) -> None:
    """What a forked child inherits is not its to close: it would end its parent's connection."""
    if os.getpid() == pid:
        close()


def _patiently(name: str) -> Callable[..., Any]:
    writes = name.startswith(("set_", "create_", "delete_"))

    def call(self: PatientStorage, *args: Any, **options: Any) -> Any:
        with self.patience.call(writes):
            while True:
                try:
                    return getattr(self.inner, name)(*args, **options)
                except (StorageInternalError, SQLAlchemyError, OSError) as error:
                    if not is_transient(error):
                        raise storage_fault(error, self.patience.address) from error
                    self.patience.wait(error)

    return call


class PatientStorage(BaseStorage):
    """`inner`, each of whose calls waits for its turn.

    A call whose answer was lost on the way is made again although it was carried out. Optuna's calls bear that, but
    for creating a trial, of which there are two then (`turns.py` knows which counts), and changing a state, which is
    then refused (`slots.py` looks whose it is).
    """

    def __init__(self, inner: BaseStorage, patience: Patience, close: Callable[[], None] | None = None) -> None:
        self.inner, self.patience = inner, patience
        self._closing = weakref.finalize(self, _in_this_process, os.getpid(), close) if close else None

    def close(self) -> None:
        """Close its connections; also done when nobody refers to it any more."""
        if self._closing:
            self._closing()

    create_new_study = _patiently("create_new_study")
    delete_study = _patiently("delete_study")
    set_study_user_attr = _patiently("set_study_user_attr")
    set_study_system_attr = _patiently("set_study_system_attr")
    get_study_id_from_name = _patiently("get_study_id_from_name")
    get_study_name_from_id = _patiently("get_study_name_from_id")
    get_study_directions = _patiently("get_study_directions")
    get_study_user_attrs = _patiently("get_study_user_attrs")
    get_study_system_attrs = _patiently("get_study_system_attrs")
    get_all_studies = _patiently("get_all_studies")
    create_new_trial = _patiently("create_new_trial")
    set_trial_param = _patiently("set_trial_param")
    set_trial_state_values = _patiently("set_trial_state_values")
    set_trial_intermediate_value = _patiently("set_trial_intermediate_value")
    set_trial_user_attr = _patiently("set_trial_user_attr")
    set_trial_system_attr = _patiently("set_trial_system_attr")
    get_trial = _patiently("get_trial")
    get_all_trials = _patiently("get_all_trials")
    get_best_trial = _patiently("get_best_trial")
    get_trial_id_from_study_id_trial_number = _patiently("get_trial_id_from_study_id_trial_number")

    def remove_session(self) -> None:
        """Close what this thread has open."""
        self.inner.remove_session()
