"""How weights are updated: optimizers and schedules (both are slots), and the groups that share settings."""

from gpt2lab.optim.groups import OptimConfig, build_optimizers, decay_groups
from gpt2lab.optim.optimizers import optimizer
from gpt2lab.optim.schedules import schedule

__all__ = ["OptimConfig", "build_optimizers", "decay_groups", "optimizer", "schedule"]
