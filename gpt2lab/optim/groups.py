"""The optim section of a config, and parameter groups: which parameters share a rate and a weight decay."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor
from torch.optim import Optimizer

from gpt2lab.components.base import Param
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.optim.averaging import Average
from gpt2lab.registry import SLOTS, Choice, read_field
from gpt2lab.schema import Settings


class OptimConfig(Settings):
    """How weights are updated; the defaults are the GPT-2 124M recipe."""

    lr: float = Field(6e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_steps: int = Field(700, ge=0)
    """Steps over which the rate increases linearly to its peak."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest 2-norm of the whole gradient; null disables clipping."""
    optimizer: Choice = Field(default_factory=lambda: _default("optimizer"))
    """The optimizer."""
    schedule: Choice = Field(default_factory=lambda: _default("schedule"))
    """How the rate changes after the warm-up."""
    averaging: Choice = Field(default_factory=lambda: _default("averaging"))
    """Which average of the weights is evaluated in their place."""
    freeze: tuple[str, ...] = ()
    """Patterns such as h.*.attn.*, of names of parameters that are not trained."""

    @field_validator("optimizer", "schedule", "averaging", mode="before")
    @classmethod
    def _components(cls, raw: object, info: Any) -> Choice | tuple[Choice, ...]:
        return read_field(info.field_name, raw)

    def multiplier(self, steps: int) -> Callable[[int], float]:
        """The factor in [0, 1] on all rates, as a function of the steps taken, in a training of `steps` steps."""
        schedule: Callable[[int], float] = SLOTS["schedule"].build(self.schedule, steps, self.warmup_steps)
        return schedule

    def problems(self, steps: int) -> list[Problem]:
        """Problems in a training of `steps` steps."""
        if self.warmup_steps <= steps:
            return []
        return [Problem("optim.warmup_steps", f"{self.warmup_steps} steps of warm-up in a training of {steps} steps")]


def build_optimizers(config: OptimConfig, params: Sequence[Param]) -> list[Optimizer]:
    """The chosen optimizer over `params`, except the frozen ones, which get no gradient from now on. Each group has its
    peak rate as `base_lr`, with the factor on the rate of its parameters; the rate of a step is base_lr times the
    schedule's multiplier.

    Raises ConfigError if a pattern of frozen ones fits none or all, or if the component omits a parameter, updates it
    twice, or puts parameters with different rates into one group.
    """
    problems = freeze_problems(config.freeze, [param.name for param in params])
    if problems:
        raise ConfigError(problems)
    names = frozen(config.freeze, [param.name for param in params])
    for param in params:
        if param.name in names:
            param.tensor.requires_grad_(False)
    params = [param for param in params if param.name not in names]
    optimizers: list[Optimizer] = list(SLOTS["optimizer"].build(config.optimizer, params, config.lr))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    updates = Counter(id(tensor) for group in groups for tensor in group["params"])
    not_once = {param.name: updates[id(param.tensor)] for param in params if updates[id(param.tensor)] != 1}
    if not_once:
        raise ConfigError(
            [
                Problem("optim.optimizer", f"{config.optimizer} updates {name} {count} times per step, not once")
                for name, count in not_once.items()
            ]
        )
    factors = {id(param.tensor): param.rate for param in params}
    for group in groups:
        rates = {factors[id(tensor)] for tensor in group["params"]} or {1.0}
        if len(rates) > 1:
            what = f"{config.optimizer} puts parameters with different rates into one group"
            raise ConfigError(what, where="optim.optimizer", hint="make groups with gpt2lab.optim.decay_groups")
        group["lr"] *= rates.pop()
        group.setdefault("base_lr", float(group["lr"]))
    return optimizers


def frozen(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Names that fit one of the patterns, in which * stands for any characters."""
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def freeze_problems(patterns: Sequence[str], names: Sequence[str]) -> list[Problem]:
    """Patterns that fit no name, and the whole model frozen."""
    unused = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    some = ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    problems = [Problem("optim.freeze", f"'{pattern}' fits no parameter (there are {some})") for pattern in unused]
    if len(frozen(patterns, names)) == len(names):
        problems.append(Problem("optim.freeze", "all parameters are frozen: nothing is left to train"))
    return problems


def build_averaging(config: OptimConfig, params: Sequence[Param], steps: int) -> Average | None:
    """The chosen average of `params` over a training of `steps` steps; None if the trained weights are evaluated."""
    average: Average | None = SLOTS["averaging"].build(config.averaging, params, steps)
    if average is not None:
        average.name = config.averaging.name
    return average


def decay_groups(params: Sequence[Param], weight_decay: float) -> list[dict[str, Any]]:
    """Torch parameter groups of the GPT-2 recipe: matrices and embeddings decay; gains, biases and scalars do not.

    The parameters of a group have the same factor on the rate, which `build_optimizers` applies. Weight decay is
    divided by it, so that rate times decay, the share by which a step decays a weight, does not depend on it
    (arXiv:2405.13698).
    """
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for param in params:
        undecayed = param.tensor.ndim < 2 or param.role.kind == "vector"
        groups.setdefault((undecayed, param.rate), []).append(param.tensor)
    return [
        {"params": groups[undecayed, rate], "weight_decay": 0.0 if undecayed else weight_decay / rate}
        for undecayed, rate in sorted(groups, key=lambda key: key[0])
    ]


def _default(slot: str) -> Any:
    return read_field(slot, SLOTS[slot].default)
