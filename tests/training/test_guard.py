"""Steps whose numbers are not finite, skipped or not, and losses that jump."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from trainings import OPTIM, fresh, spoiled, train, training, weights

from gpt2lab.errors import ConfigError
from gpt2lab.optim import OptimConfig
from gpt2lab.training import Diverged, StepRecord
from gpt2lab.training.guard import FEWEST, SIGMAS, WINDOW, Guard
from gpt2lab.training.precision import loss_scaler

CPU = torch.device("cpu")


@pytest.mark.parametrize("late", [False, True])
def test_a_skipped_step_changes_nothing_but_the_count(late: bool) -> None:
    """The step after it has its own batch and rate, so skipping step 3 equals a training whose step 3 did nothing."""
    state = fresh()
    seen: list[tuple[StepRecord, torch.Tensor]] = []
    with spoiled(state, 2):
        for record in training(state, nonfinite="skip", late=late):
            seen.append((record, weights(state)))
    assert [r.step for r, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(seen[2][1], seen[1][1])
    assert not torch.equal(seen[3][1], seen[2][1])
    assert [r.step for r, _ in seen if "train/skipped" in r.metrics] == [3]
    assert not math.isfinite(seen[2][0].metrics["train/grad_norm"])
    assert (state.guard.skipped, state.guard.in_a_row, state.step, state.tokens) == (1, 0, 6, 6 * 64)
    assert {float(s["step"]) for s in state.optimizers[0].state.values()} == {5.0}  # Adam's own count of updates


@pytest.mark.parametrize("late", [False, True])
def test_too_many_skips_in_a_row_are_a_divergence(late: bool) -> None:
    state = fresh()
    with spoiled(state, 0, 2, 3), pytest.raises(Diverged, match=r"step 4: .* 2 steps in a row were skipped") as caught:
        train(state, late=late, nonfinite="skip", max_skipped_steps=2)
    assert (caught.value.step, state.step, state.guard.skipped) == (4, 3, 3)
    assert caught.value.lr == OPTIM.lr * OPTIM.multiplier(6)(3)
    assert weights(state).isfinite().all()
    assert all(p.grad is None for p in state.model.parameters())


def test_looking_a_step_late_changes_no_bit() -> None:
    """Weights at every record, records themselves, and the optimizer's state: as when every step is waited for."""
    optim = OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5)
    seen: dict[bool, list[Any]] = {}
    for late in (False, True):
        state = fresh(optim, dropout=0.1)
        seen[late] = [
            (r.step, r.tokens, r.metrics, weights(state).tolist())
            for r in training(state, optim, late=late, micro_batch_sequences=3)
        ]
        moments = [v for s in state.optimizers[0].state.values() for v in s.values()]
        seen[late].append([m.tolist() for m in moments])
    assert seen[True] == seen[False]


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_is_in_the_record_of_its_step(late: bool) -> None:
    asked = iter([False, True, True, True, True, True])
    state = fresh()
    records = []
    for record in training(state, stop=lambda: next(asked), late=late):
        records.append(record)
        if record.stop:
            break
    assert [(r.step, r.stop) for r in records] == [(1, False), (2, True)]
    assert state.step == 2
    undisturbed = fresh()
    train(undisturbed, stop_at=2)
    assert torch.equal(weights(state), weights(undisturbed))


def test_fp16_scales_its_losses_and_halves_the_scale_at_an_overflow() -> None:
    state, plain = fresh(), fresh()
    state.scaler = loss_scaler("fp16", CPU)
    assert state.scaler is not None
    exact = [r.metrics["train/loss"] for r in train(plain)]
    with spoiled(state, 2):
        records = train(state, precision="fp16")
    assert [r.step for r in records if "train/skipped" in r.metrics] == [3]
    assert state.scaler.get_scale() == 2.0**15
    losses = [r.metrics["train/loss"] for r in records]
    assert losses[:3] == pytest.approx(exact[:3], abs=0.01)
    assert losses != exact


def test_a_loss_far_above_the_last_ones_is_a_spike() -> None:
    guard = Guard()
    losses = np.random.default_rng(0).normal(3.0, 0.1, 400).tolist()
    for step, loss in enumerate(losses):
        assert guard.accept(step, loss) is None, step
    mean, sd = float(np.mean(losses[-WINDOW:])), float(np.std(losses[-WINDOW:]))
    assert guard.accept(400, mean + (SIGMAS - 0.1) * sd) is None
    guard.recent[-1] = losses[-1]
    window = guard.recent
    mean, sd = float(np.mean(window)), float(np.std(window))
    assert guard.accept(401, mean + 7 * sd) == pytest.approx(7.0)
    (spike,) = guard.spikes
    assert spike == {"step": 401, "loss": mean + 7 * sd, "threshold": pytest.approx(mean + SIGMAS * sd)}
    assert len(guard.recent) == WINDOW


def test_the_first_losses_are_no_spikes() -> None:
    guard = Guard()
    for step in range(FEWEST):
        assert guard.accept(step, 100.0 if step == FEWEST - 1 else 3.0) is None


def test_what_the_guard_knows_survives_a_checkpoint_exactly() -> None:
    losses = np.random.default_rng(1).normal(3.0, 0.1, 200)
    losses[[150, 190]] = 9.0
    whole, parts = Guard(), Guard()
    for step, loss in enumerate(losses.tolist()):
        expected = whole.accept(step, loss)
        if step % 7 == 0:
            saved = json.loads(json.dumps(parts.state_dict()))
            parts = Guard()
            parts.load_state_dict(saved)
        assert parts.accept(step, loss) == expected
    assert parts == whole
    assert [spike["step"] for spike in whole.spikes] == [150, 190]


def test_a_checkpoint_with_a_scale_fits_fp16_alone() -> None:
    scaled, plain = fresh(), fresh()
    scaled.scaler = loss_scaler("fp16", CPU)
    for ours, theirs, what in ((plain, scaled, "has a loss scale"), (scaled, plain, "has no loss scale")):
        with pytest.raises(ConfigError, match=what):
            ours.load_state_dict(theirs.state_dict())
