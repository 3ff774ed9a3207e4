"""Commands about data: data prepare, data list, data check."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gpt2lab.cli.run import Json

app = typer.Typer(help="Prepare, list and verify token data.", no_args_is_help=True)

NOTHING = "nothing is prepared yet; try: gpt2lab data prepare nano"
Preset = Annotated[str, typer.Argument(help="A preset, as nano: its corpus and tokenizer.", metavar="PRESET")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, as data.tokenizer=gpt2.")]


@app.command()
def prepare(preset: Preset, set_: Set = None) -> None:
    """Fetch and tokenize what a preset trains on. Ends at once when that is there already."""
    from gpt2lab.config import load_config
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.data.shards import prepare as make

    config = load_config(preset, set_ or ())
    with rich_progress() as progress:
        data = make(config.data, progress=progress)
    print(f"{len(data.train):,} training and {len(data.validation):,} validation tokens in {data.path}")


@app.command("list")
def list_(json_: Json = False) -> None:
    """List what is prepared on this machine."""
    from gpt2lab.data.prepared import list_prepared

    rows = [row(path, data) for path, data in list_prepared()]
    if json_:
        print(json.dumps(rows))
        return
    for one in rows:
        told = "{corpus} ({tokenizer}): {train:,} + {validation:,} tokens" if one["usable"] else "unusable: {problem}"
        print(f"{one['path']}  {told.format(**one)}")
    if not rows:
        print(NOTHING)


def row(path: Any, data: Any) -> dict[str, Any]:
    """One prepared folder in short, or why it is of no use."""
    from gpt2lab.data.prepared import Prepared

    if not isinstance(data, Prepared):
        return {"path": str(path), "usable": False, "problem": str(data)}
    return {
        "path": str(path),
        "usable": True,
        "corpus": data.manifest["corpus"]["name"],
        "tokenizer": data.manifest["tokenizer"]["name"],
        "train": len(data.train),
        "validation": len(data.validation),
        "vocab_size": data.vocab_size,
        "fingerprint": data.fingerprint,
    }


@app.command()
def check() -> None:
    """Compare all that is prepared with its checksums. Reads every byte again."""
    from gpt2lab.data.prepared import Prepared, list_prepared
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.errors import DataFault, Gpt2labError

    found = list_prepared()
    wrong: list[Gpt2labError] = []
    for path, data in found:
        try:
            if not isinstance(data, Prepared):
                raise data
            with rich_progress() as progress:
                data.verify(progress)
        except DataFault as fault:
            wrong.append(fault)
        else:
            print(f"{path}: whole")
    if wrong:
        raise DataFault([problem for fault in wrong for problem in fault.problems], hint=wrong[0].hint)
    if not found:
        print(NOTHING)
