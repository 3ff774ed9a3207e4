"""Single runs: what a result records of cost and divergence, and trainings that start from a checkpoint of another."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt2lab.basics.faults import arm
from gpt2lab.config import load_config
from gpt2lab.data.shards import prepare
from gpt2lab.data.tokenizers import tokenizer
from gpt2lab.errors import ConfigError
from gpt2lab.inspection import costs
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.planning import machine
from gpt2lab.pretrained.huggingface import save_gpt2
from gpt2lab.pretrained.native import KeptTokenizer, save_model
from gpt2lab.runner.measured import validation_loss
from gpt2lab.store import RunFolder, Store
from gpt2lab.training import TrainingConfig
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


def test_the_second_pass_of_a_step_is_time_of_the_optimizer(tiny: Path, gpt2lab: Call, inline: list[str]) -> None:
    result = trained(gpt2lab, inline, "--set", "optim.optimizer=sam").result()
    assert result is not None
    time = result["time"]
    assert sum(time[phase] for phase in ("data", "forward", "backward", "optimizer")) < result["seconds"] + 0.01
    assert time["optimizer"] > time["backward"]


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


def test_a_seed_that_a_run_could_not_read_back_is_refused_before_it(tiny: Path, gpt2lab: Call) -> None:
    code, out = gpt2lab("train", "tiny.yaml", "--seed", str(10**18), "--dry-run")
    assert code == 2 and f"seed: {10**18} does not fit: it has too many digits" in out
    assert gpt2lab("train", "tiny.yaml", "--seed", str(10**18 - 1), "--dry-run")[0] == 0


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


def test_a_cpu_that_multiplies_bfloat16_more_slowly_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As some with instructions for them do: then a run in bf16 takes longer, and would without a word."""
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path))
    speeds = {"fp32": 151e9, "bf16": 80e9}
    monkeypatch.setattr(costs, "matmul_flops", lambda device, precision, *_: speeds[precision])
    (note,) = costs.slower_precision(CPU, "bf16", 1)
    assert note == "bf16 is slower than fp32 on this CPU: 80 against 151 GFLOP/s in matrix products"
    assert costs.slower_precision(CPU, "fp32", 1) == costs.slower_precision(torch.device("cuda"), "bf16", 1) == []
    monkeypatch.setattr(machine, "shortcomings", lambda *_: [])
    planned = machine.probe(Store(tmp_path), TrainingConfig(precision="bf16"), 1e6, jobs=1)
    assert planned.speed_from.endswith(f"; {note}")
    speeds["bf16"] = 300e9
    assert costs.slower_precision(CPU, "bf16", 1) == []


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


@pytest.fixture
def trunk(tiny: Path, gpt2lab: Call, inline: list[str], once: Any) -> RunFolder:
    """A finished run of 24 steps at a constant rate that kept every sixth step."""

    def train() -> None:
        code, out = gpt2lab(
            "train", "tiny.yaml", "--no-tracking", "--set", "training.milestone_every_steps=6",
            "--set", "optim.schedule=constant",
        )  # fmt: skip
        assert code == 0, out
        inline.clear()

    once("trunk", tiny.parent, train)
    [run] = Store("runs").runs()
    return run


def branch(run: RunFolder, step: int, take: str = "all", **changes: str) -> Path:
    """A file that branches from `run`."""
    path = Path("branch.yaml")
    inside = ", ".join(f"{key.replace('__', '.')}: {value}" for key, value in changes.items())
    path.write_text(f"branch: {{from: {run.id}@{step}, take: {take}, set: {{{inside}}}}}\n")
    return path


def weights(run: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints / f"step_{step:06d}" / "model.safetensors")


def test_a_branch_that_changes_nothing_ends_where_its_trunk_does(
    trunk: RunFolder, gpt2lab: Call, inline: list[str]
) -> None:
    """Weights, averages, rates and batches go on as if nothing had happened; only the name is another."""
    code, out = gpt2lab("train", str(branch(trunk, 12)), "--no-tracking")
    assert code == 0, out
    own = Store("runs").run(inline[-1])
    assert own.id != trunk.id
    ours, theirs = weights(own, 24), weights(trunk, 24)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows, before = ({row["step"]: row["metrics"].get("val/loss") for row in run.rows()} for run in (own, trunk))
    assert min(rows) == 12
    assert rows[24] == before[24]
    result = own.result()
    assert result is not None and (result["steps"], result["tokens"]) == (24, 24 * 64)
    code, out = gpt2lab("train", "branch.yaml", "--no-tracking")
    assert "already finished" in out


def test_decay_branches_from_one_trunk(trunk: RunFolder, gpt2lab: Call, inline: list[str]) -> None:
    """Longer, at another schedule and decay: what the branch says holds, what it does not say is the trunk's."""
    file = branch(trunk, 18, training__steps="30", optim__schedule="linear", optim__optimizer__weight_decay="0.3")
    config, parent = load_config(file), load_config(trunk.path / "config.yaml")
    assert (config.training.steps, config.optim.schedule.name, config.first_step) == (30, "linear", 18)
    assert (config.model, config.data, config.seed) == (parent.model, parent.data, parent.seed)
    code, out = gpt2lab("train", str(file), "--no-tracking")
    assert code == 0, out
    own = Store("runs").run(inline[-1])
    rates = {row["step"]: row["metrics"]["train/lr"] for row in own.rows() if "train/lr" in row["metrics"]}
    multiplier = config.optim.multiplier(30)
    assert rates == {step: config.optim.lr * multiplier(step - 1) for step in range(19, 31)}
    state = (own.checkpoints / "step_000030" / "state.json").read_text()
    assert '"weight_decay": 0.3' in state and '"weight_decay": 0.1' not in state


def test_a_branch_resumes_from_its_own_checkpoints(
    trunk: RunFolder, gpt2lab: Call, inline: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2lab.basics.faults import arm

    file = branch(trunk, 6, optim__lr="2e-2")
    arm("raise@step:9")  # after step 15
    code, out = gpt2lab("train", str(file), "--no-tracking")
    assert code == 7 and "InjectedFault" in out
    arm("")
    code, out = gpt2lab("train", str(file), "--no-tracking")
    assert code == 0 and "continuing from step 12" in out, out
    whole = Store("runs").run(inline[-1])
    other = Path("other")
    code, out = gpt2lab("train", str(file), "--no-tracking", "--set", "repeat=1")
    again = Store("runs").run(inline[-1])
    assert other.name not in out and whole.id != again.id
    ours, theirs = weights(whole, 24), weights(again, 24)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_cannot_be_branched_from_is_said(trunk: RunFolder, gpt2lab: Call) -> None:
    code, out = gpt2lab("train", str(branch(trunk, 7)), "--no-tracking")
    assert code != 0
    assert "there is no checkpoint of step 7 to branch from: it keeps 6, 12, 18, 24" in out
    assert "milestone_every_steps" in out
    code, out = gpt2lab("train", str(branch(trunk, 24)), "--no-tracking")
    assert code == 2 and "it starts from step 24 and ends at step 24: nothing is left to train" in out
    code, out = gpt2lab("train", str(branch(trunk, 12, model__n_embd="32")), "--no-tracking")
    assert code == 2 and "belongs to another architecture" in out and "(256, 16) in the checkpoint" in out
    for text, sentence in (
        ("branch: {from: nowhere}", "'nowhere' is not RUN@STEP"),
        ("branch: {from: 0123456789abcdef@3}", "there is no run 0123456789abcdef in runs"),
        (f"extends: nano\nbranch: {{from: {trunk.id}@6}}", "extends the run that it comes from, and nothing else"),
        (
            f"branch: {{from: {trunk.id}@6, sett: {{}}}}",
            "{from: RUN@STEP, take: all or weights, set: {key: value}} is expected",
        ),
        (f"branch: {{from: {trunk.id}@6, set: {{optim.lrr: 1}}}}", "did you mean 'lr'"),
    ):
        Path("wrong.yaml").write_text(text + "\n")
        with pytest.raises(ConfigError) as caught:
            load_config("wrong.yaml")
        assert sentence in str(caught.value)


def test_a_branch_takes_the_weights_that_fit_and_trains_what_is_not_frozen(
    trunk: RunFolder, gpt2lab: Call, inline: list[str]
) -> None:
    """It begins at step 0; its log and result say what was taken and what is new; a resumed run says it, too."""
    changes = {"model__head": "untied", "optim__freeze": "[wte.*, 'h.*']", "training__steps": "12"}
    file = branch(trunk, 12, "weights", model__block_size="32", training__batch_tokens="128", **changes)
    arm("raise@step:9")
    code, out = gpt2lab("train", str(file), "--no-tracking")
    assert code == 7 and "InjectedFault" in out
    assert "weights taken; new here: lm_head.weight; of another shape, so new: wpe.weight" in out
    arm("")
    code, out = gpt2lab("train", str(file), "--no-tracking")
    assert code == 0 and "continuing from step 6" in out, out
    own = Store("runs").run(inline[-1])
    result = own.result()
    assert result is not None and result["steps"] == 12 and own.rows()[0]["step"] == 0
    start = result["start"]
    before, after = weights(trunk, 12), weights(own, 12)
    assert (start["new"], start["reshaped"], start["left"]) == (["lm_head.weight"], ["wpe.weight"], [])
    assert {*start["taken"], "lm_head.weight", "wpe.weight"} == after.keys()
    still = [name for name in start["taken"] if torch.equal(before[name], after[name])]
    assert set(start["taken"]) - set(still) == {"ln_f.weight", "ln_f.bias"}


def test_patterns_of_frozen_parameters_are_checked(tiny: Path) -> None:
    for pattern, sentence in (
        ("h.*.atn.*", "'h.*.atn.*' fits no parameter (there are wte.weight, wpe.weight, h.*.ln_1.weight, "),
        ("*", "all parameters are frozen: nothing is left to train"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            load_config(tiny.with_name("tiny.yaml"), [f"optim.freeze=[{pattern!r}]"])


@pytest.fixture
def pretrained(tiny: Path, gpt2lab: Call) -> GPT:
    """A model in the folder `weights`, and finetune.yaml, which trains on from it."""
    model = build_model(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=256), seed=5).eval()
    save_gpt2(model, "weights")
    Path("finetune.yaml").write_text("extends: ./tiny.yaml\nbranch: {from: weights, set: {model.block_size: 16}}\n")
    return model


def test_training_goes_on_from_weights(pretrained: GPT, gpt2lab: Call, inline: list[str]) -> None:
    config, base = load_config("finetune.yaml"), load_config("tiny.yaml")
    assert (config.model.n_layer, config.model.block_size, config.first_step) == (2, 16, 0)
    assert (config.optim, config.training, config.data.corpus) == (base.optim, base.training, base.data.corpus)
    code, out = gpt2lab("train", "finetune.yaml", "--no-tracking")
    assert code == 0, out
    run = Store("runs").run(inline[-1])
    losses = {row["step"]: row["metrics"]["val/loss"] for row in run.rows() if "val/loss" in row["metrics"]}
    assert losses[0] == pytest.approx(validation_loss(pretrained, config, prepare(config.data), "cpu"), abs=1e-6)
    assert losses[24] < losses[0]

    save_model(pretrained, "moved", tokenizer="bytes")  # the same weights in another file, under another name
    Path("moved.yaml").write_text(Path("finetune.yaml").read_text().replace("weights", "moved"))
    code, out = gpt2lab("train", "moved.yaml", "--no-tracking")
    assert code == 0 and "already finished" in out


def test_weights_that_do_not_fit_or_are_not_there_are_said(pretrained: GPT, gpt2lab: Call, inline: list[str]) -> None:
    written = Path("finetune.yaml").read_text()
    for old, new, code, sentence in (
        ("model.block_size: 16", "model.n_layer: 3", 2, "its weights do not fit the model section"),
        ("from: weights", "from: nowhere", 2, "'nowhere' is not RUN@STEP, such as 0123456789abcdef@1000, nor weights"),
        ("from: weights", "from: tiny.yaml", 4, "cannot be read as a file of torch.save"),
    ):
        Path("other.yaml").write_text(written.replace(old, new))
        ended, out = gpt2lab("train", "other.yaml", "--no-tracking")
        assert ended == code and sentence in out, out
    fitting = written.replace("set: {model.block_size: 16}", "take: weights, set: {model.n_layer: 3}")
    Path("other.yaml").write_text(fitting)
    ended, out = gpt2lab("train", "other.yaml", "--no-tracking", "--set", "training.steps=6")
    assert ended == 0, out
    [start] = [result["start"] for run in Store("runs").runs() if (result := run.result())]
    assert {name[:4] for name in start["new"]} == {"h.2."} and start["reshaped"] == []
    bpe = KeptTokenizer(tokenizer.read({"name": "bpe", "vocab_size": 300}), (Path("tiny.yaml"),))
    save_model(pretrained, "learned", tokenizer=bpe)
    Path("other.yaml").write_text(written.replace("from: weights", "from: learned"))
    ended, out = gpt2lab("train", "other.yaml", "--no-tracking")
    assert ended == 2 and "its tokenizer was trained on its own text" in out


def test_arms_that_branch_claim_nothing(trunk: RunFolder, tiny: Path, gpt2lab: Call) -> None:
    from gpt2lab.planning.ablation import load_ablation

    branch(trunk, 12)
    Path("decay.yaml").write_text(
        "ablation: decay\nquestion: Which decay?\nbase: branch.yaml\nbaseline: constant\n"
        "arms: {constant: {}, linear: {optim.schedule: linear}}\nseeds: 3\n"
    )
    loaded = load_ablation("decay.yaml")
    assert loaded.exploratory_reason("linear") == (
        f"it branches from {trunk.id}@12: its seeds differ only in what came after"
    )
