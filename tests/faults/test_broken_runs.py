"""Trainings that are damaged, stopped, made non-finite or started twice: how the run ends, and what is kept."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breaking import RUN, Lab, outcome

from gpt2lab.runner import NOTHING_LEFT

Undisturbed = Callable[..., dict[str, Any]]
KILLED = "kill@step:8"  # with checkpoints of steps 3 and 6


@pytest.fixture
def undisturbed(lab: Lab) -> Callable[..., dict[str, Any]]:
    """The outcome of a training that nothing happened to."""

    def train(ranks: int = 1) -> dict[str, Any]:
        lab.train(lab.folder / f"undisturbed-{ranks}", ranks=ranks)
        return outcome(lab.folder / f"undisturbed-{ranks}")

    return train


def damage(root: Path, *steps: int) -> None:
    for step in steps:
        file = root / RUN / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_changes_nothing(
    lab: Lab, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    damage(tmp_path, 6)
    assert lab.train(tmp_path) == [0]
    log = (tmp_path / "log.txt").read_text()
    assert "step_000006: damaged: optimizer.safetensors is not what was written" in log
    assert "Continuing from step 3: 3 steps are trained again" in log
    assert outcome(tmp_path) == undisturbed()


def test_all_checkpoints_damaged_is_exit_4_and_never_a_fresh_start(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    damage(tmp_path, 3, 6)
    before = outcome(tmp_path)
    assert lab.train(tmp_path) == [4]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("error [DATA]") == 2
    assert "step_000003" in log and "step_000006" in log and "to train again from the start, remove" in log
    after = outcome(tmp_path)
    assert {name for name in after if name not in before} == {"error.log", "failure.json"}
    assert all(after[name] == content for name, content in before.items())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"model.n_embd": 16}, "wte.weight: (256, 32) in the checkpoint, (256, 16) in the model"),
        ({"training.precision": "fp16"}, {}, "training.precision: the checkpoint has a loss scale"),
    ],
    ids=["architecture", "precision"],
)
def test_another_architecture_is_exit_2_with_the_difference(
    lab: Lab, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    assert lab.train(tmp_path, before, fault=KILLED) == [-9]
    assert lab.train(tmp_path, after) == [2]
    log = (tmp_path / "log.txt").read_text()
    assert "step_000006: belongs to another architecture" in log and message in log


def test_data_that_changed_since_the_checkpoint_is_refused(lab: Lab, tmp_path: Path, undisturbed: Undisturbed) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    assert lab.train(tmp_path, fingerprint="0" * 64) == [4]
    log = (tmp_path / "log.txt").read_text()
    assert "the prepared data changed: fingerprint" in log and "planned with 000000000000" in log
    assert lab.train(tmp_path) == [0]
    (tmp_path / RUN / "error.log").unlink()
    assert outcome(tmp_path) == undisturbed()


def test_a_finished_run_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path) == [0]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "log.txt"}
    assert lab.train(tmp_path) == [NOTHING_LEFT]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert json.loads((tmp_path / RUN / "result.json").read_text())["status"] == "finished"


def result(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / RUN / "result.json").read_text())
    return found


@pytest.mark.parametrize("fault", ["nan@loss:5", "inf@loss:5", "nan@grad:5", "inf@grad:5"])
def test_a_number_that_is_not_finite_makes_the_run_diverged(lab: Lab, tmp_path: Path, fault: str) -> None:
    assert lab.train(tmp_path, fault=fault) == [0]
    found = result(tmp_path)
    assert (found["status"], found["steps"]) == ("diverged", 4)
    assert found["reason"].startswith("training: step 5: loss")
    assert lab.train(tmp_path) == [NOTHING_LEFT]  # it is a result: nobody tries again


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_skipped_steps_are_counted_and_too_many_in_a_row_are_a_divergence(
    lab: Lab, tmp_path: Path, precision: str
) -> None:
    changes = {"training.precision": precision, "training.nonfinite": "skip", "training.max_skipped_steps": 3}
    assert lab.train(tmp_path / "once", changes, fault="inf@grad:4,inf@grad:6") == [0]
    assert (result(tmp_path / "once")["status"], result(tmp_path / "once")["skipped_steps"]) == ("finished", 2)
    assert lab.train(tmp_path / "often", changes, fault="inf@grad:4+") == [0]
    often = result(tmp_path / "often")
    assert (often["status"], often["steps"]) == ("diverged", 5)
    assert "step 6" in often["reason"] and "3 steps in a row were skipped" in often["reason"]


@pytest.mark.slow
def test_one_ranks_infinity_stops_all_in_the_same_step(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path / "stop", ranks=2, fault="inf@grad:5,rank=1") == [0, 0]
    assert (result(tmp_path / "stop")["status"], result(tmp_path / "stop")["steps"]) == ("diverged", 4)
    skip = {"training.nonfinite": "skip"}
    assert lab.train(tmp_path / "skip", skip, ranks=2, fault="nan@loss:5,rank=1") == [0, 0]
    assert result(tmp_path / "skip")["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("name", "ranks", "on"),
    [
        ("TERM", 1, ""),
        pytest.param("USR1", 1, "", marks=pytest.mark.slow),
        pytest.param("USR2", 1, "", marks=pytest.mark.slow),
        pytest.param("INT", 1, "", marks=pytest.mark.slow),
        pytest.param("TERM", 2, ",rank=1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    lab: Lab, tmp_path: Path, undisturbed: Undisturbed, name: str, ranks: int, on: str
) -> None:
    codes = lab.train(tmp_path, ranks=ranks, fault=f"signal={name}@backward:5{on}")
    assert codes == [75] * ranks
    said = (tmp_path / "log.txt").read_text()
    assert "error [PREEMPTED]" in said and "all saved" in said
    [step] = {int(path.name.removeprefix("step_")) for path in (tmp_path / RUN / "checkpoints").iterdir()} - {3}
    assert 5 <= step <= 6
    assert not (tmp_path / RUN / "failure.json").exists()
    assert lab.train(tmp_path, ranks=ranks) == [0] * ranks
    assert outcome(tmp_path) == undisturbed(ranks)


def test_out_of_memory_names_the_phase_and_keeps_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault="memory@forward:8") == [3]
    said = (tmp_path / "log.txt").read_text()
    assert "error [ENVIRONMENT] training, step 8: out of memory with 4 sequences of 16 tokens" in said
    assert "--set training.micro_batch_sequences=2" in said
    assert (tmp_path / RUN / "checkpoints" / "step_000006").is_dir()
    failure = json.loads((tmp_path / RUN / "failure.json").read_text())
    assert "out of memory" in failure["reason"]


def test_an_error_of_our_own_is_told_and_the_run_can_be_tried_again(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault="raise@optimizer:7") == [1]
    failure = json.loads((tmp_path / RUN / "failure.json").read_text())
    assert "InjectedFault: injected at optimizer" in failure["reason"]
    assert failure["step"] == 6
    assert "Traceback" in (tmp_path / RUN / "error.log").read_text()
    assert lab.train(tmp_path) == [0]


@pytest.mark.slow
def test_sixteen_starters_of_one_run_have_one_winner(lab: Lab, tmp_path: Path, undisturbed: Undisturbed) -> None:
    codes = lab.train(tmp_path, fault="sleep=3@step:1", starters=16)
    assert sorted(codes) == [0] + [6] * 15
    said = (tmp_path / "log.txt").read_text()
    refused = re.findall(rf"error \[LOCK\] .*: in use by process (\d+) on {socket.gethostname()}, since 2\d\d\d-", said)
    assert len(refused) == 15 and len(set(refused)) == 1
    assert not (tmp_path / RUN / "failure.json").exists()
    assert outcome(tmp_path) == undisturbed()


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
