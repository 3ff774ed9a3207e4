"""Training on one or several ranks. Each rank has its share of a batch, and these functions combine the shares.

With one process everything here is a no-op, so the loop and the evaluations are written once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# buffers are constants; torch 2.13 renamed the argument, and warns about the old name
RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}


@dataclass(frozen=True)
class World:
    """This process among all that train a model together; `ranks.join_world` makes one of size > 1.

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
        """Wait for all ranks."""
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order of rank, the same list on each."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


ALONE = World()
"""A single process."""


class Objective(nn.Module):
    """The training objective as a module, because DDP wraps modules and follows their `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(n, T), (n, T) -> objective (), plain cross entropy () without gradient"""
        objective_of: Any = self.model.objective
        objective, parts = objective_of(inputs, targets)
        return objective, parts["loss"].detach()


class Replica:
    """One rank's copy of a model in training, inside torch's DistributedDataParallel if there are several ranks. DDP
    reduces gradients bucket by bucket while the backward pass still runs."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self._objective: nn.Module = Objective(model)
        self._ddp: DistributedDataParallel | None = None
        if world.size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self._ddp = DistributedDataParallel(
                self._objective,
                device_ids=ids,
                **NO_BUFFER_SYNC,
                gradient_as_bucket_view=True,
                find_unused_parameters=may_leave_unused(model),
            )

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and loss of one micro-batch.  (n, T), (n, T) -> (), ()"""
        module: nn.Module = self._ddp or self._objective
        objective, loss = module(inputs, targets)
        return objective, loss

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """The context for forward and backward of a micro-batch: only the `last` one of a step reduces gradients."""
        if self._ddp is None or last:
            return contextlib.nullcontext()
        return self._ddp.no_sync()

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """The context for a backward pass before the first step, whose gradients are dropped.

        DDP assigns gradients to its buckets anew after the first backward pass, by the order in which they came. A ring
        of more than two ranks adds in an order that depends on an element's place in its bucket, so without this pass
        the first step after a resume would differ from the undisturbed training in the last bits.
        """
        buffers = {name: buffer.clone() for name, buffer in self._objective.named_buffers()}
        yield
        for name, buffer in self._objective.named_buffers():
            buffer.copy_(buffers[name])
        for parameter in self.parameters:
            parameter.grad = None


def may_leave_unused(model: nn.Module) -> bool:
    """Whether a batch may leave a parameter without a gradient: an expert that no token selects."""
    params: Any = getattr(model, "params", None)
    return params is not None and any(param.role.active < 1 for param in params())
