"""Optimizers.

A component receives (params: Sequence[Param], lr: float) and returns a list of torch optimizers, because some recipes
update matrices by one rule and everything else by another. It distinguishes parameters by role, never by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.optim import Optimizer

from gpt2lab.components.base import Param
from gpt2lab.optim.groups import decay_groups
from gpt2lab.registry import Slot

optimizer = Slot("optim.optimizer", "how gradients become updates", default="adamw")

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
    """Adam with decoupled weight decay on matrices and embeddings, as in GPT-3 and most GPT-2 recipes since.

    w -= rate (m / (sqrt(v) + eps) + weight_decay w), with bias-corrected averages m of g and v of g^2.

    betas:        decay factors of the averages of g and g^2.
    eps:          prevents division by zero.
    weight_decay: the share by which a step at rate 1 would decay a weight.
    As in torch, the decay of one step is rate x weight_decay, so a schedule or a sweep of the rate changes both.
    """
    fused = all(param.tensor.device.type in FUSED_DEVICES for param in params)
    groups = decay_groups(params, weight_decay)
    return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)]


class Lion(Optimizer):
    """w -= rate (sign(b1 m + (1 - b1) g) + weight_decay w), then m = b2 m + (1 - b2) g. torch has no Lion.

    Source: arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; gradients are not changed."""
        assert closure is None
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                average = state["exp_avg"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(average.lerp(weight.grad, 1 - first).sign_(), alpha=-group["lr"])
                average.lerp_(weight.grad, 1 - second)


@optimizer.register("lion", source="arXiv:2302.06675", examples=({"weight_decay": 0.0},))
def lion(
    params: Sequence[Param],
    lr: float,
    *,
    betas: tuple[Decay, Decay] = (0.95, 0.98),
    weight_decay: Annotated[float, Field(ge=0)] = 1.0,
) -> list[Optimizer]:
    """The sign of an average of gradients: every weight changes by the full rate, so rates are smaller than Adam's.

    betas:        factors of the old average in the update and in the new average (the paper's values for language).
    weight_decay: as in adamw; the smaller rate needs a proportionally larger value for the same decay.
    """
    return [Lion(decay_groups(params, weight_decay), lr, betas)]


@optimizer.register("muon", source="arXiv:2502.16982")
def muon(
    params: Sequence[Param],
    lr: float,
    *,
    momentum: Decay = 0.95,
    betas: tuple[Decay, Decay] = (0.9, 0.95),
    weight_decay: Annotated[float, Field(ge=0)] = 0.1,
) -> list[Optimizer]:
    """Orthogonalised momentum for the matrices in blocks, with updates of Adam's size; adamw for everything else.

    momentum:     Nesterov momentum of the matrices in blocks.
    betas:        those of adamw, for embeddings, head, gains and biases.
    weight_decay: of matrices and embeddings, as in adamw.
    Updates are scaled to the rms of Adam's, so that the same rate suits both (section 2.2). Stacked matrices, such as
    query, key and value, are orthogonalised as one.
    """
    in_blocks = [p for p in params if p.role.kind in ("hidden", "residual_out") and p.tensor.ndim == 2]
    chosen = {id(param.tensor) for param in in_blocks}
    others = adamw([p for p in params if id(p.tensor) not in chosen], lr, betas=betas, weight_decay=weight_decay)
    if not in_blocks:
        return others
    matrices = [param.tensor for param in in_blocks]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        *others,
    ]
