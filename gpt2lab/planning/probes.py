"""Probes of this machine before training: how fast each arm trains, and how many sequences fit into memory.

    runs/throughput/<key>.json    one for each way to train, device, number of threads, code and torch

A recorded speed is never measured again, so that a study's runs do not depend on the load of the machine."""

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
from pydantic import TypeAdapter
from torch import Tensor

from gpt2lab.basics.text import memory
from gpt2lab.config import Config, config_from_text
from gpt2lab.data.files import data_home
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, command
from gpt2lab.identity import choices, component_code, core_code, digest, settings
from gpt2lab.model import build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import is_compiled
from gpt2lab.store import Store, file_lock, now, read_json, write_json
from gpt2lab.training.allocator import high_water, keep_memory
from gpt2lab.training.clock import Clock
from gpt2lab.training.compiling import compiled
from gpt2lab.training.distributed import ALONE, Replica
from gpt2lab.training.loop import Batch, accumulate
from gpt2lab.training.precision import loss_scaler, memory_guard, set_arithmetic, set_threads
from gpt2lab.training.state import TrainState, step_of

ROUNDS = 3
FEWEST_STEPS, SECONDS = 3, 0.5  # of each arm in a round, whichever takes longer
LONG_SECONDS = 20.0
"""A round ends after this time."""

# settings that do not affect speed
NOT_SPEED = {"training": {"steps"}, "optim": {"lr", "warmup_steps", "schedule"}}


def recorded(root: Path, configs: Mapping[str, Config], machine: Machine) -> dict[str, float]:
    """Tokens per second of every config, as first measured on this machine and stack; measures those without a record.

    Arms that train alike have one record. Raises DataFault for a damaged record.
    """
    parts = {name: speed_parts(config, machine) for name, config in configs.items()}
    paths = {name: root / "throughput" / f"{digest(part)[:16]}.json" for name, part in parts.items()}
    if not all(path.exists() for path in paths.values()):
        if not machine.local:
            problem = f"equal wall clock needs the arms' speeds on {machine.device_name}, which are not measured yet"
            raise ConfigError(problem, where="equalise", hint="plan once on that machine, with the same --runs")
        with file_lock(Store(root).folder("throughput") / "lock"):  # two probes at once would slow each other down
            missing = {path: name for name, path in paths.items() if not path.exists()}
            speeds = measure({name: configs[name] for name in missing.values()}, machine)
            for path, name in missing.items():
                write_json(path, {"tokens_per_second": speeds[name], "measured": now(), **parts[name]})
    return {name: _read_speed(path) for name, path in paths.items()}


def _read_speed(path: Path) -> float:
    speed = (read_json(path) or {}).get("tokens_per_second")
    if isinstance(speed, (int, float)) and math.isfinite(speed) and speed > 0:
        return float(speed)
    raise DataFault("no speed in it", where=str(path), hint=command("rm", path) + "; it is then measured again")


def speed_parts(config: Config, machine: Machine) -> dict[str, Any]:
    """Everything that speed depends on, as plain data."""
    parts = [choice for choice in choices(config) if choice.slot != "schedule"]
    code = digest([core_code(), *map(component_code, parts)])
    return {**_way_to_train(config, machine), "code": code, "torch": machine.torch}


def _way_to_train(config: Config, machine: Machine) -> dict[str, Any]:
    """The settings and the device that speed and memory depend on."""
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
    """Tokens per second of training on random tokens: the fastest of several rounds over all arms, since other load on
    the machine only slows it down. Restores torch's number of threads and random state."""
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
    """Seconds of one micro-batch of `rows` sequences forward and backward, times the passes that an update needs, and
    of the rest of an update. Raises EnvironmentFault when memory runs out."""
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
        again: list[None] = []  # an entry for each pass that the optimizer asks for
        began = time.perf_counter()
        while len(passes) < FEWEST_STEPS or time.perf_counter() - began < SECONDS:
            passes.append(_timed_pass(state, tokens, config, device))
            updates.append(_timed_update(state, config.optim.grad_clip, device, again))
            if time.perf_counter() - began > LONG_SECONDS:
                break
    return min(passes) * (1 + len(again) / len(updates)), min(updates)


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


def _timed_update(state: TrainState, grad_clip: float | None, device: torch.device, again: list[None]) -> float:
    """Seconds of clipping and of the optimizers' steps, which add to `again` instead of computing gradients anew."""
    began = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), math.inf if grad_clip is None else grad_clip)
    for optimizer in state.optimizers:
        step_of(optimizer, lambda: again.append(None))
        optimizer.zero_grad(set_to_none=True)
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    getattr(torch, device.type).synchronize()


SHARE = {"cuda": 0.92, "cpu": 0.6, "mps": 0.6}
"""Share of the available memory that a training may take; the rest is for other processes and for evaluation."""
MOST_TOKENS = {"cuda": 65_536, "cpu": 8_192, "mps": 16_384}
"""Tokens in one pass beyond which matrix products on the device get no faster."""


@dataclass(frozen=True)
class MicroBatch:
    """A size of micro-batches, measured by a short training.

    sequences: in one pass.  memory_bytes: at the peak of a training with it.  available_bytes: for one rank.
    pass_seconds, update_seconds: of one pass forward and backward, and of an update.
    """

    sequences: int
    memory_bytes: int
    available_bytes: int
    pass_seconds: float
    update_seconds: float

    def step_seconds(self, sequences: int) -> float:
        """Of a step of so many sequences on one rank."""
        return sequences / self.sequences * self.pass_seconds + self.update_seconds


def micro_batch(
    config: Config, machine: Machine, root: Path, say: Callable[[str], None] = lambda text: None
) -> MicroBatch:
    """The largest power of two that divides a rank's share of the batch and fits into memory. Raises EnvironmentFault
    where a single sequence does not fit."""
    path = root / "probes" / f"{digest(key(config, machine))[:16]}.json"
    record = read_json(path)
    if record is not None:
        try:
            return TypeAdapter(MicroBatch).validate_python(record.get("found"))
        except ValueError:
            hint = command("rm", path) + "; it is then measured again"
            raise DataFault("no micro-batch in it", where=str(path), hint=hint) from None
    share = config.training.batch_tokens // config.model.block_size // machine.ranks
    available = available_bytes(machine)
    say("trying how many sequences fit into memory")
    uncompiled = _with(config, compile="off")
    result = search(
        share,
        MOST_TOKENS[machine.device] // config.model.block_size,
        available,
        lambda n: probed(uncompiled, machine, n, available),  # a compiled training takes somewhat less memory
        (lambda n: probed(config, machine, n, available)) if is_compiled(config, machine.device) else None,
    )
    Store(root).folder("probes")
    write_json(path, {"found": asdict(result), "measured": now(), **key(config, machine)})
    return result


def micro_batch_of(config: Config, machine: Machine) -> MicroBatch:
    """Memory and time at the size in the config. Raises EnvironmentFault where it does not fit into memory."""
    share = config.training.batch_tokens // config.model.block_size // machine.ranks
    return probed(config, machine, config.training.micro_batch_sequences or share, available_bytes(machine))


def search(
    share: int, largest: int, available: int, reading: Callable[[int], MicroBatch],
    as_trained: Callable[[int], MicroBatch] | None = None,
) -> MicroBatch:  # fmt: skip
    """Memory is extrapolated linearly from one and two sequences; the largest size that should fit is then verified.

    share: sequences of one rank in a step.  largest: sequences that a pass may have, independent of memory.
    as_trained: a more exact reading for the verification, where `reading` is approximate.
    """
    sizes = [n for n in (1 << i for i in range(share.bit_length())) if share % n == 0 and n <= max(1, largest)]
    readings = {n: reading(n) for n in sizes[:2]}
    per_sequence = readings[2].memory_bytes - readings[1].memory_bytes if 2 in readings else 0
    fitting = [n for n in sizes if readings[1].memory_bytes + (n - 1) * per_sequence <= available]
    if not fitting:
        raise EnvironmentFault(
            f"one sequence takes {memory(readings[1].memory_bytes)}, and a rank may use {memory(available)}",
            where="training.micro_batch_sequences",
            hint="a machine with more memory, or a smaller model",
        )
    for n in reversed(fitting):
        try:
            measured = readings[n] if n in readings and not as_trained else (as_trained or reading)(n)
        except EnvironmentFault:
            if n == 1:
                raise
            continue
        if measured.memory_bytes <= available or n == 1:
            break
    return measured


def available_bytes(machine: Machine) -> int:
    """Memory that one rank may use."""
    if machine.device == "cuda":
        return int(SHARE[machine.device] * torch.cuda.get_device_properties(0).total_memory)
    return int(SHARE[machine.device] * psutil.virtual_memory().available / machine.ranks)


def key(config: Config, machine: Machine) -> dict[str, Any]:
    """Everything that the micro-batch depends on, as plain data."""
    parts = _way_to_train(config, machine)
    training = {name: value for name, value in parts["settings"]["training"].items() if name != "micro_batch_sequences"}
    return {
        **parts, "settings": {**parts["settings"], "training": training}, "ranks": machine.ranks,
        "torch": torch.__version__,
    }  # fmt: skip


def probed(config: Config, machine: Machine, sequences: int, available: int) -> MicroBatch:
    """A short training with so many sequences, in a separate process, since torch does not return memory. Raises
    EnvironmentFault when the process fails, mostly because memory ran out."""
    request = {"config": config.to_yaml(), "device": machine.device, "threads": machine.threads}
    request |= {"sequences": sequences, "available": available}
    process = subprocess.run(
        [sys.executable, "-m", "gpt2lab.planning.probes"],
        input=json.dumps(request), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise EnvironmentFault(f"a pass of {sequences} sequences failed: {last}", where="memory probe")
    return MicroBatch(**json.loads(process.stdout.splitlines()[-1]))


def run_probe(request: Mapping[str, Any]) -> MicroBatch:
    """The body of that process."""
    set_threads(request["threads"])
    keep_memory()  # as workers do
    device = torch.device(request["device"])
    one_pass, update = timed(config_from_text(request["config"]), device, request["sequences"])
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else high_water()
    return MicroBatch(request["sequences"], peak, request["available"], one_pass, update)


if __name__ == "__main__":
    print(json.dumps(asdict(run_probe(json.load(sys.stdin)))))
