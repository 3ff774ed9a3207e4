"""Training on a CUDA device: every precision, numbers that are looked at a step late, resuming, compiling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab.optim import OptimConfig
from gpt2lab.registry import SLOTS
from gpt2lab.testing import cases
from gpt2lab.training import Diverged, TrainingConfig, TrainState, steps
from gpt2lab.training.checkpoints import load_latest, save
from gpt2lab.training.compiling import compiled
from tests.training.trainings import spoiled, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # torch's compiler, of fp32
]

Fresh = Callable[..., TrainState]
NEAR_CPU = {"fp32": 2e-5, "tf32": 1e-3, "bf16": 1e-2, "fp16": 2e-3}
"""How far a loss of a few nats may be from that of the CPU in float32, over twelve steps."""


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"steps": 12, "batch_tokens": 256} | changes))


def losses(state: TrainState, batches: Any, optim: OptimConfig, **changes: Any) -> list[float]:
    return [r.metrics["train/loss"] for r in steps(state, batches, optim, config(**changes), seed=7)]


def test_a_model_starts_equal_on_every_device(fresh: Fresh, optim: OptimConfig) -> None:
    assert torch.equal(weights(fresh(optim)), weights(fresh(optim, device="cpu")))


@pytest.mark.parametrize("vocab_size", [97, 128], ids=["uneven", "even"])
@pytest.mark.parametrize("precision", list(NEAR_CPU))
def test_losses_are_near_those_of_the_cpu(
    fresh: Fresh, batches: Any, optim: OptimConfig, precision: str, vocab_size: int
) -> None:
    expected = losses(fresh(optim, device="cpu", vocab_size=vocab_size), batches, optim)
    state = fresh(optim, precision=precision, vocab_size=vocab_size)
    found = losses(state, batches, optim, precision=precision, micro_batch_sequences=3)
    assert found == pytest.approx(expected, abs=NEAR_CPU[precision])
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    moments = [v for s in state.optimizers[0].state.values() for v in s.values()]
    assert {m.dtype for m in moments} == {torch.float32} and {m.device.type for m in moments} == {"cuda"}


def test_looking_a_step_late_is_the_default_and_changes_no_bit(fresh: Fresh, batches: Any, optim: OptimConfig) -> None:
    seen = {}
    for late in (None, True, False):
        state = fresh(optim)
        records = steps(state, batches, optim, config(deterministic=True), seed=7, late=late)
        seen[late] = [(r.step, r.tokens, r.metrics, weights(state).tolist()) for r in records]
    assert seen[None] == seen[True] == seen[False]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_no_step_waits_for_its_own_numbers(fresh: Fresh, batches: Any, optim: OptimConfig) -> None:
    """torch can be told to raise where a program would wait for the device unasked."""
    state = fresh(optim, precision="bf16", vocab_size=128)
    running = steps(state, batches, optim, config(precision="bf16", micro_batch_sequences=4), seed=7)
    next(running), next(running)  # kernels are loaded, the optimizer makes its state
    try:
        torch.cuda.set_sync_debug_mode("error")
        next(running), next(running)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    running.close()


def test_a_divergence_stops_before_the_next_update_with_clean_weights(
    fresh: Fresh, batches: Any, optim: OptimConfig
) -> None:
    state = fresh(optim)
    last = weights(state)
    with spoiled(state, 2), pytest.raises(Diverged, match="step 3"):  # noqa: PT012
        for _ in steps(state, batches, optim, config(), seed=7):
            last = weights(state)
    assert state.step == 2
    assert torch.equal(weights(state), last) and last.isfinite().all()


def test_a_skipped_step_changes_nothing_but_the_count(fresh: Fresh, batches: Any, optim: OptimConfig) -> None:
    state, seen = fresh(optim), []
    with spoiled(state, 2):
        for record in steps(state, batches, optim, config(nonfinite="skip", steps=6), seed=7):
            seen.append((record, weights(state)))
    assert torch.equal(seen[2][1], seen[1][1]) and not torch.equal(seen[3][1], seen[2][1])
    assert [r.step for r, _ in seen if "train/skipped" in r.metrics] == [3]
    assert (state.guard.skipped, state.step) == (1, 6)
    assert {float(s["step"]) for s in state.optimizers[0].state.values()} == {5.0}  # Adam's own count of updates


def test_fp16_halves_its_scale_at_an_overflow_and_resumes_with_it(
    fresh: Fresh, batches: Any, optim: OptimConfig
) -> None:
    def begun() -> TrainState:
        state = fresh(optim, precision="fp16")
        state.scaler = torch.amp.GradScaler("cuda", growth_interval=4)
        return state

    training = config(precision="fp16", deterministic=True)
    whole, first, rest = begun(), begun(), begun()
    with spoiled(whole, 2):
        records = list(steps(whole, batches, optim, training, seed=7))
    assert [r.step for r in records if "train/skipped" in r.metrics] == [3]
    with spoiled(first, 2):
        list(steps(first, batches, optim, training, seed=7, stop_at=5))
    assert first.scaler is not None and first.scaler.get_scale() == 2.0**15
    saved = first.state_dict()
    rest.load_state_dict(saved | {name: json.loads(json.dumps(saved[name])) for name in ("scaler", "guard")})
    list(steps(rest, batches, optim, training, seed=7))
    assert torch.equal(weights(rest), weights(whole))
    assert rest.scaler is not None and whole.scaler is not None
    assert rest.scaler.state_dict() == whole.scaler.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_training_resumes_to_the_same_bits(
    fresh: Fresh, batches: Any, optim: OptimConfig, precision: Any, tmp_path: Path
) -> None:
    training = config(precision=precision, deterministic=True, micro_batch_sequences=4)
    whole, first, rest = (fresh(optim, dropout=0.1) for _ in range(3))
    list(steps(whole, batches, optim, training, seed=7))
    list(steps(first, batches, optim, training, seed=7, stop_at=5))
    save(tmp_path, first)
    assert load_latest(tmp_path, rest) is not None and rest.step == 5
    list(steps(rest, batches, optim, training, seed=7))
    assert torch.equal(weights(rest), weights(whole))


def test_without_that_setting_resuming_is_close(
    fresh: Fresh, batches: Any, optim: OptimConfig, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    training = config(precision="bf16", micro_batch_sequences=4)
    whole, first, rest = (fresh(optim, dropout=0.1) for _ in range(3))
    list(steps(whole, batches, optim, training, seed=7))
    list(steps(first, batches, optim, training, seed=7, stop_at=5))
    save(tmp_path, first)
    load_latest(tmp_path, rest)
    list(steps(rest, batches, optim, training, seed=7))
    gap = (weights(rest) - weights(whole)).abs().max().item()
    record_property("largest difference of a weight", gap)
    print(f"resumed without determinism: a weight differs by {gap:.2g} at most")
    assert gap < 1e-2  # of weights whose size is up to about 0.1, after seven steps of up to 3e-3


@pytest.mark.parametrize(("precision", "close"), [("fp32", 5e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("vocab_size", [97, 128], ids=["uneven", "even"])
def test_a_compiled_training_has_the_same_losses(
    fresh: Fresh, batches: Any, optim: OptimConfig, precision: Any, close: float, vocab_size: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    expected = losses(fresh(optim, vocab_size=vocab_size), batches, optim, precision=precision)
    state = fresh(optim, vocab_size=vocab_size)
    compiled(state.model, tmp_path)
    assert losses(state, batches, optim, precision=precision) == pytest.approx(expected, abs=close)
    assert any(tmp_path.rglob("*.py"))  # generated code, kept for the next run


def test_fused_adamw_equals_the_plain_one(fresh: Fresh, batches: Any, optim: OptimConfig) -> None:
    fused, plain = fresh(optim), fresh(optim)
    assert fused.optimizers[0].param_groups[0]["fused"]
    for group in plain.optimizers[0].param_groups:
        group["fused"] = False
    for state, late in ((fused, True), (plain, False)):
        list(steps(state, batches, optim, config(), seed=7, late=late))
    torch.testing.assert_close(weights(fused), weights(plain), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", cases(SLOTS["optimizer"]), ids=str)
def test_every_optimizer_trains_as_on_the_cpu(fresh: Fresh, batches: Any, case: Any) -> None:
    optim = OptimConfig.model_validate({"lr": 1e-3, "warmup_steps": 2, "optimizer": case.choice()})
    expected = losses(fresh(optim, device="cpu"), batches, optim)
    assert losses(fresh(optim), batches, optim) == pytest.approx(expected, abs=2e-3)
