"""The training loop: a generator of step records. It neither evaluates nor saves nor logs; its caller does.

A step runs forward and backward for every micro-batch, then updates the weights once. A GPU works through a queue, and
reading a number waits for it. So on a GPU the metrics of a step are read after forward and backward of the next one are
queued, and before its update is: the weights are those of step s when the record of step s is yielded.

No number that is not finite reaches a weight. Where metrics are read late, the optimizer gets a flag on the device that
makes it change nothing, as torch's GradScaler does it.

Shapes: n sequences of this rank's share of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from gpt2lab.basics.faults import point, tensor
from gpt2lab.errors import DataFault
from gpt2lab.training.clock import Clock
from gpt2lab.training.distributed import ALONE, Replica, World
from gpt2lab.training.guard import Diverged
from gpt2lab.training.precision import autocast, memory_guard, set_arithmetic
from gpt2lab.training.settings import TrainingConfig
from gpt2lab.training.state import TrainState, step_of

if TYPE_CHECKING:
    from gpt2lab.training.diagnostics import Diagnostic

T = TypeVar("T")
PREFETCHED = 2
"""Batches prepared ahead of the one in use."""


class Batches(Protocol):
    """A source of batches: a pure function of the step and the rank."""

    def at(self, step: int, *, rank: int, world: int) -> tuple[Any, Any]:
        """Inputs and targets of this rank's share, arrays or tensors (n, T) of int64."""
        ...


class OptimSettings(Protocol):
    """The part of the optim section that the loop uses."""

    @property
    def lr(self) -> float: ...
    @property
    def grad_clip(self) -> float | None: ...
    def multiplier(self, steps: int) -> Callable[[int], float]: ...


@dataclass(frozen=True)
class StepRecord:
    """The training after `step` steps.

    metrics: empty for steps that are not logged.  stop: some rank received a request to stop, and all ranks know it.
    """

    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    stop: bool = False


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    inputs, targets: (n, T) int64 on the CPU.  counted: targets of each sequence that count (are not -100).
    """

    inputs: Tensor
    targets: Tensor
    counted: Sequence[int]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step. loss, objective: nats, over all ranks.  grad_norm: before clipping."""

    loss: float
    objective: float
    grad_norm: float
    finite: bool
    stop: bool


@dataclass
class PendingMetrics:
    """The metrics of a step while they are on the device.

    values: loss, objective, targets of an average rank, share of ranks with a request to stop, gradient norm.
    tokens: of this step, over all ranks.  scaled: whether losses were scaled; an overflow is then no divergence.
    extra:  values of the diagnostics that observed the update.
    """

    step: int
    lr: float
    tokens: int
    scaled: bool
    values: Tensor
    ready: Any = None
    extra: dict[str, float] = field(default_factory=dict)
    _metrics: StepMetrics | None = None

    def read(self) -> StepMetrics:
        """Wait for the device, the first time. Raises DataFault for a batch in which no target counts."""
        if self._metrics is None:
            if self.ready is not None:
                self.ready.synchronize()
            loss, objective, counted, stop, norm = self.values.tolist()
            if counted == 0:
                raise DataFault(f"step {self.step + 1}: no target in the whole batch counts", where="training")
            finite = all(map(math.isfinite, (loss, objective, norm)))
            self._metrics = StepMetrics(loss, objective, norm, finite, stop > 0)
        return self._metrics

    def spoil(self) -> None:
        """Count the step as one with a number that is not finite."""
        self._metrics = replace(self.read(), finite=False)


class NotFinite(ArithmeticError):
    """Gradients at other weights, which an optimizer asked for, are not finite."""


class Update:
    """Clips gradients and steps optimizers. late: whether the metrics of a step are read during the next one."""

    def __init__(
        self,
        state: TrainState,
        optim: OptimSettings,
        training: TrainingConfig,
        replica: Replica,
        world: World,
        late: bool | None = None,
    ) -> None:
        self.state, self.optim, self.replica, self.world = state, optim, replica, world
        self.multiplier, self.steps = optim.multiplier(training.steps), training.steps
        # such optimizers take `found_inf` and then change nothing: torch's contract with its GradScaler
        takes_flag = all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in state.optimizers)
        takes_flag &= state.averaging is None  # which must not include a step that changed nothing
        self.late = (replica.device.type == "cuda" and takes_flag) if late is None else late
        assert takes_flag or not self.late

    def __call__(
        self, step: int, losses: Tensor, batch: Batch, *, stop: bool, diagnostics: Sequence[Diagnostic],
        accumulated: Callable[[], Tensor],
    ) -> PendingMetrics:  # fmt: skip
        """Update the weights by the gradients of `step`, counted from 0, unless one of its numbers is not finite.

        losses (3,): as `accumulate` returns them.  diagnostics: observe the update.  accumulated: accumulates the
        gradients of the step at the present weights.
        """
        device, world = self.replica.device, self.world
        stopping = torch.full((1,), float(stop), device=device)
        if self.state.scaler is not None:
            for optimizer in self.state.optimizers:
                self.state.scaler.unscale_(optimizer)
        norm = self._clip().to(losses).reshape(1)  # the same on all ranks, unless one of them computes wrongly
        values = world.mean(torch.cat([losses, stopping, norm]))  # one reduction for all that ranks have to agree on
        factor = self.multiplier(step)
        metrics = PendingMetrics(
            step, self.optim.lr * factor, batch.inputs.numel() * world.size, self.state.scaler is not None, values
        )
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
                group["progress"] = step / self.steps
        point("optimizer")
        parameters = self.state.model.params() if diagnostics else ()  # type: ignore[operator]
        for diagnostic in diagnostics:
            diagnostic.before_update(parameters)
        if self.late:
            not_finite = (~values.isfinite().all()).float()
            metrics.values = values.to("cpu", non_blocking=True)
            if device.type == "cuda":
                metrics.ready = torch.cuda.Event()
                metrics.ready.record()
            self._step(not_finite, accumulated)
        elif metrics.read().finite:
            try:
                self._step(None, accumulated)
            except NotFinite:
                metrics.spoil()
            else:
                if self.state.averaging is not None:
                    self.state.averaging.update(step + 1)
        for diagnostic in diagnostics:
            diagnostic.after_update(parameters)
            metrics.extra |= diagnostic.metrics()
        if self.state.scaler is not None:
            self.state.scaler.update()
        self.drop_gradients()
        return metrics

    def drop_gradients(self) -> None:
        """Free the memory of all gradients."""
        for parameter in self.replica.parameters:
            parameter.grad = None

    def _clip(self) -> Tensor:
        """Clip the whole gradient and return its norm before, which is not finite if the gradient is not.

        torch's clip_grad_norm_ alone would silently turn every gradient into NaN.
        """
        with_gradient = [p for p in self.replica.parameters if p.grad is not None]
        gradients: Sequence[Tensor] = [p.grad for p in with_gradient if p.grad is not None]
        if gradients:
            with_gradient[0].grad = tensor("grad", gradients[0])
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        if self.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(with_gradient, self.optim.grad_clip, norm)
        return norm

    def _again(self, accumulated: Callable[[], Tensor]) -> Tensor:
        """Replace the gradients by those at the present weights, clipped, over all ranks.  -> objective ()

        Raises NotFinite on all ranks if a number on one of them is not finite.
        """
        self.drop_gradients()
        losses = accumulated()
        if self.state.scaler is not None:  # which unscales once a step only
            gradients = [p.grad for p in self.replica.parameters if p.grad is not None]
            torch._foreach_div_(gradients, self.state.scaler.get_scale())
        values = self.world.mean(torch.cat([losses, self._clip().to(losses).reshape(1)]))
        if not values.isfinite().all():
            raise NotFinite
        return values[1]

    def _step(self, not_finite: Tensor | None, accumulated: Callable[[], Tensor]) -> None:
        """Step every optimizer; with a flag of 1 on the device it changes nothing."""
        for optimizer in self.state.optimizers:
            settable: Any = optimizer
            if not_finite is not None:
                settable.found_inf = not_finite
            step_of(optimizer, lambda: self._again(accumulated))
            if not_finite is not None:
                del settable.found_inf


def never(*_: int) -> bool:
    """No request to stop."""
    return False


def no_diagnostics(_: int) -> Sequence[Diagnostic]:
    """No step is observed."""
    return ()


def steps(
    state: TrainState,
    batches: Batches,
    optim: OptimSettings,
    training: TrainingConfig,
    *,
    seed: int,
    stop_at: int | None = None,
    world: World = ALONE,
    stop: Callable[[], bool] = never,
    diagnostics: Callable[[int], Sequence[Diagnostic]] = no_diagnostics,
    clock: Clock | None = None,
    late: bool | None = None,
) -> Iterator[StepRecord]:
    """Train `state` up to `stop_at` (None: to the end), one record after every step. Without what is below, a step is:

        batch = next(source)
        accumulate(...)                   # forward and backward, micro-batch by micro-batch
        clip the gradient
        rate = lr * multiplier(step)
        optimizer.step()
        yield its record

    Batches, rates and random numbers depend on (seed, step) only, so a resumed training continues exactly.

    stop:        called once a step; if it returns True on one rank, all ranks receive it.
    diagnostics: those that observe the update of the step with that number, which takes some time.
    clock:       measures time by phase.
    late:        whether metrics are read one step late; None: where that saves time and the optimizers support it.

    Uses torch's global generator. Raises Diverged in the step with a number that is not finite (or skips it, depending
    on `training.nonfinite`), and EnvironmentFault when memory runs out.
    """
    end = training.steps if stop_at is None else min(stop_at, training.steps)
    state.model.train()
    replica = Replica(state.model, world)
    clock = clock or Clock(replica.device)
    set_arithmetic(training.precision, replica.device, training.deterministic)
    update = Update(state, optim, training, replica, world, late)
    source: Any = prefetched(lambda step: load(batches, step, world, replica.device), range(state.step, end))
    pending: PendingMetrics | None = None
    if world.size > 2 and state.step < end:
        with replica.rehearsal():
            set_progress(state.model, state.step, training)
            batch = load(batches, state.step, world, replica.device)
            accumulate(replica, state, batch, training, seed=seed, step=state.step, world=world, clock=Clock())
    began = time.perf_counter()
    try:
        with closing(source):
            for step in range(state.step, end):
                with clock("data"):
                    batch = next(source)
                set_progress(state.model, step, training)
                accumulated = partial(accumulate, replica, state, batch, training, seed=seed, step=step, world=world)
                losses = accumulated(clock=clock)
                if pending is not None:
                    yield (record := finish_step(state, pending, training, began))
                    began, pending = time.perf_counter(), None
                    if record.stop:
                        return
                with clock("optimizer"):
                    again = partial(accumulated, clock=Clock())  # which is time of the optimizer
                    pending = update(
                        step, losses, batch, stop=stop(), diagnostics=diagnostics(step + 1), accumulated=again
                    )
                if not update.late:
                    yield finish_step(state, pending, training, began)
                    began, pending = time.perf_counter(), None
        if pending is not None:
            yield finish_step(state, pending, training, began)
    finally:
        update.drop_gradients()


def finish_step(state: TrainState, pending: PendingMetrics, training: TrainingConfig, began: float) -> StepRecord:
    """Count a step that was taken or skipped, and describe it. Raises Diverged, and does not count the step then."""
    read = pending.read()
    lr, step = pending.lr, pending.step + 1
    metrics: dict[str, float] = {}
    if not read.finite:
        if training.nonfinite == "stop" and not pending.scaled:
            raise Diverged(step, read.loss, read.grad_norm, lr)
        state.guard.skip(step, read.loss, read.grad_norm, lr, training.max_skipped_steps)
        metrics["train/skipped"] = 1.0
    elif (jump := state.guard.accept(step, read.loss)) is not None:
        metrics["train/spike"] = jump
    state.step = step
    set_progress(state.model, step, training)
    state.tokens += pending.tokens
    state.seconds += time.perf_counter() - began
    point("step")
    if step % training.log_every_steps == 0 or step == training.steps:
        metrics |= {"train/loss": read.loss, "train/grad_norm": read.grad_norm, "train/lr": lr}
        if read.objective != read.loss:
            metrics["train/objective"] = read.objective
    return StepRecord(step, state.tokens, state.seconds, metrics | pending.extra, read.stop)


def set_progress(model: torch.nn.Module, step: int, training: TrainingConfig) -> None:
    """Write the share of the training that is done after `step` steps into the model, for parts with a warm-up."""
    progress = getattr(model, "progress", None)
    if progress is not None:  # models of other origin have none
        progress.set(step / training.steps)


def prefetched(make: Callable[[int], T], span: range) -> Iterator[T]:
    """`make(i)` for every i of `span` in order, called in a thread while earlier results are in use.

    An exception in `make` is raised where its result would be returned.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        queue: deque[Future[T]] = deque(thread.submit(make, i) for i in span[:PREFETCHED])
        for i in span:
            if i + PREFETCHED in span:
                queue.append(thread.submit(make, i + PREFETCHED))
            yield queue.popleft().result()


def load(batches: Batches, step: int, world: World, device: torch.device) -> Batch:
    """A rank's share of a batch, in pinned memory if a GPU will fetch it."""
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
    """Accumulate the gradients of one step over micro-batches, as if they were one batch.

    A micro-batch is weighted by its number of counted targets relative to the average over all ranks, so that the mean
    over ranks is the mean over targets.  -> (3,): this rank's part of loss and objective, and the targets of an average
    rank
    """
    size = training.micro_batch_sequences or len(batch.inputs)
    starts = range(0, len(batch.inputs), size)
    counts = [sum(batch.counted[start : start + size]) for start in starts]
    # filled on the device: copying a number there would wait for the device
    average = world.mean(torch.full((1,), float(sum(counts)), device=replica.device))
    total: Any = average[0] if world.size > 1 else float(sum(counts))
    counted = [i for i, count in enumerate(counts) if count] or [len(counts) - 1]  # ranks must reduce at least once
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
                targets = inputs  # any targets with a loss; their weight is zero
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
    """The objective times the loss scale of fp16."""
    if state.scaler is None:
        return objective
    scaled: Tensor = state.scaler.scale(objective)
    return scaled


def reseed(seed: int, step: int, micro: int, rank: int, device: torch.device) -> None:
    """Seed the device's generator from (seed, step, micro-batch, rank), so that dropout has no state to save.

    Only this device's generator: torch.manual_seed seeds all, and formats a stack trace if CUDA was never used.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{micro}:{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(number)


def _to(tokens: Tensor, device: torch.device) -> Tensor:
    return tokens if device.type == "cpu" else tokens.to(device, non_blocking=True)
