"""Asked to stop, a run finishes its step, saves and says 75; the same command then ends in the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from breaking import RUN, Lab, outcome


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
    said = (tmp_path / "log.txt").read_text()
    assert "error [PREEMPTED]" in said and "all saved" in said
    [step] = {int(path.name.removeprefix("step_")) for path in (tmp_path / RUN / "checkpoints").iterdir()} - {3}
    assert 5 <= step <= 6
    assert not (tmp_path / RUN / "failure.json").exists()
    assert lab.train(tmp_path, ranks=ranks) == [0] * ranks
    lab.train(lab.folder / f"undisturbed-{ranks}", ranks=ranks)
    assert outcome(tmp_path) == outcome(lab.folder / f"undisturbed-{ranks}")


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
