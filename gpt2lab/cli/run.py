"""Commands that train studies: run, work, noise, adopt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import plural, quantity, shorten
from gpt2lab.cli import options, where
from gpt2lab.cli.options import (
    checked_time,
    confirm_time,
    given,
    names_in,
    print_json,
    say,
    scales,
    store_at,
    table_of,
)
from gpt2lab.cli.plan import finished_runs, print_plan, total_line
from gpt2lab.cli.where import LOCAL, PRINT, Location, is_typed, location_of
from gpt2lab.errors import DataFault, Problem
from gpt2lab.experiments import command

if TYPE_CHECKING:
    from gpt2lab.api import Source, StudyOptions, StudyResult
    from gpt2lab.basics.progress import Listener
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.planning.noise import Floor


def run(
    context: typer.Context,
    file: options.File,
    scale: options.Scale = None,
    seeds: options.Seeds = None,
    jobs: options.Jobs = None,
    nproc: where.Nproc = None,
    arms: options.Arms = None,
    set_: options.Set = None,
    untuned: Annotated[
        bool,
        typer.Option("--untuned", help="Skip the file's `tune`: every arm at its settings as written. Contrasts that "
                     "shift the best learning rate are then exploratory."),
    ] = False,
    name: options.Name = None,
    campaign: options.Campaign = None,
    plugin: options.Plugin = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", callback=checked_time, help="Time to spend, such as 6h: arms and seeds are chosen to "
                     "fit."),
    ] = None,
    until: Annotated[
        Literal["decided"] | None,
        typer.Option("--until", metavar="decided", help="Add seeds one by one, from 3 on, until every contrast is "
                     "decided: at most --seeds of them (12), or as many as fit into --budget."),
    ] = None,
    dry_run: options.DryRun = False,
    profile: where.Profile = None,
    executor: where.ExecutorName = LOCAL,
    workers: where.Workers = 1,
    sbatch: where.Sbatch = "",
    machine: where.MachineFile = None,
    price: Annotated[
        float | None, typer.Option("--price", help="With --dry-run: price of a GPU hour, to add up the cost.", min=0)
    ] = None,
    max_days: options.MaxDays = options.MAX_DAYS,
    force_exploratory: options.Exploratory = False,
    no_tracking: options.NoTracking = False,
    runs: options.Runs = options.RUNS,
    out: options.Out = options.OUT,
    json_: options.Json = False,
) -> None:  # fmt: skip
    """Run an ablation. Trains the unfinished runs, judges the arms and writes the report."""
    from gpt2lab.basics.early import started_early

    known = any((runs / "studies").glob(f"{Path(file).stem}@*.json"))  # it may be finished, and train nothing
    context.with_resource(started_early(wanted=executor == LOCAL and not (dry_run or known or nproc)))
    from gpt2lab.planning.ablation import read_source

    location = location_of(context, executor, workers, sbatch, jobs, nproc, machine, dry_run)
    if price is not None and not dry_run and is_typed(context, "price"):
        raise typer.BadParameter("has no effect without --dry-run", param_hint="--price")
    console = console_for(to_stderr=json_)
    results = []
    if untuned and "tune" not in read_source(file)[0].tree:
        say(console, f"{file} has no `tune`, so --untuned has no effect")
    for study in studies(
        file, scale=scale, seeds=seeds, jobs=location.local_jobs, ranks=nproc or 1, arms=names_in(arms),
        overrides=set_ or (), plugins=plugin or (), runs=runs, name=name, budget=budget, until=until,
        machine=location.machine, campaign=campaign, untuned=untuned,
    ):  # fmt: skip
        study.machine = location.machine_like(study.machine)
        if dry_run:
            print_plan(study, console, json_, price=price)
            continue
        if executor == PRINT:
            declare(study, console, json_, nproc)
            continue
        result = train(study, console, tracking=not no_tracking, max_days=max_days, location=location)
        finish(result, out, console, tracking=not no_tracking, as_json=json_, force_exploratory=force_exploratory)
        results.append(result)
    refuse_failures(*results)


def declare(study: Study, console: Any, as_json: bool, nproc: int | None) -> None:
    """Write what workers need, and print how to start one."""
    from gpt2lab.basics.progress import Message

    jobs = study.declare(lambda event: say(console, event.text) if isinstance(event, Message) else None)
    worker = command("work", study.name, nproc=nproc, runs=study.store.root.resolve())
    if as_json:
        print_json({"study": study.name, "runs": [job.run_id for job in jobs], "worker": worker if jobs else None})
    elif jobs:
        say(console, f"{study.name}: {plural(len(jobs), 'run')} to train; start this any number of times, on any "
                     "machine that sees the folder:")  # fmt: skip
        say(console, worker, wrap=False)
    else:
        say(console, f"{study.name}: every run is finished; without --executor, the same command writes the report")


def work(
    context: typer.Context,
    studies: Annotated[list[str], typer.Argument(help="Declared studies, or run ids.", metavar="STUDY")],
    jobs: options.Jobs = None,
    nproc: where.Nproc = None,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Train declared runs that no other process trains. Ends when none is left; any number of workers may share a
    study, on any machine that sees the folder of runs (docs/cluster.md)."""
    from gpt2lab.executors.slurm import NOTHING_LEFT
    from gpt2lab.experiments.work import work as work_on

    console, ranks = console_for(to_stderr=json_), nproc or 1
    jobs = where.jobs_beside(ranks, jobs, context)
    pool = work_on(studies, store_at(runs), jobs=jobs, ranks=ranks, say=lambda text: say(console, text))
    endings = list(pool.endings.values())
    failed = f", {endings.count('failed')} failed" if "failed" in endings else ""
    elsewhere = f"; {len(pool.left)} at work in other processes" if pool.left else ""
    say(console, f"{endings.count('done')} trained here{failed}{elsewhere}; {NOTHING_LEFT}")
    if json_:
        print_json({"endings": dict(pool.endings), "left": list(pool.left)})
    if failed:
        raise SystemExit(1)


def refuse_failures(*results: StudyResult) -> None:
    """Raises DataFault for what another call does not mend, and SystemExit for other failed runs."""
    damaged = {run: reason for result in results for run, reason in result.damaged.items()}
    if damaged:
        raise DataFault([Problem(run, reason) for run, reason in damaged.items()], hint="gpt2lab runs")
    if any(result.failed for result in results):
        raise SystemExit(1)


def studies(file: Source, **options: Unpack[StudyOptions]) -> Iterable[Study]:
    """The study at `scale`, else at each of the file's `scales`, else at its `base`; each followed, when finished,
    by the one that is to confirm it."""
    from gpt2lab import api
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.planning.ablation import scales_of

    for at_scale in scales(options.get("scale"), scales_of(file)):
        options["scale"] = at_scale
        with rich_progress() as progress:
            study = api.open_study(file, progress=progress, **options)
        yield study
        if following := study.confirmation():
            yield following


def train(
    study: Study, console: Any, *, tracking: bool, max_days: float,
    through: Callable[[Listener], Listener] = lambda listener: listener, location: Location | None = None,
) -> StudyResult:  # fmt: skip
    """Train the unfinished runs of a study, with progress on the console, if that takes at most `max_days` or the user
    agrees. through: what the console's listener is wrapped in. location: if not here. Raises EnvironmentFault."""
    from gpt2lab import api
    from gpt2lab.basics.progress import Message, display
    from gpt2lab.planning.forecast import lines, seconds_left
    from gpt2lab.planning.runs import unmeasured_lines

    plan, store = study.plan(), study.store
    seconds = seconds_left(plan, store)
    total = total_line(plan, finished_runs(plan, store), seconds)
    _, counted = study.new_hypotheses(plan)
    more = [*lines(plan), *unmeasured_lines(plan.runs(), store), *([counted] if counted else [])]
    say(console, f"{study.name}: {plan.ablation.question}", total, *more)
    confirm_time(seconds, max_days, study.name)
    with display(console) as listener:
        executor = location.executor_for(study.name, lambda text: listener(Message(text))) if location else None
        result = api.train_study(study, tracking=tracking, on_event=through(listener), executor=executor)
    trained = len(result.endings) - len(result.failed)
    again = len(result.failed) - len(result.damaged.keys() & set(result.failed))
    failed = f", {again} failed (tried again by the same command)" if again else ""
    failed += f", {len(result.damaged)} damaged" if result.damaged else ""
    say(console, f"{plural(result.found, 'run')} found finished, {trained} trained now{failed}", *reasons(result))
    return result


def reasons(result: StudyResult) -> list[str]:
    """Why runs failed now: a line for each reason, with the runs that it ended."""
    ended: dict[str, list[str]] = {}
    for run in result.runs if result.failed else ():
        if run.id in result.failed and run.reason:
            ended.setdefault(run.reason, []).append(f"{run.arm} seed {run.seed}")
    return [f"{shorten(', '.join(runs), 80)}: {reason}" for reason, runs in ended.items()]


def finish(
    result: StudyResult, out: Path, console: Any, *, tracking: bool, as_json: bool, force_exploratory: bool
) -> None:
    """Write a study's page, log it to the tracker, and show the verdicts. A failing tracker prints one line."""
    from gpt2lab import api
    from gpt2lab.reports.page import WRITTEN, is_current
    from gpt2lab.reports.read import read_study
    from gpt2lab.reports.study import terminal_summary, write_report
    from gpt2lab.tracking.addresses import reason
    from gpt2lab.tracking.follower import has_report

    study = read_study(result.name, result.store.root, force_exploratory=force_exploratory)
    kept = is_current(study, out)
    if not kept:
        write_report(study, out=out)
    if tracking and not (kept and has_report(result.store, result.name, out / result.name / WRITTEN)):
        try:
            tracker = api.tracker_of(result.store, result.record.ablation)()
            tracker.log_report(result.record.plain(), out / result.name)
        except Exception as error:
            later = f"`gpt2lab sync {result.name}` sends it later"
            say(console, f"the report is not in MLflow ({reason(error)}); {later}")
    if as_json:
        print_json(json.loads((out / result.name / "verdicts.json").read_text(encoding="utf-8")), indent=1)
    else:
        console.print(terminal_summary(study, out, kept=kept, width=console.width))
        say(console, *([f"MLflow: {command('ui', runs=given(result.store.root))}"] if tracking else []))


def noise(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Argument(help="Preset or file; without it, list the stored noise floors.", metavar="PRESET"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", "-n", help="Number of runs with different seeds.", min=3)] = 10,
    same_seed: Annotated[
        int, typer.Option("--same-seed", help="Number of runs with the first seed, including the original.", min=1)
    ] = 2,
    set_: options.Set = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option("--tokens-per-parameter", help="Length of training, as in a ladder of scales.")
    ] = None,
    jobs: options.Jobs = None,
    plugin: options.Plugin = None,
    dry_run: options.DryRun = False,
    max_days: options.MaxDays = options.MAX_DAYS,
    no_tracking: options.NoTracking = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Measure the noise between repeats of a recipe. Used for planning and for verdicts on few seeds."""
    from gpt2lab.basics.early import started_early

    context.with_resource(started_early(wanted=preset is not None and not dry_run))
    from gpt2lab.planning.noise import floors
    from gpt2lab.store import Store

    console, store = console_for(to_stderr=json_), Store(runs)
    if preset is None:
        show_floors(list(floors(store)), console, as_json=json_)
        return
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.experiments.noise import aa_study, keep_floor

    overrides, plugins = tuple(set_ or ()), tuple(plugin or ())
    ablation = aa_study(
        preset, seeds=seeds, same_seed=same_seed, overrides=overrides, tokens_per_parameter=tokens_per_parameter,
        plugins=plugins,
    )  # fmt: skip
    again = command(
        "noise", preset, seeds=seeds, set=overrides, tokens_per_parameter=tokens_per_parameter, plugin=plugins
    )  # fmt: skip
    with rich_progress() as progress:
        study = Study.prepare(ablation, store, jobs=jobs, progress=progress, reproduce=again)
    if dry_run:
        print_plan(study, console, json_)
        return
    result = train(study, console, tracking=not no_tracking, max_days=max_days)
    refuse_failures(result)
    show_floors([keep_floor(study.plan(), result.record, store)], console, as_json=json_)


def show_floors(floors: list[Floor], console: Any, *, as_json: bool) -> None:
    """Floors with their intervals, as a table or as JSON."""
    from dataclasses import asdict

    if as_json:
        print_json({"floors": [asdict(floor) for floor in floors]})
        return
    if not floors:
        say(console, "no noise floor has been measured; `gpt2lab noise nano` measures one")
        return
    numbers = ("tokens", "runs", "sd")
    rows = []
    for floor in floors:
        again = floor.same_seed
        same = "-" if not again else "same bits" if again["identical"] else f"sd {again['sd']:.2g}"
        failed = f", {floor.failed} failed" if floor.failed else ""
        rows.append((
            floor.scale, quantity(floor.tokens), f"{len(floor.values)}{failed}", f"{floor.sd:.3g} nats",
            f"[{floor.low:.3g}, {floor.high:.3g}]", same,
            f"torch {floor.stack['torch']}, {floor.stack['device']}", floor.age.removeprefix("measured "),
        ))  # fmt: skip
    columns = ("scale", *numbers, "95 % interval", "same seed", "on", "measured")
    console.print(table_of(*columns, rows=rows, right=numbers))


def adopt(
    file: options.File,
    scale: options.Scale = None,
    seeds: options.Seeds = None,
    jobs: options.Jobs = None,
    arms: options.Arms = None,
    set_: options.Set = None,
    plugin: options.Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs that could be kept; test nothing.")] = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Keep finished runs after a code change. First tests that the new code trains the same bits."""
    from dataclasses import asdict

    from gpt2lab.experiments.ablation import adopt_runs, list_adoptable

    report, results = partial(say, console_for(to_stderr=json_)), list[dict[str, Any]]()
    for study in studies(
        file,
        scale=scale,
        seeds=seeds,
        jobs=jobs,
        arms=names_in(arms),
        overrides=set_ or (),
        plugins=plugin or (),
        runs=runs,
    ):
        if dry_run:
            adoptable = list_adoptable(study, report)
            results += [{"study": study.name, **group.as_record()} for group in adoptable]
        else:
            results += [{"study": study.name, **asdict(adoption)} for adoption in adopt_runs(study, report)]
    if json_:
        print_json({"groups": results})
    if any(group.get("refused") for group in results):
        raise SystemExit(1)
