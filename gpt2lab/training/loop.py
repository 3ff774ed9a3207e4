"""The training loop: a generator of step records. It neither evaluates nor saves nor logs; its caller does.

A step: for every micro-batch forward and backward, then one update of the weights. On a GPU the arithmetic of the next
forward and backward is handed over before anybody looks at the numbers of the step before, so the GPU never waits for
the program; weights are at step s all the same when the record of step s is yielded.

Shapes: n sequences of this rank's share of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2lab.faults import point, tensor
from gpt2lab.training.clock import Clock
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.guard import Diverged
from gpt2lab.training.precision import autocast, memory_guard, set_arithmetic
from gpt2lab.training.prefetch import prefetched
from gpt2lab.training.replica import Replica
from gpt2lab.training.settings import TrainingConfig
from gpt2lab.training.state import TrainState
from gpt2lab.training.update import Numbers, Update


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
    """The training after `step` steps; `metrics` is empty for steps that are not logged. `stop`: some rank was asked to
    stop, and all of them know it now."""

    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    stop: bool = False


def never(*_: int) -> bool:
    """Nobody asks to stop, and no step is watched."""
    return False


def steps(
    state: TrainState,
    batches: Batches,
    optim: Optimisation,
    training: TrainingConfig,
    *,
    seed: int,
    stop_at: int | None = None,
    world: World = ALONE,
    stop: Callable[[], bool] = never,
    watched: Callable[[int], bool] = never,
    clock: Clock | None = None,
    ahead: bool | None = None,
) -> Iterator[StepRecord]:
    """Train `state` up to `stop_at` (None: to the end), one record after every step.

    Batches, rates and random numbers depend on (seed, step) alone, so that a resumed training goes on exactly.

    stop:    asked once a step; what one rank answers all hear.
    watched: whether the step of that number measures its update of the weights, which takes some time.
    clock:   counts time by phase.
    ahead:   whether numbers are looked at one step later; None: where that saves time and the optimizers can do it.

    Uses torch's global generator. Raises Diverged in the step that meets a number which is not finite (or skips it, as
    `training.nonfinite` says), and EnvironmentFault when memory runs out.
    """
    end = training.steps if stop_at is None else min(stop_at, training.steps)
    state.model.train()
    replica = Replica(state.model, world)
    clock = clock or Clock(replica.device)
    set_arithmetic(training.precision, replica.device, training.deterministic)
    update = Update(state, optim, training, replica, world, ahead)
    source: Any = prefetched(lambda step: load(batches, step, world, replica.device), range(state.step, end))
    waiting: Numbers | None = None
    began = time.perf_counter()
    try:
        with closing(source):
            for step in range(state.step, end):
                with clock("data"):
                    batch = next(source)
                losses = accumulate(replica, state, batch, training, seed=seed, step=step, world=world, clock=clock)
                if waiting is not None:
                    yield (record := settle(state, waiting, training, began))
                    began, waiting = time.perf_counter(), None
                    if record.stop:
                        return
                with clock("optimizer"):
                    waiting = update(step, losses, batch, stop=stop(), watched=watched(step + 1))
                if not update.ahead:
                    yield settle(state, waiting, training, began)
                    began, waiting = time.perf_counter(), None
        if waiting is not None:
            yield settle(state, waiting, training, began)
    finally:
        update.drop_gradients()


def settle(state: TrainState, numbers: Numbers, training: TrainingConfig, began: float) -> StepRecord:
    """Count a step, by now known to be sound or skipped, and describe it. Raises Diverged; the step does not count
    then."""
    seen = numbers.read()
    lr, step = numbers.lr, numbers.step + 1
    metrics: dict[str, float] = {}
    if not seen.finite:
        if training.nonfinite == "stop" and not numbers.scaled:
            raise Diverged(step, seen.loss, seen.grad_norm, lr)
        state.guard.bad(step, seen.loss, seen.grad_norm, lr, training.max_skipped_steps)
        metrics["train/skipped"] = 1.0
    elif (jump := state.guard.good(step, seen.loss)) is not None:
        metrics["train/spike"] = jump
    state.step = step
    state.tokens += numbers.tokens
    state.seconds += time.perf_counter() - began
    point("step")
    if step % training.log_every_steps == 0 or step == training.steps:
        metrics |= {"train/loss": seen.loss, "train/grad_norm": seen.grad_norm, "train/lr": lr}
        if seen.objective != seen.loss:
            metrics["train/objective"] = seen.objective
    return StepRecord(step, state.tokens, state.seconds, metrics | numbers.extra, seen.stop)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. inputs, targets: (n, T) int64 in memory of the CPU. counted: targets that count (not
    -100), of each sequence."""

    inputs: Tensor
    targets: Tensor
    counted: Sequence[int]


def load(batches: Batches, step: int, world: World, device: torch.device) -> Batch:
    """A rank's share of a batch, in pinned memory where a GPU will fetch it."""
    inputs, targets = (
        torch.as_tensor(x, dtype=torch.int64) for x in batches.at(step, rank=world.rank, world=world.size)
    )
    counted = (targets != -100).sum(1).tolist()
    if device.type == "cuda":
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return Batch(inputs, targets, counted)


def accumulate(
    replica: Replica, state: TrainState, batch: Batch, training: TrainingConfig,
    *, seed: int, step: int, world: World, clock: Clock,
) -> Tensor:  # fmt: skip
    """Add up the gradients of one step over micro-batches as if they were one.

    Every micro-batch weighs by the targets that count in it, against the average over all ranks, so that the mean over
    ranks is the mean over targets.  -> (3,): loss and objective, this rank's part, and the targets of an average rank
    """
    size = training.micro_batch_sequences or len(batch.inputs)
    starts = range(0, len(batch.inputs), size)
    counts = [sum(batch.counted[start : start + size]) for start in starts]
    # filled in on the device: a number that is copied there from the program would be waited for
    average = world.mean(torch.full((1,), float(sum(counts)), device=replica.device))
    total: Any = average[0] if world.size > 1 else float(sum(counts))
    counted = [i for i, count in enumerate(counts) if count] or [len(counts) - 1]  # one must be there to be joined
    losses = torch.zeros(2, device=replica.device)
    with memory_guard(
        f"training, step {step + 1}",
        f"{size} sequences of {batch.inputs.shape[1]} tokens in one pass",
        f"--set training.micro_batch_sequences={max(1, size // 2)}",
    ):
        for micro in counted:
            rows = slice(starts[micro], starts[micro] + size)
            inputs, targets = batch.inputs[rows], batch.targets[rows]
            if counts[micro] == 0:
                targets = inputs  # anything that has a loss; it weighs nothing
            weight = counts[micro] / total if counts[micro] else 0.0
            reseed(seed, step, micro, world.rank, replica.device)
            with replica.accumulating(last=micro == counted[-1]):
                point("forward")
                with clock("forward"), autocast(training.precision, replica.device):
                    objective, loss = replica(_to(inputs, replica.device), _to(targets, replica.device))
                with clock("backward"):
                    _scaled(state, tensor("loss", objective) * weight).backward()
                point("backward")
            losses += torch.stack([loss, objective.detach()]) * weight
    return torch.cat([losses, average])


def _scaled(state: TrainState, objective: Tensor) -> Tensor:
    """Times the loss scale of fp16."""
    if state.scaler is None:
        return objective
    scaled: Tensor = state.scaler.scale(objective)
    return scaled


def reseed(seed: int, step: int, micro: int, rank: int, device: torch.device) -> None:
    """Seed the device's generator from where the training stands, so that dropout has no state to store.

    Only this device's: torch.manual_seed seeds all, and where CUDA was never used that formats a stack trace.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{micro}:{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(number)


def _to(tokens: Tensor, device: torch.device) -> Tensor:
    return tokens if device.type == "cpu" else tokens.to(device, non_blocking=True)
