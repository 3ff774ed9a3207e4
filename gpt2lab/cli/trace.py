"""The command that walks through one pass of a model: trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.cli.run import Json, Plugin
from gpt2lab.errors import ConfigError

if TYPE_CHECKING:
    from gpt2lab.trace import Row, Trace

COLUMNS = ("tensor", "shape", "sizes", "parameters", "forward", "training", "what it is")
NUMBERS = ("parameters", "forward", "training")
LETTERS = {"B": "sequences", "T": "tokens", "C": "channels", "H": "heads", "D": "channels per head",
           "F": "hidden width", "V": "vocabulary"}  # fmt: skip
SPARE, ROOM = ("sizes", "training"), 34  # columns that a narrow terminal goes without, and room left for the last


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(trace)


def trace(
    what: Annotated[
        str, typer.Argument(help="A preset, or a YAML file with a config.", metavar="[PRESET|FILE]")
    ] = "gpt2-124m",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value on top of it.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Show this block in detail, from 0.", min=0)] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Show every block in detail.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Sequences.", min=1)] = 1,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens in each; the whole context.", min=1)] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Walk through one forward pass. Shows every tensor with its shape, meaning and cost."""
    from gpt2lab.config import load_config
    from gpt2lab.trace import folded
    from gpt2lab.trace import trace as traced

    config = load_config(what, set_ or (), plugins=plugin or ())
    layers = config.model.n_layer
    if layer is not None and layer >= layers:
        raise ConfigError(f"there is no block {layer}: blocks are 0 to {layers - 1}", where="--layer")
    seen = traced(config.model, batch=batch, tokens=tokens)
    if json_:
        totals = {"parameters": seen.parameters, "flops_forward": seen.forward, "flops_backward": seen.backward}
        per_token = seen.per_token(seen.forward + seen.backward)
        rows = {"letters": seen.letters, "rows": [asdict(row) for row in seen.rows]}
        print(json.dumps({"batch": seen.batch, "tokens": seen.tokens, **rows, **totals, "flops_per_token": per_token}))
    else:
        show(what, seen, folded(seen.rows, layer=layer, all_layers=all_layers))


def show(what: str, seen: Trace, rows: Sequence[Row]) -> None:
    """A table with totals, as wide as the terminal; elsewhere lines are as long as they need to be."""
    from gpt2lab.display import console_for
    from gpt2lab.text import shorten

    console = console_for()
    table = [list(COLUMNS), *(cells(seen, row) for row in rows)]
    widths = {name: max(map(len, column)) for name, column in zip(COLUMNS, zip(*table, strict=True), strict=True)}
    for name in SPARE if console.is_terminal else ():
        if sum(widths.values()) - widths[COLUMNS[-1]] + 2 * len(widths) + ROOM > console.width:
            del widths[name]

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)

    say(f"{what}: one pass over {seen.batch:,} x {seen.tokens:,} tokens")
    say(", ".join(f"{letter} {name} = {seen.letters[letter]:,}" for letter, name in LETTERS.items()) + ", n = B T\n")
    for line, heading in zip(table, [True, *(row.shape is None for row in rows)], strict=True):
        named = zip(COLUMNS, line, strict=True)
        padded = [f"{text:{'>' if name in NUMBERS else '<'}{widths[name]}}" for name, text in named if name in widths]
        text = "  ".join(padded).rstrip()
        say(shorten(text, console.width) if console.is_terminal else text, "bold" if heading else "")
    forward, training = (seen.per_token(n) / 1e6 for n in (seen.forward, seen.forward + seen.backward))
    say(f"\n{seen.parameters:,} parameters; {forward:,.1f} MFLOP per token forward, {training:,.1f} MFLOP in training")
    say("FLOP are those of matrix products as they are written: scores count as a whole, masked or not; norms, softmax "
        "and activations are not counted.")  # fmt: skip


def cells(seen: Trace, row: Row) -> list[str]:
    """One row of the table as text, FLOPs per token."""
    from gpt2lab.text import quantity

    forward, training = seen.per_token(row.forward), seen.per_token(row.forward + row.backward)
    sizes = [f"{size:,}" for size in row.shape or ()]
    shapes = [f"({', '.join(shape)})" if row.shape is not None else "" for shape in (row.letters or sizes, sizes)]
    costs = [f"{row.parameters:,}" if row.parameters else "", *(quantity(n) if n else "" for n in (forward, training))]
    return ["  " * row.level + row.name, *shapes, *costs, row.meaning]
