"""What is tried on this machine before training: how fast each arm trains, and how many sequences fit into memory.

    runs/throughput/<key>.json    one for each way to train, device, number of threads, code and torch

A recorded speed is never measured again, so that a study's runs do not depend on how busy the machine is today."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from gpt2lab.config import Config, config_from_text
from gpt2lab.data.files import data_home
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.identity import choices, component_code, core_code, digest, settings
from gpt2lab.model import build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import is_compiled
from gpt2lab.store import file_lock, now, read_json, write_json
from gpt2lab.text import memory
from gpt2lab.training.allocator import high_water, keep_memory
from gpt2lab.training.clock import Clock
from gpt2lab.training.compiling import compiled
from gpt2lab.training.distributed import ALONE, Replica
from gpt2lab.training.loop import Batch, accumulate
from gpt2lab.training.precision import loss_scaler, memory_guard, set_arithmetic, set_threads
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
            speeds = measure({name: configs[name] for name in missing.values()}, machine)
            for path, name in missing.items():
                write_json(path, {"tokens_per_second": speeds[name], "measured": now(), **parts[name]})
    return {name: _read_speed(path) for name, path in paths.items()}


def _read_speed(path: Path) -> float:
    speed = (read_json(path) or {}).get("tokens_per_second")
    if isinstance(speed, (int, float)) and math.isfinite(speed) and speed > 0:
        return float(speed)
    raise DataFault("no speed in it", where=str(path), hint=f"rm {path}; it is then measured again")


def speed_parts(config: Config, machine: Machine) -> dict[str, Any]:
    """All that speed depends on, as plain data."""
    parts = [choice for choice in choices(config) if choice.slot != "schedule"]
    code = digest([core_code(), *map(component_code, parts)])
    return {**_way_to_train(config, machine), "code": code, "torch": machine.torch}


def _way_to_train(config: Config, machine: Machine) -> dict[str, Any]:
    """The settings that speed and memory depend on, and where they apply."""
    tree = {
        section: {key: value for key, value in values.items() if key not in NOT_SPEED.get(section, ())}
        for section, values in settings(config).items()
    }
    return {
        "settings": tree,
        "device": machine.device_name,
        "threads": machine.threads if machine.device == "cpu" else 0,
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
    config = _with(config, micro_batch_sequences=rows)
    training, block_size = config.training, config.model.block_size
    hint = f"--set training.micro_batch_sequences={max(1, rows // 2)}"
    with memory_guard("throughput probe", f"{rows} sequences of {block_size} tokens in one pass", hint):
        model = build_model(config.model, seed=0, device=device)
        if compiles := is_compiled(config, device.type):
            compiled(model, data_home() / "compiled")
        scaler = loss_scaler(training.precision, device)
        state = TrainState(model.train(), build_optimizers(config.optim, model.params()), scaler=scaler)
        set_arithmetic(training.precision, device, training.deterministic)
        tokens = torch.randint(config.model.vocab_size, (rows, block_size + 1))
        if compiles:
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


def _with(config: Config, **training: Any) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def _timed_pass(state: TrainState, tokens: Tensor, config: Config, device: torch.device) -> float:
    """Seconds of one micro-batch forward and backward.  tokens: (n, T + 1)"""
    _synchronise(device)
    began = time.perf_counter()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], [tokens.shape[1] - 1] * len(tokens))
    replica, clock = Replica(state.model, ALONE), Clock()
    accumulate(replica, state, batch, config.training, seed=0, step=0, world=ALONE, clock=clock)
    _synchronise(device)
    return time.perf_counter() - began


def _timed_update(state: TrainState, grad_clip: float | None, device: torch.device) -> float:
    """Seconds of clipping and of the optimizers' steps."""
    began = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), math.inf if grad_clip is None else grad_clip)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU, which works through a queue."""
    getattr(torch, device.type).synchronize()


SHARE = {"cuda": 0.92, "cpu": 0.6, "mps": 0.6}
"""Of the memory that is there, as much as a training may take; the rest is for others, and for evaluation."""
MOST_TOKENS = {"cuda": 65_536, "cpu": 8_192, "mps": 16_384}
"""In one pass: with more, a device's products of matrices do not get faster."""


@dataclass(frozen=True)
class MicroBatch:
    """sequences: in one pass.  memory_bytes: at the peak of a training with it.  available_bytes: what a rank may use.
    pass_seconds, update_seconds: of one pass forward and backward, and of an update."""

    sequences: int
    memory_bytes: int
    available_bytes: int
    pass_seconds: float
    update_seconds: float

    def step_seconds(self, sequences: int) -> float:
        """Of a step of so many sequences on one rank."""
        return sequences / self.sequences * self.pass_seconds + self.update_seconds


@dataclass(frozen=True)
class Probe:
    """What a short training took."""

    memory_bytes: int
    pass_seconds: float
    update_seconds: float


def micro_batch(
    config: Config, machine: Machine, ranks: int, root: Path, say: Callable[[str], None] = lambda text: None
) -> MicroBatch:
    """The largest power of two that divides a rank's share of the batch and fits. Raises EnvironmentFault where not
    even one sequence does."""
    path = root / "probes" / f"{digest(key(config, machine, ranks))[:16]}.json"
    kept = read_json(path)
    if kept is not None:
        return MicroBatch(**kept["found"])
    share = config.training.batch_tokens // config.model.block_size // ranks
    available = available_bytes(machine.device, ranks)
    say("trying how many sequences fit into memory")
    line = _with(config, compile="off")
    found = search(
        share,
        most(machine.device, config.model.block_size),
        available,
        lambda n: read(line, machine, n),  # compiled a training takes somewhat less
        (lambda n: read(config, machine, n)) if is_compiled(config, machine.device) else None,
    )
    write_json(path, {"found": asdict(found), "measured": now(), **key(config, machine, ranks)})
    return found


def given(config: Config, machine: Machine, ranks: int) -> MicroBatch:
    """What the size that the config names takes. Raises EnvironmentFault where memory does not hold it."""
    n = config.training.micro_batch_sequences or config.training.batch_tokens // config.model.block_size // ranks
    taken = read(config, machine, n)
    available = available_bytes(machine.device, ranks)
    return MicroBatch(n, taken.memory_bytes, available, taken.pass_seconds, taken.update_seconds)


def search(
    share: int, most: int, available: int, reading: Callable[[int], Probe],
    as_trained: Callable[[int], Probe] | None = None,
) -> MicroBatch:  # fmt: skip
    """The line through one and two sequences, then the largest size on it that holds when it is tried.

    share: sequences of one rank in a step.  most: sequences that a pass may have, whatever memory there is.
    as_trained: what the size that is tried takes, where `reading` is only near that.
    """
    sizes = [n for n in (1 << i for i in range(share.bit_length())) if share % n == 0 and n <= max(1, most)]
    readings = {n: reading(n) for n in sizes[:2]}
    each = readings[2].memory_bytes - readings[1].memory_bytes if 2 in readings else 0
    fitting = [n for n in sizes if readings[1].memory_bytes + (n - 1) * each <= available]
    if not fitting:
        raise EnvironmentFault(
            f"one sequence takes {memory(readings[1].memory_bytes)}, and a rank may use {memory(available)}",
            where="training.micro_batch_sequences",
            hint="a machine with more memory, or a smaller model",
        )
    for n in reversed(fitting):
        try:
            taken = readings[n] if n in readings and not as_trained else (as_trained or reading)(n)
        except EnvironmentFault:
            if n == 1:
                raise
            continue
        if taken.memory_bytes <= available or n == 1:
            break
    return MicroBatch(n, taken.memory_bytes, available, taken.pass_seconds, taken.update_seconds)


def most(device: str, block_size: int) -> int:
    """Sequences beyond which a pass gets no faster."""
    return MOST_TOKENS[device] // block_size


def available_bytes(device: str, ranks: int) -> int:
    """Memory that one of `ranks` on this machine may use."""
    if device == "cuda":
        return int(SHARE[device] * torch.cuda.get_device_properties(0).total_memory)
    return int(SHARE[device] * psutil.virtual_memory().available / ranks)


def key(config: Config, machine: Machine, ranks: int) -> dict[str, Any]:
    """All that the micro-batch depends on, as plain data."""
    parts = _way_to_train(config, machine)
    training = {name: value for name, value in parts["settings"]["training"].items() if name != "micro_batch_sequences"}
    return {
        **parts, "settings": {**parts["settings"], "training": training}, "ranks": ranks, "torch": torch.__version__
    }  # fmt: skip


def read(config: Config, machine: Machine, sequences: int) -> Probe:
    """A short training with so many sequences, in a process of its own: memory that was once held is held on to.
    Raises EnvironmentFault when it does not come to its end, which mostly means that memory ran out."""
    question = {"config": config.to_yaml(), "device": machine.device, "threads": machine.threads, "rows": sequences}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2lab.planning.probes"],
        input=json.dumps(question), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFault(f"a pass of {sequences} sequences failed: {last}", where="memory probe")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def answer(question: Mapping[str, Any]) -> Probe:
    """What the process of its own does."""
    set_threads(question["threads"])
    keep_memory()  # as workers do
    device = torch.device(question["device"])
    one_pass, update = timed(config_from_text(question["config"]), device, question["rows"])
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else high_water()
    return Probe(peak, one_pass, update)


if __name__ == "__main__":
    print(json.dumps(asdict(answer(json.load(sys.stdin)))))
