"""What tests of the loop share; those on a GPU use it too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from gpt2lab.training import TrainingConfig, TrainState

Fresh = Callable[..., TrainState]


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"steps": 6, "batch_tokens": 64, "device": "cpu"} | changes))


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()]).cpu()


@contextmanager
def spoiled(state: TrainState, *at_calls: int, value: float = math.inf) -> Iterator[None]:
    """One gradient of the model becomes `value` in the backward passes of those numbers."""
    calls = iter(range(1000))
    hook = lambda gradient: torch.full_like(gradient, value) if next(calls) in at_calls else gradient  # noqa: E731
    handle = next(state.model.parameters()).register_hook(hook)
    yield
    handle.remove()


class Twice(torch.optim.SGD):
    """Steps with the gradient at the weights that a plain step would lead to."""

    takes_closure = True
    norms: ClassVar[list[float]] = []

    def step(self, closure: Any) -> None:  # type: ignore[override]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        super().step()
        try:
            closure()
        finally:
            for weight, start in zip(weights, before, strict=True):
                weight.data.copy_(start)
        self.norms.append(float(torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])))
        super().step()
