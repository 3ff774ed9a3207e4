"""How weights are updated and averaged: optimizers, schedules and averages (all are slots), and the groups that share
settings."""

from gpt2lab.optim.averaging import Average, averaging
from gpt2lab.optim.groups import OptimConfig, build_averaging, build_optimizers, decay_groups
from gpt2lab.optim.optimizers import optimizer
from gpt2lab.optim.schedules import schedule

__all__ = [
    "Average",
    "OptimConfig",
    "averaging",
    "build_averaging",
    "build_optimizers",
    "decay_groups",
    "optimizer",
    "schedule",
]
