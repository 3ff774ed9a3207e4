"""A GPT-2 small enough to train in milliseconds, batches that are a pure function of the step, and the loop over both;
tests on a GPU use some of it too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2lab.model import ModelConfig, build_model
from gpt2lab.optim import OptimConfig, build_optimizers
from gpt2lab.training import StepRecord, TrainingConfig, TrainState, steps

VOCABULARY, BLOCK, SEQUENCES = 29, 8, 8
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2)


@dataclass(frozen=True)
class RandomBatches:
    """Batches drawn from (seed, step); ranks share one global batch. `ignore` blanks that many targets at the end."""

    seed: int = 0
    ignore: int = 0

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        drawn = np.random.default_rng([self.seed, step]).integers(0, VOCABULARY, (SEQUENCES, BLOCK + 1))
        targets = drawn[:, 1:].copy()
        if self.ignore:
            targets.ravel()[-self.ignore :] = -100
        mine = slice(rank * SEQUENCES // world, (rank + 1) * SEQUENCES // world)
        return drawn[mine, :-1].copy(), targets[mine]


BATCHES = RandomBatches()


def fresh(optim: OptimConfig = OPTIM, seed: int = 1, **model: Any) -> TrainState:
    """A new training state."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": VOCABULARY}
    built = build_model(ModelConfig(**(sizes | model)), seed=seed)
    return TrainState(built, build_optimizers(optim, built.params()))


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"steps": 6, "batch_tokens": 64, "device": "cpu"} | changes))


def training(
    state: TrainState, optim: OptimConfig = OPTIM, batches: Any = BATCHES, *, seed: int = 7, **options: Any
) -> Iterator[StepRecord]:
    """The loop. options: its own, and changes to `config`."""
    changes = {name: options.pop(name) for name in TrainingConfig.model_fields.keys() & options}
    return steps(state, batches, optim, config(**changes), seed=seed, **options)


def train(state: TrainState, optim: OptimConfig = OPTIM, batches: Any = BATCHES, **options: Any) -> list[StepRecord]:
    """All of its records."""
    return list(training(state, optim, batches, **options))


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
