"""A model as the ranks train it together: torch's DistributedDataParallel around its objective.

DDP joins gradients bucket by bucket while the backward pass still runs. Alone there is nothing to join.
"""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2lab.training.distributed import World

# buffers are constants; torch 2.13 gave the argument another name, and warns of the old one
NEWER = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if NEWER else "broadcast_buffers": False}


class Objective(nn.Module):
    """What is minimised, as a module of its own, because DDP wraps modules and watches their `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(n, T), (n, T) -> objective (), plain cross entropy () without gradient"""
        objective_of: Any = self.model.objective
        objective, parts = objective_of(inputs, targets)
        return objective, parts["loss"].detach()


class Replica:
    """One rank's copy of a model in training."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self._objective: nn.Module = Objective(model)
        self._shared: DistributedDataParallel | None = None
        if world.size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self._shared = DistributedDataParallel(
                self._objective,
                device_ids=ids,
                **OWN_BUFFERS,
                gradient_as_bucket_view=True,
                find_unused_parameters=some_may_rest(model),
            )

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and loss of one micro-batch.  (n, T), (n, T) -> (), ()"""
        run: nn.Module = self._shared or self._objective
        objective, loss = run(inputs, targets)
        return objective, loss

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch: gradients are joined after the `last` one of a step only."""
        if self._shared is None or last:
            return contextlib.nullcontext()
        return self._shared.no_sync()


def some_may_rest(model: nn.Module) -> bool:
    """Whether a batch may leave a parameter without a gradient: experts that no token chose."""
    params: Any = getattr(model, "params", None)
    return params is not None and any(param.role.active < 1 for param in params())


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters lie."""
    return next(model.parameters()).device
