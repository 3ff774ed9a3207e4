"""A GPT-2 small enough to train in milliseconds, and batches that are a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpt2lab.model import ModelConfig, build_model
from gpt2lab.optim import OptimConfig, build_optimizers
from gpt2lab.training import TrainState

VOCABULARY, BLOCK, SEQUENCES = 29, 8, 8


@dataclass
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


def make_state(optim: OptimConfig, seed: int = 1, **model: Any) -> TrainState:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": VOCABULARY}
    built = build_model(ModelConfig(**(sizes | model)), seed=seed)
    return TrainState(built, build_optimizers(optim, built.params()))


@pytest.fixture
def batches() -> RandomBatches:
    return RandomBatches()


@pytest.fixture
def fresh() -> Callable[..., TrainState]:
    """A new training state: fresh(optim, seed=, dropout=, ...)."""
    return make_state


@pytest.fixture
def optim() -> OptimConfig:
    return OptimConfig(lr=1e-2, warmup_steps=2)
