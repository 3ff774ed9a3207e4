"""`gpt2lab doctor`: the machine, a shared disk or a run examined."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import plural
from gpt2lab.cli.options import RUNS, Json, Plugin, Runs, print_json, say, table_of
from gpt2lab.errors import EnvironmentFault, NumericsFault

if TYPE_CHECKING:
    from gpt2lab.doctor import Examination
    from gpt2lab.doctor.machine import MachineCheck
    from gpt2lab.store import Store


def doctor(
    run: Annotated[str | None, typer.Option("--run", help="Examine this run (an id, or its first digits).")] = None,
    shared: Annotated[
        Path | None,
        typer.Option("--shared", help="Check whether this folder of a shared disk carries locks: between two processes "
                     "here, and with other machines that give the same command.", file_okay=False),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long --shared waits for others.", min=1)] = 5.0,
    plugin: Plugin = None,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:  # fmt: skip
    """Check this machine, or a run for bugs. In a run: look-ahead, targets, gradients, learning rate and more.

    Exit code 0 without findings; otherwise 3 for the machine and 5 for a run.
    """
    from gpt2lab.doctor.machine import check_machine
    from gpt2lab.doctor.shared import check_shared
    from gpt2lab.store import Store

    if shared is not None:
        show_checks(check_shared(shared, seconds), as_json=json_)
    elif run is None:
        show_checks(check_machine(Store(runs)), as_json=json_)
    else:
        examine_run(run, Store(runs), plugin or [], as_json=json_)


def show_checks(checks: Iterable[MachineCheck], *, as_json: bool) -> None:
    """One line for each part of the machine."""
    from dataclasses import asdict

    from rich.text import Text

    parts = list(checks)
    if as_json:
        print_json({"parts": [asdict(part) for part in parts]}, indent=1)
    else:
        verdicts = [Text(part.problem or "ok", style="red" if part.problem else "green") for part in parts]
        rows = [(part.name, verdict, part.found) for part, verdict in zip(parts, verdicts, strict=True)]
        console_for().print(table_of("", "", "", rows=rows))
    if any(part.problem for part in parts):
        raise SystemExit(EnvironmentFault.exit_code)


def examine_run(name: str, store: Store, plugins: list[str], *, as_json: bool) -> None:
    """Examine one run and print the findings."""
    from gpt2lab.config import fill_slots
    from gpt2lab.doctor import examine
    from gpt2lab.reuse.measure import threads

    def show_check(check: str) -> None:  # overwritten by the next one
        print(f"\r\x1b[K{check}", end="\r", file=sys.stderr, flush=True)

    fill_slots(plugins)
    folder = store.find(name)
    with threads(((folder.result() or {}).get("stack") or {}).get("threads") or 1):
        examination = examine(folder, progress=show_check if sys.stderr.isatty() else None)
    if as_json:
        print_json(examination.to_json(), indent=1)
    else:
        say(console_for(), *examination_lines(examination))
    if examination.findings:
        raise SystemExit(NumericsFault.exit_code)


def examination_lines(examination: Examination) -> list[str]:
    """The text of an examination."""
    count = plural(len(examination.findings), "finding") if examination.findings else "nothing found"
    lines = [f"run {examination.run}, {examination.status}, step {examination.step:,}: {count}"]
    for finding in examination.findings:
        lines += ["", f"{finding.severity} [{finding.name}] {finding.evidence}"]
        lines += [f"  usual causes: {'; '.join(finding.causes)}"]
    lines += ["", f"sound: {', '.join(examination.sound) or 'nothing'}"]
    return lines + [f"not examined: {check}: {reason}" for check, reason in examination.unknown.items()]
