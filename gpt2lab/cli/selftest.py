"""Commands that test what verdicts rest on: selftest statistics."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.cli.run import Json

if TYPE_CHECKING:
    from rich.table import Table

    from gpt2lab.analysis.selftest import Row, SelfTest

group = typer.Typer(help="Test gpt2lab's statistics. Trains nothing.", no_args_is_help=True)

TITLES = {
    "rates": "What is claimed of studies with a known answer (in brackets: an independent simulation)",
    "looks": "Looking before the end, as declared",
    "planner": "Does the planned number of seeds reach 80 % power, and one seed less not",
    "forecasts": "Power as plans promise it (in brackets) and as it is",
    "unequal": "Unequal seeds, unequal noise, and both",
    "added": "Seeds added after every verdict that left something open",
    "dropped": "Contrasts dropped after a look",
    "searched": "Arms that are equal at their own best learning rates, judged at the best that a search found",
    "intervals": "Intervals with true effects, together and each by itself",
    "lent": "One or two seeds with borrowed noise, up to what the loan allows for",
    "text": "Intervals over validation documents",
    "measures": "What is printed beside verdicts",
    "controls": "Negative controls: wrong methods, which the same limit must flag",
    "invariances": "What may change nothing",
    "agreement": "One study at a time against many at once",
    "golden": "Two public ablations at 124M parameters",
}


def add_to(app: typer.Typer) -> None:
    """Put this file's commands into the application."""
    app.add_typer(group, name="selftest")


@group.command()
def statistics(
    draws: Annotated[
        int | None, typer.Option("--draws", help="Simulated studies per rate, at least 1000; 10000 by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2000 draws, in about a minute.")] = False,
    json_: Json = False,
) -> None:
    """Check the error rates of verdicts. Judges thousands of simulated studies with known answers.

    Exit code 0 when every row is accepted and every wrong method flagged, else 1.
    """
    from gpt2lab.analysis.selftest import LONG, QUICK
    from gpt2lab.analysis.selftest import selftest as run
    from gpt2lab.display import console_for
    from gpt2lab.errors import ConfigError

    if quick and draws is not None:
        raise ConfigError("--quick is a number of draws already", where="--draws", hint="gpt2lab selftest statistics")
    with progress_line() as progress:
        result = run(draws if draws is not None else QUICK if quick else LONG, progress=progress)
    if json_:
        print(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        console = console_for()
        for table in tables(result):
            console.print(table)
            console.print()
        console.print(closing(result), markup=False, highlight=False)
    if not result.ok:
        raise typer.Exit(1)


@contextmanager
def progress_line() -> Iterator[Callable[[str, int], None] | None]:
    """What is at work, on one line of the terminal that is gone afterwards; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from gpt2lab.display import console_for

    with console_for(to_stderr=True).status("self-test") as status:
        yield lambda part, rows: status.update(f"self-test: {part}, {rows} rows so far")


def tables(result: SelfTest) -> list[Table]:
    """One table per part: a line for each check and n, a column for each noise bank."""
    parts: dict[str, dict[tuple[str, int | None], list[Row]]] = {}
    for row in result.rows:
        parts.setdefault(row.part, {}).setdefault((row.check, row.n), []).append(row)
    return [table_of(part, list(lines.values())) for part, lines in parts.items()]


def table_of(part: str, lines: Sequence[Sequence[Row]]) -> Table:
    """Lines of rows that share check and n."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(TITLES[part], style="bold"), title_justify="left", box=None, padding=(0, 1))
    banks = list(dict.fromkeys(row.bank for line in lines for row in line))
    made.add_column("check")
    counted = any(line[0].n is not None for line in lines)
    if counted:
        made.add_column("n", justify="right")
    for bank in banks:
        made.add_column(bank or "measured", justify="right")
    made.add_column("accepted")
    made.add_column("")
    for line in lines:
        cells = {row.bank: measured(row) for row in line}
        first, wrong = line[0], [row for row in line if not row.ok]
        status = ", ".join(dict.fromkeys(row.status for row in wrong or line))
        where = f" ({', '.join(row.bank for row in wrong)})" if wrong and len(banks) > 1 else ""
        style = "bold red" if wrong else "green"
        made.add_row(
            first.check,
            *(["" if first.n is None else str(first.n)] if counted else []),
            *(cells.get(bank, "") for bank in banks),
            accepted(line),
            Text(status + where, style=style),
        )
    return made


def measured(row: Row) -> str:
    """The measurement, with its reference where there is one."""
    if row.high == 0:
        return f"{row.measured:g} {row.note}"
    digits = 3 if row.bank else 4
    return f"{row.measured:.{digits}f}" + ("" if row.reference is None else f" ({row.reference:.{digits}f})")


def accepted(line: Sequence[Row]) -> str:
    """The accepted ranges of a line in words; of a control, what flags it."""
    allowed = sorted(row.reference - row.low for row in line if row.reference is not None)
    if allowed:
        ends = dict.fromkeys(f"{end:.2g}" for end in (allowed[0], allowed[-1]))
        return f"within {' to '.join(ends)} of it"
    return " / ".join(dict.fromkeys(map(span, line)))


def span(row: Row) -> str:
    """The accepted range, but for ends that no rate or count can pass."""
    if row.high == 0:
        return "0"
    if row.control:
        return f"> {row.high:.3f}"
    if row.low <= 0:
        return f"<= {row.high:.3f}"
    return f">= {row.low:.3f}" if row.high >= 1 else f"{row.low:.3f} to {row.high:.3f}"


def closing(result: SelfTest) -> str:
    """One sentence."""
    from gpt2lab.text import plural

    drawn = f"{result.draws:,} draws (seed {result.seed})"
    flagged = sum(row.control for row in result.rows)
    if result.ok:
        counted = plural(len(result.rows) - flagged, "check")
        return f"calibrated: {counted} accepted and {plural(flagged, 'wrong method')} flagged, with {drawn}"
    wrong = f"{len(result.wrong)} of {plural(len(result.rows), 'check')} failed, with {drawn}"
    return f"NOT calibrated: {wrong}; trust no verdict of this version"
