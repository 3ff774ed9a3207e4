"""Commands that check the statistics by simulation: selftest statistics, selftest campaigns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import plural
from gpt2lab.cli.options import Json, print_json
from gpt2lab.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from gpt2lab.analysis.selftest import Measurement

group = typer.Typer(name="selftest", help="Test gpt2lab's statistics. Trains nothing.", no_args_is_help=True)


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
    from gpt2lab.analysis.selftest import LONG, PARTS, QUICK
    from gpt2lab.analysis.selftest import selftest as run

    if quick and draws is not None:
        raise ConfigError("--quick is a number of draws already", where="--draws", hint="gpt2lab selftest statistics")
    count = draws if draws is not None else QUICK if quick else LONG
    with console_for(to_stderr=True).status("self-test") as status:
        result = run(count, progress=lambda part, rows: status.update(f"self-test: {part}, {rows} rows so far"))
    if json_:
        print_json(result.to_json(), indent=1)
        raise typer.Exit(int(not result.ok))
    console = console_for()
    for part, (title, _) in PARTS.items():
        console.print(table_of(title, [row for row in result.rows if row.part == part]), "")
    drawn, flagged = f"{result.draws:,} draws (seed {result.seed})", sum(row.control for row in result.rows)
    closing = f"calibrated: {plural(len(result.rows) - flagged, 'check')} accepted and "
    closing += f"{plural(flagged, 'wrong method')} flagged, with {drawn}"
    failure = f"NOT calibrated: {len(result.wrong)} of {plural(len(result.rows), 'check')} failed, with {drawn}"
    console.print(
        closing if result.ok else f"{failure}; trust no verdict of this version", markup=False, highlight=False
    )
    raise typer.Exit(int(not result.ok))


def table_of(title: str, rows: list[Measurement]) -> Table:
    """A line for each check and n, a column for each noise bank."""
    from rich.table import Table
    from rich.text import Text

    lines: dict[tuple[str, int | None], dict[str, Measurement]] = {}
    for row in rows:
        lines.setdefault((row.check, row.n), {})[row.bank] = row
    banks = list(dict.fromkeys(row.bank for row in rows))
    table = Table("check", "n", *(bank or "measured" for bank in banks), "accepted", "", box=None, padding=(0, 1))
    table.title, table.title_justify = Text(title, style="bold"), "left"
    for (check, n), cells in lines.items():
        first, wrong = next(iter(cells.values())), [row for row in cells.values() if not row.ok]
        status = ", ".join(dict.fromkeys(row.status for row in wrong or [first]))
        where = f" ({', '.join(row.bank for row in wrong)})" if wrong and len(banks) > 1 else ""
        measured = (_measured(cells[bank]) if bank in cells else "" for bank in banks)
        style = "bold red" if wrong else "green"
        table.add_row(
            check, "" if n is None else str(n), *measured, _accepted(first), Text(status + where, style=style)
        )
    return table


def _measured(row: Measurement) -> str:
    """The measurement, with its reference where there is one."""
    if row.high == 0:
        return f"{row.measured:g} {row.note}"
    digits = 3 if row.bank else 4
    return f"{row.measured:.{digits}f}" + ("" if row.reference is None else f" ({row.reference:.{digits}f})")


def _accepted(row: Measurement) -> str:
    """The accepted range, without ends that no rate or count can exceed; of a control, what flags it."""
    if row.reference is not None:
        return f"within {row.high - row.reference if row.high < 1 else row.reference - row.low:.2g} of it"
    if row.high < 1 or row.control:
        return f"> {row.high:.3f}" if row.control else f"<= {row.high:.3g}"
    return f">= {row.low:.3f}"


@group.command()
def campaigns(
    draws: Annotated[
        int, typer.Option("--draws", help="Simulated campaigns of each kind.", min=200, max=20_000)
    ] = 1000,
    json_: Json = False,
) -> None:
    """Check the control of false discoveries over campaigns. Simulates campaigns of 20, 100 and 500 hypotheses of
    which a tenth is true, judged by LORD++ and, as a wrong method, by uncorrected p values.

    Exit code 0 when LORD++ keeps the share of false discoveries below 5 % and uncorrected p values do not, else 1.
    """
    from gpt2lab.analysis.selftest import Draws, SelfTest
    from gpt2lab.analysis.streams import campaigns as simulated

    rows = []
    with console_for(to_stderr=True).status("self-test") as status:
        for row in simulated(Draws(count=draws, seed=0)):
            rows.append(row)
            status.update(f"self-test: {len(rows)} rows so far")
    result = SelfTest(rows=tuple(rows), draws=draws, seed=0)
    if json_:
        print_json(result.to_json(), indent=1)
        raise typer.Exit(int(not result.ok))
    console = console_for()
    console.print(table_of("Share of false ones among the discoveries of a campaign", rows))
    verdict = "LORD++ keeps 5 %" if result.ok else f"{len(result.wrong)} of {len(rows)} rows failed"
    console.print(f"{verdict}, with {draws:,} campaigns of each kind", markup=False, highlight=False)
    raise typer.Exit(int(not result.ok))
