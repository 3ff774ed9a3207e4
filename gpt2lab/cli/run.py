"""Commands that plan and train: run, check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from gpt2lab.api import StudyResult
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.planning.plan import ArmPlan, Plan
    from gpt2lab.planning.search import Search
    from gpt2lab.planning.tuning import Tuning


def seeds_of(text: str) -> int | Literal["auto"]:
    """A number of seeds, or `auto`. Raises typer.BadParameter."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"{text!r} is neither a number from 1 on nor auto")
    return int(text)


def seconds_of(text: str) -> float:
    """Seconds of a time written as 6h, 45m, 90s or 2d. Raises typer.BadParameter."""
    from gpt2lab import text as text_module

    try:
        return text_module.seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def a_time(text: str | None) -> str | None:
    """An option's value as it is, if it is a time."""
    if text is not None:
        seconds_of(text)
    return text


File = Annotated[str, typer.Argument(help="YAML file of an ablation, such as ablations/posenc.yaml.", metavar="FILE")]
Scale = Annotated[str | None, typer.Option("--scale", "-s", help="Preset to run at, such as nano or gpt2-124m.")]
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
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value on top of the preset, for every arm.")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="Python file that registers components.")]
Budget = Annotated[
    str | None,
    typer.Option("--budget", callback=a_time, help="Time to spend, such as 6h: arms and seeds are chosen to fit."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the run store.", file_okay=False)]
Out = Annotated[Path, typer.Option("--out", help="Folder of the reports.", file_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Put this file's commands into the application."""
    app.command()(run)
    app.command()(check)
    app.command()(machine)


def run(
    file: File,
    scale: Scale = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    arms: Arms = None,
    set_: Set = None,
    plugin: Plugin = None,
    budget: Budget = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; train nothing.")] = False,
    machine: Annotated[
        Path | None,
        typer.Option("--machine", help="With --dry-run: plan for that machine, as `gpt2lab machine` describes it."),
    ] = None,
    force_exploratory: Annotated[
        bool, typer.Option("--force-exploratory", help="Show numbers where verdicts are refused; claim nothing.")
    ] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    runs: Runs = Path("runs"),
    out: Out = Path("reports"),
    json_: Json = False,
) -> None:
    """Run an ablation. Trains what is not finished, judges it and writes the report."""
    from gpt2lab import api
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.display import console_for
    from gpt2lab.planning.machine import machine_of

    if machine and not dry_run:
        raise typer.BadParameter("a plan for another machine needs --dry-run", param_hint="--machine")
    console = console_for(to_stderr=json_)
    options: Any = {
        "seeds": seeds, "arms": names_in(arms), "overrides": tuple(set_ or ()), "plugins": tuple(plugin or ()),
        "budget": budget,
    }  # fmt: skip
    failed = 0
    for each in scales_of(file, scale):
        with rich_progress() as progress:
            there = machine_of(machine) if machine else None
            study = api.open_study(
                file, scale=each, **options, jobs=jobs, machine=there, runs=runs, progress=progress
            )  # fmt: skip
        if dry_run:
            print_plan(study.plan(), study.store, console, json_)
        else:
            again = api.reproduce(file, scale=each, **options)
            result = train(study, again, console, tracking=not no_tracking)
            finish(result, out, console, tracking=not no_tracking, as_json=json_, force_exploratory=force_exploratory)
            failed += len(result.failed)
    if failed:
        raise SystemExit(1)


def scales_of(file: str, scale: str | None) -> list[str | None]:
    """The scales to run at: the one that was asked for, else those of the file's `scales`, else that of its `base`."""
    from gpt2lab.planning.ablation import ladder_of

    return [scale] if scale else list(ladder_of(file)) or [None]


def names_in(text: str | None) -> list[str] | None:
    """Names separated by commas; None where none were given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def train(study: Study, reproduce: str, console: Any, *, tracking: bool) -> StudyResult:
    """Train what a study has left to do, with its progress on the console."""
    from gpt2lab import api
    from gpt2lab.display import display
    from gpt2lab.planning.forecast import lines
    from gpt2lab.text import plural

    plan = study.plan()
    for line in (f"{study.name}: {plan.ablation.question}", *lines(plan)):
        console.print(line, markup=False, highlight=False)
    with display(console) as listener:
        result = api.train_study(study, reproduce=reproduce, tracking=tracking, on_event=listener)
    trained = len(result.endings) - len(result.failed)
    failed = f", {len(result.failed)} failed (tried again by the same command)" if result.failed else ""
    line = f"{plural(result.found, 'run')} found finished, {trained} trained now{failed}"
    console.print(line, markup=False, highlight=False)
    return result


def finish(
    result: StudyResult, out: Path, console: Any, *, tracking: bool, as_json: bool, force_exploratory: bool
) -> None:
    """Write a study's page, log it to the tracker, and show the verdicts."""
    from gpt2lab.reports import read_study, terminal_summary, write_report

    read = read_study(result.name, result.store.root, force_exploratory=force_exploratory)
    write_report(read, out=out, force_exploratory=force_exploratory)
    if tracking:
        keep_report(result, out / result.name, console)
    if as_json:
        print((out / result.name / "verdicts.json").read_text(encoding="utf-8"))
    else:
        console.print(terminal_summary(read, out))
        if tracking:
            console.print("MLflow: gpt2lab ui", markup=False, highlight=False)


def keep_report(result: StudyResult, folder: Path, console: Any) -> None:
    """Log the report with the study's parent run; a tracker that does not work costs one line, not the study."""
    from gpt2lab import api
    from gpt2lab.tracking.addresses import reason

    try:
        tracker = api.tracker_of(result.store, result.record.ablation)()
        tracker.log_report(result.record.plain(), folder)
    except Exception as error:
        console.print(
            f"the report is not in MLflow ({reason(error)}); `gpt2lab sync {result.name}` sends it later",
            markup=False,
        )


def check(
    file: File,
    scale: Scale = None,
    seeds: Seeds = None,
    arms: Arms = None,
    set_: Set = None,
    plugin: Plugin = None,
) -> None:
    """Report mistakes in an ablation or sweep file. Prepares no data and trains nothing."""
    from gpt2lab.planning.ablation import load_ablation

    if is_sweep(file):
        check_sweep(file, scale, tuple(set_ or ()), tuple(plugin or ()))
        return
    for each in scales_of(file, scale):
        ablation = load_ablation(
            file, scale=each, overrides=tuple(set_ or ()), arms=names_in(arms), seeds=seeds, plugins=plugin or ()
        )
        count = "automatic" if ablation.seeds is None else len(ablation.seeds)
        print(f"{file}: {len(ablation.arms)} arms ({', '.join(ablation.arms)}) x {count} seeds at "
              f"{ablation.scale}: all well")  # fmt: skip


def machine(
    preset: Annotated[str, typer.Argument(help="Preset or file of the runs to come.", metavar="PRESET")] = "nano",
    jobs: Jobs = None,
    runs: Runs = Path("runs"),
) -> None:
    """Describe this machine as JSON, for planning on another one. See `gpt2lab run --dry-run --machine`."""
    from gpt2lab import api

    print(api.describe_machine(preset, jobs=jobs, runs=runs).to_json())


def is_sweep(file: str) -> bool:
    """Whether a file declares a sweep, by its key of that name."""
    from gpt2lab.config.source import read_file

    return "sweep" in read_file(file).tree


def check_sweep(file: str, scale: str | None, overrides: tuple[str, ...], plugins: tuple[str, ...]) -> None:
    """`check` of a sweep's file, at every scale that it names."""
    from gpt2lab.sweep.declaration import load_sweep, scales_of

    scales: tuple[str | None, ...] = (scale,) if scale else scales_of(file) or (None,)
    for one in scales:
        loaded = load_sweep(file, scale=one, overrides=overrides, plugins=plugins)
        count = f"{len(loaded.arms)} searches ({', '.join(loaded.arms)})" if loaded.declared.variants else "1 search"
        print(f"{file}: {count} of {loaded.declared.trials} trials at {loaded.scale}: all well")


def print_plan(plan: Plan, store: Any, console: Any, as_json: bool) -> None:
    """What would be done: runs, costs per arm, time on this machine, and what it will be able to say."""
    from gpt2lab.planning import forecast
    from gpt2lab.planning.runs import is_finished
    from gpt2lab.reports.sections.verdicts import next_steps

    done = {run.id for run in plan.runs() if is_finished(run, store)}
    rows = [plan_row(name, arm, done) for name, arm in plan.arms.items()]
    left, machine = forecast.seconds_left(plan, store), plan.machine
    if as_json:
        record = {"study": f"{plan.ablation.name}@{plan.ablation.scale}", "arms": rows, "seconds": left}
        record |= {"forecast": forecast.as_record(plan), "left_out": list(plan.left_out)}
        json.dump({**record, "jobs": machine.jobs, "threads": machine.threads, "device": machine.device}, sys.stdout)
        print()
        return
    from gpt2lab.text import duration

    console.print(plan_table(plan, rows))
    due = trials_told(plan) if plan.searches else f"{len({run.id for run in plan.runs()})} runs, {len(done)} finished"
    told = [
        f"{due}; about {duration(left)} on {machine.device_name} "
        f"({machine.device}), {machine.jobs} at a time, threads each: {machine.threads}; speed from "
        f"{machine.speed_from}"
    ]
    if plan.searches:
        told.append(
            "trials first, the same for every arm; then the seeds above at the best settings of each, and once more at "
            "its settings as written where those are others"
        )
    elif plan.tuning:
        told.append("rates first: each arm tries its own with one seed; the seeds above follow at the best of them")
    if plan.ablation.looks:
        told.append(f"looks at n = {', '.join(map(str, plan.ablation.looks))}; arms that are decided stop there")
    told += [f"{name}: {arm.adjustment}" for name, arm in plan.arms.items() if arm.adjustment]
    steps = next_steps(f"{plan.ablation.name}@{plan.ablation.scale}", store)
    for line in [*told, *forecast.lines(plan), *steps]:
        console.print(line, markup=False, highlight=False)


def plan_row(name: str, arm: ArmPlan, done: set[str]) -> dict[str, Any]:
    """One arm of the plan as plain data."""
    tried = arm.tuning.labels if arm.tuning else {}
    return {
        "arm": name,
        "changes": dict(arm.arm.changes),
        "parameters": arm.costs.parameters,
        "flops_per_token": arm.costs.flops_per_token,
        "tokens": arm.tokens,
        "flops": arm.costs.flops_per_token * arm.tokens,
        "seconds_per_run": arm.seconds,
        "memory_bytes": arm.memory,
        "lr": arm.arm.config.optim.lr,
        "bracket": {label.removeprefix("lr x"): run_id for run_id, label in tried.items()},
        "search": search_row(arm.tuning, arm.tuning.search) if arm.tuning and arm.tuning.search else None,
        "adjustment": str(arm.adjustment) if arm.adjustment else None,
        "runs": {str(run.seed): run.id for run in arm.runs},
        "shared": {str(run.seed): run.id for run in arm.shared},
        "curve": {f"{b:g}": {str(run.seed): run.id for run in runs} for b, runs in arm.curve.items()},
        "finished": [str(run.seed) for run in arm.runs if run.id in done],
    }


def trials_told(plan: Plan) -> str:
    """What is due of a study whose arms are tuned first."""
    from gpt2lab.text import plural

    searches = list(plan.searches.values())
    all_, left = sum(search.trials for search in searches), sum(a.tuning.left for a in plan.arms.values() if a.tuning)
    runs = {run.id for arm in plan.arms.values() for run in arm.runs}
    each = f"{plural(searches[0].trials, 'trial')} each first" + (f", {all_ - left} done" if left < all_ else "")
    seeds = len(searches[0].seeds)
    more = f" of {plural(seeds, 'seed')}" if seeds > 1 else ""
    return f"{each}{more}, then {len(runs)} to {2 * len(runs)} runs"


def search_row(tuning: Tuning, search: Search) -> dict[str, Any]:
    """An arm's search as plain data: what may be tried, how many trials there are and are left, what was found."""
    return {
        "space": [dimension.as_record() for dimension in search.space.dimensions],
        "trials": search.trials,
        "seeds": list(search.seeds),
        "left": tuning.left,
        "settings": tuning.settings,
        "not_comparable": tuning.reason,
    }


def plan_table(plan: Plan, rows: list[dict[str, Any]]) -> Any:
    """The arms with their costs, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from gpt2lab.planning.designs import in_short
    from gpt2lab.text import duration

    shown = Table(title=Text(f"{plan.ablation.name}@{plan.ablation.scale}: {plan.ablation.question}"), box=None,
                  title_justify="left", padding=(0, 2, 0, 0))  # fmt: skip
    for name in ("arm", "what changes"):
        shown.add_column(name, overflow="fold")
    for name in ("parameters", "MFLOP/token", "tokens", "PFLOP", "time a run", "memory", "runs"):
        shown.add_column(name, justify="right")
    for row in rows:
        finished = f" ({len(row['finished'])} finished)" if row["finished"] else ""
        trials = f"{len(row['bracket'])} rates, " if row["bracket"] else ""
        if row["search"]:
            known = set() if row["search"]["left"] else set(row["runs"].values())
            again = len(set(row["shared"].values()) - known)
            trials = f"{row['search']['trials']} trials, " + (f"{again} as written, " if again else "")
        shown.add_row(
            Text(str(row["arm"])),
            Text(", ".join(f"{key} = {in_short(value)}" for key, value in row["changes"].items()) or "baseline"),
            f"{row['parameters']:,}",
            f"{row['flops_per_token'] / 1e6:,.1f}",
            f"{row['tokens']:,}",
            f"{row['flops'] / 1e15:,.3g}",
            duration(row["seconds_per_run"]),
            f"{row['memory_bytes'] / 2**30:.1f} GiB",
            f"{trials}{len(row['runs'])}{finished}",
        )
    return shown
