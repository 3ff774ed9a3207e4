"""Commands about data: data prepare, data list, data check."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Prepare, list and verify token data.", no_args_is_help=True)

Preset = Annotated[str, typer.Argument(help="A preset, as nano: its corpus and tokenizer.", metavar="PRESET")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, as data.tokenizer=gpt2.")]


@app.command()
def prepare(preset: Preset, set_: Set = None) -> None:
    """Fetch and tokenize what a preset trains on; at once when it is there already."""
    from gpt2lab.config import load_config
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.data.shards import prepare as make

    config = load_config(preset, set_ or ())
    with rich_progress() as progress:
        data = make(config.data, progress=progress)
    print(f"{len(data.train):,} training and {len(data.validation):,} validation tokens in {data.path}")


@app.command("list")
def list_() -> None:
    """What is prepared on this machine."""
    from gpt2lab.data.prepared import Prepared, list_prepared

    found = list_prepared()
    for path, data in found:
        if isinstance(data, Prepared):
            corpus, tokenizer = data.manifest["corpus"]["name"], data.manifest["tokenizer"]["name"]
            print(f"{path}  {corpus} ({tokenizer}): {len(data.train):,} + {len(data.validation):,} tokens")
        else:
            print(f"{path}  unusable: {data}")
    if not found:
        print("nothing is prepared yet; try: gpt2lab data prepare nano")


@app.command()
def check() -> None:
    """Read everything that is prepared again and compare it with its checksums."""
    from gpt2lab.data.prepared import Prepared, list_prepared
    from gpt2lab.data.progress import rich_progress

    for path, data in list_prepared():
        if not isinstance(data, Prepared):
            raise data
        with rich_progress() as progress:
            data.verify(progress)
        print(f"{path}: whole")
