"""The optim section of a config, and parameter groups: which parameters share a rate and a weight decay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, field_validator
from torch.optim import Optimizer

from gpt2lab.components.base import Param
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.registry import SLOTS, Choice, read_field
from gpt2lab.schema import Settings


class OptimConfig(Settings):
    """How weights are updated; the defaults are the GPT-2 124M recipe."""

    lr: float = Field(6e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    warmup_steps: int = Field(700, ge=0)
    """Steps over which the rate rises linearly to its peak."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest 2-norm of the whole gradient; null does not clip."""
    optimizer: Choice = Field(default_factory=lambda: _default("optimizer"))
    """What turns gradients into updates."""
    schedule: Choice = Field(default_factory=lambda: _default("schedule"))
    """How the rate changes after the warm-up."""

    @field_validator("optimizer", "schedule", mode="before")
    @classmethod
    def _components(cls, raw: object, info: Any) -> Choice | tuple[Choice, ...]:
        return read_field(info.field_name, raw)

    def multiplier(self, steps: int) -> Callable[[int], float]:
        """The factor in [0, 1] on every rate, as a function of the steps taken, for a training of `steps` steps."""
        built: Callable[[int], float] = SLOTS["schedule"].build(self.schedule, steps, self.warmup_steps)
        return built

    def problems(self, steps: int) -> list[Problem]:
        """What cannot mean anything in a training of `steps` steps."""
        if self.warmup_steps <= steps:
            return []
        return [Problem("optim.warmup_steps", f"{self.warmup_steps} steps of warm-up in a training of {steps} steps")]


def build_optimizers(config: OptimConfig, params: Sequence[Param]) -> list[Optimizer]:
    """The chosen optimizer over `params`; each of its groups keeps its peak rate as `base_lr`, so that the rate of a
    step is base_lr times the schedule's multiplier.

    Raises ConfigError when the component leaves a parameter out or updates it twice.
    """
    optimizers: list[Optimizer] = list(SLOTS["optimizer"].build(config.optimizer, params, config.lr))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owners = Counter(id(tensor) for group in groups for tensor in group["params"])
    wrong = {param.name: owners[id(param.tensor)] for param in params if owners[id(param.tensor)] != 1}
    if wrong:
        raise ConfigError(
            [
                Problem("optim.optimizer", f"{config.optimizer} updates {name} {count} times in a step, not once")
                for name, count in wrong.items()
            ]
        )
    for group in groups:
        group.setdefault("base_lr", float(group["lr"]))
    return optimizers


def decay_groups(params: Sequence[Param], weight_decay: float) -> list[dict[str, Any]]:
    """Torch parameter groups of the GPT-2 recipe: matrices and embeddings decay; gains, biases and scalars do not."""
    decayed = [p.tensor for p in params if p.tensor.ndim >= 2 and p.role.kind != "vector"]
    chosen = {id(tensor) for tensor in decayed}
    others = [p.tensor for p in params if id(p.tensor) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _default(slot: str) -> Any:
    return read_field(slot, SLOTS[slot].default)
