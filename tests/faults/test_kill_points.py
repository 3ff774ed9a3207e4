"""Killed anywhere and started again, a training ends as if nothing had happened: in every bit of its weights, optimizer
state, loss scale, numerics watch, journal and evaluation."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from breaking import RUN, Lab, log, outcome

SETUPS: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({}, 1),
    "bf16": ({"training.precision": "bf16"}, 1),
    "fp16": (
        {"training.precision": "fp16", "model.objective": ["cross_entropy", {"name": "z_loss", "weight": "300"}]},
        1,
    ),
    "accumulation": ({"training.micro_batch_sequences": 1}, 1),
    "two-ranks": ({}, 2),
}
"""Changes to the plain training (dropout 0.1, 12 steps, checkpoints every 3), and ranks."""

HITS = {
    "forward": (1, 2, 8, 12),
    "backward": (1, 5, 10, 11),
    "optimizer": (1, 6, 12),
    "step": (1, 3, 4, 8, 12),
    "evaluation": (1, 2, 5, 8),
    "journal.append": (1, 2, 7, 13),
    "save.begin": (1,),
    "save.weights": (1, 3),
    "save.optimizer": (2,),
    "save.state": (1, 4),
    "save.manifest": (2, 4),
    "save.rename": (1, 3),
    "save.done": (1, 4),
    "prune": (1, 2, 3),
    "result": (1,),
}
POINTS = [f"{name}:{hit}" for name, hits in HITS.items() for hit in hits]
IN_EVERY_RUN = [("fp32", "save.rename:3"), ("fp16", "backward:10"), ("accumulation", "step:8"), ("fp32", "result:1")]
"""A sample for the fast tests."""

ROOT = Path(__file__).parents[2]


def killed_and_resumed(lab: Lab, root: Path, setup: str, point: str, rank: int) -> dict[str, Any]:
    changes, ranks = SETUPS[setup]
    codes = lab.train(root, changes, ranks=ranks, fault=f"kill@{point},rank={rank}")
    assert codes[rank] == -signal.SIGKILL, f"{point} was never reached: {codes}\n{log(root)}"
    assert lab.train(root, changes, ranks=ranks) == [0] * ranks, log(root)
    found = outcome(root)
    shutil.rmtree(root)
    return found


def test_there_are_forty_kill_points() -> None:
    assert len(set(POINTS)) == len(POINTS) == 40


@pytest.mark.parametrize(("setup", "point"), IN_EVERY_RUN)
def test_a_sample_of_kills_changes_nothing(lab: Lab, tmp_path: Path, setup: str, point: str) -> None:
    assert killed_and_resumed(lab, tmp_path / "run", setup, point, 0) == lab.undisturbed(*SETUPS[setup])


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_changes_nothing(lab: Lab, tmp_path: Path, setup: str, point: str) -> None:
    everywhere = point.split(":")[0] in ("forward", "backward", "optimizer", "step", "evaluation")
    rank = POINTS.index(point) % 2 if SETUPS[setup][1] == 2 and everywhere else 0
    assert killed_and_resumed(lab, tmp_path / "run", setup, point, rank) == lab.undisturbed(*SETUPS[setup])


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_three_kills_in_a_row_change_nothing(lab: Lab, tmp_path: Path, setup: str) -> None:
    changes, ranks = SETUPS[setup]
    for point in ("save.manifest:2", "backward:2", "save.done:1"):
        lab.train(tmp_path, changes, ranks=ranks, fault=f"kill@{point},rank=0")
    assert lab.train(tmp_path, changes, ranks=ranks) == [0] * ranks
    assert outcome(tmp_path) == lab.undisturbed(*SETUPS[setup])


def test_what_is_compared_is_all_of_it(lab: Lab) -> None:
    """The comparison would see a difference in any part, because every part is in it and moves."""
    found = lab.undisturbed(*SETUPS["fp16"])
    state = found["checkpoints/step_000012/state.json"]
    assert {
        "checkpoints/step_000012/model.safetensors",
        "checkpoints/step_000012/optimizer.safetensors",
    } <= found.keys()
    assert state["step"] == 12
    assert state["scaler"]["scale"] < 2.0**16  # it overflowed on the way, so the scale is not what it began with
    assert state["guard"]["skipped"] > 0
    assert len(state["guard"]["recent"]) == 12 - state["guard"]["skipped"]
    assert [row["step"] for row in found["metrics.jsonl"]] == list(range(13))
    assert lab.undisturbed() != found
    assert RUN not in found


@pytest.mark.slow
def test_half_a_minute_of_soaking_finds_nothing() -> None:
    """Killed at times rather than points; half an hour of it is run by hand."""
    words = ["-m", "tests.faults.soak", "--minutes", "0.5", "--shortest", "0.5", "--longest", "3", "--steps", "60"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 faults" in done.stdout
