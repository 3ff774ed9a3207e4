"""`memory`: the peak memory of a few training steps, honestly: one side alone in a process of its own, above
what that process holds after training a model of no size, because torch imports much of itself at the first step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import options as o
from benchmarks.sides import Spec, Work, work_against
from gpt2lab.basics.text import memory as in_units
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.registry import Choice
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
        [sys.executable, "-m", "benchmarks.memory"],
        cwd=Path(__file__).parents[1], input=json.dumps(question), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFault(
            f"measuring the memory of {spec.name} failed: {last}",
            where="benchmarks",
            hint="a smaller batch or configuration",
        )
    return int(done.stdout.splitlines()[-1])


def measure(question: Mapping[str, Any]) -> int:
    """What the process of its own does."""
    set_threads(question["threads"])
    if question["spec"]["name"] == "gpt2lab":
        keep_memory()  # as workers do
    device, spec, sizes = torch.device(question["device"]), Spec(**question["spec"]), question["work"]
    work = Work(**{**sizes, "choice": sizes["choice"] and Choice(**sizes["choice"])})
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


def memory(
    config: o.Size = "b256",
    batches: Annotated[str, typer.Option("--batches", help="Sequences in a batch, with commas.")] = "2,8,32",
    vocabularies: Annotated[str, typer.Option("--vocabularies", help="Sizes, with commas.")] = "256,8192,50304",
    vs: o.Versus = "plain",
    precision: o.Precision = "fp32",
    vs_precision: o.OtherPrecision = "fp32",
    threads: o.Threads = None,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Measure the peak memory of training against batch and vocabulary, each in a process of its own."""
    place = o.chosen_device(device, threads, *o.precisions(precision, vs_precision))
    at = torch.get_num_threads()
    base = work_against(vs, config)
    specs = (Spec("gpt2lab", precision), Spec(vs, vs_precision))  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    for vocab_size in integers(vocabularies, "--vocabularies"):
        for sequences in integers(batches, "--batches"):
            work = replace(base, vocab_size=vocab_size, sequences=sequences)
            peaks = {spec.name.partition("=")[0]: peak_bytes(spec, work, place, at) for spec in specs}
            rows.append({"vocab_size": vocab_size, "sequences": sequences, "peak_memory_bytes": peaks})
    if json_:
        print(json.dumps({"config": config, "precision": precision, "threads": at, "rows": rows}))
        return
    table = o.table_of("vocabulary", "batch", *rows[0]["peak_memory_bytes"], "share")
    for row in rows:
        mine, other = row["peak_memory_bytes"].values()
        sizes = (f"{row['vocab_size']:,}", str(row["sequences"]))
        table.add_row(*sizes, in_units(mine), in_units(other), f"{mine / other:.2f}")
    o.show(table)


def integers(text: str, where: str) -> list[int]:
    """`2,8,32`. Raises ConfigError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"'{text}' is no list of whole numbers", where=where, hint=f"{where} 2,8,32") from error
    if min(found) < 1:
        raise ConfigError(f"{min(found)} is below 1", where=where, hint=f"{where} 2,8,32")
    return found


if __name__ == "__main__":
    print(measure(json.load(sys.stdin)))
