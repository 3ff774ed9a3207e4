"""The loop: accumulation, clipping, rates, records, and numbers that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trainings import BATCHES, OPTIM, RandomBatches, Twice, config, fresh, spoiled, train, training, weights

from gpt2lab.components.base import Param
from gpt2lab.errors import DataFault, EnvironmentFault
from gpt2lab.optim import OptimConfig, optimizer
from gpt2lab.training import Diverged, StepRecord, World
from gpt2lab.training.clock import Clock
from gpt2lab.training.loop import reseed


def test_records_count_steps_and_tokens() -> None:
    records = train(fresh(), log_every_steps=4)
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r.tokens for r in records] == [64 * step for step in range(1, 7)]
    assert [r.step for r in records if r.metrics] == [4, 6]  # and the last, whatever its number
    assert records[3].metrics.keys() == {"train/loss", "train/grad_norm", "train/lr"}
    seconds = [r.seconds for r in records]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_time_between_steps_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    state = fresh()
    forward: Any = state.model.objective

    def slow(*tokens: torch.Tensor) -> Any:
        clock[0] += 1.0
        return forward(*tokens)

    monkeypatch.setattr(state.model, "objective", slow)
    spent = Clock()
    for _ in training(state, steps=3, clock=spent):
        clock[0] += 100.0
    assert state.seconds == 3.0
    assert spent.split()["forward"] == 3.0


def test_metrics_are_those_of_the_batch_before_the_update() -> None:
    state = fresh()
    twin = copy.deepcopy(state.model)
    (record, *_) = train(state)
    inputs, targets = (torch.from_numpy(x) for x in BATCHES.at(0))
    loss: torch.Tensor = twin.loss(inputs, targets)  # type: ignore[operator]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert record.metrics["train/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert record.metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert record.metrics["train/lr"] == pytest.approx(OPTIM.lr / 2)  # first of two steps of warm-up


@pytest.mark.parametrize("late", [False, True])
def test_the_model_receives_the_share_of_the_training(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh()
    model: Any = state.model
    forward, seen = model.objective, []

    def watched(*tokens: torch.Tensor) -> Any:
        seen.append(model.progress.value.item())
        return forward(*tokens)

    monkeypatch.setattr(model, "objective", watched)
    assert model.progress.value.item() == 1.0
    for record in training(state, steps=4, late=late):
        assert model.progress.value.item() == record.step / 4  # also for an evaluation after this step
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_rate_of_every_group_follows_the_schedule() -> None:
    state = fresh()
    state.optimizers[0].param_groups[1]["base_lr"] = 3e-3
    multiplier = OPTIM.multiplier(6)
    for record in training(state):
        first, second = (group["lr"] for group in state.optimizers[0].param_groups)
        assert first == record.metrics["train/lr"] == OPTIM.lr * multiplier(record.step - 1)
        assert second == 3e-3 * multiplier(record.step - 1)
        assert {group["progress"] for group in state.optimizers[0].param_groups} == {(record.step - 1) / 6}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ignored", [0, 13])
def test_accumulation_equals_the_large_batch(size: int, ignored: int) -> None:
    """Also where micro-batches are unequal: 8 sequences by threes, and 13 targets that do not count."""
    batches = RandomBatches(ignore=ignored)
    optim = OptimConfig.model_validate({"lr": 0.1, "warmup_steps": 0, "grad_clip": None, "optimizer": "adamw"})
    whole, parts = fresh(optim), fresh(optim)
    for state in (whole, parts):  # plain gradient descent: Adam would amplify rounding of gradients that are zero
        state.optimizers = [torch.optim.SGD(state.model.parameters(), lr=0.1)]
        state.optimizers[0].param_groups[0]["base_lr"] = 0.1
    expected = train(whole, optim, batches)
    got = train(parts, optim, batches, micro_batch_sequences=size)
    for a, b in zip(expected, got, strict=True):
        assert b.metrics["train/loss"] == pytest.approx(a.metrics["train/loss"], abs=1e-6)
        assert b.metrics["train/grad_norm"] == pytest.approx(a.metrics["train/grad_norm"], abs=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)


def test_a_batch_without_targets_is_no_step() -> None:
    state = fresh()
    with pytest.raises(DataFault, match="step 1: no target"):
        train(state, batches=RandomBatches(ignore=64))
    assert state.step == 0


def test_gradients_are_clipped_to_the_norm() -> None:
    """With plain gradient descent the update is the clipped gradient times the rate."""
    for clip, expected in ((0.01, 0.01), (None, None), (1e6, None)):
        optim = OptimConfig(lr=1.0, warmup_steps=0, grad_clip=clip)
        state = fresh(optim)
        state.optimizers = [torch.optim.SGD(state.model.parameters(), lr=1.0)]
        state.optimizers[0].param_groups[0]["base_lr"] = 1.0
        before = weights(state)
        (record,) = train(state, optim, steps=1)
        moved = (weights(state) - before).norm().item()
        assert moved == pytest.approx(expected or record.metrics["train/grad_norm"], rel=1e-4)
        assert record.metrics["train/grad_norm"] > 0.1


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_that_is_not_finite_stops_in_its_step_with_clean_weights(
    value: float, clip: float | None, late: bool
) -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=clip)
    reference, state = fresh(optim), fresh(optim)
    train(reference, optim, micro_batch_sequences=4)
    records: list[StepRecord] = []
    snapshot = weights(state)
    with spoiled(state, 5, value=value), pytest.raises(Diverged, match="step 3: loss") as caught:  # noqa: PT012
        for record in training(state, optim, micro_batch_sequences=4, late=late):
            records.append(record)
            snapshot = weights(state)
    assert caught.value.step == 3
    assert (caught.value.exit_code, state.step, len(records)) == (5, 2, 2)
    assert torch.equal(weights(state), snapshot)
    assert all(p.grad is None for p in state.model.parameters())
    train(state, optim, micro_batch_sequences=4)  # nothing of the bad step is left: the same end as without it
    assert torch.equal(weights(state), weights(reference))


def test_objective_is_recorded_when_it_is_not_the_loss() -> None:
    state = fresh(objective=["cross_entropy", {"name": "z_loss", "weight": "0.1"}])
    metrics = train(state)[0].metrics
    assert metrics["train/objective"] > metrics["train/loss"] + 0.1


def test_dropout_depends_on_seed_step_and_micro_step_alone() -> None:
    def losses(seed: int = 7, **changes: Any) -> list[float]:
        records = train(fresh(dropout=0.2), seed=seed, **changes)
        return [r.metrics["train/loss"] for r in records]

    first = losses()
    torch.rand(3)  # what the rest of the program draws does not matter
    assert losses() == first
    assert losses(seed=8) != first
    assert losses(micro_batch_sequences=4) != first


def test_every_micro_step_is_seeded_from_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[tuple[int, ...]] = []
    monkeypatch.setattr("gpt2lab.training.loop.reseed", lambda *where: seeded.append(where[:4]))
    same_for_all = SimpleNamespace(at=lambda step, **where: BATCHES.at(step))
    third = World(rank=2, size=1)  # of size 1, so that no rank waits for the others
    train(fresh(), batches=same_for_all, world=third, stop_at=2, micro_batch_sequences=3)
    assert seeded == [(7, step, micro, 2) for step in (0, 1) for micro in (0, 1, 2)]
    monkeypatch.undo()
    draws = set()
    for where in [(7, 1, 0, 0), (7, 0, 1, 0), (7, 0, 0, 1), (8, 0, 0, 0), (7, 0, 0, 0), (71, 0, 0, 0), (7, 10, 0, 0)]:
        reseed(*where, torch.device("cpu"))
        draws.add(torch.rand(1).item())
    assert len(draws) == 7


def test_stopping_and_going_on_changes_nothing() -> None:
    whole, halves = fresh(dropout=0.1), fresh(dropout=0.1)
    train(whole)
    first = train(halves, stop_at=2)
    rest = train(halves, stop_at=100)
    assert [r.step for r in first + rest] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(weights(whole), weights(halves))


def test_one_batch_is_learnt_by_heart() -> None:
    class SameBatch:
        def at(self, step: int, *, rank: int, world: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
            inputs, targets = BATCHES.at(0)
            return inputs[:2], targets[:2]

    optim = OptimConfig.model_validate({"lr": 1e-2, "warmup_steps": 5, "schedule": "constant"})
    records = train(fresh(optim), optim, SameBatch(), steps=150)
    assert records[0].metrics["train/loss"] > 3.0
    assert records[-1].metrics["train/loss"] < 0.05


def test_running_out_of_memory_names_phase_batch_and_smaller_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh()

    def fail(error: Exception) -> None:
        def objective(*_: torch.Tensor) -> None:
            raise error

        monkeypatch.setattr(state.model, "objective", objective)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    with pytest.raises(EnvironmentFault) as caught:
        train(state, micro_batch_sequences=4)
    text = caught.value.render()
    assert "training, step 1: out of memory with 4 sequences of 8 tokens" in text
    assert "--set training.micro_batch_sequences=2" in text
    fail(RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"))
    with pytest.raises(EnvironmentFault, match="out of memory"):
        train(state)
    fail(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        train(state)


def test_batch_must_be_whole_sequences_on_every_rank() -> None:
    assert config(batch_tokens=1024).problems(block_size=128, world_size=4) == []
    (problem,) = config(batch_tokens=1000).problems(block_size=128)
    assert (problem.where, "nearest is 1024" in problem.what) == ("training.batch_tokens", True)
    assert config(batch_tokens=1024).problems(block_size=128, world_size=3)


@pytest.fixture
def twice(no_plugins_after: None) -> OptimConfig:
    @optimizer.register("twice", source="a test")
    def made(params: Sequence[Param], lr: float) -> list[torch.optim.Optimizer]:
        """Steps by the gradient one step ahead."""
        return [Twice([param.tensor for param in params], lr=lr)]

    Twice.norms.clear()
    return OptimConfig(lr=0.5, warmup_steps=0, grad_clip=0.1, optimizer={"name": "twice"}, schedule="constant")


def test_an_optimizer_gets_gradients_at_other_weights(twice: OptimConfig) -> None:
    """Those of the same batch and dropout, over all micro-batches, clipped; against two steps by hand."""
    state, by_hand = (fresh(twice, dropout=0.1) for _ in range(2))
    train(state, twice, steps=1)
    start = [p.detach().clone() for p in by_hand.model.parameters()]
    inputs, targets = (torch.as_tensor(x) for x in BATCHES.at(0))
    by_hand.model.train()
    for _ in range(2):
        reseed(7, 0, 0, 0, torch.device("cpu"))
        by_hand.model.zero_grad()
        by_hand.model.loss(inputs, targets).backward()  # type: ignore[operator]
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 0.1)
        with torch.no_grad():
            for i, p in enumerate(by_hand.model.parameters()):
                p.copy_(start[i] - 0.5 * p.grad)  # type: ignore[operator]
    for a, b in zip(state.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert Twice.norms == [pytest.approx(0.1, rel=1e-4)]
    whole, parts = (fresh(twice) for _ in range(2))
    train(whole, twice, steps=3)
    train(parts, twice, steps=3, micro_batch_sequences=2)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_second_gradient_that_is_not_finite_changes_nothing(twice: OptimConfig) -> None:
    state = fresh(twice)
    train(state, twice, steps=2, stop_at=1)
    start = weights(state)
    with spoiled(state, 1), pytest.raises(Diverged, match="step 2"):  # the second backward pass of that step
        train(state, twice, steps=2)
    assert torch.equal(start, weights(state))
