"""Speeds that are measured once and kept: which record serves whom, and that a plan from it does not move."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_plan import ABLATION, Planned

from gpt2lab.config import Config, load_config
from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.planning import probes as module
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.probes import measure, recorded, step_seconds
from gpt2lab.planning.runs import tokens_of

HERE = Machine("cpu", "a processor", 1, 1, 1e9, "a test")
CLOCK = ABLATION.replace("rotary: {", "again: {control: true}\n  rotary: {") + "equalise: wall_clock\n"
SMALL = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16", "training.batch_tokens=64"]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A probe that finds 1000 tokens per second for the first config ever, 900 for the next, ...; -> what it probed."""
    probed: list[str] = []

    def probe(configs: Mapping[str, Config], machine: Machine) -> dict[str, float]:
        found = {}
        for name in configs:
            found[name] = 1000.0 - 100 * len(probed)
            probed.append(name)
        return found

    monkeypatch.setattr(module, "measure", probe)
    return probed


def test_a_speed_is_measured_once(tmp_path: Path, probes: list[str]) -> None:
    configs = {"a": load_config("nano"), "b": load_config("nano", ["model.norm=rmsnorm"])}
    assert recorded(tmp_path, configs, HERE) == {"a": 1000.0, "b": 900.0}
    assert recorded(tmp_path, dict(reversed(configs.items())), HERE) == {"a": 1000.0, "b": 900.0}
    more = {**configs, "c": load_config("nano", ["model.mlp=relu2"])}
    assert recorded(tmp_path, more, HERE) == {"a": 1000.0, "b": 900.0, "c": 800.0}
    assert probes == ["a", "b", "c"]
    records = [json.loads(file.read_text()) for file in (tmp_path / "throughput").glob("*.json")]
    assert sorted(record["tokens_per_second"] for record in records) == [800.0, 900.0, 1000.0]
    assert all(record["device"] == "a processor" and record["torch"] == torch.__version__ for record in records)


@pytest.mark.parametrize(
    "change",
    ["training.steps=880", "optim.lr=1e-3", "optim.warmup_steps=7", "optim.schedule=linear", "seed=3",
     "evaluation.tokens=1280", "scale.smallest_effect=1"],
)  # fmt: skip
def test_arms_that_train_alike_share_a_record(tmp_path: Path, probes: list[str], change: str) -> None:
    """So a control arm, or the same arm over more tokens, is never told from its twin by the noise of a probe."""
    found = recorded(tmp_path, {"a": load_config("nano"), "b": load_config("nano", [change])}, HERE)
    assert found["a"] == found["b"] and len(probes) == 1


@pytest.mark.parametrize(
    "change",
    ["model.position=rotary", "model.n_layer=2", "training.batch_tokens=2048", "training.micro_batch_sequences=4",
     "training.precision=bf16", "optim.grad_clip=null"],
)  # fmt: skip
def test_what_may_change_speed_has_a_record_of_its_own(tmp_path: Path, probes: list[str], change: str) -> None:
    recorded(tmp_path, {"a": load_config("nano"), "b": load_config("nano", [change])}, HERE)
    assert probes == ["a", "b"]


@pytest.mark.parametrize(
    "there",
    [dataclasses.replace(HERE, threads=2), dataclasses.replace(HERE, device_name="another")],
    ids=["threads", "device"],
)
def test_another_machine_measures_anew(tmp_path: Path, probes: list[str], there: Machine) -> None:
    configs = {"a": load_config("nano")}
    assert recorded(tmp_path, configs, HERE) == {"a": 1000.0}
    assert recorded(tmp_path, configs, there) == {"a": 900.0}
    assert recorded(tmp_path, configs, HERE) == {"a": 1000.0}
    jobs = dataclasses.replace(HERE, jobs=4, speed=1.0, speed_from="elsewhere")
    assert recorded(tmp_path, configs, jobs) == {"a": 1000.0}


@pytest.mark.parametrize("what", ["torch", "core_code"])
def test_another_stack_or_code_measures_anew(
    tmp_path: Path, probes: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    configs = {"a": load_config("nano")}
    recorded(tmp_path, configs, HERE)
    here = dataclasses.replace(HERE, torch="9.9.9") if what == "torch" else HERE
    if what == "core_code":
        monkeypatch.setattr("gpt2lab.planning.probes.core_code", lambda: "edited")
    assert recorded(tmp_path, configs, here) == {"a": 900.0} and len(probes) == 2


def test_another_machine_is_not_measured_here(tmp_path: Path, probes: list[str]) -> None:
    configs, there = {"a": load_config("nano")}, dataclasses.replace(HERE, local=False)
    with pytest.raises(ConfigError, match="not measured yet"):
        recorded(tmp_path, configs, there)
    recorded(tmp_path, configs, HERE)
    assert recorded(tmp_path, configs, there) == {"a": 1000.0} and len(probes) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tokens_per_second": 0}', '{"tokens_per_second": NaN}'])
def test_a_damaged_record_is_told_and_not_replaced_in_silence(tmp_path: Path, probes: list[str], text: str) -> None:
    configs = {"a": load_config("nano")}
    recorded(tmp_path, configs, HERE)
    [file] = (tmp_path / "throughput").glob("*.json")
    file.write_text(text)
    with pytest.raises(DataFault) as caught:
        recorded(tmp_path, configs, HERE)
    assert str(file) in str(caught.value) and len(probes) == 1


# Plans.


def test_wall_clock_becomes_a_fixed_number_of_whole_steps(planned: Planned, probes: list[str]) -> None:
    """The arm is a tenth slower than the baseline, and gets nine tenths of its steps."""
    long = {"overrides": ["training.steps=240"]}
    plan = planned(CLOCK, **long)
    steps = {name: arm.arm.config.training.steps for name, arm in plan.arms.items()}
    assert steps == {"learned": 240, "again": 240, "rotary": 216}
    assert plan.arms["rotary"].arm.config.optim.warmup_steps == 4  # of 240 steps 4, of 216 3.6
    learned, rotary = plan.arms["learned"], plan.arms["rotary"]
    assert abs((rotary.tokens / 900) / (learned.tokens / 1000) - 1) <= 0.01
    assert str(rotary.adjustment) == "steps 240 -> 216: 17.07 -> 15.36 s, the baseline has 15.36 (+0.00 %)"
    assert learned.adjustment is None and plan.arms["again"].adjustment is None
    again = planned(CLOCK, **long)
    assert [run.id for run in again.runs()] == [run.id for run in plan.runs()] and len(probes) == 2


def test_few_steps_cannot_share_out_wall_clock(planned: Planned, probes: list[str]) -> None:
    """24 steps x 0.9 are 21.6: 22 are 1.9 % too many."""
    with pytest.raises(ConfigError, match=r"arm rotary: tokens cannot make wall_clock equal .* at steps 22") as caught:
        planned(CLOCK)
    assert caught.value.hint == "--arms learned,again"


def test_other_budgets_and_tokens_per_parameter_follow_the_equalised_steps(planned: Planned, probes: list[str]) -> None:
    text = CLOCK + "tokens_per_parameter: 2\nbudget_curve: {budgets: [0.5, 1], arms: [rotary]}\n"
    plan = planned(text)
    learned, rotary = plan.arms["learned"], plan.arms["rotary"]
    steps = round(2 * learned.costs.parameters / 64)
    assert learned.arm.config.training.steps == steps
    assert rotary.arm.config.training.steps == round(0.9 * steps)
    [half, _] = rotary.curve[0.5]
    assert half.config.training.steps == round(round(0.9 * steps) / 2)


# The probe itself.


def test_the_probe_measures_and_leaves_threads_and_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    configs = {"a": load_config("nano", SMALL), "b": load_config("nano", [*SMALL, "optim.grad_clip=null"])}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = measure(configs, dataclasses.replace(HERE, threads=threads + 1))
    assert found.keys() == {"a", "b"} and all(math.isfinite(v) and v > 0 for v in found.values())
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_a_deeper_model_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.1)
    configs = {str(n): load_config("nano", [*SMALL, f"model.n_layer={n}"]) for n in (1, 6)}
    found = measure(configs, HERE)
    assert found["1"] > 2 * found["6"]


def test_a_step_is_its_micro_batches_and_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def one_pass(state: Any, tokens: torch.Tensor, config: Config, device: torch.device) -> float:
        rows.append(len(tokens))
        return 3.0 if len(rows) < 3 else 2.0

    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "_timed_pass", one_pass)
    monkeypatch.setattr(module, "_timed_update", lambda *_: 0.5)
    config = load_config("nano", [*SMALL, "training.batch_tokens=256", "training.micro_batch_sequences=4"])
    assert step_seconds(config, torch.device("cpu")) == 4 * 2.0 + 0.5  # 16 sequences in fours
    assert rows == [4, 4, 4]
    whole = load_config("nano", [*SMALL, "training.batch_tokens=256"])
    assert step_seconds(whole, torch.device("cpu")) == 2.0 + 0.5 and rows[-1] == 16
    assert tokens_of(whole) == 256 * whole.training.steps


def test_a_long_pass_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def one_pass(*_: Any) -> float:
        seen.append(1)
        return 1.0

    monkeypatch.setattr(module, "LONG_SECONDS", -1.0)
    monkeypatch.setattr(module, "_timed_pass", one_pass)
    assert step_seconds(load_config("nano", SMALL), torch.device("cpu")) > 1.0
    assert len(seen) == 1
