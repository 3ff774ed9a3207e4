"""The loss in a report is that of the weights that every later command reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2lab.pretrained.load import open_trained
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
SCHEDULE_FREE = ("--set", "optim.optimizer=schedule_free", "--set", "optim.schedule=constant")


@pytest.mark.parametrize("choice", [SCHEDULE_FREE, ("--set", "optim.averaging=ema")], ids=["schedule_free", "ema"])
def test_a_run_its_evaluation_and_its_export_have_one_loss(
    tiny: Path, gpt2lab: Call, inline: list[str], choice: tuple[str, ...]
) -> None:
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", *choice)[0] == 0
    (run,) = (Store("runs").run(id) for id in inline)
    curve = {row["step"]: row["metrics"] for row in run.rows() if "val/loss" in row["metrics"]}
    last = curve[24]
    assert last["val/loss"] != last["val/raw_loss"]
    (recorded,) = (json.loads(file.read_text()) for file in (run.path / "evaluations").glob("*.json"))
    assert recorded["metrics"]["val/loss"] == last["val/loss"]
    code, printed = gpt2lab("eval", run.id, "--metric", "loss", "--json", "--no-tracking")
    assert code == 0
    answer, _ = json.JSONDecoder().raw_decode(printed)
    assert answer["values"]["loss"] == last["val/loss"]
    assert gpt2lab("export", run.id, "out")[0] == 0
    taken, kept = (
        open_trained(name, Store("runs"), device=torch.device("cpu")).model.state_dict() for name in ("out", run.id)
    )
    assert all(torch.equal(taken[name], kept[name]) for name in kept)
