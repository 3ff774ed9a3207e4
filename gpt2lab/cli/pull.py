"""The command that brings a study from another store."""

from __future__ import annotations

from typing import Annotated

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import plural
from gpt2lab.cli.options import RUNS, Json, Runs, print_json, say


def pull(
    study: Annotated[str, typer.Argument(help="A study or sweep of the other store.", metavar="STUDY")],
    source: Annotated[
        str, typer.Option("--from", help="Folder of the other store, or HOST:FOLDER by ssh.", metavar="STORE")
    ],
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Copy a study and its runs from another folder of runs. Runs that are finished here stay unchanged."""
    from dataclasses import asdict

    from gpt2lab.store import Store
    from gpt2lab.store.merging import merge, store_of

    with store_of(source, study) as store:
        merged = merge(study, store, Store(runs))
    notes = [f"{plural(len(merged.copied), 'run')} copied", f"{len(merged.there)} finished here before"]
    notes += [f"{len(merged.at_work)} still training (the same command copies them later)"] if merged.at_work else []
    notes += [f"{len(merged.missing)} not started there"] if merged.missing else []
    say(console_for(to_stderr=json_), f"{study}: {', '.join(notes)}")
    if json_:
        print_json(asdict(merged))
