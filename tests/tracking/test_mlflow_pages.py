"""What Chromium shows of a study at the address that `gpt2lab ui` prints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from servers import Server
from small_study import Lab, row

from gpt2lab.tracking.addresses import runs_link
from gpt2lab.tracking.follower import links, sync
from gpt2lab.tracking.mlflow import MlflowTracker

pytestmark = [pytest.mark.service, pytest.mark.slow]


def shown(url: str, profile: Path) -> str:
    """The text of a page after its scripts."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("Chromium is not installed")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", "--dump-dom"]
    command = [browser, *options, f"--user-data-dir={profile}", "--window-size=1500,2400", url]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", dom, flags=re.DOTALL).split())


def test_the_link_of_a_study_shows_arms_with_validation_first(lab: Lab, template: Path, tmp_path: Path) -> None:
    for arm in lab.record["arms"]:
        for seed in (0, 1):
            run = lab.begin(lab.run(arm, seed))
            lab.write(run, [row(s, **{"diag/rms": 1.0, "train/loss": 5.0 - s, "val/loss": 5.0 - s}) for s in range(4)])
            lab.finish(run)
    shutil.copy(template, tmp_path / "mlflow.db")
    server = Server(tmp_path / "artifacts")
    client = server.start(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        sink = MlflowTracker(server.uri, "posenc", tmp_path / "artifacts")
        sync(lab.store, lab.record, lambda: sink)
        (tmp_path / "page").mkdir()
        contrast = {"arm": "rotary", "against": "learned", "word": "better by far", "difference": -1.0, "low": -2.0,
                    "high": -0.5, "p_holm": 0.01, "n_arm": 2, "n_against": 2}  # fmt: skip
        (tmp_path / "page" / "verdicts.json").write_text(json.dumps({"contrasts": [contrast], "arms": []}))
        sink.log_report(lab.record, tmp_path / "page")
        found = links(lab.store, "posenc@nano")
        assert found
        curves = shown(runs_link(server.uri, found["experiment_id"], found["parent_run_id"]), tmp_path / "profile")
        assert "Group: rotary 2" in curves and "Group: learned 2" in curves
        assert 0 < curves.index("val (1)") < curves.index("train (1)") < curves.index("diag (1)")
        page = f"{server.uri}/#/experiments/{found['experiment_id']}/runs/{found['parent_run_id']}"
        about = shown(f"{page}?workflowType=machine_learning", tmp_path / "profile")
        assert "better by far" in about and "Model training" in about
        assert client.get_experiment(found["experiment_id"]).tags["mlflow.experimentKind"] == "custom_model_development"
    finally:
        server.stop()
