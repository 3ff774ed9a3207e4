"""A Slurm cluster of the tests' own: one node, with its daemons and files in a temporary folder.

As a program it starts one, prints the environment to use it from a shell, and stops it at the end of its input.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import free_ports, until

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=gpt2lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=10
OverTimeLimit=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes={host} MaxTime=1 State=UP
"""


class Slurm:
    """A fresh cluster of one node with two cores, with partitions `main` and `short` (one minute)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gpt2lab-slurm-", dir="/tmp"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        control, daemon = free_ports(2)
        text = CONFIG.format(host=host, folder=self.folder, control=control, daemon=daemon)
        (self.folder / "slurm.conf").write_text(text)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in places.items()]
        self._launch("munged", "--foreground", "--force", *options)
        until((self.folder / "munge.socket").exists)
        self._launch("slurmctld", "-D", "-i")
        self._launch("slurmd", "-D", "-N", host)
        until(lambda: "idle" in self.said("sinfo", "--noheader", "--format=%T"))

    def stop(self) -> None:
        self.said("scancel", "--me")
        time.sleep(0.5)
        for process in reversed(self.daemons):
            process.terminate()
            process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def said(self, *words: str) -> str:
        """What a command prints; empty where it fails."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60).stdout

    def states(self) -> list[str]:
        """Of all jobs that have not ended."""
        return self.said("squeue", "--noheader", "--array", "--format=%T").split()

    def start_requeued(self, number: str) -> None:
        """Start a requeued job after two seconds in place of two minutes. Not at once: a job that ends and starts
        within the same second is refused by slurmd and lost."""
        self.said("scontrol", "update", f"JobId={number}", "StartTime=now+2")

    def _launch(self, name: str, *options: str) -> None:
        command = [path_of(name), *options]
        with (self.folder / f"{name}.out").open("w") as log:
            environment = {**os.environ, **self.environment}
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))  # type: ignore[arg-type]


def path_of(name: str) -> str | None:
    """Where a daemon is installed."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Slurm]:
    """A running cluster, for tests marked `service`."""
    missing = [name for name in DAEMONS if path_of(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"no Slurm to be started: {', '.join(missing) or 'it needs root'} (Debian: slurm-wlm, munge)")
    cluster = Slurm()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(slurm_cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The running cluster, for the commands of this test; afterwards no job is left on it."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gpt2lab.executors.slurm.QUEUE_SECONDS", 0.5)
    yield slurm_cluster
    slurm_cluster.said("scancel", "--me")
    until(lambda: not slurm_cluster.states())


if __name__ == "__main__":
    started = Slurm()
    started.start()
    print(" ".join(f"export {name}={value}" for name, value in started.environment.items()), flush=True)
    sys.stdin.read()
    started.stop()
