"""A process that saves checkpoints in forked children, which wait until somebody lets them go: see test_every_call.py.

Standard input: a folder, one per line. Standard output: for each, the id of a stopped child.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from gpt2lab.training import TrainState, prune, save


def state(step: int) -> TrainState:
    """A very small model after `step` steps, whatever they were: the same for the same step."""
    import torch

    from gpt2lab.model import ModelConfig, build_model
    from gpt2lab.optim import OptimConfig, build_optimizers

    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "vocab_size": 29}
    model = build_model(ModelConfig.model_validate(sizes), seed=1)
    found = TrainState(model, build_optimizers(OptimConfig(), model.params()), step=step)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(step))
    for optimizer in found.optimizers:
        optimizer.step()
    return found


def main() -> None:
    newest = state(6)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            save(Path(line.strip()), newest)
            prune(Path(line.strip()), keep=2)
            os._exit(0)
        print(pid, flush=True)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
