"""The command sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.cli import options, where
from gpt2lab.cli.options import checked_time, confirm_time, print_json, say, scales
from gpt2lab.cli.where import LOCAL, PRINT, location_of
from gpt2lab.errors import NumericsFault
from gpt2lab.experiments import command

if TYPE_CHECKING:
    from gpt2lab.basics.progress import Listener
    from gpt2lab.experiments.sweep import SweepPlan
    from gpt2lab.records import SweepRecord

NOTHING_FOUND = 1
"""Exit code of a sweep without a finished trial, unless all diverged."""


def sweep(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="YAML file of a sweep, such as sweeps/lr.yaml.", metavar="FILE")],
    scale: options.Scale = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Total number of trials, instead of the file's.", min=1)
    ] = None,
    jobs: options.Jobs = None,
    nproc: where.Nproc = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Join a sweep: end when nothing is left to start, write no report.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="sqlite:////abs/optuna.db, journal:/shared/optuna.log, "
                     "postgresql://user@host/db.", envvar="GPT2LAB_STORAGE"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Start no trial after this time, such as 6h or 45m.", callback=checked_time),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the best settings as a preset into the current folder.")
    ] = False,
    set_: options.Set = None,
    name: options.Name = None,
    plugin: options.Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the search and its cost; train nothing.")] = False,
    profile: where.Profile = None,
    executor: where.ExecutorName = LOCAL,
    workers: where.Workers = 1,
    sbatch: where.Sbatch = "",
    machine: where.MachineFile = None,
    max_days: options.MaxDays = options.MAX_DAYS,
    no_tracking: options.NoTracking = False,
    runs: options.Runs = options.RUNS,
    out: options.Out = options.OUT,
    json_: options.Json = False,
) -> None:  # fmt: skip
    """Search for the best settings. Trains the unfinished trials and reports the optimum with its interval."""
    from gpt2lab.basics.early import started_early

    known = any((runs / "sweeps").glob(f"{Path(file).stem}@*.json"))  # it may be finished, and train nothing
    context.with_resource(started_early(wanted=executor == LOCAL and not (dry_run or known or nproc)))
    from gpt2lab import api
    from gpt2lab.basics.progress import Message, display
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.experiments.sweep import SweepPlan
    from gpt2lab.planning.ablation import scales_of
    from gpt2lab.store import Store

    location = location_of(context, executor, workers, sbatch, jobs, nproc, machine, dry_run)
    if executor == PRINT:
        raise typer.BadParameter("is for ablations", param_hint=f"--executor {executor}")
    console, code = console_for(to_stderr=json_), 0
    for at_scale in scales(scale, scales_of(file)):
        with rich_progress() as progress:
            plan = SweepPlan.prepare(
                file, Store(runs), name=name, scale=at_scale, trials=trials, overrides=tuple(set_ or ()),
                plugins=tuple(plugin or ()), budget=budget, jobs=location.local_jobs, ranks=nproc or 1,
                progress=progress, machine=location.machine, machine_like=location.machine_like,
            )  # fmt: skip
        if dry_run and json_:
            print_json({"sweep": plan.loaded.name, "searches": plan.as_record()})
            continue
        say(console, f"{plan.record.name}: {plan.record.question}", *plan.lines())
        if dry_run:
            continue
        from gpt2lab.sweep.drive import run_searches  # Optuna takes a second to load

        confirm_time(plan.seconds, max_days, plan.record.name)
        tracker = None if no_tracking else api.tracker_of(plan.store, plan.loaded.declared.sweep)
        with display(console) as listener:

            def tell(text: str, listener: Listener = listener) -> None:
                listener(Message(text))

            record = run_searches(
                plan.searches, plan.record, plan.store, on_event=listener, tracker=tracker, storage=storage,
                stays=not worker, executor=location.executor_for(plan.record.name, tell),
            )  # fmt: skip
        if worker:
            page = command("report", record.name, runs=runs)
            say(console, f"{record.name}: nothing is left to start here; {page} writes the page")
        else:
            code = max(code, show_sweep(record, plan, out, console, apply=apply, as_json=json_))
    if code:
        raise SystemExit(code)


def show_sweep(record: SweepRecord, plan: SweepPlan, out: Path, console: Any, *, apply: bool, as_json: bool) -> int:
    """Write the page and print the result; -> the exit code. Raises NumericsFault when everything diverged."""
    from gpt2lab.records import page_folder
    from gpt2lab.reports.page import is_current
    from gpt2lab.reports.read import read_sweep
    from gpt2lab.reports.sweep import terminal_sweep, write_sweep_report

    read, loaded = read_sweep(record.name, plan.store.root), plan.loaded
    kept = is_current(read, out)
    page = page_folder(out, read.name) / "index.html" if kept else write_sweep_report(read, out=out)
    if as_json:
        print_json(json.loads((page.parent / "sweep.json").read_text(encoding="utf-8")), indent=1)
    else:
        console.print(terminal_sweep(read, out=out, kept=kept))
    for best in sorted(page.parent.glob("best*.yaml")) if apply else ():
        path = Path(f"{loaded.scale}-{loaded.declared.sweep}{best.stem.removeprefix('best')}.yaml")
        path.write_text(best.read_text(encoding="utf-8"), encoding="utf-8")
        say(console, f"written: {path}; try: {command('train', path)}")
    outcomes = {trial.outcome for search in record.searches.values() for trial in search.trials}
    if outcomes <= {"diverged", "pruned"} and "diverged" in outcomes:
        problem = "no trial was finished: all of them diverged"
        raise NumericsFault(problem, where=str(page), hint="lower rates: see the page for which ones to try")
    return 0 if "finished" in outcomes or outcomes <= {"waiting", "running"} else NOTHING_FOUND
