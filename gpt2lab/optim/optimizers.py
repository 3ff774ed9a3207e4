"""What turns gradients into updates.

A component receives (params: Sequence[Param], lr: float) and returns a list of torch optimizers, because some recipes
update matrices by one rule and everything else by another. It reads roles, never names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch.optim import Optimizer

from gpt2lab.components.base import Param
from gpt2lab.optim.groups import decay_groups
from gpt2lab.registry import Slot

optimizer = Slot("optim.optimizer", "what turns gradients into updates", default="adamw")

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
FUSED_DEVICES = ("cpu", "cuda", "mps")


@optimizer.register("adamw", source="arXiv:1711.05101", can=("rates",), examples=({"weight_decay": 0.0},))
def adamw(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    eps: Annotated[float, Field(gt=0)] = 1e-8,
    weight_decay: Annotated[float, Field(ge=0)] = 0.1,
) -> list[Optimizer]:
    """Adam with decoupled weight decay on matrices and embeddings, as GPT-3 and most GPT-2 recipes since.

    w -= rate (m / (sqrt(v) + eps) + weight_decay w), with bias-corrected averages m of g and v of g^2.

    betas:        how much of the old averages of g and of g^2 a step keeps.
    eps:          keeps the division finite.
    weight_decay: the share of a decayed weight that a step at rate 1 would take away.
    As in torch, the decay of one step is rate x weight_decay, so a schedule or a sweep of the rate moves both.
    """
    fused = all(param.tensor.device.type in FUSED_DEVICES for param in params)
    groups = decay_groups(params, weight_decay)
    return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)]
