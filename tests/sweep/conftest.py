"""A PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PLACES = ["/usr/lib/postgresql/15/bin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
PASSWORD = "s3cret"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Address of a fresh server, up to the name of a database; for tests marked `service`."""
    path = os.pathsep.join([*PLACES, os.environ.get("PATH", "")])
    initdb, control = shutil.which("initdb", path=path), shutil.which("pg_ctl", path=path)
    if initdb is None or control is None:
        pytest.skip("no PostgreSQL server is installed (initdb, pg_ctl)")
    folder = Path(tempfile.mkdtemp(prefix="gpt2lab-pg-", dir="/tmp"))
    user = "nobody" if os.geteuid() == 0 else None  # a server refuses to run as root
    if user:
        shutil.chown(folder, user)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data, log = folder / "data", folder / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=120)

    run(initdb, "-D", str(data), "-U", "lab", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    run(control, "-D", str(data), "-l", str(log), "-w", "-o", options, "start")
    try:
        yield f"postgresql://lab:{PASSWORD}@127.0.0.1:{port}"
    finally:
        run(control, "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an empty database."""
    import sqlalchemy

    name = f"sweep_{abs(hash(request.node.nodeid)) % 10**8}"
    engine = sqlalchemy.create_engine(
        f"{postgres_server}/postgres", isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"create database {name}"))
    yield f"{postgres_server}/{name}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"drop database {name} with (force)"))
