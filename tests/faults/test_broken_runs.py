"""Trainings that are damaged, stopped, made non-finite or started twice: how the run ends, and what is kept."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from breaking import RUN, Lab, log, outcome, record

from gpt2lab.runner import NOTHING_LEFT

KILLED = "kill@step:8"  # with checkpoints of steps 3 and 6


def damage(root: Path, *steps: int) -> None:
    for step in steps:
        file = root / RUN / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    damage(tmp_path, 6)
    assert lab.train(tmp_path) == [0]
    said = log(tmp_path)
    assert "step_000006: damaged: optimizer.safetensors is not what was written" in said
    assert "Continuing from step 3: 3 steps are trained again" in said
    assert outcome(tmp_path) == lab.undisturbed()


def test_all_checkpoints_damaged_is_exit_4_and_never_a_fresh_start(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    damage(tmp_path, 3, 6)
    before = outcome(tmp_path)
    assert lab.train(tmp_path) == [4]
    said = log(tmp_path)
    assert said.count("error [DATA]") == 2
    assert "step_000003" in said and "step_000006" in said and "to train again from the start, remove" in said
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
    said = log(tmp_path)
    assert "step_000006: belongs to another architecture" in said and message in said


def test_data_that_changed_since_the_checkpoint_is_refused(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    assert lab.train(tmp_path, fingerprint="0" * 64) == [4]
    said = log(tmp_path)
    assert "the prepared data changed: fingerprint" in said and "planned with 000000000000" in said
    assert lab.train(tmp_path) == [0]
    (tmp_path / RUN / "error.log").unlink()
    assert outcome(tmp_path) == lab.undisturbed()


def test_a_finished_run_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path) == [0]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "log.txt"}
    assert lab.train(tmp_path) == [NOTHING_LEFT]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert record(tmp_path, "result")["status"] == "finished"


@pytest.mark.parametrize("fault", ["nan@loss:5", "inf@loss:5", "nan@grad:5", "inf@grad:5"])
def test_a_number_that_is_not_finite_makes_the_run_diverged(lab: Lab, tmp_path: Path, fault: str) -> None:
    assert lab.train(tmp_path, fault=fault) == [0]
    found = record(tmp_path, "result")
    assert (found["status"], found["steps"]) == ("diverged", 4)
    assert found["reason"].startswith("training: step 5: loss")
    assert lab.train(tmp_path) == [NOTHING_LEFT]  # it is a result, and not tried again


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_skipped_steps_are_counted_and_too_many_in_a_row_are_a_divergence(
    lab: Lab, tmp_path: Path, precision: str
) -> None:
    changes = {"training.precision": precision, "training.nonfinite": "skip", "training.max_skipped_steps": 3}
    assert lab.train(tmp_path / "once", changes, fault="inf@grad:4,inf@grad:6") == [0]
    once = record(tmp_path / "once", "result")
    assert (once["status"], once["skipped_steps"]) == ("finished", 2)
    assert lab.train(tmp_path / "often", changes, fault="inf@grad:4+") == [0]
    often = record(tmp_path / "often", "result")
    assert (often["status"], often["steps"]) == ("diverged", 5)
    assert "step 6" in often["reason"] and "3 steps in a row were skipped" in often["reason"]


@pytest.mark.slow
def test_one_ranks_infinity_stops_all_in_the_same_step(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path / "stop", ranks=2, fault="inf@grad:5,rank=1") == [0, 0]
    found = record(tmp_path / "stop", "result")
    assert (found["status"], found["steps"]) == ("diverged", 4)
    skip = {"training.nonfinite": "skip"}
    assert lab.train(tmp_path / "skip", skip, ranks=2, fault="nan@loss:5,rank=1") == [0, 0]
    assert record(tmp_path / "skip", "result")["skipped_steps"] == 1


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
    lab: Lab, tmp_path: Path, name: str, ranks: int, on: str
) -> None:
    codes = lab.train(tmp_path, ranks=ranks, fault=f"signal={name}@backward:5{on}")
    assert codes == [75] * ranks
    said = log(tmp_path)
    assert "error [PREEMPTED]" in said and "all saved" in said
    [step] = {int(path.name.removeprefix("step_")) for path in (tmp_path / RUN / "checkpoints").iterdir()} - {3}
    assert 5 <= step <= 6
    assert not (tmp_path / RUN / "failure.json").exists()
    assert lab.train(tmp_path, ranks=ranks) == [0] * ranks
    assert outcome(tmp_path) == lab.undisturbed(ranks=ranks)


def test_out_of_memory_names_the_phase_and_keeps_the_checkpoint(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault="memory@forward:8") == [3]
    said = log(tmp_path)
    assert "error [ENVIRONMENT] training, step 8: out of memory with 4 sequences of 16 tokens" in said
    assert "--set training.micro_batch_sequences=2" in said
    assert (tmp_path / RUN / "checkpoints" / "step_000006").is_dir()
    failure = record(tmp_path, "failure")
    assert "out of memory" in failure["reason"]


def test_an_error_of_our_own_is_told_and_the_run_can_be_tried_again(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault="raise@optimizer:7") == [1]
    failure = record(tmp_path, "failure")
    assert "InjectedFault: injected at optimizer" in failure["reason"]
    assert failure["step"] == 6
    assert "Traceback" in (tmp_path / RUN / "error.log").read_text()
    assert lab.train(tmp_path) == [0]


@pytest.mark.slow
def test_sixteen_starters_of_one_run_have_one_winner(lab: Lab, tmp_path: Path) -> None:
    codes = lab.train(tmp_path, fault="sleep=3@step:1", starters=16)
    assert sorted(codes) == [0] + [6] * 15
    said = log(tmp_path)
    refused = re.findall(rf"error \[LOCK\] .*: in use by process (\d+) on {socket.gethostname()}, since 2\d\d\d-", said)
    assert len(refused) == 15 and len(set(refused)) == 1
    assert not (tmp_path / RUN / "failure.json").exists()
    assert outcome(tmp_path) == lab.undisturbed()


def test_the_content_of_a_lock_file_blocks_no_run(lab: Lab, tmp_path: Path) -> None:
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
