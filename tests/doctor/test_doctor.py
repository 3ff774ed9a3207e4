"""The doctor is silent where a training is sound, whatever it is made of, and says what it could not look at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab import testing
from gpt2lab.analysis.compare import failure_ceiling_of
from gpt2lab.cli import execute
from gpt2lab.doctor import ExaminedRun, checks, examine, machine
from gpt2lab.errors import ConfigError
from gpt2lab.model import MODEL_SLOTS
from gpt2lab.registry import SLOTS
from gpt2lab.store import Store, read_json
from gpt2lab.tracking.journal import Journal

ASSEMBLIES = {
    "modern": ["model.position=rotary", "model.norm=rmsnorm", "model.mlp=swiglu", "model.scores.qk_norm=true"],
    "post, dropout": ["model.residual=post", "model.dropout=0.1", "training.micro_batch_sequences=4"],
    "experts, windows": ["model.mlp=moe", "model.mask=sliding_window", "model.attention=gqa", "model.position=alibi"],
    "bf16, z": ["training.precision=bf16", "model.objective=[cross_entropy, z_loss]", "optim.grad_clip=null"],
    "early": ["training.steps=12", "optim.warmup_steps=0", "model.head={name: untied, zero_init: true}"],
}  # fmt: skip
TOO_SHORT = "learned_nothing"
"""The check that some trainings of 60 steps are too short for."""
EVERYTHING = [case for slot in (*MODEL_SLOTS, "optimizer", "schedule") for case in testing.cases(SLOTS[slot])]


@pytest.mark.parametrize("assembly", ASSEMBLIES)
def test_sound_trainings_are_left_alone(assembly: str, trained: Any) -> None:
    found = examine(trained(*ASSEMBLIES[assembly]))
    assert not found.findings
    assert set(found.unknown) <= {"residual_scaling", TOO_SHORT}


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_every_shipped_component_is_left_alone(case: testing.Case, trained: Any) -> None:
    section = "optim" if case.slot in ("optimizer", "schedule") else "model"
    choice = testing.placed(case.choice())
    if case.name == "documents":  # the preset's bytes have no separator to tell documents apart by
        with pytest.raises(ConfigError):
            trained(f"{section}.{case.slot}={json.dumps(choice)}")
        return
    run = trained(f"{section}.{case.slot}={json.dumps(choice)}")
    found = examine(run)
    assert not found.findings
    weighing = (
        "gate", "sink_logits", "sigmoid", "talking_heads", "top_k", "off_by_one", "pointwise", "consmax",
        "residual_scores", "z_loss", "head_gate", "head_scale", "xsa",
    )  # fmt: skip
    allowed = {
        "softmax_rows": weighing,
        "attention_scale": ("none",),  # no scores
        "residual_scaling": (
            "post",
            "deepnorm",
            "rezero",
            "residual_dual",
            "gpt2_tf",
            "small_init",
            "xavier",
            "orthogonal",
        ),
    }
    for check in found.unknown.keys() - {TOO_SHORT}:
        assert {case.name, *case.options} & set(allowed[check]), (check, found.unknown)


def test_the_gradient_is_that_of_torch(trained: Any) -> None:
    examined = ExaminedRun.load(trained("training.micro_batch_sequences=2"))
    first = checks.gradients(examined)[0]
    batches = checks.batches_of(examined.config, examined.data)
    inputs, targets = (torch.as_tensor(x) for x in batches.at(0))
    model = examined.start
    torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert first.plain == pytest.approx(norm, rel=1e-5) and first.own == pytest.approx(norm, rel=1e-5)
    assert first.journal == pytest.approx(norm, rel=1e-5)


def test_large_steps_are_done_again_as_far_as_it_takes_no_longer(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained()
    size = 3 * sum(p.numel() for p in ExaminedRun.load(run).start.parameters()) * 128
    monkeypatch.setattr(checks, "LARGEST_WORK", 2 * size + 1)
    assert [one.step for one in checks.gradients(ExaminedRun.load(run))] == [1, 2]
    monkeypatch.setattr(checks, "LARGEST_WORK", size - 1)
    found = examine(run)
    short = found.unknown.pop(TOO_SHORT)
    assert short.endswith("token frequencies alone reach 2.725, and 60 steps may be too few for more")
    assert found.unknown == {"gradient": "its steps are too large to be done again here (128 tokens)"}


def test_a_running_training_is_examined_as_far_as_it_has_come(trained: Any) -> None:
    run = trained("training.checkpoint_every_steps=20", "training.keep_checkpoints=3")
    (run.path / "result.json").unlink()
    found = examine(run)
    assert (found.status, found.step, list(found.findings)) == ("partial", 60, [])
    for folder in run.checkpoints.iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    found = examine(run)
    assert found.step == 0 and not found.findings
    assert found.unknown.keys() - {TOO_SHORT} == {"checkpoint", "targets", "tie"}
    assert {found.unknown[check] for check in ("checkpoint", "targets", "tie")} == {"no checkpoint yet"}
    assert "causality" in found.sound and "gradient" in found.sound


def rewrite(run: Any, change: Any) -> None:
    """Another journal, with its sum, as a worker with a mistake would write it."""
    rows, result = run.rows(), read_json(run.path / "result.json")
    run.metrics.unlink()
    with Journal(run.metrics) as journal:
        for row in rows:
            change(row["step"], row["metrics"])
            journal.append(row)
    run.finish(result)


def named(run: Any) -> set[str]:
    return {finding.name for finding in examine(run).findings}


def test_a_journal_that_cannot_be_is_seen_through(trained: Any) -> None:
    run = trained()
    whole = run.metrics.read_bytes()

    def told(metric: str, value: Any) -> set[str]:
        run.metrics.write_bytes(whole)
        rewrite(run, lambda step, m: m.update({metric: value(step, m[metric])}) if metric in m else None)
        return named(run)

    assert told("val/loss", lambda step, x: x if step else 9.0) == {"loss_at_start"}
    assert told("val/loss", lambda step, x: x if step else 4.0) == {"loss_at_start"}
    assert told("val/loss", lambda step, x: 0.05 if step == 60 else x) == {"impossible_loss"}
    assert told("train/lr", lambda step, x: x * (1.001 if step == 30 else 1)) == {"learning_rate"}
    assert told("train/grad_norm", lambda step, x: x * 1.1) == {"gradient"}
    assert told("train/grad_norm", lambda step, x: x * (1.1 if step == 4 else 1)) == {"gradient"}
    assert told("train/grad_norm", lambda step, x: x * (1.1 if step == 40 else 1)) == set()


def test_checkpoints_that_are_damaged_or_gone_are_findings(trained: Any) -> None:
    run = trained()
    [weights] = run.checkpoints.glob("*/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    [finding] = examine(run).findings
    assert finding.name == "checkpoint" and finding.evidence.startswith(
        "step_000060: model.safetensors is not what was"
    )
    weights.parent.rename(run.path / "aside")
    [finding] = examine(run).findings
    assert finding.evidence == "none of the last step, 60: the final weights are gone"


def test_a_long_training_that_learns_nothing_is_named(trained: Any) -> None:
    run = trained("training.steps=300", "optim.lr=1e-6", "evaluation.every_steps=300")
    assert named(run) == {"learned_nothing"}
    ceiling = failure_ceiling_of(ExaminedRun.load(run).data.floors)  # that of studies

    def end_at(loss: float) -> set[str]:
        rewrite(run, lambda step, m: m.update({"val/loss": loss}) if step and "val/loss" in m else None)
        return named(run)

    assert end_at(ceiling - 1e-6) == set() and end_at(ceiling) == {"learned_nothing"}


def test_a_schedule_that_is_over_long_before_training_is_named(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2lab.optim import OptimConfig

    run = trained("optim.warmup_steps=0")
    right = OptimConfig.multiplier
    monkeypatch.setattr(OptimConfig, "multiplier", lambda self, steps: right(self, steps // 3))
    rewrite(run, lambda step, m: m.update({"train/lr": 1e-2 * right(ExaminedRun.load(run).config.optim, 20)(step - 1)})
            if "train/lr" in m else None)  # fmt: skip
    [finding] = [one for one in examine(run).findings if one.name == "learning_rate"]
    assert finding.severity == "warning" and "last 40 of 60 steps" in finding.evidence


def test_the_command_answers_with_a_code(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained()
    words = ["doctor", "--run", run.id[:6], "--runs", str(run.path.parent)]
    assert execute(words, debug=False) == 0
    assert "nothing found" in capsys.readouterr().out
    rewrite(run, lambda step, m: m.update({"val/loss": 9.0}) if step == 0 else None)
    with pytest.raises(SystemExit) as ended:
        execute(words, debug=True)
    out = capsys.readouterr().out
    assert ended.value.code == 5 and "error [loss_at_start] the loss before the first step is 9.000" in out
    with pytest.raises(SystemExit) as ended:
        execute([*words, "--json"], debug=True)
    assert ended.value.code == 5
    record = json.loads(capsys.readouterr().out)
    assert record["run"] == run.id and [one["name"] for one in record["findings"]] == ["loss_at_start"]
    assert execute(["doctor", "--run", "ffff", "--runs", str(run.path.parent)], debug=False) == 2


def test_the_machine_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    parts = {part.name: part for part in machine.check_machine(Store(tmp_path / "runs"))}
    assert {"Python", "torch", "device", "precision", "threads", "memory"} <= parts.keys()
    assert {"run store", "data cache", "MLflow"} <= parts.keys()
    assert all(part.problem is None for part in parts.values())
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("GPT2LAB_DATA", "/proc/nowhere")
    monkeypatch.setattr(machine, "OLDEST_TORCH", (99, 0))
    parts = {part.name: part for part in machine.check_machine(Store(tmp_path / "runs"))}
    assert {name for name, part in parts.items() if part.problem} == {"torch", "data cache", "MLflow"}
    assert "secret" not in str(parts["MLflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/somewhere")
    assert "no longer supported" in str(machine._mlflow(Store(tmp_path)).problem)


def test_a_machine_that_is_unfit_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "OLDEST_PYTHON", (4, 0))
    with pytest.raises(SystemExit) as ended:
        execute(["doctor", "--runs", str(tmp_path)], debug=True)
    assert ended.value.code == 3 and "4.0 or newer is needed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        execute(["doctor", "--runs", str(tmp_path), "--json"], debug=True)
    assert ended.value.code == 3 and json.loads(capsys.readouterr().out)["parts"][0]["problem"]
