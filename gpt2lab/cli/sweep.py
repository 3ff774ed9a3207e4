"""Search for settings: sweep."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Jobs, Json, Out, Plugin, Runs, Scale, Set, a_time, seconds_of

if TYPE_CHECKING:
    from gpt2lab.experiments.sweep import SweepPlan
    from gpt2lab.records import SweepRecord
    from gpt2lab.sweep.declaration import LoadedSweep

NOTHING_FOUND = 1
"""Exit code of a sweep in which no trial was finished, for other reasons than divergence."""


def add_to(app: typer.Typer) -> None:
    """Put this file's command into the application."""
    app.command()(sweep)


def sweep(
    file: Annotated[str, typer.Argument(help="YAML file of a sweep, such as sweeps/lr.yaml.", metavar="FILE")],
    scale: Scale = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Total number of trials, instead of the file's.", min=1)
    ] = None,
    jobs: Jobs = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Ranks per run; trials then run one at a time.", min=1)
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Join a sweep: end when nothing is left to start, write no report.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="sqlite:////abs/optuna.db, journal:/shared/optuna.log, postgresql://user@host/db.",
            envvar="GPT2LAB_STORAGE",
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Start no trial after this time, such as 6h or 45m.", callback=a_time)
    ] = None,
    audit_pruning: Annotated[
        bool, typer.Option("--audit-pruning", help="Run all trials to the end; report what pruning would cut.")
    ] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the best settings as a preset into the current folder.")
    ] = False,
    set_: Set = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the search and its cost; train nothing.")] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    runs: Runs = Path("runs"),
    out: Out = Path("reports"),
    json_: Json = False,
) -> None:
    """Search for the best settings. Trains what is not finished and reports the optimum with its interval."""
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.display import console_for
    from gpt2lab.experiments.sweep import SweepPlan
    from gpt2lab.store import Store
    from gpt2lab.sweep.declaration import scales_of

    console, store = console_for(to_stderr=json_), Store(runs)
    code = 0
    scales: tuple[str | None, ...] = (scale,) if scale else scales_of(file) or (None,)
    for each in scales:
        loaded = load(file, each, trials, tuple(set_ or ()), tuple(plugin or ()), audit_pruning)
        limit = budget or loaded.declared.time_budget
        with rich_progress() as progress:
            plan = SweepPlan.prepare(
                loaded, store, jobs=jobs, seconds=seconds_of(limit) if limit else None, progress=progress,
                reproduce=reproduce(file, scale, trials, tuple(set_ or ()), tuple(plugin or ()), audit_pruning),
            )  # fmt: skip
        if dry_run:
            print_plan(plan, console, json_)
            continue
        record = train(plan, console, storage=storage, nproc=nproc or 1, stays=not worker, tracking=not no_tracking)
        if not worker:
            code = max(code, tell(record, loaded, store, out, console, apply=apply, as_json=json_))
    if code:
        raise SystemExit(code)


def load(
    file: str, scale: str | None, trials: int | None, overrides: tuple[str, ...], plugins: tuple[str, ...], audit: bool
) -> LoadedSweep:
    """The sweep as it is asked for. Raises ConfigError."""
    from gpt2lab.sweep.declaration import load_sweep

    replaced: dict[str, Any] = {"trials": trials} if trials else {}
    replaced |= {"audit_pruning": True} if audit else {}
    return load_sweep(file, scale=scale, overrides=overrides, replaced=replaced, plugins=plugins)


def reproduce(
    file: str, scale: str | None, trials: int | None, overrides: tuple[str, ...], plugins: tuple[str, ...], audit: bool
) -> str:
    """The command that repeats the sweep, without what only concerns this machine."""
    words = ["gpt2lab", "sweep", file, *(["--scale", scale] if scale else [])]
    words += ["--trials", str(trials)] if trials else []
    words += ["--audit-pruning"] if audit else []
    words += [word for item in overrides for word in ("--set", item)]
    return shlex.join([*words, *(word for item in plugins for word in ("--plugin", item))])


def train(
    plan: SweepPlan, console: Any, *, storage: str | None, nproc: int, stays: bool, tracking: bool
) -> SweepRecord:
    """Work on the sweep, with its progress on the console; -> its record."""
    from gpt2lab.api import tracker_of
    from gpt2lab.display import display

    for line in (f"{plan.record.name}: {plan.record.question}", *plan.lines()):
        console.print(line, markup=False, highlight=False)
    tracker = tracker_of(plan.store, plan.loaded.declared.sweep) if tracking else None
    with display(console) as listener:
        return plan.train(on_event=listener, tracker=tracker, storage=storage, nproc=nproc, stays=stays)


def print_plan(plan: SweepPlan, console: Any, as_json: bool) -> None:
    """What would be done."""
    if as_json:
        record = {
            label: {
                "trials": search.trials,
                "seeds": list(search.seeds),
                "tokens": search.tokens,
                "flops": search.costs.flops_per_token * search.tokens * search.trials * search.settings.seeds,
                "space": [dimension.as_record() for dimension in search.space.dimensions],
            }
            for label, search in plan.searches.items()
        }
        print(json.dumps({"sweep": plan.loaded.name, "searches": record}))
        return
    for line in (f"{plan.loaded.name}: {plan.loaded.declared.question}", *plan.lines()):
        console.print(line, markup=False, highlight=False)


def tell(
    record: SweepRecord, loaded: LoadedSweep, store: Any, out: Path, console: Any, *, apply: bool, as_json: bool
) -> int:
    """Write the page and say what was found; -> the exit code. Raises NumericsFault when everything diverged."""
    from gpt2lab.errors import NumericsFault
    from gpt2lab.reports import terminal_sweep, write_sweep_report

    page = write_sweep_report(record.name, root=store.root, out=out)
    if as_json:
        print((page.parent / "sweep.json").read_text(encoding="utf-8"))
    else:
        console.print(terminal_sweep(record.plain(), root=store.root, out=out))
    for best in sorted(page.parent.glob("best*.yaml")) if apply else ():
        path = Path(f"{loaded.scale}-{loaded.declared.sweep}{best.stem.removeprefix('best')}.yaml")
        path.write_text(best.read_text(encoding="utf-8"), encoding="utf-8")
        console.print(f"written: {path}; try: gpt2lab train {path}", markup=False, highlight=False)
    outcomes = {trial.outcome for search in record.searches.values() for trial in search.trials}
    if "finished" in outcomes:
        return 0
    if outcomes <= {"diverged", "pruned"} and "diverged" in outcomes:
        what = "no trial was finished: all of them diverged"
        raise NumericsFault(what, where=str(page), hint="lower rates: see the page for which ones to try")
    return 0 if outcomes <= {"waiting", "running"} else NOTHING_FOUND
