"""A GPT-2 of the sizes of contract tests, and parts of it.

B batch, T tokens, C channels, H heads, D channels per head, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2lab import testing
from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.registry import SLOTS

B, T, C, H, D, V = 2, 16, 32, 4, 8, 97
LATER = torch.ones(T, T, dtype=torch.bool).triu(1)


def config(**parts: Any) -> ModelConfig:
    return ModelConfig(**{"n_layer": 2, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V, **parts})


def initial(seed: int = 0, **parts: Any) -> GPT:
    """The model as it is before training, without its dropout."""
    return build_model(config(**parts), seed=seed).eval()


def model(**parts: Any) -> GPT:
    """One in which no weight is zero."""
    return testing.disturbed(initial(**parts))


def site(**parts: Any) -> Builder:
    """Where the first layer's parts are built."""
    return Builder(config(**parts), config(**parts).choices(), layer=0)


def part(slot: str, name: str, **options: Any) -> Any:
    """One component."""
    return SLOTS[slot][name].factory(site(), **options)


def tokens() -> Tensor:
    """(B, T)"""
    return testing.batch()[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(made: GPT, layer: int = 0, progress: float = 1.0) -> ForwardContext:
    """That of a layer of a model that reads `tokens`."""
    ctx = made.context(tokens())
    ctx.enter(layer, made.positions[layer])
    ctx.progress = torch.tensor(progress)
    return ctx
