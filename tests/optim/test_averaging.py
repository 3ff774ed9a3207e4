"""Averages of weights against torch's AveragedModel and means by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from gpt2lab.components.base import Param, Role
from gpt2lab.config import config_from_text
from gpt2lab.errors import ConfigError
from gpt2lab.optim import OptimConfig, build_averaging


def averages(name: str, steps: int = 10, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after each of some steps, and what the component evaluates after each."""
    weight = nn.Parameter(torch.zeros(2, 3))
    config = OptimConfig.model_validate({"averaging": {"name": name, **options}})
    average = build_averaging(config, [Param("w", weight, Role("hidden"))], steps)
    assert average is not None
    weights, means = [], []
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.update(step)
        weights.append(weight.detach().clone())
        ((same, mean),) = average.evaluated()
        assert same is weight
        means.append(mean.detach().clone())
    return weights, means


def torchs(weights: list[Tensor], **how: Any) -> list[Tensor]:
    """The same by torch."""
    module = nn.Linear(3, 2, bias=False)
    average, means = AveragedModel(module, **how), []
    for weight in weights:
        with torch.no_grad():
            module.weight.copy_(weight)
        average.update_parameters(module)
        means.append(average.module.weight.detach().clone())
    return means


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-6)


def test_ema_is_torchs() -> None:
    weights, means = averages("ema", decay=0.8, warmup=False)
    close(means, torchs(weights, avg_fn=get_ema_avg_fn(0.8)))


def test_ema_with_warmup_begins_quickly() -> None:
    """n = 1: 2/11 of the old and 9/11 of the new weights; the decay is reached at n = 35."""
    weights, means = averages("ema", decay=0.8, steps=40)
    assert torch.equal(means[0], weights[0])
    close(means[1:2], [weights[0] * 2 / 11 + weights[1] * 9 / 11])
    close(means[2:3], [means[1] * 3 / 12 + weights[2] * 9 / 12])
    close(means[37:], [means[step - 1] * 0.8 + weights[step] * 0.2 for step in range(37, 40)])


def test_polyak_is_torchs_equal_average_of_the_last_part() -> None:
    weights, means = averages("polyak", start=0.5)
    close(means[:5], weights[:5])
    close(means[5:], torchs(weights[5:]))
    assert torch.equal(means[4], weights[4])


def test_lawa_is_the_mean_of_the_latest_snapshots() -> None:
    weights, means = averages("lawa", checkpoints=3, interval=0.2)  # every second step of ten
    close(means[:2], [weights[0], weights[1]])
    close(means[2:4], [weights[1], (weights[1] + weights[3]) / 2])
    close(means[9:], [(weights[5] + weights[7] + weights[9]) / 3])


def test_none_evaluates_the_trained_weights() -> None:
    assert OptimConfig().averaging.name == "none"
    assert build_averaging(OptimConfig(), [], 10) is None


@pytest.mark.parametrize("name", ["ema", "polyak", "lawa"])
def test_an_average_of_an_average_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="schedule_free averages already"):
        config_from_text(f"optim: {{optimizer: schedule_free, averaging: {name}}}")
