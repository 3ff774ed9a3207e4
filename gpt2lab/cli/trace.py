"""The command that walks through one pass of a model: trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Json, Plugin
from gpt2lab.errors import ConfigError

if TYPE_CHECKING:
    from gpt2lab.trace import Row, Trace

FLAGSHIP = "gpt2-124m"
HEADS = ("tensor", "shape", "sizes", "parameters", "forward", "training", "what it is")
RIGHT = ("parameters", "forward", "training")
SPARE, ROOM = ("sizes", "training"), 34  # what a narrow terminal goes without, so that words have this much room


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(trace)


def trace(
    what: Annotated[
        str, typer.Argument(help="A preset, or a YAML file with a config.", metavar="[PRESET|FILE]")
    ] = FLAGSHIP,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value on top of it.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Show this block in detail, from 0.", min=0)] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Show every block in detail.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Sequences.", min=1)] = 1,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens in each; the whole context.", min=1)] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Walk through one pass of a model. Every tensor with its shape, meaning and cost, in the order of the pass."""
    from gpt2lab.config import load_config
    from gpt2lab.trace import trace as traced

    config = load_config(what, set_ or (), plugins=plugin or ())
    layers = config.model.n_layer
    if layer is not None and layer >= layers:
        raise ConfigError(f"there is no block {layer}: blocks are 0 to {layers - 1}", where="--layer")
    seen = traced(config.model, batch=batch, tokens=tokens)
    if json_:
        print(json.dumps(as_json(seen)))
        return
    from gpt2lab.trace import folded

    rows = folded(seen.rows, layer=layer, all_layers=all_layers)
    show(what, seen, rows)


def show(what: str, seen: Trace, rows: Sequence[Row]) -> None:
    """A table on a terminal; elsewhere lines that are as long as they need to be."""
    from gpt2lab.display import console_for

    console = console_for()
    opening = [f"{what}: {pass_line(seen)}", legend(seen), ""]
    cells = [row_cells(seen, row) for row in rows]
    if console.is_terminal:
        for line in opening:
            console.print(line, markup=False, highlight=False)
        console.print(table(cells, [row.shape is None for row in rows], console.width))
    else:
        print("\n".join([*opening, *aligned([list(HEADS), *cells])]))
    for line in closing(seen):
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def pass_line(seen: Trace) -> str:
    """What was passed through the model."""
    sequences, tokens = ("" if n == 1 else "s" for n in (seen.batch, seen.tokens))
    return f"one pass over {seen.batch:,} sequence{sequences} of {seen.tokens:,} token{tokens}"


def legend(seen: Trace) -> str:
    """What the letters of the shapes stand for."""
    words = {"B": "sequences", "T": "tokens", "C": "channels", "H": "heads", "D": "channels per head",
             "F": "hidden width", "V": "vocabulary"}  # fmt: skip
    return ", ".join(f"{letter} {word} = {seen.letters[letter]:,}" for letter, word in words.items()) + ", n = B T"


def row_cells(seen: Trace, row: Row) -> list[str]:
    """One row of the table as text."""
    from gpt2lab.text import quantity

    forward, both = seen.per_token(row.forward), seen.per_token(row.forward + row.backward)
    return [
        "  " * row.level + row.name,
        "" if row.shape is None else f"({', '.join(row.letters or ())})" if row.letters is not None else "",
        "" if row.shape is None else f"({', '.join(f'{size:,}' for size in row.shape)})".replace(",)", ")"),
        f"{row.parameters:,}" if row.parameters else "",
        quantity(forward) if forward else "",
        quantity(both) if both else "",
        row.meaning,
    ]


def table(cells: Sequence[Sequence[str]], dim: Sequence[bool], width: int) -> Any:
    """The rows for a terminal, headings in bold."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown = columns(cells, width)
    for head in (HEADS[i] for i in shown):
        made.add_column(head, justify="right" if head in RIGHT else "left", no_wrap=head != "what it is")
    for row, heading in zip(cells, dim, strict=True):
        made.add_row(*(Text(row[i]) for i in shown), style="bold" if heading else None)
    return made


def columns(cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns that fit beside the words."""
    shown = list(range(len(HEADS)))
    for head in SPARE:
        wide = sum(2 + max(len(HEADS[i]), *(len(row[i]) for row in cells)) for i in shown[:-1])
        if wide + ROOM > width:
            shown.remove(HEADS.index(head))
    return shown


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns under one another, two blanks between them."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    padded = [
        [
            cell.rjust(width) if head in RIGHT else cell.ljust(width)
            for cell, width, head in zip(line, widths, HEADS, strict=True)
        ]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in padded]


def closing(seen: Trace) -> list[str]:
    """Totals, and what is counted."""
    forward, both = seen.per_token(seen.forward), seen.per_token(seen.forward + seen.backward)
    return [
        "",
        f"{seen.parameters:,} parameters; {mega(forward)} per token forward, {mega(both)} forward and back",
        "FLOP are those of matrix products as they are written: scores count as a whole, masked or not; norms, softmax "
        "and activations are not counted.",
    ]


def mega(flops: float) -> str:
    """FLOP in millions, as the documents write them."""
    return f"{flops / 1e6:,.1f} MFLOP"


def as_json(seen: Trace) -> dict[str, Any]:
    """All rows of all blocks for programs."""
    return {
        "batch": seen.batch,
        "tokens": seen.tokens,
        "letters": seen.letters,
        "rows": [asdict(row) for row in seen.rows],
        "parameters": seen.parameters,
        "flops_forward": seen.forward,
        "flops_backward": seen.backward,
        "flops_per_token": seen.per_token(seen.forward + seen.backward),
    }
