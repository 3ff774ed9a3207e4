"""Losses and gradients that are not finite, in whole runs: stopped or skipped as the config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from breaking import RUN, Lab

from gpt2lab.runner import NOTHING_LEFT


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
