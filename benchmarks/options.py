"""What the commands share: options, the device that they name, and how findings are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import torch
import typer
from rich.table import Table

from gpt2lab.basics.output import console_for
from gpt2lab.cli.options import Json as Json
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.training.precision import choose_device, set_threads

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
Size = Annotated[
    str, typer.Option("--config", help="Sizes: a, nano, b256, b50k, c (GPT-2 124M) or d (see docs/performance.md).")
]
Versus = Annotated[
    str,
    typer.Option(
        "--vs",
        help="The other side: plain, engine (the plain model in our training loop), transformers, or nanogpt=PATH.",
    ),
]
Precision = Annotated[str, typer.Option("--precision", help="Of our matrix products: fp32, bf16 or fp16.")]
OtherPrecision = Annotated[str, typer.Option("--vs-precision", help="Of the other side's: fp32 or bf16.")]
Blocks = Annotated[int, typer.Option("--blocks", help="Blocks of each side, in turns; six give an interval.", min=1)]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, mps or auto.")]


def chosen_device(name: str, threads: int | None, *words: tuple[str, str, Sequence[str]]) -> torch.device:
    """The device, with torch's threads set. words: option, value and known values of what else is to be checked first.
    Raises ConfigError, or EnvironmentFault where there is no such device."""
    asked = (*words, ("--device", name, DEVICES))
    problems = [
        Problem(o, unknown(o.rpartition("-")[2], value, known)) for o, value, known in asked if value not in known
    ]
    if problems:
        raise ConfigError(problems)
    set_threads(threads)
    return choose_device(name)  # type: ignore[arg-type]


def precisions(ours: str, theirs: str, known: Sequence[str] = PRECISIONS) -> list[tuple[str, str, Sequence[str]]]:
    """What chosen_device is to check of both sides."""
    return [("--precision", ours, known), ("--vs-precision", theirs, PRECISIONS[:2])]


def table_of(*names: str) -> Table:
    """An empty table with these columns."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in ("", "precision") else "right")
    return table


def show(table: Table, said: str = "") -> None:
    """Print the table, and what is said below it."""
    console = console_for()
    console.print(table)
    if said:
        console.print(said, markup=False, highlight=False, soft_wrap=True)


class Named(Protocol):
    """A side with the precision of its matrix products."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...


def names_of(ours: Named, theirs: Named) -> tuple[str, str]:
    """Both names; with the precisions where these differ."""
    unequal = ours.precision != theirs.precision
    return tuple(f"{side.name} in {side.precision}" if unequal else side.name for side in (ours, theirs))  # type: ignore[return-value]


def verdict(ours: str, theirs: str, ratio: float, interval: tuple[float, float] | None) -> str:
    """How many times as fast, in words."""
    reach = f", 95 % interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
    return f"{ours} is {ratio:.2f} times as fast as {theirs}{reach}"
