"""Old runs and new code: what differs is told, and runs are kept only if the new code trains the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2lab.store import Store

PART = """
from torch import nn
from gpt2lab.components import mlp


@mlp.register("mine", source="a test")
class Mine(nn.Module):
    \"\"\"One hidden layer.\"\"\"

    def __init__(self, site):
        super().__init__()
        width = site.dims.n_embd
        self.c_fc = site.linear(width, 2 * width)
        self.c_proj = site.linear(2 * width, width, "residual_out")

    def forward(self, x, step):
        return ACTIVATE
"""
RELU = "self.c_proj(self.c_fc(x).relu())"
SAME = "self.c_proj(nn.functional.relu(self.c_fc(x)))"
OTHER = "self.c_proj(nn.functional.gelu(self.c_fc(x)))"


@pytest.fixture
def mine(tiny: Path) -> Path:
    """The tiny ablation with an arm of a plug-in's; -> the plug-in."""
    plugin = tiny.parent / "mine.py"
    plugin.write_text(PART.replace("ACTIVATE", RELU))
    tiny.write_text(tiny.read_text().replace("rotary: {model.position: rotary}", "mine: {model.mlp: mine}"))
    (tiny.parent / "tiny.yaml").write_text((tiny.parent / "tiny.yaml").read_text().replace("steps: 24", "steps: 40"))
    return plugin


def call(tiny: Path, *words: str, code: int = 0) -> str:
    """The command line in a process of its own, since code that was imported stays as it was."""
    command = [sys.executable, "-c", "from gpt2lab.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.parent, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return " ".join(said.split())


def test_runs_are_kept_if_and_only_if_the_new_code_trains_the_same_bits(tiny: Path, mine: Path) -> None:
    study = (str(tiny), "--plugin", str(mine))
    call(tiny, "run", *study, "--no-tracking", "--jobs", "2")
    store = Store(tiny.parent / "runs")
    old = store.study("tiny")["arms"]["mine"]["runs"]
    assert (store.run(old["0"]).replay / "step_000020").is_dir() and not store.run(old["1"]).replay.exists()
    assert "nothing to keep" in call(tiny, "adopt", *study)

    # written otherwise, the same in every bit
    mine.write_text(PART.replace("ACTIVATE", SAME))
    assert "mine seed 1: " + old["1"] in call(tiny, "adopt", *study, "--dry-run")
    assert len(store.runs()) == 4
    said = call(tiny, "adopt", *study)
    assert "mine: 2 runs kept" in said
    assert len(store.runs()) == 6
    said = call(tiny, "run", *study, "--no-tracking")
    assert "4 runs found finished, 0 trained now" in said
    new = store.study("tiny")["arms"]["mine"]["runs"]
    assert set(new.values()).isdisjoint(old.values())
    record = store.run(new["1"]).identity()
    assert record is not None and record["adopted_from"] == old["1"] and record["id"] == new["1"]
    assert f"taken over from {old['1']}" in (tiny.parent / "reports/tiny@tiny/report.md").read_text()
    assert store.run(new["1"]).rows() == store.run(old["1"]).rows()

    # in effect another activation: refused, at the first step that shows it
    mine.write_text(PART.replace("ACTIVATE", OTHER))
    said = call(tiny, "adopt", *study, code=1)
    assert "mine: refused: step 1: train/loss is" in said
    assert len(store.runs()) == 6

    # and why the first and the kept ones are different runs
    said = call(tiny, "why", old["0"], new["0"])
    assert "code of mlp=mine: plugin.Mine changed" in said
    assert "- return self.c_proj(self.c_fc(x).relu())" in said
    assert "+ return self.c_proj(nn.functional.relu(self.c_fc(x)))" in said


@pytest.mark.slow
def test_final_bits_are_compared_too(tiny: Path, mine: Path) -> None:
    """Weights of the old run that its own last steps do not lead to: whatever made them, they are not kept."""
    study = (str(tiny), "--plugin", str(mine), "--seeds", "1")
    call(tiny, "run", *study, "--no-tracking", "--jobs", "2")
    store = Store(tiny.parent / "runs")
    old = store.run(store.study("tiny")["arms"]["mine"]["runs"]["0"])
    rows = [json.loads(line) for line in old.metrics.read_text().splitlines()]
    rows[-1]["metrics"]["train/grad_norm"] *= 1 + 1e-12
    old.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine.write_text(PART.replace("ACTIVATE", SAME))
    assert "refused: step 40: train/grad_norm is" in call(tiny, "adopt", *study, code=1)
