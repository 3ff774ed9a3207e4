"""What a run does about damaged checkpoints, another architecture in its folder, and data that changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from breaking import RUN, Lab, outcome

from gpt2lab.runner import NOTHING_LEFT

KILLED = "kill@step:8"  # with checkpoints of steps 3 and 6


@pytest.fixture
def undisturbed(lab: Lab) -> dict[str, Any]:
    lab.train(lab.folder / "undisturbed")
    return outcome(lab.folder / "undisturbed")


def damage(root: Path, *steps: int) -> None:
    for step in steps:
        file = root / RUN / "checkpoints" / f"step_{step:06d}" / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_changes_nothing(
    lab: Lab, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    damage(tmp_path, 6)
    assert lab.train(tmp_path) == [0]
    log = (tmp_path / "log.txt").read_text()
    assert "step_000006: damaged: optimizer.safetensors is not what was written" in log
    assert "Continuing from step 3: 3 steps are trained again" in log
    assert outcome(tmp_path) == undisturbed


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


def test_data_that_changed_since_the_checkpoint_is_refused(
    lab: Lab, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    assert lab.train(tmp_path, fingerprint="0" * 64) == [4]
    log = (tmp_path / "log.txt").read_text()
    assert "the prepared data changed: fingerprint" in log and "planned with 000000000000" in log
    assert lab.train(tmp_path) == [0]
    (tmp_path / RUN / "error.log").unlink()
    assert outcome(tmp_path) == undisturbed


def test_a_finished_run_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path) == [0]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "log.txt"}
    assert lab.train(tmp_path) == [NOTHING_LEFT]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert json.loads((tmp_path / RUN / "result.json").read_text())["status"] == "finished"
