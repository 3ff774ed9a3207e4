"""Options and output that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gpt2lab.basics.text import duration, harmless, seconds_of
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gpt2lab.store import Store


def seeds_of(text: str) -> int | Literal["auto"]:
    """A number of seeds, or `auto`. Raises typer.BadParameter."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"{text!r} is neither a number from 1 on nor auto")
    return int(text)


def checked_time(text: str | None) -> str | None:
    """Validates an option that is a time such as 6h. Raises typer.BadParameter."""
    try:
        seconds_of(text or "1s")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


File = Annotated[str, typer.Argument(help="YAML file of an ablation, or the name of a shipped one.", metavar="FILE")]
Run = Annotated[str, typer.Argument(help="A run id, or its first digits.", metavar="RUN")]
Model = Annotated[
    str, typer.Argument(help="A run id or its first digits, a folder, a file of weights, or a name on the hub.")
]
Scale = Annotated[str | None, typer.Option("--scale", "-s", help="Preset to run at, such as nano or gpt2-124m.")]
Name = Annotated[
    str | None, typer.Option("--name", help="Store this variant under a name, with its own record and page.")
]
Campaign = Annotated[
    str | None,
    typer.Option("--campaign", help="Campaign to use if the file names none; by default that of the whole store."),
]
Seeds = Annotated[
    Any,
    typer.Option(
        "--seeds",
        "-n",
        parser=seeds_of,
        metavar="N|auto",
        help="Seeds per arm; auto: as many as the noise floor requires.",
    ),
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", help="Runs at a time; jobs x threads <= cores.", min=1)]
Arms = Annotated[str | None, typer.Option("--arms", help="Run only these arms, separated by commas.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value on top of the preset, for all runs.")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="Python file that registers components.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; train nothing.")]
Exploratory = Annotated[
    bool, typer.Option("--force-exploratory", help="Show numbers where verdicts are refused; claim nothing.")
]
NoTracking = Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the run store.", file_okay=False)]
Out = Annotated[Path, typer.Option("--out", help="Folder of the reports.", file_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxDays = Annotated[
    float, typer.Option("--max-days", help="Ask before a longer training; stop if there is no terminal.", min=0)
]
MAX_DAYS = 7.0
SCHEMA = 1
"""Version of what `--json` prints (docs/results.md)."""
RUNS, OUT = Path("runs"), Path("reports")


def confirm_time(seconds: float, max_days: float, where: str) -> None:
    """Ask whether a training that takes longer than `max_days` is meant. Raises EnvironmentFault where it is not, or
    where there is no terminal to answer at."""
    if seconds <= max_days * 86_400:
        return
    what = f"it would take about {duration(seconds)} here, more than {max_days:g} days"
    if sys.stdin.isatty() and typer.confirm(f"{where}: {what}. Start anyway?", err=True):
        return
    hint = f"a smaller --scale, as --scale nano; or --max-days {seconds / 86_400 + 1:.0f} to start anyway"
    raise EnvironmentFault(what, where=where, hint=hint)


def store_at(root: Path) -> Store:
    """The store in a folder. Raises ConfigError for one that is not there."""
    from gpt2lab.store import Store

    if not root.is_dir():
        raise ConfigError("there is no such folder of runs", where=str(root), hint="--runs FOLDER, or gpt2lab run FILE")
    return Store(root)


def given(runs: Path) -> Path | None:
    """The folder of runs where it is not the usual one, as an option has to say."""
    return None if runs == RUNS else runs


def names_in(text: str | None) -> list[str] | None:
    """Names separated by commas; None where none were given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def scales(chosen: str | None, declared: Iterable[str]) -> list[str | None]:
    """The scales to run at; None is that of the file's `base`."""
    return [chosen] if chosen else list(declared) or [None]


def say(console: Console, *lines: str, wrap: bool = True) -> None:
    """Print lines as they are written; wrap: at the width of the console."""
    for line in lines:
        console.print(harmless(line), markup=False, highlight=False, soft_wrap=not wrap)


def print_json(record: Mapping[str, Any], indent: int | None = None) -> None:
    """Print plain data as JSON with the version of its schema, numbers that are not finite as null."""
    from gpt2lab.analysis.verdicts import as_json

    print(json.dumps(as_json({"schema": SCHEMA, **record}), indent=indent, allow_nan=False))


def print_fault(fault: Gpt2labError, *, as_json: bool) -> int:
    """Print an error, as JSON on one line where the command was to print JSON; -> the exit code."""
    text = json.dumps({"schema": SCHEMA, "error": fault.as_record()}) if as_json else fault.render()
    print(text, file=sys.stderr)
    return fault.exit_code


def table_of(
    *columns: str, rows: Iterable[Iterable[str | Text]], right: Iterable[str] = (), title: str | None = None
) -> Table:
    """A table without lines; without a header where no column has a name. right: columns of numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(harmless(title)) if title else None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.show_header = any(columns)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table
