"""Trainings that start from a checkpoint of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2lab.config import load_config
from gpt2lab.errors import ConfigError
from gpt2lab.store import RunFolder, Store

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def trunk(tiny: Path, gpt2lab: Call, inline: list[str]) -> RunFolder:
    """A finished run of 24 steps at a constant rate that kept every sixth step."""
    code, out = gpt2lab(
        "train", "tiny.yaml", "--no-tracking", "--set", "training.milestone_every_steps=6",
        "--set", "optim.schedule=constant",
    )  # fmt: skip
    assert code == 0, out
    return Store("runs").run(inline.pop())


def branch(run: RunFolder, step: int, **changes: str) -> Path:
    """A file that branches from `run`."""
    path = Path("branch.yaml")
    inside = ", ".join(f"{key.replace('__', '.')}: {value}" for key, value in changes.items())
    path.write_text(f"branch: {{from: {run.id}@{step}, set: {{{inside}}}}}\n")
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
    assert "finished already" in out


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
    from gpt2lab.faults import arm

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
        (f"branch: {{from: {trunk.id}@6, sett: {{}}}}", "{from: RUN@STEP, set: {key: value}} is expected"),
        (f"branch: {{from: {trunk.id}@6, set: {{optim.lrr: 1}}}}", "did you mean 'lr'"),
    ):
        Path("wrong.yaml").write_text(text + "\n")
        with pytest.raises(ConfigError) as caught:
            load_config("wrong.yaml")
        assert sentence in str(caught.value)


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
