"""When a model is compiled, and what that leaves as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt2lab import testing
from gpt2lab.config import load_config
from gpt2lab.inspection.costs import costs
from gpt2lab.model import GPT
from gpt2lab.training.compiling import compile_fault, compiled, decide

# torch's compiler uses what torch itself calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def work(preset: str) -> float:
    """FLOP of a preset's training."""
    config = load_config(preset)
    return costs(config.model).flops_per_token * config.training.steps * config.training.batch_tokens


def test_a_setting_is_obeyed() -> None:
    for device in ("cpu", "cuda"):
        assert decide("on", device, 1.0)[0]
        assert not decide("off", device, 1e30)[0]
    assert decide("on", "cpu", 1.0)[1] == "training.compile is on"


def test_auto_compiles_long_trainings_on_gpus_alone() -> None:
    assert decide("auto", "cuda", work("gpt2-124m"))[0]
    chosen, why = decide("auto", "cuda", work("nano"))
    assert not chosen
    assert "pays from 5e+16" in why
    assert not decide("auto", "cpu", work("gpt2-124m"))[0]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPT:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return testing.Case("norm", "layernorm").model()


def test_what_the_compiler_raises_is_a_fault_of_the_machine() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        raise RuntimeError("a step") from InvalidCxxCompiler()
    except RuntimeError as error:
        fault = compile_fault(error)
    assert fault is not None and "training.compile: torch.compile failed: " in str(fault) and "C++" in str(fault)
    assert "\n" not in str(fault) and compile_fault(ValueError("other")) is None
    circle, cause = ValueError("other"), ValueError("cause")
    circle.__cause__, cause.__cause__ = cause, circle
    assert compile_fault(circle) is None


def test_names_and_evaluations_stay(model: GPT, tmp_path: Path) -> None:
    tokens, targets = testing.batch()
    names = list(model.state_dict())
    with torch.no_grad():
        before = model.loss(tokens, targets)
        assert compiled(model, tmp_path) is model
        assert torch.equal(model.loss(tokens, targets), before)
    assert list(model.state_dict()) == names
    assert not list(tmp_path.iterdir())  # nothing was compiled


@pytest.mark.slow
def test_training_is_compiled_and_agrees(model: GPT, tmp_path: Path) -> None:
    tokens, targets = testing.batch()
    expected, _ = model.objective(tokens, targets)
    compiled(model, tmp_path)
    found, _ = model.objective(tokens, targets)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(p.grad is not None for p in model.parameters())
    assert any(tmp_path.rglob("*.cpp")) or any(tmp_path.rglob("*.py"))
