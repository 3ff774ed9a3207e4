"""sbatch, squeue, scancel and scontrol without a cluster: jobs are processes of this machine, in the folder FAKE_SLURM.

A file FAKE_SLURM/refuse is what sbatch says instead; with FAKE_SLURM/idle, jobs wait in the queue for ever.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SELF = Path(__file__).resolve()


class FakeSlurm:
    """The folder of its state. calls: what was asked of it, by program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "queue").mkdir()
        for name in ("sbatch", "squeue", "scancel", "scontrol"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{SELF}" {name} "$@"\n')
            program.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"FAKE_SLURM": str(self.folder), "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def calls(self, program: str) -> list[list[str]]:
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [words[1:] for words in map(json.loads, lines) if words[0] == program]

    def jobs(self) -> list[Path]:
        return sorted((self.folder / "queue").iterdir())


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def start(folder: Path, job: dict[str, str], number: str) -> None:
    environment = {**os.environ, "SLURM_JOB_ID": number}
    with open(job["output"], "a") as log:
        process = subprocess.Popen(
            ["bash", job["script"]], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
            cwd=job["chdir"], start_new_session=True,
        )  # fmt: skip
    (folder / "queue" / number).write_text(json.dumps({**job, "pid": process.pid, "state": "RUNNING"}))


def main(name: str, words: list[str]) -> int:
    folder = Path(os.environ["FAKE_SLURM"])
    with (folder / "calls").open("a") as log:
        log.write(json.dumps([name, *words]) + "\n")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    queue = {path.name: json.loads(path.read_text()) for path in (folder / "queue").iterdir() if "." not in path.name}
    for number, job in list(queue.items()):
        if "pid" in job and not is_alive(job["pid"]):
            (folder / "queue" / number).unlink(missing_ok=True)
            del queue[number]
    mine = {number: job for number, job in queue.items() if job["name"] == options.get("name")}
    if name == "sbatch":
        if (folder / "refuse").exists():
            print((folder / "refuse").read_text(), file=sys.stderr)
            return 1
        first = time.time_ns() // 1000 % 10**9
        script = folder / f"{first}.sh"
        script.write_text(sys.stdin.read())
        for index in range(int(options["array"].partition("-")[2]) + 1):
            output = options["output"].replace("%A", str(first)).replace("%a", str(index))
            job = {
                "array": str(first),
                "name": options["job-name"],
                "script": str(script),
                "chdir": options["chdir"],
                "output": output,
            }
            if (folder / "idle").exists():
                text = json.dumps({**job, "state": "PENDING", "reason": (folder / "idle").read_text()})
                (folder / "queue" / str(first + index)).write_text(text)
            else:
                start(folder, job, str(first + index))
        print(first)
    elif name == "squeue":
        for job in mine.values():
            print(f"{job['array']}|{job['state']}|{job.get('reason', 'None')}")
    elif name == "scancel":
        for number, job in mine.items():
            if "pid" not in job:
                (folder / "queue" / number).unlink()
                continue
            os.killpg(job["pid"], signal.SIGKILL if options.get("signal") == "KILL" else signal.SIGTERM)
    elif name == "scontrol":
        start(folder, queue[words[1]], words[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
