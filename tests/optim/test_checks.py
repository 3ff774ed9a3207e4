"""Contract checks find optimizers that break a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

from gpt2lab.components.base import Param
from gpt2lab.optim import Average, averaging, optimizer
from gpt2lab.testing import Case, problem_of
from gpt2lab.testing.checks import check_average, check_optimizer, check_resume, check_same_on_all_ranks


class Noisy(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.add_(torch.randn_like(weight), alpha=1e-4)


class Counting(SGD):
    """Its rate falls by a count that is in no state dict."""

    count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.count
        super().step()


class Ramped(SGD):
    """Its rate follows the progress of the training, which the loop sets in every group."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * (1 - group["progress"])
        super().step()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]


class Pickled(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.state[self.param_groups[0]["params"][0]]["rule"] = range(3)


class Greedy(Average):
    """Changes the weights that it should only read."""

    def update(self, step: int) -> None:
        with torch.no_grad():
            for weight in self.weights:
                weight.mul_(0.999)

    def mean(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, saved: Any) -> None:
        pass


@pytest.fixture
def wrong(no_plugins_after: None) -> Callable[[type[Optimizer]], Case]:
    """A case of an optimizer of that class, registered for the time of a test."""

    def registered(kind: type[Any]) -> Case:
        def made(params: Sequence[Param], lr: float) -> list[Optimizer]:
            """Wrong on purpose."""
            return [kind([param.tensor for param in params], lr=lr, momentum=0.9)]

        optimizer.register("wrong", source="test")(made)
        return Case("optimizer", "wrong")

    return registered


@pytest.mark.parametrize(
    ("kind", "check", "problem"),
    [
        (Noisy, check_same_on_all_ranks, "draws from the global generator, so ranks drift apart"),
        (Counting, check_resume, "a restored optimizer continues differently"),
        (Pickled, check_resume, "a checkpoint cannot hold"),
    ],
)
def test_what_breaks_a_rule_is_found(wrong: Any, kind: type[Optimizer], check: Any, problem: str) -> None:
    assert problem in str(problem_of(check, wrong(kind)))
    assert problem_of(check, Case("optimizer", "sgd")) is None


@pytest.mark.parametrize("check", [check_optimizer, check_resume])
def test_an_optimizer_may_read_the_progress_of_the_training(wrong: Any, check: Any) -> None:
    assert problem_of(check, wrong(Ramped)) is None


@pytest.mark.usefixtures("no_plugins_after")
def test_an_average_that_changes_the_training_is_found() -> None:
    def greedy(params: Sequence[Param], steps: int) -> Average:
        """Wrong on purpose."""
        return Greedy(params)

    averaging.register("greedy", source="test")(greedy)
    problem = problem_of(check_average, Case("averaging", "greedy"))
    assert problem == "the training is another one with the average"
