"""The seam between one process and several: each rank has its share of a batch, and these functions join the shares.

With one process everything here is a no-op, so the loop and the evaluations are written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all that train one model together; `ranks.join_world` makes one of size > 1.

    local_rank: among the ranks of this machine. Every rank must make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, the same on each."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag)))) if self.size > 1 else flag

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """What every rank has, in order of rank, the same list on each."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


ALONE = World()
"""One process that trains by itself."""
