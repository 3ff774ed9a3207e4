"""Generation timed in turns, as training steps are: each side in a process of its own."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpt2lab.bench.away import Away
from gpt2lab.bench.compare import in_turns, ratio_of
from gpt2lab.bench.writers import Passage, Writer


@dataclass(frozen=True)
class WriterResult:
    """One side. milliseconds: a token of each sequence, the median; low and high: the fastest and slowest block's.
    tokens_per_second: of all sequences together."""

    name: str
    precision: str
    milliseconds: float
    low: float
    high: float
    tokens_per_second: float


@dataclass(frozen=True)
class Generated:
    """Ours, the other, and how many times as fast ours is, with a 95 % interval over blocks (None with one block).
    same_tokens: whether both wrote the same."""

    passage: Passage
    device: str
    threads: int
    blocks: int
    sides: tuple[WriterResult, WriterResult]
    same_tokens: bool
    ratio: float
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_writers(passage: Passage, specs: tuple[Writer, Writer], device: torch.device, *, blocks: int) -> Generated:
    """Time both sides over `blocks` blocks each, in turns and in processes of their own."""
    passage.check()
    threads = torch.get_num_threads()
    with Away(specs[0], passage, device, threads) as first, Away(specs[1], passage, device, threads) as second:
        sides = (first, second)
        names, precisions = [side.name for side in sides], [side.precision for side in sides]
        sums = [side.run(1)[1] for side in sides]
        seconds = in_turns(sides, blocks)
    results = [
        writer_result(name, precision, taken, passage)
        for name, precision, taken in zip(names, precisions, seconds, strict=True)
    ]
    ratio, interval = ratio_of(seconds[1], seconds[0])
    return Generated(
        passage, device.type, threads, blocks, (results[0], results[1]), sums[0] == sums[1], ratio, interval
    )


def writer_result(name: str, precision: str, taken: list[float], passage: Passage) -> WriterResult:
    """From the seconds of a whole passage in every block."""
    each, count = statistics.median(taken), passage.new_tokens
    scale = 1000 / count
    return WriterResult(
        name, precision, scale * each, scale * min(taken), scale * max(taken), passage.sequences * count / each
    )
