"""What a Ray task does on its node: it trains a run in a folder of its own, and sends what the run writes.

Ray sends these functions by value, to nodes that need not have gpt2lab installed: they use the standard library, and
the package that comes with the job. Workers are forks of a process that has imported torch, and that stays for the next
tasks of the same Ray process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOOK_SECONDS = 0.5
"""Between two looks at the files of the run."""


class Mail:
    """An actor on the driver's node: what runs have written, and which of them are to end. Of a run that was given out
    again, an earlier attempt, which may survive on a node that Ray has lost, is not listened to."""

    def __init__(self) -> None:
        self.attempts: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.begun: set[str] = set()
        self.news: list[tuple[str, dict[str, Any]]] = []

    def expect(self, run: str, attempt: int) -> None:
        self.attempts[run] = attempt
        self.cancelled.discard(run)
        self.begun.discard(run)

    def cancel(self, run: str) -> bool:
        """-> whether its task has begun."""
        self.cancelled.add(run)
        return run in self.begun

    def deliver(self, run: str, attempt: int, news: dict[str, Any]) -> bool:
        """-> whether the run is to end."""
        if self.attempts.get(run) != attempt:
            return True
        self.begun.add(run)
        if news:
            self.news.append((run, news))
        return run in self.cancelled

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        news, self.news = self.news, []
        return news


def unpacked(home: Path, key: str, reference: Any) -> Path:
    """On a node: the folder of what `reference` packs, which is fetched unless another task has fetched it."""
    import ray

    folder = home / key
    if not folder.is_dir():
        draft = Path(tempfile.mkdtemp(dir=home))
        with tarfile.open(fileobj=io.BytesIO(ray.get(reference))) as archive:
            archive.extractall(draft, filter="data")
        with contextlib.suppress(OSError):  # another task was quicker
            draft.rename(folder)
    return folder


def changed(folder: Path, seen: dict[str, tuple[Any, bytes]]) -> dict[str, tuple[int, bytes] | None]:
    """On a node: what was written below `folder` since the last call. Of files that grow, the new part alone."""
    news: dict[str, tuple[int, bytes] | None] = {}
    places = set()
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        if path.name == "job.json" or path.name.startswith("lock") or ".partial" in place or not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            stamp = path.stat().st_size, path.stat().st_mtime_ns
            places.add(place)
            before, content = seen.get(place, (None, b""))
            if stamp != before:
                data = path.read_bytes()
                grows = place.endswith((".jsonl", ".log"))
                offset = len(content) if grows and data.startswith(content) else 0
                seen[place], news[place] = (stamp, data if grows else b""), (offset, data[offset:])
    for place in seen.keys() - places:
        del seen[place]
        news[place] = None
    return news


def train(
    mail: Any, attempt: int, job: dict[str, Any], code: Any, data: Any, start: Any, variables: dict[str, str]
) -> int:
    """On a node: train a run in a folder of this process, by a worker of its own; -> its return code.

    code, data, start: references, in lists so that Ray fetches them on demand; data is empty where it lies on every
    node.
    """
    import ray

    home = Path(tempfile.gettempdir()) / f"gpt2lab-ray-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    for left in home.glob("runs-*"):  # of processes that were killed
        if not Path(f"/proc/{left.name.split('-')[1]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    root, run = Path(tempfile.mkdtemp(prefix=f"runs-{os.getpid()}-", dir=home)), job["run_id"]
    try:
        if ray.get(mail.deliver.remote(run, attempt, {})):
            return 75
        package = unpacked(home, Path(job["code"]).name, code[0])
        prepared = unpacked(home, job["identity"]["data"][:32], data[0]) if data else job["data"]
        with tarfile.open(fileobj=io.BytesIO(ray.get(start[0]))) as archive:
            archive.extractall(root, filter="data")
        seen: dict[str, tuple[Any, bytes]] = {}
        changed(root / run, seen)
        plugins = [str(package / Path(plugin).relative_to(job["code"])) for plugin in job["plugins"]]
        here = {**job, "root": str(root), "data": str(prepared), "code": str(package), "plugins": plugins}
        (root / run / "job.json").write_text(json.dumps(here))
        paths = [str(package), *map(str, sorted((package / "plugins").glob("*"))), os.environ.get("PYTHONPATH", "")]
        if str(package) not in sys.path:
            sys.path.insert(0, str(package))
        from gpt2lab.basics.forks import server_with, wait_readable

        with (root / run / "run.log").open("a") as log:
            described = SimpleNamespace(path=root / run / "job.json")
            worker = server_with(os.pathsep.join(paths)).start(described, {**os.environ, **variables}, log)
        while worker.poll() is None:
            if ray.get(mail.deliver.remote(run, attempt, changed(root / run, seen))):
                worker.send_signal(signal.SIGTERM)
            wait_readable([worker.pipe], LOOK_SECONDS)
        ray.get(mail.deliver.remote(run, attempt, changed(root / run, seen)))
        return worker.wait()
    finally:
        shutil.rmtree(root, ignore_errors=True)
