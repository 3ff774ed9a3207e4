"""What a project begins with, and one change tried with one seed beside the stored baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Call = Callable[..., Any]


def losses(run: Path) -> dict[int, float]:
    """Step -> validation loss, as the run's file has it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["metrics"]["val/loss"] for row in rows if "val/loss" in row["metrics"]}


def test_a_change_is_tried_beside_the_baseline_that_another_study_trained(
    gpt2lab: Call, trained: Callable[..., Any], tmp_path: Path
) -> None:
    known = trained()["learned"]["0"]
    before = (tmp_path / "runs" / known / "metrics.jsonl").stat().st_mtime_ns
    words = ("norm=rmsnorm,eps=1e-4", "optim.lr=0.02", "--scale", "preset.yaml", "--no-tracking")
    answer = gpt2lab("try", *words, "--json", "--promote", "mine")
    assert answer.code == 0 and "1 run found finished, 1 trained now" in answer.err, answer.err
    found = json.loads(answer.out)
    assert found["changes"] == {"model.norm": {"name": "rmsnorm", "eps": 0.0001}, "optim.lr": "0.02"}
    assert found["baseline"] == known and (tmp_path / "runs" / known / "metrics.jsonl").stat().st_mtime_ns == before
    ours, theirs = losses(tmp_path / "runs" / found["arm"]), losses(tmp_path / "runs" / known)
    assert {row["step"]: (row["arm"], row["baseline"]) for row in found["curve"]} == {
        step: (ours[step], theirs[step]) for step in theirs
    }
    assert (
        found["word"] == "unstable (1 of 1 failed)" and found["word"] in found["verdict"]
    )  # 30 steps teach it nothing
    for step in theirs:
        assert f"step {step:>5}: {ours[step]:.4f}, baseline {theirs[step]:.4f}" in answer.err
    plan = json.loads(gpt2lab("run", "mine.yaml", "--scale", "preset.yaml", "--dry-run", "--json").out)
    assert [(arm["finished"], arm["runs"]["0"]) for arm in plan["arms"]] == [(["0"], known), (["0"], found["arm"])]
    assert len(plan["arms"][0]["runs"]) == 3
    record = json.loads((tmp_path / "runs" / "studies" / f"{found['study']}.json").read_text())
    assert record["reproduce"] == "gpt2lab try --scale preset.yaml norm=rmsnorm,eps=1e-4 optim.lr=0.02"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("norm=rmsnorn",), "did you mean 'rmsnorm'?"),
        (("norm=rmsnorm", "norm=derf"), "model.norm: is changed twice"),
        (("metric=loss",), "unknown slot of a config 'metric'"),
        (("model.n_layers=2",), "did you mean 'n_layer'?"),
        (("norm=layernorm",), "is the same training as arm 'baseline'"),
        (("norm=rmsnorm", "--promote", "ablation"), "ablation.yaml: is there already"),
        (("norm=rmsnorm", "--promote", "a/b"), "--promote: a name of letters"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_trains(
    gpt2lab: Call, ablation: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    written = ablation.read_text()
    answer = gpt2lab("try", *words, "--scale", "preset.yaml", "--no-tracking")
    assert answer.code == 2 and said in answer.err and "try: " in answer.err
    assert ablation.read_text() == written and not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_an_empty_folder_becomes_a_project_and_a_project_stays_as_it_is(gpt2lab: Call, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.tmp\n")
    answer = gpt2lab("init")
    assert answer.code == 0 and answer.out == "gpt2lab.toml, norms.yaml: next, gpt2lab run norms.yaml --dry-run\n"
    assert (tmp_path / ".gitignore").read_text() == "*.tmp\n"
    checked = gpt2lab("check", "norms.yaml")
    assert checked.code == 0 and "3 seeds at nano" in checked.out  # the scale is the project's
    before = {path: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    again = gpt2lab("init")
    assert again.code == 2 and "gpt2lab.toml: is there already" in again.err
    assert {path: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before
    assert yaml.safe_load((tmp_path / "norms.yaml").read_text())["seeds"] == 3
