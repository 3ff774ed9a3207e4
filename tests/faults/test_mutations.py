"""Tests must bite: every protection is taken out of a copy of the package, and the test that guards it has to fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A protection that is taken away: in `file`, each `old` becomes `new`. `test` then fails."""

    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    test: str


def without(what: str, file: str, old: str, test: str, new: str = "pass") -> Mutation:
    return Mutation(what, f"gpt2lab/{file}", ((old, new),), f"tests/{test}")


CHECKPOINTS, KILLS = "training/test_checkpoints.py::", "faults/test_kill_points.py::test_a_sample_of_kills"
MUTATIONS = [
    without(
        "random numbers are seeded in every micro-step", "training/loop.py",
        "reseed(seed, step, micro, world.rank, replica.device)",
        "training/test_loop.py::test_dropout_depends_on_seed_step_and_micro_step_alone",
    ),
    without(
        "batches are a function of the step", "training/loop.py",
        "lambda step: load(batches, step,", CHECKPOINTS + "test_resume_is_exact",
        "lambda step, first=state.step: load(batches, step - first,",
    ),
    without(
        "rates are a function of the step", "training/loop.py",
        "factor = self.multiplier(step)", CHECKPOINTS + "test_resume_is_exact",
        "self.calls = getattr(self, 'calls', -1) + 1; factor = self.multiplier(self.calls)",
    ),
    without(
        "what is not finite reaches no weight", "training/loop.py",
        "elif metrics.read().finite:",
        "training/test_loop.py::test_a_gradient_that_is_not_finite_stops_in_its_step_with_clean_weights",
        "else:",
    ),
    without(
        "optimizer state is loaded", "training/state.py",
        "optimizer.load_state_dict(state)", CHECKPOINTS + "test_resume_is_exact",
    ),
    without(
        "the loss scale is loaded", "training/state.py",
        'self.scaler.load_state_dict(saved["scaler"])', KILLS + "_changes_nothing[fp16-backward:10]",
    ),
    without(
        "the numerics watch is loaded", "training/state.py",
        'self.guard.load_state_dict(saved["guard"])', KILLS + "_changes_nothing[fp32-save.rename:3]",
    ),
    without(
        "shapes are compared before anything is loaded", "training/state.py",
        "raise ConfigError(problems)", CHECKPOINTS + "test_another_architecture_shows_the_difference",
    ),
    without(
        "every byte is checked against the manifest", "training/checkpoints.py",
        "reason = damage(folder, step, FILES)", CHECKPOINTS + "test_300_flipped_bits_and_50_truncations",
        "reason = None",
    ),
    without(
        "a manifest has a sum of itself", "training/checkpoints.py",
        'if written != _sealed({**content, "files": files}):', CHECKPOINTS + "test_300_flipped_bits_and_50_truncations",
        "if False:",
    ),
    without(
        "a checkpoint is written under a temporary name", "training/checkpoints.py",
        "temporary = temporary_beside(final)",
        CHECKPOINTS + "test_a_kill_at_any_file_operation_leaves_a_verified_checkpoint",
        "temporary = final.with_name(f'step_{state.step + 1:06d}')",
    ),
    without(
        "damage everywhere is no fresh start", "training/checkpoints.py",
        "raise DataFault(damaged,", CHECKPOINTS + "test_all_damaged_is_never_a_silent_fresh_start",
        "print(damaged,",
    ),
    without(
        "retention counts good checkpoints only", "training/checkpoints.py",
        "good += damage(path, step, FILES) is None",
        CHECKPOINTS + "test_damaged_checkpoints_never_push_out_good_ones", "good += 1",
    ),
    without(
        "a checkpoint is renamed before it is deleted", "training/checkpoints.py",
        "    os.replace(path, aside)\n    shutil.rmtree(aside, ignore_errors=True)",
        CHECKPOINTS + "test_a_kill_in_the_middle_of_pruning_leaves_no_half_checkpoint",
        "    shutil.rmtree(path, ignore_errors=True)",
    ),
    without(
        "what would need code to be read back is refused", "training/checkpoints.py",
        'raise ConfigError(\n            f"a checkpoint cannot',
        CHECKPOINTS + "test_state_that_could_not_be_read_back_is_refused_when_saving",
        'return str(\n            f"a checkpoint cannot',
    ),
    without(
        "a temporary of a failed save is removed", "training/checkpoints.py",
        "    finally:\n        shutil.rmtree(temporary, ignore_errors=True)",
        CHECKPOINTS + "test_a_full_disk_leaves_the_older_checkpoint_and_no_debris",
        "    finally:\n        pass",
    ),
    without(
        "a file is on the disk before its name is", "store/files.py",
        "                os.fsync(file.fileno())\n                os.replace",
        "store/test_store_files.py::test_a_file_reaches",
        "                os.replace",
    ),
    without(
        "a folder's files are on the disk before its name is", "store/files.py",
        "                    os.fsync(file.fileno())", "store/test_store_files.py::test_a_published_folder_is_on",
        "                    pass",
    ),
    without(
        "a name is on the disk when a save returns", "store/files.py",
        "        fsync_folder(final.parent)", "store/test_store_files.py::test_a_published_folder_is_on",
        "        pass",
    ),
    Mutation(
        "a file is replaced, not written over", "gpt2lab/store/files.py",
        (("temporary = temporary_beside(path)", "temporary = path"), ('temporary.open("xb")', 'temporary.open("wb")')),
        "tests/store/test_store_files.py::test_a_failed_write_keeps_the_old_file_and_removes_the_temporary",
    ),
    without(
        "sweeping spares what is being written", "store/files.py",
        "elif not _unlink_unlocked(entry):\n            continue", "store/test_store_files.py::test_sweeping_spares",
        "else:\n            entry.unlink(missing_ok=True)",
    ),
    without(
        "a run is locked", "store/locks.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "faults/test_broken_runs.py::test_sixteen_starters",
    ),
    without(
        "a lock on a file that was removed is not trusted", "store/locks.py",
        "if still_named(descriptor, path):", "store/test_store_runs.py::test_a_lock_file_removed", "if True:",
    ),
    without(
        "a forked child lets go of its parent's locks", "store/locks.py",
        "os.register_at_fork(after_in_child=_forget_inherited)", "store/test_store_runs.py::test_a_forked_child",
    ),
    without(
        "a lock is not written through a link", "store/locks.py",
        " | os.O_NOFOLLOW", "faults/test_security.py::test_files_that_are_written_in_place", "",
    ),
    without(
        "rows after the checkpoint are dropped", "runner/training.py",
        "journal.truncate_after(self.state.step if self.loaded else -1)",
        KILLS + "_changes_nothing[fp32-save.rename:3]",
    ),
    without(
        "rows are on the disk before the checkpoint is", "runner/training.py",
        "journal.sync()", "faults/test_order.py::test_rows_are_on_the_disk",
    ),
    without(
        "data that changed is refused", "runner/training.py",
        'if data.fingerprint != job.identity["data"]:', "faults/test_broken_runs.py::test_data_that", "if False:",
    ),
    without(
        "tokens are compared with their checksums", "data/prepared.py",
        "prepared.verify(progress if tokens >= SHOW_PROGRESS_FROM else quiet, remembered=True)",
        "data/test_prepared.py::test_content_is_verified_when_opened",
    ),
    without(
        "a torn last row does not swallow the next", "tracking/journal.py",
        "os.ftruncate(self._descriptor, end)", "tracking/test_journal.py::test_a_torn_last_line",
    ),
    without(
        "an evaluation leaves the mode of the model alone", "evaluation/windows.py",
        "module.training = mode", "evaluation/test_validation.py::test_the_model_and_random_numbers_are_left_alone",
    ),
]  # fmt: skip


def whole_name(test: str) -> str:
    """The test's full name, from how it begins."""
    file, _, name = test.partition("::")
    begin, bracket, parameters = name.partition("[")
    found = re.findall(rf"^def ({begin}\w*)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 1, f"{file} has {len(found)} tests that begin with {begin}"
    return f"{file}::{found[0]}{bracket}{parameters}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_list_has_not_rotted(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    for old, _ in mutation.edits:
        assert source.count(old) == 1, f"{mutation.file} has this {source.count(old)} times: {old}"
    assert whole_name(mutation.test)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests in another place."""
    place = tmp_path_factory.mktemp("copy")
    for folder in ("gpt2lab", "tests"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def run(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """These tests in the copy, in a process that finds the package there and nowhere else."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    code = f"import gpt2lab, pytest, sys; assert gpt2lab.__file__.startswith({str(copy)!r}); sys.exit(pytest.main())"
    return subprocess.run(
        [sys.executable, "-c", code, "-x", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", *tests],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_all_of_them_pass_in_an_unchanged_copy(copy: Path) -> None:
    done = run(copy, *dict.fromkeys(whole_name(mutation.test) for mutation in MUTATIONS))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_without_it_a_test_fails(copy: Path, mutation: Mutation) -> None:
    file = copy / mutation.file
    source = file.read_text(encoding="utf-8")
    changed = source
    for old, new in mutation.edits:
        changed = changed.replace(old, new)
    file.write_text(changed, encoding="utf-8")
    try:
        done = run(copy, whole_name(mutation.test))
    finally:
        file.write_text(source, encoding="utf-8")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr[-1000:]
