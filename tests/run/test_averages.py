"""The loss in a report is that of the weights that every later command reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab.config import config_from_text
from gpt2lab.reuse.load import open_trained
from gpt2lab.reuse.measure import data_of
from gpt2lab.runner import measured
from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
SCHEDULE_FREE = ("--set", "optim.optimizer=schedule_free", "--set", "optim.schedule=constant")


LAWA = ("--set", "optim.averaging={name: lawa, interval: 0.2}")


@pytest.mark.parametrize("choice", [SCHEDULE_FREE, LAWA], ids=["schedule_free", "lawa"])
def test_a_run_its_evaluation_and_its_export_have_one_loss(
    tiny: Path, gpt2lab: Call, inline: list[str], choice: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    diagnosed: dict[str, torch.Tensor] = {}

    def health(model: torch.nn.Module, config: Any, data: Any) -> dict[str, float]:
        diagnosed.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return measured.health(model, config, data)

    monkeypatch.setattr("gpt2lab.runner.training.health", health)
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", *choice)[0] == 0
    (run,) = (Store("runs").run(id) for id in inline)
    curve = {row["step"]: row["metrics"] for row in run.rows() if "val/loss" in row["metrics"]}
    last = curve[24]
    assert last["val/loss"] != last["val/raw_loss"]
    (recorded,) = (json.loads(file.read_text()) for file in (run.path / "evaluations").glob("*.json"))
    assert recorded["metrics"]["val/loss"] == last["val/loss"]
    code, printed = gpt2lab("eval", run.id, "--metric", "loss", "--json")
    assert code == 0
    answer, _ = json.JSONDecoder().raw_decode(printed)
    assert answer["values"]["loss"] == last["val/loss"]
    assert gpt2lab("export", run.id, "out")[0] == 0
    taken, kept = (
        open_trained(name, Store("runs"), device=torch.device("cpu")).model.state_dict() for name in ("out", run.id)
    )
    assert all(torch.equal(taken[name], kept[name]) for name in kept)
    assert all(torch.equal(diagnosed[name], kept[name]) for name in kept)
    sampled = [
        gpt2lab("sample", name, "--prompt", "The", "--max-new-tokens", "8", "--json") for name in (run.id, "out")
    ]
    texts = [json.JSONDecoder().raw_decode(text)[0] for _, text in sampled]
    assert texts[0]["samples"] == texts[1]["samples"]


def test_another_evaluation_measures_the_average_and_trains_nothing(
    tiny: Path, gpt2lab: Call, inline: list[str]
) -> None:
    ema = ("--set", "optim.averaging=ema")
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", *ema)[0] == 0
    run = Store("runs").run(inline[0])
    journal = run.metrics.read_bytes()
    tokens = json.loads(next((run.path / "evaluations").glob("*.json")).read_text())["spec"]["tokens"]
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", *ema, "--set", f"evaluation.tokens={tokens // 2}")[0] == 0
    assert (set(inline), run.metrics.read_bytes()) == ({run.id}, journal)
    records = [json.loads(file.read_text()) for file in (run.path / "evaluations").glob("*.json")]
    (half,) = (record for record in records if record["spec"]["tokens"] == tokens // 2)
    trained = open_trained(run.id, Store("runs"), device=torch.device("cpu"))
    config = config_from_text(run.config() or "")
    small = config.evaluation.model_copy(update={"tokens": tokens // 2})
    again, _ = measured.evaluated(trained.model, config, data_of(run, config), "cpu", small)
    assert half["metrics"]["val/loss"] == again["metrics"]["val/loss"]


def test_an_average_does_not_change_the_training(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    assert gpt2lab("train", "tiny.yaml", "--no-tracking")[0] == 0
    assert gpt2lab("train", "tiny.yaml", "--no-tracking", "--set", "optim.averaging=polyak")[0] == 0
    plain, averaged = (Store("runs").run(run).rows() for run in inline)
    losses = [row["metrics"]["val/loss"] for row in plain if "val/loss" in row["metrics"]]
    assert losses == [row["metrics"]["val/raw_loss"] for row in averaged if "val/loss" in row["metrics"]]


def test_fewer_tokens_before_the_end_leave_the_final_losses_as_they_are(
    tiny: Path, gpt2lab: Call, inline: list[str]
) -> None:
    few = ("--set", "evaluation.curve_tokens=64", "--runs", "few")
    for options in ((), few):
        assert gpt2lab("train", "tiny.yaml", "--no-tracking", "--set", "optim.averaging=polyak", *options)[0] == 0
    kept, fewer = (Store(root).run(inline[0]) for root in ("runs", "few"))
    assert len(set(inline)) == 1  # no run trains again because of it
    curves = [
        [tuple(row["metrics"][f"val/{name}"] for name in ("loss", "raw_loss")) for row in run.rows()
         if "val/loss" in row["metrics"]] for run in (kept, fewer)
    ]  # fmt: skip
    assert curves[0][-1] == curves[1][-1] and all(a != b for a, b in zip(curves[0][:-1], curves[1][:-1], strict=True))
    trained = open_trained(fewer.id, Store("few"), device=torch.device("cpu"))
    config = config_from_text(fewer.config() or "")
    small = config.evaluation.model_copy(update={"tokens": 64, "contexts": ()})
    again, _ = measured.evaluated(trained.model, config, data_of(fewer, config), "cpu", small)
    assert again["metrics"]["val/loss"] == measured.validation_loss(
        trained.model, config, data_of(fewer, config), "cpu"
    ) != curves[1][-1][0]  # fmt: skip
