"""The command trace: one forward pass with its shapes, or of a trained model on a text with its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import number, quantity, shorten
from gpt2lab.cli.options import RUNS, Json, Plugin, Runs, print_json, say, table_of
from gpt2lab.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from gpt2lab.inspection.lens import Reading
    from gpt2lab.inspection.trace import Trace, TraceRow

COLUMNS = ("module", "shape", "sizes", "parameters", "FLOP", "what it is")
NUMBERS = ("parameters", "FLOP")
LETTERS = {"B": "sequences", "T": "tokens", "C": "channels", "H": "heads", "D": "channels per head",
           "F": "hidden width", "V": "vocabulary"}  # fmt: skip
OPTIONAL, LAST_WIDTH = ("sizes",), 34  # columns that a narrow terminal drops; least width of the last one
GUESSES, LOOKS, PIECE = 3, 2, 8
"""Of a terminal: guesses of each depth, tokens that each head looks at, characters of a token."""


def trace(
    what: Annotated[
        str, typer.Argument(help="A preset, or a YAML file with a config.", metavar="[PRESET|FILE]")
    ] = "gpt2-124m",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value on top of it.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Show this block in detail, from 0.", min=0)] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Show every block in detail.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Sequences.", min=1)] = 1,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens in each sequence; by default the whole context.", min=1)
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Show the values of this trained model: whatever `sample` takes.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="With --run: the text for the model to read.")] = None,
    page: Annotated[Path | None, typer.Option("--page", help="With --run: write an HTML page.", dir_okay=False)] = None,
    plugin: Plugin = None,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Walk through one forward pass. Shows modules with shape, component and cost; with --run and --text the
    attention of each head, what each depth would predict, and the next token."""
    if (run is None) != (text is None) or (page and run is None):
        raise ConfigError("--run and --text belong together", hint='gpt2lab trace --run RUN --text "To be, or not"')
    if run is not None:
        trace_values(run, str(text), layer, page, plugin, runs, json_)
        return
    from gpt2lab.config import load_config
    from gpt2lab.inspection.trace import folded
    from gpt2lab.inspection.trace import trace as traced

    config = load_config(what, set_ or (), plugins=plugin or ())
    refuse_layer(layer, config.model.n_layer)
    result = traced(config.model, batch=batch, tokens=tokens)
    if json_:
        print_json(result.as_record())
    else:
        print_trace(what, result, folded(result.rows, layer=layer, all_layers=all_layers))


def refuse_layer(layer: int | None, layers: int) -> None:
    """Raises ConfigError for a block that is not there."""
    if layer is not None and layer >= layers:
        raise ConfigError(f"there is no block {layer}: blocks are 0 to {layers - 1}", where="--layer")


def trace_values(
    run: str, text: str, layer: int | None, page: Path | None, plugin: list[str] | None, runs: Path, as_json: bool
) -> None:
    """Read a text with a trained model and show what happens inside."""
    import torch

    from gpt2lab.config import fill_slots
    from gpt2lab.generation import encoded
    from gpt2lab.inspection.lens import read
    from gpt2lab.inspection.lens_page import page as html
    from gpt2lab.reuse.load import open_trained
    from gpt2lab.store import Store

    fill_slots(plugin or ())
    trained = open_trained(run, Store(runs), device=torch.device("cpu"))
    if trained.tokenizer is None:
        raise ConfigError("its tokenizer is not known, so it cannot read text", where=trained.name)
    refuse_layer(layer, trained.model.config.n_layer)
    reading = read(trained.model, encoded(text, trained.tokenizer), trained.tokenizer.decode)
    if page:
        try:
            page.write_text(html(trained.name, reading), encoding="utf-8")
        except OSError as error:
            raise EnvironmentFault(f"cannot write: {error.strerror}", where=str(page)) from None
    if as_json:
        print_json({"model": trained.name, "page": page and str(page), **reading.as_record()})
    else:
        print_reading(trained.name, reading, layer, page)


def print_reading(name: str, reading: Reading, layer: int | None, page: Path | None) -> None:
    """Tables of at most 80 columns. layer: show the heads of this block alone."""
    from gpt2lab.evaluation.windows import shown

    def piece(token: str) -> str:
        return shorten(shown(token), PIECE)

    console, last = console_for(), len(reading.tokens) - 1
    say(console, f"{name} reads {last + 1} tokens, the last of them {piece(reading.tokens[-1])}", "")
    rows = [(piece(guess.token), f"{guess.probability:.4f}", "█" * round(40 * guess.probability))
            for guess in reading.guesses[-1][-1]]  # fmt: skip
    console.print(table_of("next token", "probability", "", rows=rows, right=("probability",)))
    rows = []
    for depth, guesses in enumerate(reading.guesses):
        best = "  ".join(f"{piece(g.token)} {g.probability:.3f}" for g in guesses[-1][:GUESSES])
        loss = reading.losses[depth]
        rows.append((reading.depth(depth), number(None if math.isnan(loss) else loss, 3), best))
    columns = ("\nafter", "loss of\nthe text", "\nlikeliest after the last token")
    console.print(table_of(*columns, rows=rows, right=columns[1:2]))
    names, heads = ("itself", "previous", "first", "distance"), []
    for head in reading.heads:
        if layer in (None, head.block):
            means = head.means()
            cells = [number(None if math.isnan(means[name]) else means[name], 2) for name in names]
            looks = "  ".join(
                f"{piece(reading.tokens[place])} {place - last:+d} {weight:.2f}"
                for place, weight in head.looks(last, LOOKS)
            )
            heads.append((f"{head.block}.{head.head}", *cells, looks.replace("+0", "±0")))
    titles = ("head", *names[:-1], "back")
    console.print(table_of(*titles, "the last token looks at", rows=heads, right=titles))
    say(console, "head 0.3: block 0, head 3; itself, previous, first: mean weight on that token;",
        "back: how many tokens it looks back on average",
        "looks at: token, how many places before (-) the last one, weight",
        *([f"page: {page}"] if page else []))  # fmt: skip


def print_trace(what: str, result: Trace, rows: Sequence[TraceRow]) -> None:
    """A table with totals, as wide as the terminal; elsewhere lines are not cut."""
    console = console_for()
    table = [list(COLUMNS), *(cells(result, row) for row in rows)]
    widths = {name: max(map(len, column)) for name, column in zip(COLUMNS, zip(*table, strict=True), strict=True)}
    for name in OPTIONAL if console.is_terminal else ():
        if sum(widths.values()) - widths[COLUMNS[-1]] + 2 * len(widths) + LAST_WIDTH > console.width:
            del widths[name]

    def write(line: str, style: str = "") -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)

    write(f"{what}: one pass over {result.batch:,} x {result.tokens:,} tokens")
    write(
        ", ".join(f"{letter} {name} = {result.letters[letter]:,}" for letter, name in LETTERS.items()) + ", n = B T\n"
    )
    for line, heading in zip(table, [True, *(row.shape is None for row in rows)], strict=True):
        named = zip(COLUMNS, line, strict=True)
        padded = [f"{text:{'>' if name in NUMBERS else '<'}{widths[name]}}" for name, text in named if name in widths]
        text = "  ".join(padded).rstrip()
        write(shorten(text, console.width) if console.is_terminal else text, "bold" if heading else "")
    from gpt2lab.inspection.costs import costs

    forward, training = result.per_token(result.forward) / 1e6, costs(result.config).flops_per_token / 1e6
    write(
        f"\n{result.parameters:,} parameters; {forward:,.1f} MFLOP per token forward, {training:,.1f} MFLOP in training"
        " at the full context"
    )
    write("FLOP are those of matrix products as they are written, for each token forward: scores count as a whole, "
          "masked or not; norms, softmax and activations are not counted.")  # fmt: skip


def cells(result: Trace, row: TraceRow) -> list[str]:
    """One row of the table as text, FLOPs per token."""
    forward = result.per_token(row.forward)
    sizes = [f"{size:,}" for size in row.shape or ()]
    shapes = [f"({', '.join(shape)})" if row.shape is not None else "" for shape in (row.letters or sizes, sizes)]
    costs = [f"{row.parameters:,}" if row.parameters else "", quantity(forward) if forward else ""]
    meaning = row.meaning if row.calls == 1 else f"{row.meaning} ({row.calls} calls)"
    return ["  " * row.level + row.name, *shapes, *costs, meaning]
