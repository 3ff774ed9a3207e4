"""The seam between one process and several: each rank has its share of a batch, and these functions join the shares.

With one process everything here is a no-op, so the loop and the evaluations are written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all that train one model together; needs torch.distributed set up when size > 1."""

    rank: int = 0
    size: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each; every rank must call it."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, the same on each; every rank must call it."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor


ALONE = World()
"""One process that trains by itself."""


def average_gradients(parameters: Iterable[torch.nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over the ranks. A NaN or infinity on one rank thereby reaches all.

    A parameter that some ranks did not use counts as zero there; one that no rank used keeps no gradient, so that the
    optimizer passes it by as in one process.
    """
    if world.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    pending = []
    for parameter, count in zip(trained, world.sum(used).tolist(), strict=True):
        if count == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        pending.append((parameter.grad, dist.all_reduce(parameter.grad, async_op=True)))
    for gradient, work in pending:
        assert work is not None
        work.wait()
        gradient /= world.size
