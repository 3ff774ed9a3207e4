"""Commands about data: data prepare, data show, data list, data check."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.text import clean
from gpt2lab.cli.options import Json, Plugin, print_json, say, table_of
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError, Interrupted, nearest, printable, unknown

if TYPE_CHECKING:
    from gpt2lab.data.shards import DataConfig

group = typer.Typer(name="data", help="Prepare, show, list and verify token data.", no_args_is_help=True)

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
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads that tokenize; one per core by default.", min=1)
    ] = None,
    json_: Json = False,
) -> None:
    """Fetch and tokenize a corpus or a preset's data. Does nothing if the data is already prepared.

    An interrupted preparation continues where it stopped. The default tokenizer for a corpus is gpt2. Options of a
    corpus are set like any other: --set 'data.corpus={name: documents, paths: [FOLDER/*.parquet]}'.
    """
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.data.shards import prepare as make

    config = data_config(what, tokenizer, set_ or (), plugin or ())
    try:
        with rich_progress() as progress:
            data = make(config, progress=progress, threads=threads)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what was prepared is kept") from None
    if json_:
        print_json(row(data.path, data))
    else:
        print(f"{len(data.train):,} training and {len(data.validation):,} validation tokens in {data.path}")


def data_config(what: str, tokenizer: str | None, overrides: Any, plugins: Any) -> DataConfig:
    """The data section of a preset, a config file or a corpus name. Raises ConfigError."""
    from gpt2lab.config import ALIASES, fill_slots, load_config, preset_names
    from gpt2lab.data.corpora import corpus

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


SAMPLE = 300
"""Characters."""


@group.command()
def show(what: What, set_: Set = None, plugin: Plugin = None, json_: Json = False) -> None:
    """Show the sources of a corpus, with samples. Fetches it if necessary, but does not tokenize it."""
    from gpt2lab.data.corpora import Corpus, corpus
    from gpt2lab.data.prepared import Prepared, list_prepared
    from gpt2lab.data.progress import rich_progress

    chosen = data_config(what, None, set_ or (), plugin or ()).corpus
    made = corpus.build(chosen)
    if not isinstance(made, Corpus):
        problem = f"corpus {chosen.name} does not list its documents"
        raise ConfigError(problem, where="data show", hint=f"gpt2lab data prepare {what}; gpt2lab data list")
    with rich_progress() as progress:
        made.ready(progress)
    documents, sources = list(made.documents()), made.composition()
    prepared = [data for _, data in list_prepared() if isinstance(data, Prepared)
                and data.manifest["corpus"]["identity"] == made.identity]  # fmt: skip
    if sources:
        groups = [[d for d in documents if d.name.startswith(f"{source['name']}/")] for source in sources]
    else:
        groups = [documents[i * len(documents) // 3 : (i + 1) * len(documents) // 3] for i in range(3)]
    middle = [group[len(group) // 2] for group in groups if group]
    facts = {
        "corpus": chosen.written(),
        "source": made.source,
        "bytes": sum(document.size for document in documents),
        "documents": len(documents),
        "tokens": [{"tokenizer": data.manifest["tokenizer"], "train": len(data.train),
                    "validation": len(data.validation)} for data in prepared],
        "sources": sources,
        "samples": {document.name: next(document.chunks(), "")[:SAMPLE] for document in middle},
    }  # fmt: skip
    if json_:
        print_json(facts)
    else:
        _print_facts(str(chosen), facts)


def _print_facts(name: str, facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    total = facts["bytes"]
    say(console, f"{name}: {total:,} bytes, {facts['documents']:,} documents", facts["source"])
    for made in facts["tokens"]:
        options = ", ".join(str(value) for key, value in made["tokenizer"].items())
        say(console, f"{made['train']:,} training and {made['validation']:,} validation tokens ({options})")
    if facts["sources"]:
        numbers = ("share", "MB", "documents", "duplicates")
        rows = [
            (source["name"], source["domain"], f"{100 * source['bytes'] / total:.1f} %", f"{source['bytes'] / 1e6:.1f}",
             f"{source['documents']:,}", f"{source['duplicate_bytes'] / 1e6:.1f} MB", source["license"])
            for source in facts["sources"]
        ]  # fmt: skip
        console.print(table_of("source", "domain", *numbers, "licence", rows=rows, right=numbers))
    for document, sample in facts["samples"].items():
        say(console, f"\n[{document}]", clean(sample))


@group.command("list")
def list_(json_: Json = False) -> None:
    """List prepared and partly prepared data."""
    from gpt2lab.data.prepared import list_prepared
    from gpt2lab.data.shards import unfinished

    rows = [row(path, data) for path, data in list_prepared()] + [unfinished_row(*entry) for entry in unfinished()]
    if json_:
        print_json({"data": rows})
        return
    for facts in rows:
        if facts["usable"]:
            form = "{path}  {corpus} ({tokenizer}): {train:,} + {validation:,} tokens"
        else:
            form = "{path}  {problem}" if facts["problem"].startswith("unfinished") else "{path}  unusable: {problem}"
        print(printable(form.format(**facts)))
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
def check(json_: Json = False) -> None:
    """Verify all prepared data against its checksums."""
    from gpt2lab.data.prepared import Prepared, list_prepared
    from gpt2lab.data.progress import rich_progress

    folders = list_prepared()
    faults: list[Gpt2labError] = []
    whole: list[str] = []
    for path, data in folders:
        try:
            if not isinstance(data, Prepared):
                raise data
            with rich_progress() as progress:
                data.verify(progress)
        except DataFault as fault:
            faults.append(fault)
        else:
            whole.append(str(path))
            print(*([] if json_ else [f"{path}: whole\n"]), sep="", end="")
    if faults:
        raise DataFault([problem for fault in faults for problem in fault.problems], hint=faults[0].hint)
    if json_:
        print_json({"whole": whole})
    elif not folders:
        print(NOTHING)
