"""The command that takes weights out: export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gpt2lab.cli.run import Json, Plugin, Runs

if TYPE_CHECKING:
    from gpt2lab.pretrained.load import Trained

Layout = Literal["auto", "huggingface", "gpt2lab"]


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(export)


def export(
    source: Annotated[
        str, typer.Argument(help="A run id or its first digits, a folder, a nanoGPT checkpoint, or a name on the hub.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write; an older folder of weights is replaced.")],
    layout: Annotated[
        Layout, typer.Option("--layout", help="auto takes Hugging Face's where it holds model and tokenizer.")
    ] = "auto",
    plugin: Plugin = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Write weights for use elsewhere. In the layout of transformers, or in gpt2lab's, which holds any model."""
    import torch

    from gpt2lab.config import fill_slots
    from gpt2lab.pretrained import save_gpt2, save_model
    from gpt2lab.pretrained.load import open_trained
    from gpt2lab.store import Store

    fill_slots(plugin or ())
    found = open_trained(source, Store(runs), device=torch.device("cpu"))
    kept = found.kept.choice.name if found.kept else None
    chosen, reason = settled(layout, found)
    if chosen == "huggingface":
        save_gpt2(found.model, folder, gpt2_tokenizer=kept == "gpt2")
        with_it = kept if kept == "gpt2" else None
    else:
        save_model(found.model, folder, tokenizer=found.kept, precision=found.precision)
        with_it = kept
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    if json_:
        record = {"source": found.name, "folder": str(folder), "layout": chosen, "reason": reason}
        print(json.dumps({**record, "parameters": parameters, "tokenizer": with_it}))
        return
    print(f"{found.name}: {parameters:,} parameters, {f'tokenizer {with_it}' if with_it else 'no tokenizer'}")
    print(f"written to {folder} in {'Hugging Face' if chosen == 'huggingface' else 'our own'} layout ({reason})")


def settled(layout: Layout, found: Trained) -> tuple[str, str]:
    """(layout, why it)."""
    from gpt2lab.pretrained import misfits

    if layout != "auto":
        return layout, "as asked"
    problems = misfits(found.model.config)
    if problems:
        return "gpt2lab", f"Hugging Face's does not hold it: {'; '.join(map(str, problems))}"
    if found.kept is not None and found.kept.choice.name != "gpt2":
        return "gpt2lab", f"Hugging Face's does not hold the tokenizer {found.kept.choice}"
    return "huggingface", "transformers reads it"
