"""Full disks, for real where a small file system can be mounted, and folders that cannot be written."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import RUN, Lab, log, outcome, record

from gpt2lab.store import Store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("file systems may not be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def logged_elsewhere(disk: Path) -> Path:
    """A folder for runs on that disk, whose log lies beside the disk."""
    root = disk / "runs"
    root.mkdir()
    (root / "log.txt").symlink_to(disk.parent / "log.txt")
    return root


def test_a_training_on_a_full_disk_says_so_and_goes_on_when_there_is_room(lab: Lab, small_disk: Path) -> None:
    """Room for some checkpoints and not for all; then room again."""
    root = logged_elsewhere(small_disk)
    assert lab.train(root, {"training.keep_checkpoints": 12, "training.checkpoint_every_steps": 1}) == [3]
    said = log(root)
    assert "error [ENVIRONMENT]" in said and "the disk is full" in said and "bytes needed" in said
    assert "Traceback" not in said
    run = Store(root).run(RUN)
    kept = [path.name for path in run.checkpoints.iterdir()]
    assert kept and all(name.startswith("step_") for name in kept)
    shutil.copytree(root / RUN, lab.folder / "disk-moved" / RUN)  # to where there is room
    assert lab.train(lab.folder / "disk-moved") == [0]
    moved, undisturbed = outcome(lab.folder / "disk-moved"), lab.undisturbed()
    assert moved["metrics.jsonl"] == undisturbed["metrics.jsonl"]
    assert (
        moved["checkpoints/step_000012/model.safetensors"] == undisturbed["checkpoints/step_000012/model.safetensors"]
    )


@pytest.mark.parametrize("point", ["save.weights:2", "save.state:1", "save.done:3"])
def test_a_full_disk_at_any_point_costs_nothing_but_time(lab: Lab, tmp_path: Path, point: str) -> None:
    assert lab.train(tmp_path, fault=f"full@{point}") == [3]
    assert "the disk is full" in record(tmp_path, "failure")["reason"]
    assert lab.train(tmp_path) == [0]
    assert not (tmp_path / RUN / "failure.json").exists()
    (tmp_path / RUN / "error.log").unlink()
    assert outcome(tmp_path) == lab.undisturbed()


def test_a_place_that_cannot_be_written_is_said_before_the_first_step(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("a file in the way")
    assert lab.train(tmp_path) == [3]
    said = log(tmp_path)
    assert "error [ENVIRONMENT]" in said and "cannot write" in said and "Traceback" not in said


def test_a_file_system_that_is_read_only_is_said_before_the_first_step(lab: Lab, small_disk: Path) -> None:
    root = logged_elsewhere(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert lab.train(root) == [3]
    assert "cannot write: read-only file system" in log(root) and "Traceback" not in log(root)


def test_a_journal_that_is_damaged_is_named_in_the_failure(lab: Lab, tmp_path: Path) -> None:
    assert lab.train(tmp_path, fault="kill@step:8") == [-9]
    journal = tmp_path / RUN / "metrics.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"step"', b'"st', 1))
    assert lab.train(tmp_path) == [4]
    assert "line 1 is damaged" in record(tmp_path, "failure")["reason"]
