"""One update of the weights, from gradients that are all there; and the numbers of the step, read when they are needed.

Nothing that is not finite reaches a weight. Where the program does not wait for the device, the optimizer itself gets a
flag on the device and leaves everything as it is, as it does for torch's GradScaler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2lab.errors import DataFault
from gpt2lab.faults import point, tensor
from gpt2lab.training.diagnostics import Updates
from gpt2lab.training.distributed import World
from gpt2lab.training.replica import Replica
from gpt2lab.training.settings import TrainingConfig
from gpt2lab.training.state import TrainState

if TYPE_CHECKING:
    from gpt2lab.training.loop import Batch, Optimisation


@dataclass(frozen=True)
class Seen:
    """The numbers of a step. loss, objective: nats, over all ranks.  grad_norm: before clipping."""

    loss: float
    objective: float
    grad_norm: float
    finite: bool
    stop: bool


@dataclass
class Numbers:
    """The numbers of a step, on the device until somebody asks. values: loss, objective, targets of an average rank,
    share of ranks that were asked to stop, gradient norm.  tokens: of this step, over all ranks.  scaled: whether its
    losses were (an overflow is then no divergence).  extra: metrics of a watched step."""

    step: int
    lr: float
    tokens: int
    scaled: bool
    values: Tensor
    ready: Any = None
    extra: dict[str, float] = field(default_factory=dict)
    _seen: Seen | None = None

    def read(self) -> Seen:
        """Wait for them, the first time. Raises DataFault for a batch in which nothing counted."""
        if self._seen is None:
            if self.ready is not None:
                self.ready.synchronize()
            loss, objective, counted, stop, norm = self.values.tolist()
            if counted == 0:
                raise DataFault(f"step {self.step + 1}: no target in the whole batch counts", where="training")
            finite = all(map(math.isfinite, (loss, objective, norm)))
            self._seen = Seen(loss, objective, norm, finite, stop > 0)
        return self._seen


class Update:
    """Clips gradients and steps optimizers. `ahead`: the program does not wait for the numbers of its own step."""

    def __init__(
        self,
        state: TrainState,
        optim: Optimisation,
        training: TrainingConfig,
        replica: Replica,
        world: World,
        ahead: bool | None = None,
    ) -> None:
        self.state, self.optim, self.replica, self.world = state, optim, replica, world
        self.multiplier = optim.multiplier(training.steps)
        # such optimizers take `found_inf` and then change nothing: torch's contract with its GradScaler
        able = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in state.optimizers)
        self.ahead = (replica.device.type == "cuda" and able) if ahead is None else ahead
        assert able or not self.ahead

    def __call__(self, step: int, losses: Tensor, batch: Batch, *, stop: bool, watched: bool) -> Numbers:
        """Update the weights by the gradients of `step`, counted from 0, unless one of its numbers is not finite.

        losses (3,): as `accumulate` returns them.  watched: measure how far weights move.
        """
        device, world = self.replica.device, self.world
        asked = torch.full((1,), float(stop), device=device)
        norm = self._clipped().to(losses).reshape(1)  # the same on all ranks, unless one of them computes wrongly
        values = world.mean(torch.cat([losses, asked, norm]))  # one message for all that ranks have to agree on
        factor = self.multiplier(step)
        numbers = Numbers(
            step, self.optim.lr * factor, batch.inputs.numel() * world.size, self.state.scaler is not None, values
        )
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        point("optimizer")
        moves = Updates(self.state.model.params()) if watched else None  # type: ignore[operator]
        if moves is not None:
            moves.before()
        if self.ahead:
            flag = (~values.isfinite().all()).float()
            numbers.values = values.to("cpu", non_blocking=True)
            if device.type == "cuda":
                numbers.ready = torch.cuda.Event()
                numbers.ready.record()
            self._step(flag)
        elif numbers.read().finite:
            self._step(None)
        if moves is not None:
            numbers.extra = moves.after()
        if self.state.scaler is not None:
            self.state.scaler.update()
        self.drop_gradients()
        return numbers

    def drop_gradients(self) -> None:
        """Forget all gradients, which frees their memory."""
        for parameter in self.replica.parameters:
            parameter.grad = None

    def _clipped(self) -> Tensor:
        """Clip the whole gradient; -> its norm before, which is not finite when a gradient is not.

        torch's clip_grad_norm_ alone would turn every gradient into NaN and say nothing.
        """
        if self.state.scaler is not None:
            for optimizer in self.state.optimizers:
                self.state.scaler.unscale_(optimizer)
        with_gradient = [p for p in self.replica.parameters if p.grad is not None]
        gradients: Sequence[Tensor] = [p.grad for p in with_gradient if p.grad is not None]
        if gradients:
            with_gradient[0].grad = tensor("grad", gradients[0])
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        if self.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(with_gradient, self.optim.grad_clip, norm)
        return norm

    def _step(self, flag: Tensor | None) -> None:
        """Step every optimizer; with a flag of 1 on the device it changes nothing."""
        for optimizer in self.state.optimizers:
            settable: Any = optimizer
            if flag is not None:
                settable.found_inf = flag
            optimizer.step()
            if flag is not None:
                del settable.found_inf
