"""The training loop: a generator of step records. It neither evaluates nor saves nor logs; its caller does.

Shapes: n sequences of this rank's share of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from gpt2lab.errors import DataFault, NumericsFault, Problem
from gpt2lab.schema import Settings
from gpt2lab.training.distributed import ALONE, World, average_gradients
from gpt2lab.training.precision import DeviceName, Precision, autocast, memory_guard
from gpt2lab.training.state import TrainState


class TrainingConfig(Settings):
    """How long and how to train; the defaults are one pass over 10B tokens, the GPT-2 124M recipe."""

    steps: int = Field(19_073, ge=1)
    """Optimizer steps."""
    batch_tokens: int = Field(524_288, ge=1)
    """Tokens in each step, over all ranks."""
    micro_batch_sequences: int | None = Field(None, ge=1)
    """Sequences in one forward pass of one rank: fewer need less memory for the same step. Null: all of them."""
    precision: Precision = "fp32"
    """Arithmetic of matrix products; weights and optimizer state are fp32 always."""
    device: DeviceName = "auto"
    """Where to compute; auto is cuda, else mps, else cpu."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null leaves torch's choice."""
    checkpoint_every_steps: int = Field(1_000, ge=1)
    """Steps between checkpoints."""
    log_every_steps: int = Field(1, ge=1)
    """Steps between records that carry metrics."""

    def problems(self, block_size: int, world_size: int = 1) -> list[Problem]:
        """What cannot mean anything with sequences of `block_size` tokens on `world_size` ranks."""
        unit = block_size * world_size
        if self.batch_tokens % unit == 0:
            return []
        per = f"block_size {block_size}" + (f" x {world_size} ranks" if world_size > 1 else "")
        nearest = max(1, round(self.batch_tokens / unit)) * unit
        return [
            Problem("training.batch_tokens", f"{self.batch_tokens} is no multiple of {per}; the nearest is {nearest}")
        ]


class Batches(Protocol):
    """Where batches come from: a pure function of the step and the rank."""

    def at(self, step: int, *, rank: int, world: int) -> tuple[Any, Any]:
        """Inputs and targets of this rank's share, arrays or tensors (n, T) of int64."""
        ...


class Optimisation(Protocol):
    """What the loop needs to know of the optim section."""

    @property
    def lr(self) -> float: ...
    @property
    def grad_clip(self) -> float | None: ...
    def multiplier(self, steps: int) -> Callable[[int], float]: ...


@dataclass(frozen=True)
class StepRecord:
    """The training after `step` steps; `metrics` is empty for steps that are not logged."""

    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]


class Diverged(NumericsFault):
    """A loss or gradient that is not finite. The weights are still those before `step`, counted from 1."""

    def __init__(self, step: int, loss: float, grad_norm: float) -> None:
        super().__init__(
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}; the weights were left as they were",
            where="training",
            hint="a lower optim.lr, a longer optim.warmup_steps, or optim.grad_clip",
        )
        self.step = step


def steps(
    state: TrainState,
    batches: Batches,
    optim: Optimisation,
    training: TrainingConfig,
    *,
    seed: int,
    world: World = ALONE,
    stop_at: int | None = None,
) -> Iterator[StepRecord]:
    """Train from where `state` stands to the end of `training`, or to `stop_at` steps; one record after every step.

    The learning rate follows the whole of `training` wherever it stops, so stopping and going on changes nothing.
    The optimizers come from `build_optimizers`: each of their groups knows its `base_lr`. Seeds torch's global
    generator. Raises Diverged in the step that meets a number which is not finite, and EnvironmentFault when memory
    runs out.
    """
    multiplier = optim.multiplier(training.steps)
    end = training.steps if stop_at is None else min(stop_at, training.steps)
    state.model.train()
    while state.step < end:
        began = time.perf_counter()
        inputs, targets = (_tensor(x) for x in batches.at(state.step, rank=world.rank, world=world.size))
        size = training.micro_batch_sequences or len(inputs)
        with memory_guard(
            f"training, step {state.step + 1}",
            f"{size} sequences of {inputs.shape[1]} tokens in one pass",
            f"--set training.micro_batch_sequences={max(1, size // 2)}",
        ):
            losses = accumulate(state, inputs, targets, size, training.precision, seed, world)
            average_gradients(state.model.parameters(), world)
            loss, objective, norm = _clip(state, losses, optim.grad_clip, world)
            factor = multiplier(state.step)
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += inputs.numel() * world.size
        state.seconds += time.perf_counter() - began
        metrics: dict[str, float] = {}
        if state.step % training.log_every_steps == 0 or state.step == training.steps:
            metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": optim.lr * factor}
            if objective != loss:
                metrics["train/objective"] = objective
        yield StepRecord(state.step, state.tokens, state.seconds, metrics)


def accumulate(
    state: TrainState, inputs: Tensor, targets: Tensor, size: int, precision: Precision, seed: int, world: World
) -> Tensor:
    """Add up the gradients of one step, (n, T) tokens, over micro-batches of `size` sequences as if they were one.

    Every micro-batch weighs by the targets that count in it (those that are not -100), against the average over all
    ranks, so that the mean over ranks is the mean over targets.  -> (2,): loss and objective, this rank's part.
    """
    objective_of: Any = state.model.objective
    device = next(state.model.parameters()).device
    counted = [int((part != -100).sum()) for part in torch.split(targets, size)]
    total = float(sum(counted))
    if world.size > 1:
        total = float(world.mean(torch.tensor(total, device=device)))
    if total == 0:
        raise DataFault(f"step {state.step + 1}: no target in the whole batch counts", where="training")
    losses = torch.zeros(2, device=device)
    micro_batches = zip(torch.split(inputs, size), torch.split(targets, size), counted, strict=True)
    for micro, (x, y, count) in enumerate(micro_batches):
        if count == 0:
            continue
        reseed(seed, state.step, micro, world.rank)
        with autocast(precision, device):
            objective, parts = objective_of(_to(x, device), _to(y, device))
        weight = count / total
        (objective * weight).backward()
        losses += torch.stack([parts["loss"].detach(), objective.detach()]) * weight
    return losses


def _clip(state: TrainState, losses: Tensor, grad_clip: float | None, world: World) -> tuple[float, float, float]:
    """Clip the gradients; -> loss, objective and the gradient's norm before clipping. Raises Diverged.

    This is the one place in a step that waits for the device: whether the numbers are finite must be known before
    weights change. torch's clip_grad_norm_ alone would turn every gradient into NaN and say nothing.
    """
    with_gradient = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    values = torch.cat([world.mean(losses), norm.to(losses).reshape(1)]).tolist()
    if not all(map(math.isfinite, values)):
        for parameter in with_gradient:
            parameter.grad = None
        raise Diverged(state.step + 1, values[0], values[2])
    if grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, grad_clip, norm)
    return values[0], values[1], values[2]


def reseed(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed every device's generator from where the training stands, so that dropout has no state to store."""
    digest = hashlib.sha256(f"{seed}:{step}:{micro}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _to(tokens: Tensor, device: torch.device) -> Tensor:
    """Pinned memory lets the copy to a GPU run beside the computation."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
