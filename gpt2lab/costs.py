"""What an assembly costs, found by building it without memory and counting, never declared by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.model import GPT, ModelConfig


@dataclass(frozen=True)
class Costs:
    """Parameters and floating-point work of one model.

    parameters:               all of them, each once.
    non_embedding_parameters: without token and position tables and an untied head.
    active_parameters:        those that work on one token (experts count by the share that is chosen).
    flops_per_token:          forward and backward, in FLOP, at the full context.
    """

    parameters: int
    non_embedding_parameters: int
    active_parameters: int
    flops_per_token: float


@lru_cache(maxsize=256)
def costs(config: ModelConfig) -> Costs:
    """Build on the meta device, run one sequence of block_size tokens forward and backward, and count.

    The count is of matrix multiplications as written: attention counts the whole square of scores, masked or not, and
    an MLP with experts counts an even load.
    """
    with torch.device("meta"):
        model = GPT(config)
        tokens = torch.zeros(1, config.block_size, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model.objective(tokens, tokens)[0].backward()
    found = model.params()
    tables = sum(p.tensor.numel() for p in found if p.role.kind in ("embedding", "position", "head"))
    total = sum(p.tensor.numel() for p in found)
    active = sum(p.tensor.numel() * p.role.active for p in found)
    return Costs(total, total - tables, round(active), counter.get_total_flops() / config.block_size)
