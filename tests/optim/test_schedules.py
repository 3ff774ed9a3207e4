"""Schedules against hand-computed values, torch and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import optimization

from gpt2lab.optim import OptimConfig, schedule

STEPS, WARMUP = 110, 10
WSD = {"num_decay_steps": 22, "num_training_steps": STEPS}


def built(name: str, steps: int = STEPS, warmup: int = WARMUP, **options: object) -> list[float]:
    config = OptimConfig.model_validate({"warmup_steps": warmup, "schedule": {"name": name, **options}})
    multiplier = config.multiplier(steps)
    return [multiplier(step) for step in range(steps + 1)]


@pytest.mark.parametrize("name", schedule.names())
def test_every_schedule_shares_the_warmup_and_stays_between_0_and_1(name: str) -> None:
    values = built(name)
    assert values[:WARMUP] == [(step + 1) / WARMUP for step in range(WARMUP)]
    assert values[WARMUP] == 1.0
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[WARMUP:] == sorted(values[WARMUP:], reverse=True)
    assert built(name, warmup=0)[0] == 1.0
    config = OptimConfig.model_validate({"warmup_steps": WARMUP, "schedule": name})
    assert config.multiplier(STEPS)(STEPS + 1000) == values[-1]
    assert config.multiplier(WARMUP)(WARMUP - 1) == 1.0


def test_values_by_hand() -> None:
    cosine = built("cosine")
    assert cosine[60] == pytest.approx(0.55)  # halfway between 1 and 0.1
    assert cosine[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert cosine[STEPS] == pytest.approx(0.1)
    linear = built("linear")
    assert (linear[35], linear[60], linear[STEPS]) == pytest.approx((0.75, 0.5, 0.0))
    assert linear[STEPS - 1] > 0
    assert built("linear", final_fraction="0.2")[60] == pytest.approx(0.6)
    assert set(built("constant")[WARMUP:]) == {1.0}
    wsd = built("wsd", shape="linear", decay_fraction="0.2")  # 22 of 110 steps
    assert set(wsd[WARMUP:89]) == {1.0}
    assert (wsd[89], wsd[99], wsd[109], wsd[STEPS]) == pytest.approx((21 / 22, 0.5, 1 / 22, 0.0))
    sqrt = built("wsd", final_fraction="0.1")
    assert set(sqrt[WARMUP:89]) == {1.0}
    assert (sqrt[99], sqrt[STEPS]) == pytest.approx((1 - 0.9 * math.sqrt(0.5), 0.1))
    assert built("wsd", decay_fraction="1", shape="linear") == pytest.approx(built("linear"))  # all after the warm-up
    inverse = built("inverse_sqrt")
    assert (inverse[40], inverse[90]) == pytest.approx((0.5, 1 / 3))
    assert built("inverse_sqrt", warmup=0)[:5] == pytest.approx([1, 1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5])


@pytest.mark.parametrize(
    ("name", "options", "maker", "settings"),
    [
        ("cosine", {"final_fraction": "0"}, "get_cosine_schedule_with_warmup", {"num_training_steps": STEPS}),
        ("linear", {"final_fraction": "0"}, "get_linear_schedule_with_warmup", {"num_training_steps": STEPS}),
        ("inverse_sqrt", {}, "get_inverse_sqrt_schedule", {}),
        ("wsd", {"shape": "linear"}, "get_wsd_schedule", WSD | {"decay_type": "linear"}),
        ("wsd", {"shape": "sqrt"}, "get_wsd_schedule", WSD | {"decay_type": "1-sqrt"}),
    ],
)  # fmt: skip
def test_agreement_with_transformers(name: str, options: dict[str, Any], maker: str, settings: dict[str, Any]) -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = getattr(optimization, maker)(sgd, num_warmup_steps=WARMUP, **settings).lr_lambdas[0]
    ours = built(name, **options)
    assert ours[WARMUP:] == pytest.approx([theirs(step) for step in range(WARMUP, STEPS + 1)], abs=1e-12)
    assert ours[: WARMUP - 1] == pytest.approx([theirs(step + 1) for step in range(WARMUP - 1)])  # theirs starts at 0


def test_agreement_with_torchs_cosine_annealing() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=50, eta_min=0.1)
    ours = built("cosine", steps=50, warmup=0)
    for step in range(51):
        assert ours[step] == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        sgd.step()
        theirs.step()


def test_exponential_and_stairs() -> None:
    assert built("exponential", steps=4, warmup=0)[:3:2] == pytest.approx([1, 0.1**0.5])
    stairs = built("stairs", steps=10, warmup=0)
    assert [round(stairs[step], 3) for step in (0, 7, 8, 9)] == [1, 1, 0.316, 0.1]


def test_a_warmup_longer_than_the_training_is_a_problem() -> None:
    config = OptimConfig(warmup_steps=100)
    assert [problem.where for problem in config.problems(99)] == ["optim.warmup_steps"]
    assert config.problems(100) == []


@pytest.mark.parametrize("wrong", ["1.1", "-0.1"])
def test_impossible_fractions_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"final_fraction|fit"):
        built("cosine", final_fraction=wrong)
