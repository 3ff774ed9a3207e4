"""One training: the loop, its precision, its ranks and its checkpoints."""

from gpt2lab.training.checkpoints import Loaded, best_step, load_latest, prune, save
from gpt2lab.training.distributed import World
from gpt2lab.training.guard import Diverged
from gpt2lab.training.loop import StepRecord, steps
from gpt2lab.training.precision import autocast, choose_device, set_threads
from gpt2lab.training.settings import TrainingConfig
from gpt2lab.training.state import TrainState

__all__ = [
    "Diverged",
    "Loaded",
    "StepRecord",
    "TrainState",
    "TrainingConfig",
    "World",
    "autocast",
    "best_step",
    "choose_device",
    "load_latest",
    "prune",
    "save",
    "set_threads",
    "steps",
]
