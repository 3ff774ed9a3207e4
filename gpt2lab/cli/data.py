"""Commands about data: data prepare, data list, data check."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.options import Json, Plugin, print_json

if TYPE_CHECKING:
    from gpt2lab.data.shards import DataConfig

group = typer.Typer(name="data", help="Prepare, list and verify token data.", no_args_is_help=True)

NOTHING = "nothing is prepared yet; try: gpt2lab data prepare nano"
What = Annotated[
    str, typer.Argument(help="A preset or config file, or a corpus such as fineweb-edu-10b.", metavar="WHAT")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, such as data.validation_fraction=0.01.")]


@group.command()
def prepare(
    what: What,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Such as bytes, or '{name: bpe, vocab_size: 4096}'.")
    ] = None,
    set_: Set = None,
    plugin: Plugin = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Tokenizing processes; one per core by default.", min=1)
    ] = None,
) -> None:
    """Fetch and tokenize a corpus or a preset's data. Does nothing if it is prepared already.

    An interrupted preparation continues where it stopped. The default tokenizer for a corpus is gpt2. Options of a
    corpus are set like any other: --set 'data.corpus={name: documents, paths: [FOLDER/*.parquet]}'.
    """
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.data.shards import prepare as make

    config = data_config(what, tokenizer, set_ or (), plugin or ())
    try:
        with rich_progress() as progress:
            data = make(config, progress=progress, processes=processes)
    except KeyboardInterrupt:
        print("gpt2lab: interrupted; the same command continues", file=sys.stderr)
        raise
    print(f"{len(data.train):,} training and {len(data.validation):,} validation tokens in {data.path}")


def data_config(what: str, tokenizer: str | None, overrides: Any, plugins: Any) -> DataConfig:
    """The data section of a preset, a config file or a corpus name. Raises ConfigError."""
    from gpt2lab.config import ALIASES, fill_slots, load_config, preset_names
    from gpt2lab.data.corpora import corpus
    from gpt2lab.errors import ConfigError, nearest, unknown

    fill_slots(plugins)
    chosen = [] if tokenizer is None else [f"data.tokenizer={tokenizer}"]
    if what in corpus:
        # a corpus and its options, some of which are required, go into one value
        whole = [override for override in overrides if override.startswith("data.corpus=")]
        pairs = [override.removeprefix("data.corpus.").partition("=") for override in overrides
                 if override.startswith("data.corpus.")]  # fmt: skip
        options = ", ".join([f"name: {what}", *(f"{key}: {value}" for key, _, value in pairs)])
        rest = [override for override in overrides if not override.startswith("data.corpus")]
        return load_config("gpt2-124m", [*(whole or [f"data.corpus={{{options}}}"]), *chosen, *rest]).data
    if nearest(what, [*preset_names(), *ALIASES, *corpus.names()]) in corpus:
        raise ConfigError(unknown("corpus", what, corpus.names()), where="data prepare")
    return load_config(what, [*chosen, *overrides]).data


@group.command("list")
def list_(json_: Json = False) -> None:
    """List prepared and partly prepared data."""
    from gpt2lab.data.prepared import list_prepared
    from gpt2lab.data.shards import unfinished
    from gpt2lab.text import clean

    rows = [row(path, data) for path, data in list_prepared()] + [unfinished_row(*entry) for entry in unfinished()]
    if json_:
        print_json(rows)
        return
    for facts in rows:
        if facts["usable"]:
            form = "{path}  {corpus} ({tokenizer}): {train:,} + {validation:,} tokens"
        else:
            form = "{path}  {problem}" if facts["problem"].startswith("unfinished") else "{path}  unusable: {problem}"
        print(clean(form.format(**facts)))
    if not rows:
        print(NOTHING)


def row(path: Any, data: Any) -> dict[str, Any]:
    """Facts of a prepared folder, or why it cannot be used."""
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


def unfinished_row(path: Any, state: Any) -> dict[str, Any]:
    """An interrupted preparation, and the command that continues it."""
    config = state["config"]
    corpus, tokenizer = (config[key] if isinstance(config[key], str) else json.dumps(config[key])
                         for key in ("corpus", "tokenizer"))  # fmt: skip
    name = config["corpus"] if isinstance(config["corpus"], str) else config["corpus"]["name"]
    command = ["gpt2lab", "data", "prepare", name, "--tokenizer", tokenizer]
    command += ["--set", f"data.validation_fraction={config['validation_fraction']}"]
    command += [] if corpus == name else ["--set", f"data.corpus={corpus}"]
    share = 100 * state["done"] / max(1, state["size"])
    problem = f"unfinished, about {share:.0f} %; {shlex.join(command)} continues"
    return {"path": str(path), "usable": False, "problem": problem}


@group.command()
def check() -> None:
    """Verify all prepared data against its checksums."""
    from gpt2lab.data.prepared import Prepared, list_prepared
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.errors import DataFault, Gpt2labError

    folders = list_prepared()
    faults: list[Gpt2labError] = []
    for path, data in folders:
        try:
            if not isinstance(data, Prepared):
                raise data
            with rich_progress() as progress:
                data.verify(progress)
        except DataFault as fault:
            faults.append(fault)
        else:
            print(f"{path}: whole")
    if faults:
        raise DataFault([problem for fault in faults for problem in fault.problems], hint=faults[0].hint)
    if not folders:
        print(NOTHING)
