"""One training: the loop, its precision, its ranks and its checkpoints."""

from gpt2lab.training.checkpoints import Loaded, load_latest, prune, save
from gpt2lab.training.distributed import World, average_gradients
from gpt2lab.training.loop import Diverged, StepRecord, TrainingConfig, steps
from gpt2lab.training.precision import autocast, choose_device, set_threads
from gpt2lab.training.state import TrainState

__all__ = [
    "Diverged",
    "Loaded",
    "StepRecord",
    "TrainState",
    "TrainingConfig",
    "World",
    "autocast",
    "average_gradients",
    "choose_device",
    "load_latest",
    "prune",
    "save",
    "set_threads",
    "steps",
]
