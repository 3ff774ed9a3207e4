"""Commands about what a run is: why two differ, and keeping old ones when only code changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt2lab.cli.run import Arms, File, Jobs, Json, Plugin, Runs, Scale, Seeds, Set, names_in, scales_of

Run = Annotated[str, typer.Argument(help="A run id, or its first digits.", metavar="RUN")]


def add_to(app: typer.Typer) -> None:
    """Put this file's commands into the application."""
    app.command()(why)
    app.command()(adopt)


def why(run_a: Run, run_b: Run, runs: Runs = Path("runs"), json_: Json = False) -> None:
    """Explain why two runs have different ids. Settings, data, software, and changed definitions."""
    from dataclasses import asdict

    from gpt2lab.display import console_for
    from gpt2lab.reuse.why import why as differences
    from gpt2lab.store import Store

    store = Store(runs)
    a, b = store.find(run_a), store.find(run_b)
    found = differences(a, b, store)
    if json_:
        json.dump({"a": a.id, "b": b.id, "differences": [asdict(one) for one in found]}, sys.stdout)
        print()
        return
    console = console_for()
    if not found:
        same = "one and the same run" if a.id == b.id else "nothing differs that could change a weight"
        console.print(f"{a.id} and {b.id}: {same}", markup=False, highlight=False)
    for one in found:
        console.print(str(one), markup=False, highlight=False)
        for line in one.code:
            console.print(f"    {line}", markup=False, highlight=False, style=STYLES.get(line[:1], ""))


STYLES = {"+": "green", "-": "red", "@": "dim"}


def adopt(
    file: File,
    scale: Scale = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    arms: Arms = None,
    set_: Set = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs that could be kept.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Keep finished runs after a code change. First tests that the new code trains the same bits."""
    from gpt2lab import api
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.display import console_for
    from gpt2lab.reuse.adopt import adopt as adopt_runs
    from gpt2lab.reuse.adopt import groups, without_old_runs
    from gpt2lab.store import Store
    from gpt2lab.text import plural

    console, store = console_for(), Store(runs)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    refused = False
    for each in scales_of(file, scale):
        with rich_progress() as progress:
            study = api.open_study(
                file, scale=each, seeds=seeds, arms=names_in(arms), overrides=tuple(set_ or ()), plugins=plugin or (),
                jobs=jobs, runs=runs, progress=progress,
            )  # fmt: skip
        kept = 0
        while True:  # rates that were bracketed are adopted first; the runs at the best of them are known only then
            plan = study.plan()
            if plan.ablation.looks:  # whatever was trained up to the last look
                plan = study.plan(dict.fromkeys(plan.arms, plan.ablation.looks[-1]))
            lacking = without_old_runs(plan, store)
            if dry_run:
                for group in groups(plan, store):
                    for run in group.candidates:
                        say(f"{run.new.arm} seed {run.new.seed}: {run.old.id} differs in code alone")
                    say(f"{group}: {group.replayable.id if group.replayable else 'none of them'} can be replayed")
                break
            outcomes = adopt_runs(plan, store, say)
            for outcome in outcomes:
                refused |= bool(outcome.refused)
                result = f"{plural(len(outcome.adopted), 'run')} kept" if outcome.adopted else ""
                result = f"refused: {outcome.refused}" if outcome.refused else result
                say(f"{outcome.group}: {result or 'another process was there first'}")
            kept += sum(len(outcome.adopted) for outcome in outcomes)
            if not plan.tuning or not outcomes or any(not outcome.adopted for outcome in outcomes):
                break
        for line in lacking:
            say(line)
        if not dry_run:
            name = f"{plan.ablation.name}@{plan.ablation.scale}"
            say(f"{name}: {plural(kept, 'run')} kept" if kept else f"{name}: nothing to keep")
    if refused:
        raise SystemExit(1)
