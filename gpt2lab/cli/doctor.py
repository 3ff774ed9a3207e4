"""The command that looks for what is wrong with this machine or a run: doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Json, Plugin, Runs
from gpt2lab.errors import EnvironmentFault, NumericsFault

if TYPE_CHECKING:
    from gpt2lab.doctor import Examination, Finding
    from gpt2lab.doctor.machine import MachineCheck
    from gpt2lab.store import Store


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(doctor)


def doctor(
    run: Annotated[str | None, typer.Option("--run", help="Examine this run (an id, or its first digits).")] = None,
    plugin: Plugin = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Check this machine, or a run for bugs. In a run: look-ahead, targets, gradients, learning rate and more.

    Exit code 0 when nothing is found, 3 for the machine and 5 for a run otherwise; always 0 with --json.
    """
    from gpt2lab.store import Store

    store = Store(runs)
    if run is None:
        show_machine(store, as_json=json_)
    else:
        show_run(run, store, plugin or [], as_json=json_)


def show_machine(store: Store, *, as_json: bool) -> None:
    """One line for each part of the machine."""
    from dataclasses import asdict

    from gpt2lab.display import console_for
    from gpt2lab.doctor.machine import check_machine

    found = list(check_machine(store))
    if as_json:
        print(json.dumps([asdict(part) for part in found], indent=1))
        return
    console_for().print(machine_table(found))
    wrong = [part for part in found if part.problem]
    if wrong:
        raise SystemExit(EnvironmentFault.exit_code)


def machine_table(found: list[MachineCheck]) -> Any:
    """Name, what there is, what is wrong with it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for part in found:
        verdict = Text(part.problem, style="red") if part.problem else Text("ok", style="green")
        table.add_row(Text(part.name), verdict, Text(part.found))
    return table


def show_run(name: str, store: Store, plugins: list[str], *, as_json: bool) -> None:
    """Examine one run and say what was found."""
    from gpt2lab.config import fill_slots
    from gpt2lab.display import console_for
    from gpt2lab.doctor import examine
    from gpt2lab.reuse.measure import threads

    fill_slots(plugins)
    folder = store.find(name)
    with threads(((folder.result() or {}).get("stack") or {}).get("threads") or 1):
        found = examine(folder, progress=teller())
    if as_json:
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
        return
    console = console_for()
    for line in lines(found):
        console.print(line, markup=False, highlight=False)
    if found.findings:
        raise SystemExit(NumericsFault.exit_code)


def teller() -> Callable[[str], None] | None:
    """Which check is at work, on a terminal only; the line goes when the next one comes."""
    if not sys.stderr.isatty():
        return None

    def tell(check: str) -> None:
        print(f"\r\x1b[K{check}", end="\r", file=sys.stderr, flush=True)

    return tell


def lines(found: Examination) -> list[str]:
    """An examination as people read it."""
    head = f"run {found.run}, {found.status}, step {found.step:,}: "
    counted = f"{len(found.findings)} findings" if len(found.findings) != 1 else "1 finding"
    told = [head + (counted if found.findings else "nothing found")]
    for finding in found.findings:
        told += ["", *finding_lines(finding)]
    told += ["", f"sound: {', '.join(found.sound) or 'nothing'}"]
    return told + [f"not examined: {check}: {why}" for check, why in found.unknown.items()]


def finding_lines(finding: Finding) -> list[str]:
    """Name and evidence, then what usually causes it."""
    return [f"{finding.severity} [{finding.name}] {finding.evidence}", f"  usual causes: {'; '.join(finding.causes)}"]
