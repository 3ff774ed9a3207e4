"""A PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import free_ports

PLACES = ["/usr/lib/postgresql/15/bin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
PASSWORD = "s3cret"


class Postgres:
    """A fresh server, which can be stopped and started. uri: its address, up to the name of a database."""

    def __init__(self, initdb: str, control: str) -> None:
        self.control = control
        self.folder = Path(tempfile.mkdtemp(prefix="gpt2lab-pg-", dir="/tmp"))
        self.user = "nobody" if os.geteuid() == 0 else None  # a server refuses to run as root
        if self.user:
            shutil.chown(self.folder, self.user)
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        [self.port] = free_ports(1)
        self.uri = f"postgresql://lab:{PASSWORD}@127.0.0.1:{self.port}"
        self.run(initdb, "-U", "lab", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self.run(self.control, "-l", str(self.folder / "log"), "-w", "-o", options, "start")

    def stop(self) -> None:
        """As a crash does: without a word to those who are connected."""
        self.run(self.control, "-m", "immediate", "stop")

    def run(self, *command: str) -> None:
        words = [command[0], "-D", str(self.folder / "data"), *command[1:]]
        subprocess.run(words, user=self.user, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, timeout=120)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Its rows, if it has any."""
        import sqlalchemy

        engine = sqlalchemy.create_engine(
            f"{self.uri}/{database}", isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
        )
        with engine.connect() as connection:
            result = connection.execute(sqlalchemy.text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Postgres]:
    """A running server, for tests marked `service`."""
    path = os.pathsep.join([*PLACES, os.environ.get("PATH", "")])
    initdb, control = shutil.which("initdb", path=path), shutil.which("pg_ctl", path=path)
    if initdb is None or control is None:
        pytest.skip("no PostgreSQL server is installed (initdb, pg_ctl)")
    cluster = Postgres(initdb, control)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_cluster: Postgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of an empty database."""
    name = f"lab_{abs(hash(request.node.nodeid)) % 10**8}"
    postgres_cluster.execute(f"create database {name}")
    yield f"{postgres_cluster.uri}/{name}"
    postgres_cluster.execute(f"drop database {name} with (force)")
