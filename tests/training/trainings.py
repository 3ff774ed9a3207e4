"""What tests of the loop share; those on a GPU use it too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
