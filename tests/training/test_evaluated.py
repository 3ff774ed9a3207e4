"""The weights that are evaluated: in the model while it is judged, in its checkpoints, and the same after resuming."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainings import fresh, spoiled, train, training

from gpt2lab.errors import ConfigError
from gpt2lab.optim import OptimConfig, build_averaging
from gpt2lab.training import TrainState, load_latest, save

EMA: dict[str, Any] = {"averaging": {"name": "ema", "decay": 0.7, "warmup": False}}
SCHEDULE_FREE: dict[str, Any] = {"optimizer": "schedule_free", "schedule": "constant"}
CHOICES = [
    EMA,
    {"averaging": {"name": "polyak", "start": 0.3}},
    {"averaging": {"name": "lawa", "checkpoints": 2, "interval": 0.3}},
    SCHEDULE_FREE,
]


def optim_of(choice: dict[str, Any]) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 1e-2, "warmup_steps": 2, **choice})


def started(choice: dict[str, Any], **changes: Any) -> TrainState:
    optim = optim_of(choice)
    state = fresh(optim, **changes)
    state.averaging = build_averaging(optim, state.model.params(), 6)  # type: ignore[operator]
    return state


def trained(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.model.named_parameters()}


def judged(state: TrainState) -> dict[str, Tensor]:
    with state.evaluated():
        return trained(state)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_checkpoint_holds_what_is_evaluated_and_resumes_exactly(tmp_path: Path, choice: dict[str, Any]) -> None:
    whole = started(choice)
    train(whole, optim_of(choice))
    first = started(choice)
    train(first, optim_of(choice), stop_at=3)
    before = judged(first)
    folder = save(tmp_path, first)
    published = load_file(folder / "model.safetensors")
    assert all(torch.equal(published[name], before[name]) for name in published)
    assert not equal(trained(first), before)

    resumed = started(choice, seed=9)
    load_latest(tmp_path, resumed)
    assert equal(trained(resumed), trained(first)) and equal(judged(resumed), before)
    train(resumed, optim_of(choice))
    assert equal(trained(resumed), trained(whole)) and equal(judged(resumed), judged(whole))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_judging_after_every_step_changes_nothing(choice: dict[str, Any]) -> None:
    quiet, watched = started(choice), started(choice)
    train(quiet, optim_of(choice))
    for _ in training(watched, optim_of(choice)):
        before = trained(watched)
        with watched.evaluated():
            pass
        with pytest.raises(ZeroDivisionError), watched.evaluated():
            raise ZeroDivisionError
        assert equal(trained(watched), before)
    assert equal(trained(watched), trained(quiet)) and equal(judged(watched), judged(quiet))


def test_a_canonical_checkpoint_has_no_more_than_before(tmp_path: Path) -> None:
    state = started({})
    train(state, stop_at=1)
    folder = save(tmp_path, state)
    record = json.loads((folder / "state.json").read_text())
    assert list(record) == ["format", "optimizers", "step", "tokens", "seconds", "scaler", "guard", "random", "extra"]
    assert record["format"] == 2
    assert all(name.startswith("optimizers.") for name in load_file(folder / "optimizer.safetensors"))


def test_a_skipped_step_is_not_averaged() -> None:
    state, mean, decay = started(EMA), dict[str, Tensor](), 0.7
    with spoiled(state, 2):
        for record in training(state, optim_of(EMA), nonfinite="skip"):
            if "train/skipped" not in record.metrics:
                now = trained(state)
                mean = {name: decay * mean[name] + (1 - decay) * now[name] if mean else now[name] for name in now}
    after = judged(state)
    torch.testing.assert_close(
        torch.cat([after[n].flatten() for n in mean]), torch.cat([*map(torch.flatten, mean.values())])
    )


def test_a_checkpoint_with_or_without_an_average_fits_no_other(tmp_path: Path) -> None:
    plain, averaged = started({}), started(EMA)
    for state, choice in ((plain, {}), (averaged, EMA)):
        train(state, optim_of(choice), stop_at=2)
    before = trained(plain)
    with pytest.raises(ConfigError, match=r"optim\.averaging: ema in the checkpoint, none here"):
        plain.load_state_dict(averaged.state_dict())
    with pytest.raises(ConfigError, match="none in the checkpoint, ema here"):
        averaged.load_state_dict(plain.state_dict())
    assert equal(trained(plain), before)


@pytest.mark.parametrize("choice", [{}, *CHOICES], ids=str)
def test_a_branch_starts_from_the_trained_weights(choice: dict[str, Any]) -> None:
    """One that changes nothing ends as its trunk; an average of another kind starts anew."""
    trunk = started(choice)
    train(trunk, optim_of(choice), stop_at=3)
    branch, other = started(choice, seed=9), started({**choice, **({} if "optimizer" in choice else EMA)})
    for state in (branch, other):
        state.start_from(copy.deepcopy(trunk.state_dict()))
        assert equal(trained(state), trained(trunk))
    assert equal(judged(other), trained(trunk)) or choice in (EMA, SCHEDULE_FREE)
    train(trunk, optim_of(choice))
    train(branch, optim_of(choice))
    assert equal(trained(branch), trained(trunk)) and equal(judged(branch), judged(trunk))
