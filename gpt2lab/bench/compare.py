"""Two training steps timed in turns, A B A B, so that whatever else the machine does falls on both. Each side is in a
process of its own, since how memory is kept is a process's, not a step's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from scipy import stats

from gpt2lab.bench.away import Away
from gpt2lab.bench.memory import peak_bytes
from gpt2lab.bench.sides import Spec
from gpt2lab.bench.work import Work
from gpt2lab.costs import costs
from gpt2lab.peak import matmul_flops

BLOCK_SECONDS = 1.0
MOST_STEPS = 50
WARM_UP_STEPS = 2
CONFIDENCE = 0.95
LIMIT_SIZE, GPU_LIMIT_SIZE = 2048, 8192


@dataclass(frozen=True)
class SideResult:
    """One side. milliseconds: a step, the median; low and high: the fastest and slowest block's.  of_limit: its model
    FLOP/s as a share of what a large matrix product reaches here in the same precision.  losses: of the first steps."""

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    config: str, work: Work, specs: tuple[Spec, Spec], device: torch.device, *, blocks: int, memory: bool = True
) -> Comparison:
    """Time both sides over `blocks` blocks each, and measure their memory in processes of their own."""
    threads = torch.get_num_threads()
    with Away(specs[0], work, device, threads) as first, Away(specs[1], work, device, threads) as second:
        sides = (first, second)
        names, precisions = [side.name for side in sides], [side.precision for side in sides]
        losses = [tuple(side.run(WARM_UP_STEPS)[1]) for side in sides]
        seconds = in_turns(sides, blocks)
    size = GPU_LIMIT_SIZE if device.type == "cuda" else LIMIT_SIZE
    limits = {precision: matmul_flops(device, precision, threads, size) for precision in set(precisions)}
    peaks = [peak_bytes(spec, work, device, threads) if memory else None for spec in specs]
    flops = costs(work.model()).flops_per_token * work.tokens
    results = [
        result(name, precision, taken, work, flops, limits[precision], peak, begun)
        for name, precision, taken, peak, begun in zip(names, precisions, seconds, peaks, losses, strict=True)
    ]
    ratio, interval = ratio_of(seconds[1], seconds[0])
    return Comparison(config, work, device.type, threads, blocks, (results[0], results[1]), ratio, interval)


class Timed(Protocol):
    """What takes its turns."""

    def run(self, steps: int) -> tuple[float, list[float]]:
        """Seconds per step, and losses."""
        ...


def in_turns(sides: Sequence[Timed], blocks: int) -> list[list[float]]:
    """Seconds per step of every side in each block; a block has as many steps as fit into about a second."""
    counts = [max(1, min(MOST_STEPS, round(BLOCK_SECONDS / side.run(1)[0]))) for side in sides]
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(blocks):
        for side, count, found in zip(sides, counts, taken, strict=True):
            found.append(side.run(count)[0])
    return taken


def result(
    name: str, precision: str, taken: Sequence[float], work: Work, flops: float, limit: float, peak: int | None,
    losses: tuple[float, ...],
) -> SideResult:  # fmt: skip
    """From seconds per step of every block, FLOP of a step, and the limit in FLOP/s."""
    each = statistics.median(taken)
    return SideResult(
        name, precision, 1000 * each, 1000 * min(taken), 1000 * max(taken), work.tokens / each,
        flops / each, limit, flops / each / limit, peak, losses,
    )  # fmt: skip


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """How many times as fast ours is: the geometric mean over pairs of neighbouring blocks, and its t interval."""
    logs = [math.log(a / b) for a, b in zip(theirs, ours, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), (math.exp(mean - reach), math.exp(mean + reach))
