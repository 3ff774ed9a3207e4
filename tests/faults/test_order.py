"""What a power cut may take: nothing that something else on the disk already builds upon. kill -9 cannot show this,
the order of calls can."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from breaking import RUN, Lab, job_of

from gpt2lab.runner import StopRequest, execute


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every write, fsync and rename in this process, by the name of the file."""
    seen: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}

    def name_of(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def write(descriptor: int, data: bytes) -> int:
        seen.append(("write", name_of(descriptor)))
        return int(real["write"](descriptor, data))

    def fsync(descriptor: int) -> None:
        seen.append(("fsync", name_of(descriptor)))
        real["fsync"](descriptor)

    def replace(source: Path, target: Path) -> None:
        seen.append(("rename", os.path.basename(target)))
        real["replace"](source, target)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_rows_are_on_the_disk_before_the_checkpoint_that_will_not_write_them_again(
    lab: Lab, tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    """And a checkpoint's files, its folder, its name, in this order; the result comes after the evaluation."""
    execute(job_of(lab.job(tmp_path)), StopRequest())
    files = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    for step in (3, 6, 9, 12):
        named = calls.index(("rename", f"step_{step:06d}"))
        before = [call for call in calls[:named] if call != ("fsync", "lock")]
        row = max(i for i, call in enumerate(before) if call == ("write", "metrics.jsonl"))
        assert ("fsync", "metrics.jsonl") in before[row:]
        assert {name for kind, name in before[-5:-1]} == files and {kind for kind, _ in before[-5:]} == {"fsync"}
        assert before[-1][1].startswith(f".step_{step:06d}.")
        assert calls[named + 1] == ("fsync", "checkpoints")
    result = calls.index(("rename", "result.json"))
    evaluation = next(
        i for i, (kind, name) in enumerate(calls) if kind == "rename" and "step_" not in name and i > named
    )
    assert evaluation < result
    assert calls[result - 1][0] == "fsync" and calls[result + 1] == ("fsync", RUN)
