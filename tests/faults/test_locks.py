"""One run is trained by one process at a time, and a lock outlives nobody. The locks by themselves are tested with the
store; here are whole trainings."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from breaking import RUN, Lab, outcome


@pytest.mark.slow
def test_sixteen_starters_of_one_run_have_one_winner(lab: Lab, tmp_path: Path) -> None:
    codes = lab.train(tmp_path, fault="sleep=3@step:1", starters=16)
    assert sorted(codes) == [0] + [6] * 15
    said = (tmp_path / "log.txt").read_text()
    refused = re.findall(rf"error \[LOCK\] .*: in use by process (\d+) on {socket.gethostname()}, since 2\d\d\d-", said)
    assert len(refused) == 15 and len(set(refused)) == 1
    assert not (tmp_path / RUN / "failure.json").exists()
    lab.train(lab.folder / "undisturbed")
    assert outcome(tmp_path) == outcome(lab.folder / "undisturbed")


def test_what_a_lock_file_says_stops_nobody(lab: Lab, tmp_path: Path) -> None:
    """A stale one, of a living process, of another host: only the kernel's lock counts."""
    (tmp_path / RUN).mkdir()
    (tmp_path / RUN / "lock").write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "since": "long ago"}))
    assert lab.train(tmp_path) == [0]


@pytest.mark.slow
def test_a_stopped_holder_still_holds_and_a_killed_one_does_not(lab: Lab, tmp_path: Path) -> None:
    """Two starters: one stops dead (SIGSTOP) at its second step and keeps the lock, until it is killed."""
    codes = lab.train(tmp_path, fault="stop@step:2", starters=2, kill_after=4.0)
    assert sorted(codes) == [-9, 6]
    assert lab.train(tmp_path) == [0]
