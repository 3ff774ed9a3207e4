"""How fast each arm trains here, measured once and kept: equal wall clock becomes a fixed number of tokens.

Layer: plan.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from gpt2lab.config import Config
from gpt2lab.identity import digest, settings
from gpt2lab.machine import Machine
from gpt2lab.model import build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.store import now, read_json, write_json

ROUNDS = 7


def recorded(root: Path, configs: Mapping[str, Config], machine: Machine) -> dict[str, float]:
    """Tokens per second of every config, from the first measurement of this set on this machine."""
    tree = {name: settings(config) for name, config in configs.items()}
    for one in tree.values():
        one["training"].pop("steps", None)
    parts = [tree, machine.device_name, machine.threads, torch.__version__]
    path = root / "throughput" / f"{digest(parts)[:16]}.json"
    kept = read_json(path)
    if kept is None:
        kept = {"tokens_per_second": measure(configs, machine), "rounds": ROUNDS, "measured": now()}
        write_json(path, kept)
    return dict(kept["tokens_per_second"])


def measure(configs: Mapping[str, Config], machine: Machine) -> dict[str, float]:
    """Tokens per second of training steps on random tokens, one arm after another in turns, the median of them."""
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(machine.threads)
    seen: dict[str, list[float]] = {name: [] for name in configs}
    try:
        made = {name: _Stepper(config, machine.device) for name, config in configs.items()}
        for _ in range(ROUNDS):
            for name, stepper in made.items():
                seen[name].append(stepper.tokens_per_second())
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)
    return {name: statistics.median(speeds[1:]) for name, speeds in seen.items()}


class _Stepper:
    """A model that can be trained a step at a time on random tokens."""

    def __init__(self, config: Config, device: str) -> None:
        self.model = build_model(config.model, seed=0, device=torch.device(device))
        self.optimizers = build_optimizers(config.optim, self.model.params())
        rows = config.training.batch_tokens // config.model.block_size
        self.tokens = torch.randint(config.model.vocab_size, (rows, config.model.block_size + 1), device=device)

    def tokens_per_second(self) -> float:
        """Of one step."""
        began = time.perf_counter()
        self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.tokens.is_cuda:
            torch.cuda.synchronize()
        return (self.tokens.numel() - len(self.tokens)) / (time.perf_counter() - began)
