"""bench tokenize: our tokenizing beside tiktoken's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.cli.run import Json

if TYPE_CHECKING:
    from gpt2lab.bench.tokenizing import Tokenizing


def add_to(bench: typer.Typer) -> None:
    """Put this file's command among the others of bench."""
    bench.command()(tokenize)


def tokenize(
    corpus: Annotated[
        str, typer.Option("--corpus", help="As shakespeare, or '{name: text, paths: [FILE]}'.")
    ] = "shakespeare",
    processes: Annotated[int | None, typer.Option("--processes", help="Ours; threads of tiktoken.", min=1)] = None,
    blocks: Annotated[int, typer.Option("--blocks", help="Of each side, in turns.", min=1)] = 5,
    json_: Json = False,
) -> None:
    """Time tokenizing with GPT-2's tokenizer as `data prepare` does it, and tiktoken's own batch call, in turns.

    Both are given the same documents and as many cores. The figures are only as good as the machine is quiet.
    """
    from gpt2lab.bench.tokenizing import bench_tokenizing
    from gpt2lab.config import load_config
    from gpt2lab.data.encoding import usable_cores

    chosen = load_config("gpt2-124m", [f"data.corpus={corpus}"]).data.corpus
    found = bench_tokenizing(chosen, processes=processes or usable_cores(), blocks=blocks)
    if json_:
        print(json.dumps(found.to_json()))
    else:
        show(found)


def show(found: Tokenizing) -> None:
    """Two lines of figures and their ratio."""
    import statistics

    for name, rates in (("gpt2lab", found.ours), ("tiktoken", found.theirs)):
        print(f"{name:9}{statistics.median(rates):7.1f} MB/s   blocks from {min(rates):.1f} to {max(rates):.1f}")
    reach = f", 95 % interval {found.interval[0]:.2f} to {found.interval[1]:.2f}" if found.interval else ""
    print(
        f"gpt2lab is {found.ratio:.2f} times as fast{reach} "
        f"({len(found.ours)} blocks of {found.block_bytes / 1e6:.0f} MB each, {found.processes} processes or threads)"
    )
