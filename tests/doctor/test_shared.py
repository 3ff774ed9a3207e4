"""Whether a shared disk carries locks, asked from two processes."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gpt2lab.doctor import shared
from gpt2lab.doctor.shared import FOLDER, check_shared, leave, meet

Call = Callable[..., Any]


def test_a_disk_is_probed_by_two_processes_and_other_hosts(
    gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "BEAT_SECONDS", 0.05)
    disk, seconds = tmp_path / "disk", 0.5

    def problems() -> dict[str, str | None]:
        return {check.name: check.problem for check in check_shared(disk, seconds)}

    answer = gpt2lab("doctor", "--shared", disk, "--seconds", "1")
    assert answer.code == 0 and "flock, against a second process here" in answer.out and "none met" in answer.out
    assert list(disk.iterdir()) == []
    (disk / FOLDER).mkdir()
    other = Thread(target=meet, args=(disk / FOLDER, "node17.1", 3 * seconds))
    other.start()
    found = {check.found: check.problem for check in check_shared(disk, seconds)}
    other.join()
    leave(disk / FOLDER, "node17.1")
    assert found["flock, against node17.1"] is None and not any("none met" in text for text in found)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # grants each lock to everybody, as some disks do
    before = problems()
    assert "not carried" in str(before["locks"]) and before["claims"] == f"touch {disk / 'claims'}"
    (disk / "claims").touch()
    after = problems()
    assert after["locks"] is None and after["claims"] is None
    (disk / "claims").unlink()
    answer = gpt2lab("doctor", "--shared", disk, "--seconds", "1")
    assert answer.code == 3 and "not carried" in answer.out
