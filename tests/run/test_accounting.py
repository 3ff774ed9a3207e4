"""What a result says of cost: time by phase, utilisation, peak memory, notes; and how a divergence came about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2lab import costs
from gpt2lab.faults import arm
from gpt2lab.store import RunFolder, Store
from gpt2lab.training.precision import shortcomings

Call = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


def trained(gpt2lab: Call, inline: list[str], *words: str, code: int = 0) -> RunFolder:
    ended, out = gpt2lab("train", "tiny.yaml", "--no-tracking", *words)
    assert ended == code, out
    return Store("runs").run(inline[-1]) if inline else next(iter(Store("runs").runs()))


def test_a_result_accounts_for_its_time_and_speed(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    run = trained(gpt2lab, inline)
    result = run.result()
    assert result is not None
    time = result["time"]
    assert time.keys() == {"data", "forward", "backward", "optimizer", "evaluation", "saving", "other"}
    assert all(seconds >= 0 for seconds in time.values())
    assert time["forward"] > 0 and time["backward"] > 0 and time["evaluation"] > 0 and time["saving"] > 0
    of_steps = sum(time[phase] for phase in ("data", "forward", "backward", "optimizer"))
    assert 0.4 * result["seconds"] < of_steps < result["seconds"] + 0.01  # the rest is the program's own
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"], rel=0.02)  # rounded
    reached = result["tokens_per_second"] * result["flops_per_token"]
    assert result["mfu"] == pytest.approx(reached / result["peak_flops"], abs=6e-5)
    assert "measured here on 1 thread" in result["peak_from"]
    assert 2**26 < result["peak_memory_bytes"] < 2**34
    assert (result["skipped_steps"], result["spikes"], result["notes"]) == (0, [], [])
    assert (result["stack"]["ranks"], result["stack"]["compiled"]) == (1, False)


def test_time_goes_on_where_a_resumed_run_stopped(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    arm("raise@step:20")
    code, said = gpt2lab("train", "tiny.yaml", "--no-tracking")
    assert code == 7 and "InjectedFault" in said
    arm("")
    (run,) = Store("runs").runs()
    saved = json.loads((run.checkpoints / "step_000018" / "state.json").read_text())["extra"]
    assert saved["run"] == run.id and saved["ranks"] == 1 and saved["identity"]["device"] == "cpu"
    trained(gpt2lab, inline)
    result = run.result()
    assert result is not None
    assert result["time"]["backward"] > saved["time"]["backward"] > 0


def test_a_divergence_is_told_with_its_circumstances(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    arm("nan@loss:10")
    code, out = gpt2lab("train", "tiny.yaml", "--no-tracking")
    arm("")
    assert code == 5 and "Traceback" not in out, out
    (run,) = Store("runs").runs()
    result = run.result()
    assert result is not None and result["status"] == "diverged" and result["steps"] == 9
    found = result["divergence"]
    assert found["step"] == 10
    assert found["lr"] == pytest.approx(run.rows()[-1]["metrics"]["train/lr"], rel=0.1)
    assert not math.isfinite(found["grad_norm"])
    starts = found["batch"]["first_tokens"]
    assert len(starts) == 4 and found["batch"]["seed"] == 0 and len(set(starts)) == 4


def test_a_skipped_step_is_counted_in_journal_and_result(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    arm("nan@loss:10")
    run = trained(gpt2lab, inline, "--set", "training.nonfinite=skip")
    arm("")
    result = run.result()
    assert result is not None and (result["status"], result["skipped_steps"]) == ("finished", 1)
    skipped = [row["step"] for row in run.rows() if row["metrics"].get("train/skipped")]
    assert skipped == [10]
    assert all(math.isfinite(row["metrics"]["val/loss"]) for row in run.rows() if "val/loss" in row["metrics"])


def test_a_trace_is_written_where_it_is_asked_for(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    run = trained(gpt2lab, inline, "--profile")
    trace = json.loads((run.path / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"ProfilerStep#{step}" for step in (7, 8, 9)} <= names
    assert any("scaled_dot_product" in str(name) for name in names)


def test_a_slow_first_product_is_not_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a process may last longer than the whole measurement; a peak from it made MFU 2,300 %."""
    clock = iter([0.0, 1.0, 10.0, 10.5, 20.0, 20.25])  # three products, each beyond SECONDS by itself
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    assert costs.matmul_flops(CPU, "fp32", 1, size=8) == 2 * 8**3 / 0.25


def test_the_peak_is_the_best_that_was_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path))
    speeds = iter([1e10, 3e10, 2e10])
    monkeypatch.setattr(costs, "matmul_flops", lambda *_: next(speeds))
    found = [costs.peak_flops(CPU, "fp32", 1)[0] for _ in range(3)]
    assert found == [1e10, 3e10, 3e10]
    assert costs.peak_flops(CPU, "fp16", 1) == (None, "fp16 on CPU is emulated")


def test_one_large_product_reaches_what_its_size_over_its_time_says() -> None:
    assert 1e9 < costs.matmul_flops(CPU, "fp32", 1, size=256) < 1e13


def test_a_known_gpu_is_held_against_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    assert costs.peak_flops(cuda, "bf16", 1) == (989.4e12, "H100 80GB HBM3's data sheet")
    assert costs.peak_flops(cuda, "tf32", 1)[0] == 494.7e12


def test_a_device_that_lacks_a_precision_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortcomings("fp32", CPU) == []
    assert "on this cpu matrix products were fp32" in shortcomings("tf32", CPU)[0]
    assert "a hundred times slower" in shortcomings("fp16", CPU)[0]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "no bfloat16 instructions" in shortcomings("bf16", CPU)[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Ampere" in shortcomings("tf32", torch.device("cuda"))[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert shortcomings("tf32", torch.device("cuda")) == []
