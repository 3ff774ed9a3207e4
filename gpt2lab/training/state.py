"""The state of a training: everything that a checkpoint must contain.

It has no random state: the generator is seeded before every micro-batch from (seed, step, micro-batch, rank). Batches
and the learning rate are functions of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2lab.errors import ConfigError, Problem
from gpt2lab.training.guard import Guard


class Averaging(Protocol):
    """An average of the weights, as `gpt2lab.optim.Average`."""

    name: str

    def update(self, step: int) -> None: ...
    def evaluated(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...


@runtime_checkable
class TwoPoints(Protocol):
    """An optimizer that evaluates other weights than those at which it takes gradients, such as schedule-free ones:
    `eval()` puts the former into the model, `train()` the latter."""

    def eval(self) -> None: ...
    def train(self) -> None: ...


def step_of(optimizer: Optimizer, closure: Callable[[], Any]) -> None:
    """Step an optimizer. One whose class says `takes_closure = True` gets `closure`, which replaces the gradients by
    those of the same batch at the present weights, and returns the objective. If it raises, the optimizer must leave
    its weights as they were before the step."""
    if getattr(optimizer, "takes_closure", False):
        optimizer.step(closure)
    else:
        optimizer.step()


@dataclass
class TrainState:
    """A model in training.

    The weights that are evaluated can be others than those that are trained: those of `averaging`, or of an optimizer
    with two points. Everything that judges or publishes the model uses them: validation, diagnostics and tasks inside
    `evaluated()`, and the model of a checkpoint, from which all else reads.

    step:   optimizer steps taken.  tokens: trained on so far, over all ranks.  seconds: in steps only.
    scaler: the loss scale of fp16; None in other precisions.  guard: non-finite steps and loss spikes.
    averaging: the average that is evaluated; None where it is the optimizer's weights.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    scaler: torch.amp.GradScaler | None = None
    guard: Guard = field(default_factory=Guard)
    averaging: Averaging | None = None

    @property
    def has_average(self) -> bool:
        """Whether other weights are evaluated than trained."""
        return self.averaging is not None or any(isinstance(optimizer, TwoPoints) for optimizer in self.optimizers)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the model holds the weights that are evaluated; afterwards the trained ones, to the last bit."""
        if not self.has_average:
            yield
            return
        weights = weights_of(self.model)
        trained = {name: tensor.clone() for name, tensor in weights.items()}
        two_points = [optimizer for optimizer in self.optimizers if isinstance(optimizer, TwoPoints)]
        try:
            with torch.no_grad():
                for optimizer in two_points:
                    optimizer.eval()
                for weight, average in self.averaging.evaluated() if self.averaging else ():
                    weight.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for optimizer in two_points:
                    optimizer.train()
                for name, tensor in weights.items():
                    tensor.copy_(trained[name])

    def state_dict(self) -> dict[str, Any]:
        """The whole state, with the tensors themselves, not copies; except `model`, the weights that are evaluated,
        where those are not the ones in training. The latter are `trained` then."""
        content = self._state_dict()
        if self.has_average:
            with self.evaluated():
                content["model"] = {name: tensor.clone() for name, tensor in content["model"].items()}
            content["trained"] = weights_of(self.model)
            content["averaging"] = self._average()
        return content

    def _average(self) -> dict[str, Any]:
        """The state of the average, under its name."""
        return {"name": self.averaging.name, **self.averaging.state_dict()} if self.averaging else {"name": "none"}

    def _state_dict(self) -> dict[str, Any]:
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
        """Continue from the state of another training: its weights, averages and counters, with the optimizer settings
        (rates, decay, betas) and the precision of this one. An average of another kind starts anew. Raises ConfigError.

        The settings of an optimizer are what it has defaults for; all else in its groups are counters.
        """
        settings_here = [
            [
                {key: value for key, value in group.items() if key in optimizer.defaults or key == "base_lr"}
                for group in optimizer.param_groups
            ]
            for optimizer in self.optimizers
        ]
        scale = saved["scaler"] if self.scaler is not None else None
        if self.scaler is not None and scale is None:
            scale = self.scaler.state_dict()
        average = self._average()
        if saved.get("averaging", average)["name"] == average["name"]:
            average = saved.get("averaging", average)
        self.load_state_dict({**saved, "scaler": scale, "averaging": average})
        for optimizer, groups in zip(self.optimizers, settings_here, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group |= settings

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`. Raises ConfigError if it does not fit, and changes nothing then."""
        weights, optimizers = canonical(saved.get("trained", saved["model"])), saved["optimizers"]
        average = saved.get("averaging", {"name": "none"})
        problems = weight_problems(self.model, weights) or _optimizer_problems(self.optimizers, optimizers)
        if (self.scaler is None) != (saved["scaler"] is None):
            scales = ["has no loss scale, but this training has", "has a loss scale, but this training has none"]
            problems.append(Problem("training.precision", f"the checkpoint {scales[self.scaler is None]}"))
        if average["name"] != self._average()["name"]:
            which = f"{average['name']} in the checkpoint, {self._average()['name']} here"
            problems.append(Problem("optim.averaging", which))
        if problems:
            raise ConfigError(problems)
        with torch.no_grad():
            for name, tensor in weights_of(self.model).items():
                tensor.copy_(weights[name])
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        if self.averaging is not None:
            self.averaging.load_state_dict(average)
        self.guard.load_state_dict(saved["guard"])
        self.step, self.tokens, self.seconds = int(saved["step"]), int(saved["tokens"]), float(saved["seconds"])


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put into them: `_orig_mod.` (torch.compile) and a leading `module.` (DDP)."""
    wrapped = bool(weights) and all(name.startswith("module.") for name in weights)
    bare = {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}
    inner = {name.replace("_orig_mod.", ""): tensor for name, tensor in bare.items()}
    return inner if list(inner) == list(weights) else canonical(inner)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by canonical name; a tensor with two names (tied weights) is listed once."""
    names: dict[int, str] = {}
    named = canonical(model.state_dict(keep_vars=True))  # not copies: tied weights are one object
    for name, tensor in named.items():
        names.setdefault(id(tensor), name)
    return {name: named[name].detach() for name in names.values()}


def weight_problems(model: nn.Module, saved: Mapping[str, Tensor]) -> list[Problem]:
    """Differences in names and shapes between saved weights and those of `model`."""
    expected = weights_of(model)
    problems = [
        Problem(name, f"{_shape(expected[name])} in the model, missing in the checkpoint")
        for name in expected
        if name not in saved
    ]
    for name, tensor in saved.items():
        if name not in expected:
            problems.append(Problem(name, f"{_shape(tensor)} in the checkpoint, missing in the model"))
        elif tensor.shape != expected[name].shape:
            problems.append(Problem(name, f"{_shape(tensor)} in the checkpoint, {_shape(expected[name])} in the model"))
    return problems


@dataclass(frozen=True)
class Fit:
    """Names of weights in a model and in a checkpoint: `taken` from it, `new` in the model, `reshaped` (in both, with
    different shapes, hence new), and `left`, which the model lacks."""

    taken: tuple[str, ...]
    new: tuple[str, ...]
    reshaped: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        parts = {"new here": self.new, "of another shape, so new": self.reshaped, "not used": self.left}
        texts = [f"{title}: {', '.join(names)}" for title, names in parts.items() if names]
        return "; ".join([f"{len(self.taken)} weights taken", *texts])


def take_fitting(model: nn.Module, saved: Mapping[str, Tensor]) -> Fit:
    """Copy the weights whose name and shape fit into `model`. Raises ConfigError if none does."""
    weights, saved = weights_of(model), canonical(saved)
    common = [name for name in weights if name in saved]
    taken = [name for name in common if saved[name].shape == weights[name].shape]
    if not taken:
        raise ConfigError("no weight of the checkpoint has a name and shape of the model's", where="branch")
    with torch.no_grad():
        for name in taken:
            weights[name].copy_(saved[name])
    new, left = ([name for name in a if name not in b] for a, b in ((weights, saved), (saved, weights)))
    return Fit(tuple(taken), tuple(new), tuple(name for name in common if name not in taken), tuple(left))


def _optimizer_problems(optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Differences between saved optimizer states and `optimizers`: their number, and the parameters in each group."""
    expected = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in saved]
    if expected == sizes:
        return []
    return [Problem("optim.optimizer", f"parameters in each group: {sizes} in the checkpoint, {expected} here")]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
