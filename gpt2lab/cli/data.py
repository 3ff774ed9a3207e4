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

    config = asked(what, tokenizer, set_ or (), plugin or ())
    try:
        with rich_progress() as progress:
            data = make(config, progress=progress, processes=processes)
    except KeyboardInterrupt:
        print("gpt2lab: interrupted; the same command continues", file=sys.stderr)
        raise
    print(f"{len(data.train):,} training and {len(data.validation):,} validation tokens in {data.path}")


def asked(what: str, tokenizer: str | None, overrides: Any, plugins: Any) -> DataConfig:
    """The data section that a command line means. Raises ConfigError."""
    from gpt2lab.config import ALIASES, fill_slots, load_config, preset_names
    from gpt2lab.data.corpora import corpus
    from gpt2lab.errors import ConfigError, nearest, unknown

    fill_slots(plugins)
    chosen = [] if tokenizer is None else [f"data.tokenizer={tokenizer}"]
    if what in corpus:
        # options of the corpus, which some cannot do without, come with it in one value
        own = [override for override in overrides if override.startswith("data.corpus=")]
        named = own or [f"data.corpus={with_options(what, overrides)}"]
        rest = [override for override in overrides if not override.startswith("data.corpus")]
        return load_config("gpt2-124m", [*named, *chosen, *rest]).data
    if nearest(what, [*preset_names(), *ALIASES, *corpus.names()]) in corpus:
        raise ConfigError(unknown("corpus", what, corpus.names()), where="data prepare")
    return load_config(what, [*chosen, *overrides]).data


def with_options(corpus: str, overrides: Any) -> str:
    """`{name: documents, paths: [...]}` of a name and overrides such as data.corpus.paths=[...]."""
    pairs = [override.removeprefix("data.corpus.").partition("=") for override in overrides
             if override.startswith("data.corpus.")]  # fmt: skip
    return "{" + ", ".join([f"name: {corpus}", *(f"{key}: {value}" for key, _, value in pairs)]) + "}"


@group.command("list")
def list_(json_: Json = False) -> None:
    """List prepared and partly prepared data."""
    from gpt2lab.data.prepared import list_prepared
    from gpt2lab.data.shards import unfinished

    rows = [row(path, data) for path, data in list_prepared()]
    begun = [begun_row(path, state) for path, state in unfinished()]
    if json_:
        print_json(rows + begun)
        return
    for facts in rows:
        form = "{path}  {corpus} ({tokenizer}): {train:,} + {validation:,} tokens"
        print((form if facts["usable"] else "{path}  unusable: {problem}").format(**facts))
    for facts in begun:
        print("{path}  {problem}".format(**facts))
    if not rows and not begun:
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


def begun_row(path: Any, state: Any) -> dict[str, Any]:
    """A folder whose making was interrupted, and the command that continues."""
    facts = state["config"]
    corpus, tokenizer = (facts[name] for name in ("corpus", "tokenizer"))
    name = corpus if isinstance(corpus, str) else corpus["name"]
    words = ["gpt2lab", "data", "prepare", name, "--tokenizer", written(tokenizer)]
    words += ["--set", f"data.validation_fraction={facts['validation_fraction']}"]
    words += [] if isinstance(corpus, str) else ["--set", f"data.corpus={written(corpus)}"]
    share = 100 * state["done"] / max(1, state["size"])
    problem = f"unfinished, about {share:.0f} %; {shlex.join(words)} continues"
    return {"path": str(path), "usable": False, "problem": problem}


def written(choice: Any) -> str:
    """A choice in the form that `--set` takes."""
    return choice if isinstance(choice, str) else json.dumps(choice)


@group.command()
def check() -> None:
    """Verify all prepared data against its checksums."""
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
