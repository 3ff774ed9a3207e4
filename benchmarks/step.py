"""`step`: our training step and another's timed in turns, on the same weights and batches, with one large matrix
product in the turn after them, which is the limit of both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks import options as o
from benchmarks.memory import peak_bytes
from benchmarks.sides import Product, Spec, Work, work_against
from benchmarks.turns import time_sides
from gpt2lab.basics.text import memory as in_units
from gpt2lab.basics.text import quantity
from gpt2lab.inspection.costs import costs

WARM_UP_STEPS = 2
LIMIT_SIZE, GPU_LIMIT_SIZE = 2048, 8192


@dataclass(frozen=True)
class SideResult:
    """One side. milliseconds: a step, the median; low and high: the fastest and slowest block's.  of_limit: its model
    FLOP/s as a share of what a large matrix product in the same precision reaches in the blocks between, the median.
    losses: of the first steps."""

    name: str
    precision: str
    milliseconds: float
    low: float
    high: float
    tokens_per_second: float
    flops_per_second: float
    limit_flops_per_second: float
    of_limit: float
    peak_memory_bytes: int | None
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Ours, the other, and how many times as fast ours is, with a 95 % interval over blocks (None with one block)."""

    config: str
    work: Work
    device: str
    threads: int
    blocks: int
    sides: tuple[SideResult, SideResult]
    ratio: float
    interval: tuple[float, float] | None


def compare(
    config: str, work: Work, specs: tuple[Spec, Spec], device: torch.device, *, blocks: int, memory: bool = True
) -> Comparison:
    """Time both sides over `blocks` blocks each, and measure their memory in processes of their own."""
    threads = torch.get_num_threads()
    size = GPU_LIMIT_SIZE if device.type == "cuda" else LIMIT_SIZE
    products = [Product(size, precision) for precision in dict.fromkeys(spec.precision for spec in specs)]
    timing = time_sides([*specs, *products], work, device, blocks=blocks, first_steps=WARM_UP_STEPS)
    speeds = {p.precision: [p.flops / s for s in taken] for p, taken in zip(products, timing.seconds[2:], strict=True)}
    flops = costs(work.model()).flops_per_token * work.tokens

    def result(spec: Spec, name: str, taken: list[float], losses: list[float]) -> SideResult:
        each, limits = median(taken), speeds[spec.precision]
        return SideResult(
            name, spec.precision, 1000 * each, 1000 * min(taken), 1000 * max(taken), work.tokens / each,
            flops / each, median(limits), median(flops / s / limit for s, limit in zip(taken, limits, strict=True)),
            peak_bytes(spec, work, device, threads) if memory else None, tuple(losses),
        )  # fmt: skip

    ours, theirs = map(result, specs, timing.names, timing.seconds, timing.values)
    return Comparison(config, work, device.type, threads, blocks, (ours, theirs), timing.ratio, timing.interval)


def step(
    config: o.Size = "a",
    vs: o.Versus = "plain",
    model: Annotated[str, typer.Option("--model", help="plain puts the plain model into our engine.")] = "gpt2lab",
    precision: o.Precision = "fp32",
    vs_precision: o.OtherPrecision = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="Compile our model.")] = False,
    blocks: o.Blocks = 7,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Time only; memory takes a process each.")] = False,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Time our training step and another's in turns: same weights, same batches, a process each."""
    place = o.chosen_device(
        device, threads, ("--model", model, ("gpt2lab", "plain")), *o.precisions(precision, vs_precision)
    )
    work = work_against(vs, config)
    ours = Spec("gpt2lab", precision, plain_model=model == "plain", compile=compile_)  # type: ignore[arg-type]
    found = compare(config, work, (ours, Spec(vs, vs_precision)), place, blocks=blocks, memory=not no_memory)  # type: ignore[arg-type]
    if json_:
        print(json.dumps(asdict(found)))
        return
    table = o.table_of("", "precision", "ms per step", "blocks", "tokens/s", "FLOP/s", "of the limit", "memory")
    for side in found.sides:
        table.add_row(
            side.name, side.precision, f"{side.milliseconds:.4g}", f"{side.low:.4g} to {side.high:.4g}",
            quantity(side.tokens_per_second), quantity(side.flops_per_second), f"{100 * side.of_limit:.0f} %",
            in_units(side.peak_memory_bytes),
        )  # fmt: skip
    words = o.verdict(*o.names_of(*found.sides), found.ratio, found.interval)
    counted = f"({found.blocks} blocks each, {found.device}, {found.threads} threads)"
    o.show(table, f"configuration {found.config}: {words} {counted}")
