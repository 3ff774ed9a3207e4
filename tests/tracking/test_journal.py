"""The journal loses no row, repeats none, and its follower sees each step once."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.errors import DataFault, EnvironmentFault
from gpt2lab.store import parse_rows
from gpt2lab.tracking.journal import Journal, Tail


def row(step: int, seconds: float = 0.0, **metrics: float) -> dict[str, Any]:
    return {"step": step, "tokens": 64 * step, "seconds": seconds or float(step), "metrics": metrics or {"loss": 2.0}}


def steps(path: Path) -> list[int]:
    return [r["step"] for r in parse_rows(path.read_bytes(), str(path))[0]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_come_back_exactly(path: Path) -> None:
    third = 1 / 3
    with Journal(path) as journal:
        journal.append(row(0, loss=third))
        journal.append(row(2, loss=math.inf, other=-math.inf))
        journal.append(row(3, loss=math.nan))
    rows = Tail(path).new_rows()
    assert rows[:2] == [row(0, loss=third), row(2, loss=math.inf, other=-math.inf)]
    assert math.isnan(rows[2]["metrics"]["loss"])
    assert len(path.read_bytes().splitlines()) == 3


def test_a_killed_process_has_lost_no_row(path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from gpt2lab.tracking.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]))\n"
        "for s in range(3): j.append({'step': s, 'tokens': s, 'seconds': 0.0, 'metrics': {}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(path) == [0, 1, 2]


@pytest.mark.parametrize("step", [2, 1, 0])
def test_steps_only_go_up(path: Path, step: int) -> None:
    with Journal(path) as journal:
        journal.append(row(2))
        with pytest.raises(ValueError, match="after one of step 2"):
            journal.append(row(step))
    with Journal(path) as journal, pytest.raises(ValueError, match="after one of step 2"):
        journal.append(row(step))
    assert steps(path) == [2]


def test_a_torn_last_line_does_not_swallow_the_next_row(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(row(1))
    with path.open("ab") as file:
        file.write(json.dumps(row(2)).encode()[:-3])
    with Journal(path) as journal:
        assert journal.last_step == 1
        journal.append(row(2))
        journal.append(row(3))
    assert steps(path) == [1, 2, 3]


def test_damage_inside_is_never_written_over(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(row(1)) + "\n{\n" + json.dumps(row(3)) + "\n")
    before = path.read_bytes()
    with pytest.raises(DataFault, match="line 2"):
        Journal(path)
    assert path.read_bytes() == before


def test_resuming_drops_later_rows_in_one_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(path) as journal:
        for step in range(6):
            journal.append(row(step))
        whole = path.read_bytes()
        replaced: list[bytes] = []
        replace = os.replace

        def recorded(source: Path, target: Path) -> None:
            replaced.append(path.read_bytes())
            replace(source, target)

        monkeypatch.setattr(os, "replace", recorded)
        journal.truncate_after(3)
        assert replaced == [whole], "the old file must be whole until the new one takes its name"
        assert steps(path) == [0, 1, 2, 3]
        assert whole.startswith(path.read_bytes())
        journal.append(row(4))
        assert steps(path) == [0, 1, 2, 3, 4]
        journal.truncate_after(-1)
        assert steps(path) == []
        journal.append(row(0))
    assert steps(path) == [0]


def test_sync_reaches_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with Journal(path) as journal:
        assert synced[-1] == str(path.parent), "the new file's name must survive a power cut too"
        journal.append(row(1))
        assert str(path) not in synced
        journal.sync()
        assert synced[-1] == str(path)


def test_a_full_disk_is_waited_out_with_one_warning(
    path: Path, file_limit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with Journal(path) as journal:
        journal.append(row(0))
        room = file_limit(path.stat().st_size + 10)  # for part of a line
        with room, caplog.at_level(logging.WARNING):
            for step in range(1, 6):
                journal.append(row(step))
        assert len(caplog.records) == 1
        assert "training goes on" in caplog.text
        assert "free" in caplog.text
        assert steps(path) == [0]
        journal.append(row(6))
        assert steps(path) == list(range(7))


def test_a_full_disk_stops_training_before_rows_are_lost(
    path: Path, file_limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.tracking.journal.BUFFER_LIMIT_BYTES", 300)
    journal = Journal(path)
    with file_limit(10):
        while len(json.dumps(row(journal.last_step + 1))) * (journal.last_step + 2) < 280:
            journal.append(row(journal.last_step + 1))
        written = journal.last_step + 1
        assert written >= 2
        with pytest.raises(EnvironmentFault, match="stopping before any is lost") as caught:
            journal.append(row(written))
        assert caught.value.exit_code == 3
        with pytest.raises(EnvironmentFault, match="bytes needed"):
            journal.sync()
    journal.close()
    assert steps(path) == list(range(written + 1))


def test_other_write_errors_are_raised_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    journal = Journal(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        with pytest.raises(EnvironmentFault, match="input/output error"):
            journal.append(row(1))
    journal.close()
    journal.close()


def test_a_tail_returns_whole_rows_once(path: Path) -> None:
    following = Tail(path)
    assert following.new_rows() == []
    with Journal(path) as journal:
        journal.append(row(0))
        journal.append(row(1))
        assert [r["step"] for r in following.new_rows()] == [0, 1]
        assert following.new_rows() == []
        line = json.dumps(row(2)).encode() + b"\n"
        with path.open("ab") as file:
            file.write(line[:20])
            file.flush()
            assert following.new_rows() == []
            file.write(line[20:])
        assert following.new_rows() == [row(2)]


@pytest.mark.parametrize("kept", [4, 1, -1])
@pytest.mark.parametrize("rewritten", [1, 3, 9, 30])
def test_a_tail_survives_a_resumed_run(path: Path, kept: int, rewritten: int) -> None:
    """Whether the file is then shorter, as long or longer than it was, no step comes twice and none is missed."""
    following = Tail(path)
    with Journal(path) as journal:
        for step in range(6):
            journal.append(row(step))
        assert len(following.new_rows()) == 6
        journal.truncate_after(kept)
        for step in range(kept + 1, kept + 1 + rewritten):
            journal.append(row(step, seconds=step + 0.5))
        seen = [r["step"] for r in following.new_rows()]
        assert seen == [s for s in range(kept + 1, kept + 1 + rewritten) if s > 5]
        journal.append(row(100))
        assert [r["step"] for r in following.new_rows()] == [100]


def test_a_tail_names_damage(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(row(1)) + "\nnonsense\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(DataFault, match=r"metrics\.jsonl: line 2"):
        Tail(path).new_rows()
