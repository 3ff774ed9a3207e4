"""Devices and arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trainings import BATCHES, fresh, train

from gpt2lab.errors import EnvironmentFault
from gpt2lab.training import autocast, choose_device, set_threads

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    pretend(monkeypatch, cuda, mps)
    assert choose_device("auto").type == expected
    assert choose_device("cpu").type == "cpu"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=False, mps=False)
    for name in ("cuda", "mps"):
        with pytest.raises(EnvironmentFault, match=f"finds no {name} device"):
            choose_device(name)


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(EnvironmentFault, match="Tesla T4 has no bfloat16"):
        autocast("bf16", torch.device("cuda"))


def test_threads_are_set_unless_absent() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        set_threads(None)
        assert torch.get_num_threads() == 2
    finally:
        set_threads(before)


def test_bf16_multiplies_in_bfloat16_and_takes_the_loss_in_float32() -> None:
    model: Any = fresh().model
    inputs, targets = (torch.from_numpy(x) for x in BATCHES.at(0))
    with autocast("bf16", CPU):
        logits = model(inputs)
        objective, parts = model.objective(inputs, targets)
    assert logits.dtype == torch.bfloat16
    assert objective.dtype == parts["loss"].dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    # In bfloat16 the loss itself would be off by up to 2^-9 of its value, about 0.007.
    assert objective.item() == pytest.approx(expected.item(), abs=1e-5)


def test_bf16_training_keeps_weights_gradients_and_state_in_float32() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        state = fresh()
        seen: set[torch.dtype] = set()
        for parameter in state.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.add(p.grad.dtype))
        records = train(state, steps=5, precision=precision, micro_batch_sequences=4)
        losses[precision] = [record.metrics["train/loss"] for record in records]
        assert seen == {torch.float32}
        moments = [v for s in state.optimizers[0].state.values() for v in s.values()]
        assert {t.dtype for t in [*state.model.parameters(), *moments]} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.03)
