"""The first steps again: are the gradients that the journal tells of those of the batches?

The run's own loop trains, and before each step the gradient of its batch is computed here by itself, from nothing but
the model and the batch.

Shapes: n sequences of a batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2lab.data.batches import Batches
from gpt2lab.doctor.findings import Finding, NotExamined
from gpt2lab.doctor.patient import Patient
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.training.loop import reseed, steps
from gpt2lab.training.precision import autocast, set_arithmetic
from gpt2lab.training.state import TrainState

STEPS = 5
LARGEST, LARGEST_ON_GPU = 1 << 40, 1 << 46
"""Parameters times tokens, three times over for each step that is done again: a minute or two on one core."""
SAME, ELSEWHERE = 0.02, 0.1
"""Share by which norms may differ, on the run's type of device and on another."""


@dataclass(frozen=True)
class Gradient:
    """Norms at one step. journal: as logged. own: of the run's objective. plain: of next-token cross entropy alone."""

    step: int
    journal: float
    own: float
    plain: float


def gradients(patient: Patient) -> list[Gradient]:
    """Of the first steps that the journal holds. Raises NotExamined where they cannot be done again."""
    config, logged = patient.config, patient.series("train/grad_norm")
    training = config.training
    stack: dict[str, Any] = patient.result.get("stack") or {}
    size = 3 * sum(p.numel() for p in patient.start.parameters()) * training.batch_tokens
    count = min(STEPS, training.steps, (LARGEST if patient.device.type == "cpu" else LARGEST_ON_GPU) // size)
    if not count:
        raise NotExamined(f"its steps are too large to be done again here ({training.batch_tokens:,} tokens)")
    if not set(logged) & set(range(1, count + 1)):
        raise NotExamined("no gradient norm of the first steps in its journal")
    if training.precision == "fp16":
        raise NotExamined("fp16 scales its gradients")
    if int(stack.get("ranks", 1)) > 1 and config.model.dropout:
        raise NotExamined("several ranks with dropout")
    return [
        Gradient(step, logged[step], own, plain) for step, own, plain in again(patient, count) if step in logged
    ]  # fmt: skip


def again(patient: Patient, count: int) -> Iterator[tuple[int, float, float]]:
    """Train the first `count` steps; -> step, norm of the objective's gradient, norm of the plain loss's gradient."""
    config, training = patient.config, patient.config.training
    model = build_model(config.model, seed=config.seed, device=patient.device)
    state = TrainState(model, build_optimizers(config.optim, model.params()))
    block = config.model.block_size
    batches = Batches(patient.data.train, block, training.batch_tokens // block, config.seed)
    set_arithmetic(training.precision, patient.device, training.deterministic)
    trained: Any = steps(state, batches, config.optim, training, seed=config.seed, stop_at=count, ahead=False)
    model.train()
    for step in range(count):
        inputs, targets = (torch.as_tensor(x, device=patient.device) for x in batches.at(step))
        yield step + 1, *norms(patient, model, inputs, targets, step)
        next(trained)
    trained.close()


def norms(patient: Patient, model: GPT, inputs: Tensor, targets: Tensor, step: int) -> tuple[float, float]:
    """Norms of the mean gradient of a whole batch (n, T): of the objective, and of the plain loss."""
    size = patient.config.training.micro_batch_sequences or len(inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    own, plain = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    counted = (targets != -100).sum().item()
    for micro, start in enumerate(range(0, len(inputs), size)):
        x, y = inputs[start : start + size], targets[start : start + size]
        share = (y != -100).sum().item() / counted
        for sums, terms in ((own, True), (plain, False)):
            reseed(patient.config.seed, step, micro, 0, patient.device)
            with autocast(patient.config.training.precision, patient.device):
                loss = model.objective(x, y)[0] if terms else plain_loss(model, x, y)
            for total, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if part is not None:
                    total.add_(part, alpha=share)
    return tuple(float(torch.nn.utils.get_total_norm(sums)) for sums in (own, plain))  # type: ignore[return-value]


def plain_loss(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next token by torch's own function.  -> ()"""
    return torch.nn.functional.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


def micro_batches(patient: Patient) -> int:
    """In a step."""
    training = patient.config.training
    sequences = training.batch_tokens // patient.config.model.block_size
    return math.ceil(sequences / (training.micro_batch_sequences or sequences))


def gradient(patient: Patient) -> Finding | None:
    """The gradient of a step is the mean over its batch, and that of its batch alone."""
    found = gradients(patient)
    return summed(found[0], micro_batches(patient)) or foreign(found, patient)


def summed(first: Gradient, count: int) -> Finding | None:
    """Whether the first gradient is a sum over micro-batches."""
    for norm, of in ((first.own, "the mean objective"), (first.plain, "the mean loss")):
        if count > 1 and math.isclose(first.journal, count * norm, rel_tol=ELSEWHERE):
            return Finding(
                name="accumulation",
                severity="error",
                evidence=f"the gradient of step {first.step} has norm {first.journal:.4g}, {first.journal / norm:.2f} "
                f"times that of {of} over its batch ({norm:.4g}), and a step has {count} micro-batches",
                causes=("the loss of a micro-batch is not divided by their number",),
            )
    return None


def foreign(found: Sequence[Gradient], patient: Patient) -> Finding | None:
    """Whether a gradient holds more than its batch."""
    device = (patient.result.get("stack") or {}).get("device", patient.device.type)
    allowed = SAME if device == patient.device.type else ELSEWHERE
    for one in found:
        if not math.isclose(one.journal, one.own, rel_tol=allowed):
            before = f"; that of step {found[0].step} agreed" if one is not found[0] else ""
            return Finding(
                name="gradient",
                severity="error",
                evidence=f"the gradient of step {one.step} has norm {one.journal:.4g} in the journal, and that of its "
                f"batch alone has {one.own:.4g}{before}",
                causes=("gradients that are not zeroed between steps", "code that changed since the run"),
            )
    return None
