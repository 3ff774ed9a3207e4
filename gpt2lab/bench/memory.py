"""The peak memory of a few training steps, honestly: one side alone in a process of its own, above what that process
holds after training a model of no size, because torch imports much of itself at the first step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gpt2lab.bench.sides import Spec
from gpt2lab.bench.work import Work
from gpt2lab.errors import EnvironmentFault
from gpt2lab.training.allocator import high_water, keep_memory
from gpt2lab.training.precision import set_threads

STEPS = 2
"""The first makes the optimizer's state, the second has everything at once."""


def peak_bytes(spec: Spec, work: Work, device: torch.device, threads: int) -> int:
    """Bytes at the peak of a training by `spec`: weights, gradients, optimizer state, activations.

    Raises EnvironmentFault when the process does not come to its end, which mostly means that memory ran out.
    """
    question = {"spec": asdict(spec), "work": asdict(work), "device": device.type, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2lab.bench.memory"],
        input=json.dumps(question), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFault(
            f"measuring the memory of {spec.name} failed: {last}",
            where="bench",
            hint="a smaller batch or configuration",
        )
    return int(done.stdout.splitlines()[-1])


def measure(question: Mapping[str, Any]) -> int:
    """What the process of its own does."""
    set_threads(question["threads"])
    if question["spec"]["name"] == "gpt2lab":
        keep_memory()  # as workers do
    device, spec, work = torch.device(question["device"]), Spec(**question["spec"]), Work(**question["work"])
    train(spec, replace(work, n_layer=1, n_head=1, n_embd=8, block_size=8, sequences=1, vocab_size=8), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = start_over()
    train(spec, work, device)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else high_water() - before


def train(spec: Spec, work: Work, device: torch.device) -> None:
    """A few steps."""
    side = spec.make(work, device)
    for _ in range(STEPS):
        side.step()


def start_over() -> int:
    """Forget this process's peak where the kernel can do so; -> the bytes that it holds now, or held at most so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return high_water()


if __name__ == "__main__":
    print(measure(json.load(sys.stdin)))
