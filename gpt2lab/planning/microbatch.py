"""How many sequences one forward pass may hold, found by two short trainings in processes of their own.

Memory is a line in the number of sequences: weights, gradients and optimizer state, and so much for each sequence. Two
points give the line; what it promises is tried once, because an allocator may need more. The answer is kept, as it
belongs to a run's identity: the same command must find the same run again.

    runs/probes/<key>.json    one for each way to train and device

Layer: plan.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from gpt2lab.config import Config, config_from_text
from gpt2lab.errors import EnvironmentFault
from gpt2lab.identity import digest, settings
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import is_compiled
from gpt2lab.planning.throughput import NOT_SPEED, timed
from gpt2lab.store import now, read_json, write_json
from gpt2lab.text import memory
from gpt2lab.training.allocator import high_water, keep_memory
from gpt2lab.training.precision import set_threads

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
class Reading:
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
    line = config.model_copy(update={"training": config.training.model_copy(update={"compile": "off"})})
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
    share: int, most: int, available: int, reading: Callable[[int], Reading],
    as_trained: Callable[[int], Reading] | None = None,
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
    """All that the answer rests on, as plain data."""
    tree = {
        section: {name: value for name, value in values.items() if name not in NOT_SPEED.get(section, ())}
        for section, values in settings(config).items()
    }
    tree["training"] = {name: value for name, value in tree["training"].items() if name != "micro_batch_sequences"}
    place = {"device": machine.device_name, "threads": machine.threads if machine.device == "cpu" else 0}
    translated = is_compiled(config, machine.device)
    return {"settings": tree, "ranks": ranks, "torch": torch.__version__, "compiled": translated, **place}


def read(config: Config, machine: Machine, sequences: int) -> Reading:
    """A short training with so many sequences, in a process of its own: memory that was once held is held on to.
    Raises EnvironmentFault when it does not come to its end, which mostly means that memory ran out."""
    question = {"config": config.to_yaml(), "device": machine.device, "threads": machine.threads, "rows": sequences}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2lab.planning.microbatch"],
        input=json.dumps(question), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFault(f"a pass of {sequences} sequences failed: {last}", where="memory probe")
    return Reading(**json.loads(done.stdout.splitlines()[-1]))


def answer(question: Mapping[str, Any]) -> Reading:
    """What the process of its own does."""
    set_threads(question["threads"])
    keep_memory()  # as workers do
    device = torch.device(question["device"])
    one_pass, update = timed(config_from_text(question["config"]), device, question["rows"])
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else high_water()
    return Reading(peak, one_pass, update)


if __name__ == "__main__":
    print(json.dumps(asdict(answer(json.load(sys.stdin)))))
