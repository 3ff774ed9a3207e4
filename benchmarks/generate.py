"""`generate`: our generation and another's timed in turns, from the same weights and prompts."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from benchmarks import options as o
from benchmarks.turns import Away, in_turns, ratio_of
from benchmarks.writers import Passage, Writer


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


def generate(
    vs: o.Versus = "transformers",
    config: o.Size = "c",
    batch: Annotated[int, typer.Option("--batch", help="Texts at once.", min=1)] = 1,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of each prompt.", min=1)] = 24,
    tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each text.", min=1)] = 128,
    precision: Annotated[str, typer.Option("--precision", help="Of our matrix products: fp32 or bf16.")] = "fp32",
    vs_precision: o.OtherPrecision = "fp32",
    cold: Annotated[
        bool, typer.Option("--cold", help="Count what ours does before the first token, as in one `gpt2lab sample`.")
    ] = False,
    blocks: o.Blocks = 5,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Time our generation and another's in turns: same weights, same prompts, the best token each time."""
    place = o.chosen_device(device, threads, *o.precisions(precision, vs_precision, o.PRECISIONS[:2]))
    specs = (Writer("gpt2lab", precision, cold), Writer(vs, vs_precision))  # type: ignore[arg-type]
    found = compare_writers(Passage(config, batch, prompt, tokens), specs, place, blocks=blocks)
    if json_:
        print(json.dumps(asdict(found)))
        return
    table = o.table_of("", "precision", "ms per token", "blocks", "tokens/s")
    for side in found.sides:
        spread = f"{side.low:.1f} to {side.high:.1f}"
        table.add_row(
            side.name, side.precision, f"{side.milliseconds:.1f}", spread, f"{side.tokens_per_second:.1f}"
        )  # fmt: skip
    words = o.verdict(found.sides[0].name, found.sides[1].name, found.ratio, found.interval)
    said = (
        f"configuration {config}, batch {batch}, {prompt} tokens of prompt and {tokens} new: {words} "
        f"({found.blocks} blocks each, {found.device}, {found.threads} threads); "
        f"{'both wrote the same tokens' if found.same_tokens else 'they wrote different tokens'}"
    )
    o.show(table, said)
