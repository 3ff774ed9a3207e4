"""How fast text is generated, measured beside others: bench generate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.cli.run import Json
from gpt2lab.errors import ConfigError, Problem, unknown

if TYPE_CHECKING:
    from gpt2lab.bench.generation import Generated

PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def add_to(app: typer.Typer) -> None:
    """Put this file's command among the others of `bench`."""
    app.command()(generate)


def generate(
    vs: Annotated[
        str, typer.Option("--vs", help="The other side: transformers, plain, or nanogpt=PATH of a checkout.")
    ] = "transformers",
    config: Annotated[str, typer.Option("--config", help="Whose sizes: a, b256, b50k or c, which is 124M.")] = "c",
    batch: Annotated[int, typer.Option("--batch", help="Texts at once.", min=1)] = 1,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of each prompt.", min=1)] = 24,
    tokens: Annotated[int, typer.Option("--tokens", help="New tokens of each text.", min=1)] = 128,
    precision: Annotated[str, typer.Option("--precision", help="Of our matrix products: fp32 or bf16.")] = "fp32",
    vs_precision: Annotated[str, typer.Option("--vs-precision", help="Of the other side's: fp32 or bf16.")] = "fp32",
    cold: Annotated[
        bool, typer.Option("--cold", help="Count what ours does before the first token, as in one `gpt2lab sample`.")
    ] = False,
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks of each side, in turns.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps or auto.")] = "cpu",
    json_: Json = False,
) -> None:
    """Time our generation and another's in turns: same weights, same prompts, the best token each time.

    The figures are only as good as the machine is quiet; the ratio suffers least, as both sides take turns.
    """
    asked = (("precision", precision, PRECISIONS), ("vs-precision", vs_precision, PRECISIONS),
             ("device", device, DEVICES))  # fmt: skip
    problems = [Problem(f"--{o}", unknown(o, value, known)) for o, value, known in asked if value not in known]
    if problems:
        raise ConfigError(problems)
    from gpt2lab.bench.generation import compare_writers
    from gpt2lab.bench.writers import Passage, Writer
    from gpt2lab.training.precision import choose_device, set_threads

    set_threads(threads)
    passage = Passage(config, batch, prompt, tokens)
    specs = (Writer("gpt2lab", precision, cold), Writer(vs, vs_precision))  # type: ignore[arg-type]
    found = compare_writers(passage, specs, choose_device(device), blocks=blocks)  # type: ignore[arg-type]
    if json_:
        print(json.dumps(found.to_json()))
    else:
        show(found)


def show(found: Generated) -> None:
    """A table of two rows and a sentence."""
    from rich.table import Table

    from gpt2lab.display import console_for

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "precision", "ms per token", "blocks", "tokens/s"):
        table.add_column(name, justify="left" if name in ("", "precision") else "right")
    for side in found.sides:
        spread = f"{side.low:.1f} to {side.high:.1f}"
        table.add_row(
            side.name, side.precision, f"{side.milliseconds:.1f}", spread, f"{side.tokens_per_second:.1f}"
        )  # fmt: skip
    console = console_for()
    console.print(table)
    ours, theirs = found.sides
    reach = f", 95 % interval {found.interval[0]:.2f} to {found.interval[1]:.2f}" if found.interval else ""
    passage = found.passage
    said = (
        f"configuration {passage.config}, batch {passage.sequences}, {passage.prompt_tokens} tokens of prompt and "
        f"{passage.new_tokens} new: {ours.name} is {found.ratio:.2f} times as fast as {theirs.name}{reach} "
        f"({found.blocks} blocks each, {found.device}, {found.threads} threads); "
        f"{'both wrote the same tokens' if found.same_tokens else 'they wrote different tokens'}"
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)
