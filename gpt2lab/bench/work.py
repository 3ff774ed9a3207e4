"""The configurations that are measured, and the batches that all sides train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpt2lab.data.batches import Batches
from gpt2lab.errors import ConfigError, unknown
from gpt2lab.model import ModelConfig

DIFFERENT_STEPS = 20
"""Steps until the random tokens come again."""


@dataclass(frozen=True)
class Work:
    """A model's sizes and its batch: what one training step has to do. sequences: in a batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    sequences: int
    vocab_size: int
    bias: bool = False

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.sequences * self.block_size

    def model(self) -> ModelConfig:
        """As our config."""
        return ModelConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            bias=self.bias,
        )

    def batches(self, seed: int = 0) -> Batches:
        """Batches of random tokens; the same for equal work."""
        tokens = np.random.default_rng(seed).integers(0, self.vocab_size, DIFFERENT_STEPS * self.tokens + 1)
        return Batches(tokens, self.block_size, self.sequences, seed)


WORKS = {
    "a": Work(4, 4, 128, 64, 12, 65),
    "b256": Work(6, 6, 384, 256, 8, 256),
    "b50k": Work(6, 6, 384, 256, 8, 50_304),
    "c": Work(12, 12, 768, 1024, 1, 50_304),
    "d": Work(12, 12, 768, 1024, 32, 50_304),
}
"""nanoGPT's example for a CPU; a small model with a vocabulary of bytes, and with GPT-2's; GPT-2 124M, with a batch of
one sequence and of as many as keep a GPU busy."""


def work_named(name: str) -> Work:
    """Raises ConfigError."""
    if name not in WORKS:
        raise ConfigError(unknown("configuration", name, WORKS), where="--config")
    return WORKS[name]
