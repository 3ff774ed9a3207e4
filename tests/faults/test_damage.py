"""What a run does about damaged checkpoints, another architecture in its folder, and data that changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saving
from breaking import RUN, Lab, outcome

from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.runner import NOTHING_LEFT
from gpt2lab.training import load_latest

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
    said = (tmp_path / "log.txt").read_text()
    assert "step_000006: damaged: optimizer.safetensors is not what was written" in said
    assert "Continuing from step 3: 3 steps are trained again" in said
    assert outcome(tmp_path) == undisturbed


def test_all_checkpoints_damaged_is_exit_4_and_never_a_fresh_start(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    damage(tmp_path, 3, 6)
    before = outcome(tmp_path)
    assert lab.train(tmp_path) == [4]
    said = (tmp_path / "log.txt").read_text()
    assert said.count("error [DATA]") == 2
    assert "step_000003" in said and "step_000006" in said and "to train again from the start, remove" in said
    after = outcome(tmp_path)
    assert {name for name in after if name not in before} == {"error.log", "failure.json"}
    assert all(after[name] == content for name, content in before.items())


def test_another_architecture_is_exit_2_with_the_difference(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    assert lab.train(tmp_path, {"model.n_embd": 16}) == [2]
    said = (tmp_path / "log.txt").read_text()
    assert "step_000006: belongs to another architecture" in said
    assert "wte.weight: (256, 32) in the checkpoint, (256, 16) in the model" in said


def test_another_precision_does_not_take_over_a_loss_scale(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, {"training.precision": "fp16"}, fault=KILLED) == [-9]
    assert lab.train(tmp_path) == [2]
    assert "training.precision: the checkpoint has a loss scale" in (tmp_path / "log.txt").read_text()


def test_data_that_changed_since_the_checkpoint_is_refused(
    lab: Lab, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    assert lab.train(tmp_path, fault=KILLED) == [-9]
    assert lab.train(tmp_path, fingerprint="0" * 64) == [4]
    said = (tmp_path / "log.txt").read_text()
    assert "the prepared data changed: fingerprint" in said and "planned with 000000000000" in said
    assert lab.train(tmp_path) == [0]
    (tmp_path / RUN / "error.log").unlink()
    assert outcome(tmp_path) == undisturbed


def test_a_finished_run_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path) == [0]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != "log.txt"}
    assert lab.train(tmp_path) == [NOTHING_LEFT]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert json.loads((tmp_path / RUN / "result.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_300_flipped_bits_and_50_truncations_of_a_real_checkpoint_are_all_detected(lab: Lab, tmp_path: Path) -> None:
    """Of a trained fp16 model with its loss scale; bits are drawn from all of it alike, and from each file alike."""
    changes = {"training.precision": "fp16", "model.n_embd": 64}
    assert lab.train(tmp_path, changes) == [0]
    [checkpoint] = (tmp_path / RUN / "checkpoints").iterdir()
    files = sorted(checkpoint.iterdir())
    sizes = np.array([file.stat().st_size for file in files])
    draw, state = np.random.default_rng(0), saving.state(0)
    for trial in range(350):
        file = files[trial // 2 % len(files) if trial % 2 else draw.choice(len(files), p=sizes / sizes.sum())]
        whole = file.read_bytes()
        if trial < 300:
            content = bytearray(whole)
            bit = int(draw.integers(8 * len(whole)))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
        else:
            os.truncate(file, int(draw.integers(len(whole))))
        with pytest.raises(DataFault):
            load_latest(checkpoint.parent, state)
        file.write_bytes(whole)
    with pytest.raises(ConfigError, match="belongs to another architecture"):  # it is sound again
        load_latest(checkpoint.parent, state)
