"""Trainings that are broken on purpose, each in a process forked from one that has imported everything: 0.2 s a trial.

The server (this file as a program) imports torch and computes nothing, so that it has one thread and can be forked.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.tiny import write_text

if TYPE_CHECKING:
    from gpt2lab.runner import Job

TESTS = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
RUN = "00000000000000aa"

PLAIN: dict[str, Any] = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 256, "dropout": 0.1},
    "optim": {"lr": 1e-2, "warmup_steps": 2},
    "training": {"steps": 12, "batch_tokens": 64, "checkpoint_every_steps": 3, "device": "cpu", "threads": 1},
    "evaluation": {"every_steps": 4, "tokens": 64, "context_tokens": 16},
}


@dataclass
class Lab:
    """A folder with prepared data, and a server that trains over it.

    train: exit codes of the ranks of one run.  undisturbed: the outcome of one that nothing happens to.
    """

    folder: Path
    _server: subprocess.Popen[str] | None = field(default=None, init=False)
    _data: dict[str, str] | None = field(default=None, init=False)
    _undisturbed: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def __enter__(self) -> Lab:
        environment = {**os.environ, **ONE_THREAD, "GPT2LAB_DATA": str(self.folder / "data")}
        environment["PYTHONPATH"] = str(TESTS.parent)  # the package beside these tests, wherever they were copied to
        environment.pop("GPT2LAB_FAULT", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=TESTS.parent,
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        self._data = self._ask({"prepare": str(write_text(self.folder / "text.txt"))})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def train(
        self, root: Path, changes: dict[str, Any] | None = None, *, fault: str = "", ranks: int = 1,
        kill_after: float | None = None, starters: int = 1, fingerprint: str | None = None,
    ) -> list[int]:  # fmt: skip
        """Start the run in `root` once, or so many times at once; -> exit codes, negative for signals.

        changes: to PLAIN, by dotted key.  fault: GPT2LAB_FAULT.  kill_after: seconds until SIGKILL for all.
        fingerprint: of the data that was planned with; None: the right one.
        """
        root.mkdir(parents=True, exist_ok=True)
        job = self.job(root, changes) | ({"fingerprint": fingerprint} if fingerprint else {})
        times = {"fault": fault, "ranks": ranks, "starters": starters, "kill_after": kill_after}
        codes: list[int] = self._ask(job | times)
        return codes

    def undisturbed(self, changes: dict[str, Any] | None = None, ranks: int = 1) -> dict[str, Any]:
        """Trained once for all tests."""
        key = repr((changes or {}, ranks))
        if key not in self._undisturbed:
            root = self.folder / f"undisturbed-{len(self._undisturbed)}"
            assert self.train(root, changes, ranks=ranks) == [0] * ranks, log(root)
            self._undisturbed[key] = outcome(root)
        return self._undisturbed[key]

    def job(self, root: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        """What `job_of` takes: the run in `root`."""
        assert self._data is not None
        tree = {"data": {"corpus": {"name": "text", "paths": [self._data["text"]]}, "tokenizer": "bytes"}, **PLAIN}
        tree = json.loads(json.dumps(tree))
        for key, value in (changes or {}).items():
            part, _, name = key.partition(".")
            tree[part][name] = value
        place = {"root": str(root), "data": self._data["path"], "fingerprint": self._data["fingerprint"]}
        return {"config": json.dumps(tree), **place}

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def log(root: Path) -> str:
    """What the workers of a run printed."""
    return (root / "log.txt").read_text()


def record(root: Path, name: str) -> dict[str, Any]:
    """What a run left: its result or failure."""
    found: dict[str, Any] = json.loads((root / RUN / f"{name}.json").read_text())
    return found


def outcome(root: Path) -> dict[str, Any]:
    """All that two equal runs have in common, byte by byte; times and memory are not in it."""
    folder = root / RUN
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in ("lock", "run.log", "run.json") or path.name == "manifest.json":
            continue
        if path.name == "metrics.jsonl":
            found[name] = [_without(json.loads(line), "seconds") for line in path.read_text().splitlines()]
        elif path.name in ("result.json", "state.json"):
            record = json.loads(path.read_text())
            timed = ("seconds", "time", "tokens_per_second", "mfu", "peak_flops", "peak_memory_bytes", "finished_at")
            sums = ("seal", "journal_sha256")  # of the above
            found[name] = _without(record, *timed, *sums)
            if "extra" in record:
                found[name]["extra"] = _without(record["extra"], "time")
        else:
            found[name] = path.read_bytes()
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where two outcomes differ: file, and key or line inside."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{name}: {key}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        elif isinstance(a, list) and isinstance(b, list):
            found += [f"{name}: line {i + 1}" for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]]
        elif a != b:
            found.append(name)
    return found


def _without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def _serve() -> None:
    from gpt2lab.data.shards import DataConfig, prepare

    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            text = request["prepare"]
            corpus = {"name": "text", "paths": [text]}
            prepared = prepare(DataConfig.model_validate({"corpus": corpus, "tokenizer": "bytes"}))
            answer: Any = {"text": text, "path": str(prepared.path), "fingerprint": prepared.fingerprint}
        else:
            answer = _run(request)
        print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any]) -> list[int]:
    """Fork every process of a run and wait for them; when one rank dies its peers are ended, as a launcher would."""
    sys.stdout.flush()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    children: dict[int, int] = {}
    for number in range(request["ranks"] * request["starters"]):
        pid = os.fork()
        if pid == 0:
            _child(request, number % request["ranks"], port)
        children[pid] = number
    codes = [0] * len(children)
    deadline = time.monotonic() + (request["kill_after"] or 120.0)
    while children:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            codes[children.pop(ended)] = os.waitstatus_to_exitcode(status)
            if request["ranks"] > 1 and status != 0:
                deadline = min(deadline, time.monotonic() + 0.2)
        elif time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            deadline += 60.0
        else:
            select.select([], [], [], 0.005)
    return codes


def _child(request: dict[str, Any], rank: int, port: int) -> None:
    """One process of a run; never returns."""
    code = 99
    try:
        log = os.open(Path(request["root"], "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(GPT2LAB_FAULT=request["fault"], RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = _work(request)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _work(request: dict[str, Any]) -> int:
    from gpt2lab.basics import faults
    from gpt2lab.runner import StopRequest, work

    faults.arm_from_environment()
    stop = StopRequest()
    stop.listen()
    return work(job_of(request), stop)


def job_of(request: dict[str, Any]) -> Job:
    """The job of a worker."""
    from gpt2lab.runner import Job

    identity = {"data": request["fingerprint"], "device": "cpu"}
    return Job(request["root"], RUN, request["config"], identity, request["data"], 1.0, 1)


if __name__ == "__main__":
    for module in ("gpt2lab.runner", "torch._dynamo"):  # the second is what building an optimizer imports
        importlib.import_module(module)
    _serve()
    os._exit(0)  # torch takes a second to say goodbye
