"""Commands about campaigns: ledger, register."""

from __future__ import annotations

from typing import Annotated

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import time_taken
from gpt2lab.cli.options import RUNS, Json, Runs, print_fault, print_json, say, store_at, table_of
from gpt2lab.errors import ConfigError, DataFault, Problem, unknown


def ledger(
    name: Annotated[
        str | None, typer.Argument(help="A campaign; all of them by default.", metavar="[CAMPAIGN]")
    ] = None,
    registered: Annotated[
        str | None,
        typer.Option("--registered", metavar="HEAD", help="Check that the ledger still has this line, as "
                     "printed by `gpt2lab register`."),
    ] = None,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:  # fmt: skip
    """List every declared hypothesis by campaign. Shows outcomes and checks that no line was changed.

    Exit code 4 if one was changed or is missing.
    """
    from dataclasses import asdict

    from gpt2lab.analysis.campaigns import campaigns_of, problems_of
    from gpt2lab.store.ledger import FILE, read_ledger

    store = store_at(runs)
    lines, problems, campaigns = read_ledger(store.root), problems_of(store), campaigns_of(store)
    if name is not None:
        if name not in campaigns:
            raise ConfigError(unknown("campaign", name, [n for n in campaigns if n]), hint="gpt2lab ledger")
        campaigns = {name: campaigns[name]}
    if registered is not None and not lines.has(registered.strip()):
        problems.append(f"the line {registered.strip()}, which was registered, is not in it")
    if json_:
        shown = [
            {
                "name": campaign.name, "seconds": campaign.seconds, "luck": campaign.luck,
                "summary": campaign.sentences(),
                "hypotheses": [asdict(hypothesis) | {"claim": hypothesis.claim} for hypothesis in campaign.hypotheses],
            }
            for campaign in campaigns.values()
        ]  # fmt: skip
        print_json({"head": lines.head, "lines": len(lines.lines), "problems": problems, "campaigns": shown}, indent=1)
    else:
        console = console_for()
        right = ("no.", "difference", "p", "level")
        for campaign in campaigns.values():
            rows = []
            for hypothesis in campaign.hypotheses:
                numbers = [f"{x:{form}}" if x is not None else "-" for x, form in
                           ((hypothesis.difference, "+.3g"), (hypothesis.p, ".2g"),
                            (hypothesis.level, ".2g"))]  # fmt: skip
                supported = {True: "yes", False: "no", None: "-"}[hypothesis.supported]
                rows.append([
                    str(hypothesis.number or "screen"), hypothesis.declared[:16].replace("T", " "), hypothesis.study,
                    f"{hypothesis.arm} against {hypothesis.against}", hypothesis.word or "open", *numbers, supported,
                ])  # fmt: skip
            columns = ("no.", "declared", "study", "contrast", "verdict", *right[1:], "supported")
            title = f"campaign {campaign.name}" if campaign.name else "studies without a campaign"
            console.print(table_of(*columns, rows=rows, right=right, title=title))
            say(console, *campaign.sentences(), f"{time_taken(campaign.seconds)} of training", "")
        say(console, f"{len(lines.lines)} lines in {store.root / FILE}, head {lines.head or 'none'}", wrap=False)
    if problems:
        hint = "restore the file from a backup; later entries cannot be trusted"
        fault = DataFault([Problem(str(store.root / FILE), problem) for problem in problems], hint=hint)
        raise SystemExit(print_fault(fault, as_json=json_))


def register(
    study: Annotated[str, typer.Argument(help="A declared study, such as posenc@nano.", metavar="STUDY")],
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Print a study's declaration for a public place. Put it into an issue, a commit message or a git tag.

    `gpt2lab ledger --registered HEAD` checks later that the ledger up to that line is unchanged.
    """
    from gpt2lab.analysis.campaigns import registration

    store = store_at(runs)
    record = registration(store.study(study), store)
    print_json(record) if json_ else print(record["line"])
