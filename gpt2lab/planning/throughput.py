"""How fast each arm trains here, measured once and kept: equal wall clock becomes a fixed number of tokens.

    runs/throughput/<key>.json    one for each way to train, device, number of threads, code and torch

A recorded speed is never measured again, so that a study's runs do not depend on how busy the machine is today.

Layer: plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab.config import Config
from gpt2lab.data.files import data_home
from gpt2lab.errors import ConfigError, DataFault
from gpt2lab.identity import choices, component_code, core_code, digest, settings
from gpt2lab.model import build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import is_compiled
from gpt2lab.store import file_lock, now, read_json, write_json
from gpt2lab.training.clock import Clock
from gpt2lab.training.compiling import compiled
from gpt2lab.training.distributed import ALONE
from gpt2lab.training.loop import Batch, accumulate
from gpt2lab.training.precision import loss_scaler, memory_guard, set_arithmetic
from gpt2lab.training.replica import Replica
from gpt2lab.training.state import TrainState

ROUNDS = 3
FEWEST_STEPS, SECONDS = 3, 0.5  # of each arm in a round, whichever takes longer
LONG_SECONDS = 20.0
"""Nothing is timed again in a round that took as long as this."""

# no matter for speed: how long, and at what rate
NOT_SPEED = {"training": {"steps"}, "optim": {"lr", "warmup_steps", "schedule"}}


def recorded(root: Path, configs: Mapping[str, Config], machine: Machine) -> dict[str, float]:
    """Tokens per second of every config, as first measured on this machine and stack; the missing ones are measured.

    Arms that train alike have one record. Raises DataFault for a damaged record.
    """
    parts = {name: speed_parts(config, machine) for name, config in configs.items()}
    paths = {name: root / "throughput" / f"{digest(part)[:16]}.json" for name, part in parts.items()}
    if not all(path.exists() for path in paths.values()):
        if not machine.here:
            what = f"equal wall clock needs the arms' speeds on {machine.device_name}, which are not measured yet"
            raise ConfigError(what, where="equalise", hint="plan once on that machine, with the same --runs")
        with file_lock(root / "throughput" / "lock"):  # two probes at once would slow each other down
            missing = {path: name for name, path in paths.items() if not path.exists()}
            found = measure({name: configs[name] for name in missing.values()}, machine)
            for path, name in missing.items():
                write_json(path, {"tokens_per_second": found[name], "measured": now(), **parts[name]})
    return {name: _kept(path) for name, path in paths.items()}


def _kept(path: Path) -> float:
    speed = (read_json(path) or {}).get("tokens_per_second")
    if isinstance(speed, (int, float)) and math.isfinite(speed) and speed > 0:
        return float(speed)
    raise DataFault("no speed in it", where=str(path), hint=f"rm {path}; it is then measured again")


def speed_parts(config: Config, machine: Machine) -> dict[str, Any]:
    """All that speed depends on, as plain data."""
    tree = {
        section: {key: value for key, value in values.items() if key not in NOT_SPEED.get(section, ())}
        for section, values in settings(config).items()
    }
    parts = [choice for choice in choices(config) if choice.slot != "schedule"]
    return {
        "settings": tree,
        "code": digest([core_code(), *map(component_code, parts)]),
        "device": machine.device_name,
        "threads": machine.threads if machine.device == "cpu" else 0,
        "torch": machine.torch,
        "compiled": is_compiled(config, machine.device),
    }


def measure(configs: Mapping[str, Config], machine: Machine) -> dict[str, float]:
    """Tokens per second of training on random tokens: the fastest of several rounds, in which arms take turns, as what
    else the machine does can only slow it down. Leaves torch's threads and random numbers as they were."""
    before, best = torch.get_num_threads(), dict.fromkeys(configs, math.inf)
    torch.set_num_threads(machine.threads)
    try:
        with torch.random.fork_rng():
            for _ in range(ROUNDS):
                for name, config in configs.items():
                    best[name] = min(best[name], step_seconds(config, torch.device(machine.device)))
    finally:
        torch.set_num_threads(before)
    return {name: config.training.batch_tokens / best[name] for name, config in configs.items()}


def step_seconds(config: Config, device: torch.device) -> float:
    """Seconds of one training step: of one micro-batch times their number, and of the update after them."""
    sequences = config.training.batch_tokens // config.model.block_size
    rows = config.training.micro_batch_sequences or sequences
    one_pass, update = timed(config, device, rows)
    return sequences / rows * one_pass + update


def timed(config: Config, device: torch.device, rows: int) -> tuple[float, float]:
    """Seconds of one micro-batch of `rows` sequences forward and backward, and of an update. Raises EnvironmentFault
    where memory does not hold them."""
    config = config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_sequences": rows})})
    training, block_size = config.training, config.model.block_size
    hint = f"--set training.micro_batch_sequences={max(1, rows // 2)}"
    with memory_guard("throughput probe", f"{rows} sequences of {block_size} tokens in one pass", hint):
        model = build_model(config.model, seed=0, device=device)
        translated = is_compiled(config, device.type)
        if translated:
            compiled(model, data_home() / "compiled")
        scaler = loss_scaler(training.precision, device)
        state = TrainState(model.train(), build_optimizers(config.optim, model.params()), scaler=scaler)
        set_arithmetic(training.precision, device, training.deterministic)
        tokens = torch.randint(config.model.vocab_size, (rows, block_size + 1))
        if translated:
            _timed_pass(state, tokens, config, device)  # which compiles
        passes: list[float] = []
        updates: list[float] = []
        began = time.perf_counter()
        while len(passes) < FEWEST_STEPS or time.perf_counter() - began < SECONDS:
            passes.append(_timed_pass(state, tokens, config, device))
            updates.append(_timed_update(state, config.optim.grad_clip, device))
            if time.perf_counter() - began > LONG_SECONDS:
                break
    return min(passes), min(updates)


def _timed_pass(state: TrainState, tokens: Tensor, config: Config, device: torch.device) -> float:
    """Seconds of one micro-batch forward and backward.  tokens: (n, T + 1)"""
    _wait_for(device)
    began = time.perf_counter()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], [tokens.shape[1] - 1] * len(tokens))
    replica, clock = Replica(state.model, ALONE), Clock()
    accumulate(replica, state, batch, config.training, seed=0, step=0, world=ALONE, clock=clock)
    _wait_for(device)
    return time.perf_counter() - began


def _timed_update(state: TrainState, grad_clip: float | None, device: torch.device) -> float:
    """Seconds of clipping and of the optimizers' steps."""
    began = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), math.inf if grad_clip is None else grad_clip)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    """A GPU computes behind the program's back."""
    getattr(torch, device.type).synchronize()
