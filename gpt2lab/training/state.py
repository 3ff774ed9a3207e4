"""What changes while a model trains, and therefore all that a checkpoint must hold.

Random numbers are not in it: every micro-step seeds the generator from (seed, step, micro-step, rank), batches are a
function of the step, and so is the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2lab.errors import ConfigError, Problem
from gpt2lab.training.guard import Guard


@dataclass
class TrainState:
    """A model in training.

    step:    optimizer steps taken.  tokens: trained on so far, over all ranks.  seconds: spent in steps, nothing else.
    scaler:  the loss scale of fp16 and how it grows; None in other precisions.  guard: what went wrong with numbers.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    scaler: torch.amp.GradScaler | None = None
    guard: Guard = field(default_factory=Guard)

    def state_dict(self) -> dict[str, Any]:
        """Everything, with the tensors themselves rather than copies."""
        return {
            "model": weights_of(self.model),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def start_from(self, saved: Mapping[str, Any]) -> None:
        """Begin where another training stood: its weights, its optimizer's averages and its counters, under the
        settings that this one's optimizers have (rates, decay, betas) and its own precision. Raises ConfigError."""
        own = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]
        scale = saved["scaler"] if self.scaler is not None else None
        if self.scaler is not None and scale is None:
            scale = self.scaler.state_dict()
        self.load_state_dict({**saved, "scaler": scale})
        for optimizer, groups in zip(self.optimizers, own, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group |= settings

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises ConfigError, before anything changes, when it does not fit."""
        weights, optimizers = canonical(saved["model"]), saved["optimizers"]
        problems = weight_problems(self.model, weights) or _optimizer_problems(self.optimizers, optimizers)
        if (self.scaler is None) != (saved["scaler"] is None):
            scales = ["has no loss scale, this training has", "has a loss scale, this training has none"]
            problems.append(Problem("training.precision", f"the checkpoint {scales[self.scaler is None]}"))
        if problems:
            raise ConfigError(problems)
        own = weights_of(self.model)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self.guard.load_state_dict(saved["guard"])
        self.step, self.tokens, self.seconds = int(saved["step"]), int(saved["tokens"]), float(saved["seconds"])


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put into them: `_orig_mod.` (torch.compile) and a leading `module.` (DDP)."""
    wrapped = bool(weights) and all(name.startswith("module.") for name in weights)
    bare = {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}
    inner = {name.replace("_orig_mod.", ""): tensor for name, tensor in bare.items()}
    return inner if list(inner) == list(weights) else canonical(inner)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by canonical name; a tensor with two names (tied weights) is there once."""
    names: dict[int, str] = {}
    named = canonical(model.state_dict(keep_vars=True))  # the objects themselves: tied weights are one object
    for name, tensor in named.items():
        names.setdefault(id(tensor), name)
    return {name: named[name].detach() for name in names.values()}


def weight_problems(model: nn.Module, saved: Mapping[str, Tensor]) -> list[Problem]:
    """How saved weights differ from what `model` expects: names and shapes."""
    own = weights_of(model)
    problems = [
        Problem(name, f"the model has it {_shape(own[name])}, the checkpoint does not")
        for name in own
        if name not in saved
    ]
    for name, tensor in saved.items():
        if name not in own:
            problems.append(Problem(name, f"the checkpoint has it {_shape(tensor)}, the model does not"))
        elif tensor.shape != own[name].shape:
            problems.append(Problem(name, f"{_shape(tensor)} in the checkpoint, {_shape(own[name])} in the model"))
    return problems


def _optimizer_problems(optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """How saved optimizer states differ from `optimizers`: their number, and the parameters in each group."""
    own_sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in saved]
    if own_sizes == sizes:
        return []
    return [Problem("optim.optimizer", f"parameters in each group: {sizes} in the checkpoint, {own_sizes} here")]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
