"""kill -9 at every system call of a save and the pruning after it that changes a file, by strace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import saving

from gpt2lab.store import sweep_leftovers
from gpt2lab.training import load_latest, prune, save

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")]

CHANGING = (
    "openat", "write", "pwrite64", "writev", "ftruncate", "fallocate", "fsync", "fdatasync", "rename", "renameat",
    "renameat2", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "link", "linkat",
)  # fmt: skip

Traced = Callable[..., str]


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    """traced(folder, *options of strace): save step 6 there and prune, under strace; -> what strace wrote."""
    server = subprocess.Popen(
        [sys.executable, saving.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None

    def run(folder: Path, *options: str) -> str:
        server.stdin.write(f"{folder}\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        child = int(server.stdout.readline())  # type: ignore[union-attr]
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)  # it names itself before it stops, and must not be woken before
        log = folder.with_suffix(".strace")
        strace = subprocess.Popen(
            ["strace", "-f", "-p", str(child), "-o", log, *options], stderr=subprocess.PIPE, text=True
        )
        assert strace.stderr is not None
        said = strace.stderr.readline()
        if "attached" not in said:
            os.kill(child, signal.SIGKILL)
            pytest.skip(f"strace may not look at other processes here: {said}")
        os.kill(child, signal.SIGCONT)
        strace.communicate()
        return log.read_text()

    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4."""
    for step in (2, 4):
        save(tmp_path / "before", saving.state(step))
    return tmp_path / "before"


@pytest.mark.parametrize("replaces_damaged", [False, True])
def test_a_kill_at_every_call_leaves_a_verified_checkpoint(
    before: Path, tmp_path: Path, traced: Traced, replaces_damaged: bool
) -> None:
    if replaces_damaged:
        save(before, saving.state(6))
        (before / "step_000006" / "model.safetensors").write_bytes(b"damaged")
    shutil.copytree(before, tmp_path / "counted")
    whole = traced(tmp_path / "counted", "-e", f"trace={','.join(CHANGING)}")
    assert "exited with 0" in whole
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", whole, re.MULTILINE))
    assert counts["fsync"] >= 6 and counts.total() > 40
    trials = [(call, hit) for call, count in counts.items() for hit in range(1, count + 1)]
    reached = 0
    for call, hit in trials:
        folder = tmp_path / f"{call}-{hit}"
        shutil.copytree(before, folder)
        said = traced(folder, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={hit}")
        reached += "killed by SIGKILL" in said
        state = saving.state(0)
        loaded = load_latest(folder, state)
        assert loaded is not None
        assert loaded.step in (4, 6), (call, hit)
        assert not loaded.damaged or replaces_damaged
        sweep_leftovers(folder)
        assert all(re.fullmatch(r"step_\d{6}", path.name) for path in folder.iterdir())
        save(folder, saving.state(6))  # and the next start saves and prunes as if nothing had happened
        prune(folder, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == ["step_000004", "step_000006"]
        assert load_latest(folder, state).damaged == ()  # type: ignore[union-attr]
        shutil.rmtree(folder)
    assert reached == len(trials)
