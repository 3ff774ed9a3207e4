"""What other programs log, read from files that they made: samples/README.md says how."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from gpt2lab.analysis import compare
from gpt2lab.analysis.table import read
from gpt2lab.errors import ConfigError

SAMPLES = Path(__file__).parent / "samples"
LOSSES: dict[str, dict[str, float]] = {"base": {}, "new": {}}
for row in csv.DictReader((SAMPLES / "mlflow.csv").read_text().splitlines()):
    LOSSES[row["params.arm"]][row["params.seed"]] = float(row["metrics.val_loss"])


@pytest.mark.parametrize("source", ["wandb", "trackio", "trackio/demo.db", "tensorboard", "mlflow.csv"])
def test_every_program_says_the_same(source: str) -> None:
    table = read(SAMPLES / source, "val_loss" if source == "mlflow.csv" else "val/loss")
    found = {
        arm: {seed: value for seed, value in runs.items() if value is not None} for arm, runs in table.runs.items()
    }
    assert {arm: sorted(runs) for arm, runs in found.items()} == {arm: ["0", "1", "2"] for arm in LOSSES}
    for arm, runs in LOSSES.items():
        assert found[arm] == pytest.approx(runs, rel=1e-7)  # event files hold single precision
    assert source == "mlflow.csv" or table.ends == {"base": 300.0, "new": 300.0}
    verdicts = compare(SAMPLES / source, baseline="base", smallest_effect=0.05, metric=table.metric)
    assert verdicts.contrasts[0].word == "better"


def test_results_of_lm_eval_are_of_the_model_that_their_folder_names() -> None:
    table = read(SAMPLES / "lm_eval", "toy/acc")
    assert sorted(table.runs) == ["base", "new"]
    for file in (SAMPLES / "lm_eval").rglob("*.json"):
        arm, _, seed = file.parent.name.partition("-seed")
        assert table.runs[arm][seed] == json.loads(file.read_text())["results"]["toy"]["acc,none"]
    verdicts = compare(SAMPLES / "lm_eval", baseline="base", smallest_effect=0.05, metric="toy/acc")
    assert verdicts.higher_is_better and verdicts.contrasts[0].word == "better"
    with pytest.raises(ConfigError, match=r"which metric\? The table holds toy/acc, toy/acc_norm"):
        read(SAMPLES / "lm_eval")


def test_runs_that_failed_or_never_ended_are_no_results(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "wandb", tmp_path / "runs")
    shutil.copytree(SAMPLES / "wandb_failed", tmp_path / "runs/failed")
    assert math.isnan(read(tmp_path / "runs", "val/loss").runs["base"]["3"] or 0)
    for file in (tmp_path / "runs").glob("*.wandb"):
        whole = file.read_bytes()
        if b"new-seed0" in whole:
            last = whole.rindex(b"val/loss", 0, whole.rindex(b"_step"))
            file.write_bytes(whole[: last - 200])  # killed before its last step was written
    assert read(tmp_path / "runs", "val/loss").runs["new"]["0"] is None


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: nothing that TensorBoard"):
        read(tmp_path / "empty")
    for name, content in (("a.db", b"SQLite format 3"), ("results_1.json", b"{"), ("b.wandb", b"nothing")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            read(tmp_path / name)
    shutil.copytree(SAMPLES / "tensorboard/base-seed0", tmp_path / "logs/first")
    with pytest.raises(ConfigError, match="unknown column 'arm' "):
        read(tmp_path / "logs", "val/loss")


def test_settings_of_a_run_may_tell_its_arm(tmp_path: Path) -> None:
    for file in (SAMPLES / "wandb").glob("*.wandb"):
        if b"base-seed" in file.read_bytes():
            shutil.copy(file, tmp_path)
    assert sorted(read(tmp_path, "val/loss", arm="lr").runs["0.001"]) == ["0", "1", "2"]
