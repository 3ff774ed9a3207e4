"""Whether a shared disk carries locks, asked from two processes."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gpt2lab.doctor.shared import FOLDER, check_shared, leave, meet

Call = Callable[..., Any]


def test_a_disk_is_probed_by_two_processes_and_other_hosts(
    gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    answer = gpt2lab("doctor", "--shared", disk, "--seconds", "2")
    assert answer.code == 0 and "flock, against a second process here" in answer.out and "none met" in answer.out
    assert list(disk.iterdir()) == []
    (disk / FOLDER).mkdir()
    other = Thread(target=meet, args=(disk / FOLDER, "node17.1", 4.0))
    other.start()
    found = {part.found: part.problem for part in check_shared(disk, 2.0)}
    other.join()
    leave(disk / FOLDER, "node17.1")
    assert found["flock, against node17.1"] is None and not any("none met" in text for text in found)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # grants each lock to everybody, as some disks do
    answer = gpt2lab("doctor", "--shared", disk, "--seconds", "2")
    assert answer.code == 3 and "not carried" in answer.out
    (disk / "claims").touch()
    assert {part.name: part.problem for part in check_shared(disk, 2.0)}["locks"] is None
    (disk / "claims").unlink()
    assert {part.name: part.problem for part in check_shared(disk, 2.0)}["claims"] == f"touch {disk / 'claims'}"
