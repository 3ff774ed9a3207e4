"""Commands that plan and train many runs: run, work, check, machine, sweep, noise, adopt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import apart, duration, memory, plural, quantity
from gpt2lab.cli.options import (
    MAX_DAYS,
    OUT,
    RUNS,
    Arms,
    Campaign,
    DryRun,
    Exploratory,
    File,
    Jobs,
    Json,
    MaxDays,
    Name,
    NoTracking,
    Out,
    Plugin,
    Runs,
    Scale,
    Seeds,
    Set,
    checked_time,
    confirm_time,
    given,
    names_in,
    print_json,
    say,
    store_at,
    table_of,
)
from gpt2lab.cli.where import (
    LOCAL,
    PRINT,
    ExecutorName,
    MachineFile,
    Place,
    Profile,
    Sbatch,
    Workers,
    is_typed,
    place_of,
)
from gpt2lab.errors import ConfigError, DataFault, NumericsFault, Problem

if TYPE_CHECKING:
    from gpt2lab.api import Source, StudyOptions, StudyResult
    from gpt2lab.basics.progress import Listener
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.experiments.sweep import SweepPlan
    from gpt2lab.planning.noise import Floor
    from gpt2lab.planning.plan import ArmPlan, Plan
    from gpt2lab.records import SweepRecord
    from gpt2lab.store import Store

NOTHING_FOUND = 1
"""Exit code of a sweep without a finished trial, unless all diverged."""
MOST_JUDGED = 1000
"""Runs of a study that a plan judges to say what is open; more take longer than the plan."""


def run(
    context: typer.Context,
    file: File,
    scale: Scale = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    arms: Arms = None,
    set_: Set = None,
    untuned: Annotated[
        bool,
        typer.Option("--untuned", help="Skip the file's `tune`: every arm at its settings as written. Contrasts that "
                     "move the best learning rate are then exploratory."),
    ] = False,
    name: Name = None,
    campaign: Campaign = None,
    plugin: Plugin = None,
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
    dry_run: DryRun = False,
    profile: Profile = None,
    executor: ExecutorName = LOCAL,
    workers: Workers = 1,
    sbatch: Sbatch = "",
    machine: MachineFile = None,
    price: Annotated[
        float | None, typer.Option("--price", help="With --dry-run: price of a GPU hour, to add up the cost.", min=0)
    ] = None,
    max_days: MaxDays = MAX_DAYS,
    force_exploratory: Exploratory = False,
    no_tracking: NoTracking = False,
    runs: Runs = RUNS,
    out: Out = OUT,
    json_: Json = False,
) -> None:  # fmt: skip
    """Run an ablation. Trains what is not finished, judges it and writes the report."""
    from gpt2lab.basics.early import started_early
    from gpt2lab.planning.ablation import read_source

    known = any((runs / "studies").glob(f"{Path(file).stem}@*.json"))  # it may be finished, and train nothing
    context.with_resource(started_early(wanted=executor == LOCAL and not dry_run and not known))
    place = place_of(context, executor, workers, sbatch, jobs, machine, dry_run)
    if price is not None and not dry_run and is_typed(context, "price"):
        raise typer.BadParameter("has no effect without --dry-run", param_hint="--price")
    console = console_for(to_stderr=json_)
    results = []
    if untuned and "tune" not in read_source(file)[0].tree:
        say(console, f"{file} tunes nothing, so --untuned changes nothing")
    for study in studies(
        file, scale=scale, seeds=seeds, jobs=place.local_jobs, arms=names_in(arms), overrides=set_ or (),
        plugins=plugin or (), runs=runs, name=name, budget=budget, until=until, machine=place.machine,
        campaign=campaign, untuned=untuned,
    ):  # fmt: skip
        study.machine = place.machine_like(study.machine)
        if dry_run:
            print_plan(study, console, json_, price=price)
            continue
        if executor == PRINT:
            declare(study, console, json_)
            continue
        result = train(study, console, tracking=not no_tracking, max_days=max_days, place=place)
        finish(result, out, console, tracking=not no_tracking, as_json=json_, force_exploratory=force_exploratory)
        results.append(result)
    refuse_failures(*results)


def declare(study: Study, console: Any, as_json: bool) -> None:
    """Write what workers need, and print how to start one."""
    from gpt2lab import api
    from gpt2lab.basics.progress import Message

    jobs = study.declare(lambda event: say(console, event.text) if isinstance(event, Message) else None)
    worker = api.command("work", study.name, runs=study.store.root.resolve())
    if as_json:
        print_json({"study": study.name, "runs": [job.run_id for job in jobs], "worker": worker if jobs else None})
    elif jobs:
        say(console, f"{study.name}: {plural(len(jobs), 'run')} to train; start this any number of times, on any "
                     "machine that sees the folder:")  # fmt: skip
        say(console, worker, wrap=False)
    else:
        say(console, f"{study.name}: every run is finished; without --executor, the same command writes the report")


def work(
    studies: Annotated[list[str], typer.Argument(help="Declared studies, or run ids.", metavar="STUDY...")],
    jobs: Jobs = None,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Train declared runs that no other process trains. Ends when none is left; any number of these may work on a
    study, on any machine that sees the folder of runs (docs/cluster.md)."""
    from gpt2lab.executors.slurm import NOTHING_LEFT
    from gpt2lab.experiments.work import work as work_on

    console = console_for(to_stderr=json_)
    pool = work_on(studies, store_at(runs), jobs=jobs, say=lambda text: say(console, text))
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


def scales(chosen: str | None, declared: Iterable[str]) -> list[str | None]:
    """The scales to run at; None is that of the file's `base`."""
    return [chosen] if chosen else list(declared) or [None]


def train(
    study: Study, console: Any, *, tracking: bool, max_days: float,
    through: Callable[[Listener], Listener] = lambda listener: listener, place: Place | None = None,
) -> StudyResult:  # fmt: skip
    """Train the unfinished runs of a study, with progress on the console, if that takes at most `max_days` or the user
    agrees. through: what the console's listener is wrapped in. place: where, if not here. Raises EnvironmentFault."""
    from gpt2lab import api
    from gpt2lab.basics.progress import Message, display
    from gpt2lab.planning.forecast import lines, seconds_left

    plan, store = study.plan(), study.store
    seconds = seconds_left(plan, store)
    total = total_line(plan, finished_runs(plan, store), seconds)
    _, counted = study.new_hypotheses(plan)
    more = [*lines(plan), *unmeasured_lines(plan, store), *([counted] if counted else [])]
    say(console, f"{study.name}: {plan.ablation.question}", total, *more)
    confirm_time(seconds, max_days, study.name)
    with display(console) as listener:
        executor = place.executor_for(study.name, lambda text: listener(Message(text))) if place else None
        result = api.train_study(study, tracking=tracking, on_event=through(listener), executor=executor)
    trained = len(result.endings) - len(result.failed)
    again = len(result.failed) - len(result.damaged.keys() & set(result.failed))
    failed = f", {again} failed (tried again by the same command)" if again else ""
    failed += f", {len(result.damaged)} damaged" if result.damaged else ""
    say(console, f"{plural(result.found, 'run')} found finished, {trained} trained now{failed}")
    return result


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
        say(console, *([f"MLflow: {api.command('ui', runs=given(result.store.root))}"] if tracking else []))


def check(
    files: Annotated[list[str], typer.Argument(help="YAML files of ablations and sweeps.", metavar="FILE...")],
    scale: Scale = None,
    seeds: Seeds = None,
    arms: Arms = None,
    set_: Set = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Report mistakes in ablation and sweep files. Prepares no data and trains nothing."""
    from gpt2lab.basics.shipped import found
    from gpt2lab.cli.kept import kept

    overrides, plugins = tuple(set_ or ()), tuple(plugin or ())

    def lines(file: str) -> Iterator[str]:
        from gpt2lab.planning.ablation import load_ablation, read_source, scales_of
        from gpt2lab.sweep.declaration import load_sweep

        if "sweep" in read_source(file)[0].tree:
            for each in scales(scale, scales_of(file)):
                sweep = load_sweep(file, scale=each, overrides=overrides, plugins=plugins)
                several = f"{len(sweep.arms)} searches ({', '.join(sweep.arms)})"
                count = several if sweep.declared.variants else "1 search"
                yield f"{count} of {sweep.declared.trials} trials at {sweep.scale}"
            return
        for each in scales(scale, scales_of(file)):
            ablation = load_ablation(
                file, scale=each, overrides=overrides, arms=names_in(arms), seeds=seeds, plugins=plugins
            )
            count = "automatic" if ablation.seeds is None else str(len(ablation.seeds))
            names = ", ".join(ablation.arms)
            yield f"{len(ablation.arms)} arms ({names}) x {count} seeds at {ablation.scale}"

    problems: list[Problem] = []
    sound: list[dict[str, str]] = []
    hints: list[str] = []
    for file in files:
        try:
            question = (file, str(found(file).absolute()), scale, seeds, arms, overrides)
            for line in lines(file) if plugins else kept("sound", question, partial(list, lines(file))):
                sound.append({"file": file, "what": line})
                if not json_:
                    print(f"{file}: {line}: no mistakes")
        except ConfigError as error:
            problems += error.problems
            hints += [error.hint] if error.hint else []
    if problems:
        raise ConfigError(problems, hint=hints[0] if len(set(hints)) == 1 else None)
    if json_:
        print_json({"sound": sound})


def machine(
    preset: Annotated[str, typer.Argument(help="Preset or file of the runs to come.", metavar="PRESET")] = "nano",
    jobs: Jobs = None,
    runs: Runs = RUNS,
) -> None:
    """Describe this machine as JSON, for planning on another one. See `gpt2lab run --dry-run --machine`."""
    from gpt2lab import api

    print(api.describe_machine(preset, jobs=jobs, runs=runs).to_json())


def print_plan(study: Study, console: Any, as_json: bool, price: float | None = None) -> None:
    """Print the plan: runs, costs per arm, time on this machine, and statistical power."""
    from gpt2lab.analysis.verdicts import FEWEST
    from gpt2lab.planning import forecast, prediction
    from gpt2lab.records import replacing

    plan, store = study.plan(), study.store
    done = finished_runs(plan, store)
    rows = [plan_row(name, arm, done) for name, arm in plan.arms.items()]
    seconds, machine = forecast.seconds_left(plan, store), plan.machine
    kept, (new, counted) = study.replaces(plan), study.new_hypotheses(plan)
    if as_json:
        record = {"study": study.name, "arms": rows, "seconds": seconds, "replaces": kept, "new_hypotheses": new}
        record |= {"forecast": forecast.as_record(plan), "left_out": list(plan.left_out)}
        record |= forecast.device_hours(plan, store, price).as_record()
        print_json({**record, "jobs": machine.jobs, "threads": machine.threads, "device": machine.device})
        return
    say(console, total_line(plan, done, seconds))
    against = {pair.arm: pair.against for pair in reversed(plan.ablation.contrasts) if pair.is_pair}
    console.print(plan_table(f"{study.name}: {plan.ablation.question}", rows, against))
    lines: list[str] = []
    if plan.searches:
        lines.append(
            "trials first, the same for every arm; then the seeds above at the best settings of each, and once more at "
            "its settings as written where those are others"
        )
    elif plan.tuning:
        lines.append("rates first: each arm tries its own with one seed; the seeds above follow at the best of them")
    if plan.ablation.looks:
        first, *_, last = plan.ablation.looks
        lines.append(
            f"seeds are added one by one from {first} to at most {last} per arm; arms that are decided stop"
            if plan.ablation.until_decided
            else f"looks at n = {', '.join(map(str, plan.ablation.looks))}; arms that are decided stop there"
        )
    if rule := plan.ablation.confirm:
        lines.append(f"then the best {rule.best} on {rule.seeds} fresh seeds: {plan.ablation.name}-confirm")
    lines += [f"{name}: {arm.adjustment}" for name, arm in plan.arms.items() if arm.adjustment]
    lines += [replacing(study.name, kept)] if kept else []
    lines += [counted] if counted else []
    lines += unmeasured_lines(plan, store)
    if len(plan.seeds) < FEWEST and plan.ablation.contrasts:
        lines.append(f"{plural(len(plan.seeds), 'seed')} per arm: at most likely better or likely worse, and "
                     f"exploratory without a noise floor of ten repeats; verdicts take {FEWEST}")  # fmt: skip
    if price is not None or machine.gpus or not machine.local:
        lines += forecast.device_hours(plan, store, price).lines()
    say(console, *lines, *forecast.lines(plan), *prediction.lines(plan), *next_steps(study.name, store))


def next_steps(name: str, store: Store) -> list[str]:
    """What to do about each contrast that the runs of a recorded study left open."""
    from gpt2lab import api
    from gpt2lab.analysis.results import cleaned, collect, judge_runs
    from gpt2lab.records import run_ids

    if name not in store.studies():
        return []
    study = cleaned(store.study(name))
    if (count := len(run_ids(study))) > MOST_JUDGED:
        page = api.command("report", name, runs=given(store.root))
        return [f"{count:,} runs of this study so far; what they leave open: {page}"]
    contrasts = judge_runs(study, collect(study, store), store, sensitivity=False, text={}).contrasts
    still_open = [contrast for contrast in contrasts if contrast.word.startswith("inconclusive")]
    return [f"open so far: {c.arm} against {c.against}; {c.next.text}" for c in still_open]


def finished_runs(plan: Plan, store: Store) -> set[str]:
    """Ids of the runs of a plan that need no training."""
    from gpt2lab.planning.runs import is_finished

    return {run.id for run in plan.runs() if is_finished(run, store)}


def unmeasured_lines(plan: Plan, store: Store) -> list[str]:
    """What was listed too late to be measured in every run."""
    from gpt2lab.planning.runs import unmeasured

    return [
        f"{name} has no values in {plural(count, 'run')} that finished before it was listed: diagnostics are measured "
        "while a run trains"
        for name, count in unmeasured(plan.runs(), store).items()
    ]


def total_line(plan: Plan, done: set[str], seconds: float) -> str:
    """How much there is to train, and how long it takes here."""
    machine = plan.machine
    runs = plural(len({run.id for run in plan.runs()}), "run")
    due = trials_due(plan) if plan.searches else f"{runs}, {len(done)} finished"
    return (
        f"{due}; about {duration(seconds)} on {machine.device_name} ({machine.device}), "
        f"{machine.jobs} at a time, threads each: {machine.threads}; speed from {machine.speed_from}"
    )


def plan_row(name: str, arm: ArmPlan, done: set[str]) -> dict[str, Any]:
    """One arm of the plan as plain data."""
    labels, search = (arm.tuning.labels, arm.tuning.search) if arm.tuning else ({}, None)
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
        "bracket": {label.removeprefix("lr x"): run_id for run_id, label in labels.items()},
        "search": arm.tuning and search and {
            "space": [dimension.as_record() for dimension in search.space.dimensions],
            "trials": search.trials,
            "seeds": list(search.seeds),
            "left": arm.tuning.left,
            "settings": arm.tuning.settings,
            "not_comparable": arm.tuning.reason,
        },
        "adjustment": str(arm.adjustment) if arm.adjustment else None,
        "runs": {str(run.seed): run.id for run in arm.runs},
        "shared": {str(run.seed): run.id for run in arm.shared},
        "curve": {f"{b:g}": {str(run.seed): run.id for run in runs} for b, runs in arm.curve.items()},
        "finished": [str(run.seed) for run in arm.runs if run.id in done],
    }  # fmt: skip


def trials_due(plan: Plan) -> str:
    """Trials and runs of a study whose arms are tuned first."""
    first, *_ = searches = list(plan.searches.values())
    total, remaining = (
        sum(search.trials for search in searches),
        sum(a.tuning.left for a in plan.arms.values() if a.tuning),
    )
    runs = len({run.id for arm in plan.arms.values() for run in arm.runs})
    done = f", {total - remaining} done" if remaining < total else ""
    seeds = f" of {plural(len(first.seeds), 'seed')}" if len(first.seeds) > 1 else ""
    return f"{plural(first.trials, 'trial')} each first{done}{seeds}, then {runs} to {2 * runs} runs"


def plan_table(title: str, rows: list[dict[str, Any]], against: Mapping[str, str]) -> Any:
    """The arms with their costs, for a terminal. against: arm -> the one that it is compared with first;
    changes are relative to that."""
    changes = {row["arm"]: row["changes"] for row in rows}

    def changed(arm: str) -> str:
        other = against.get(arm, "")
        beside = ", ".join(apart(changes[arm], changes.get(other, {}))) or "baseline"
        return f"{other}, and {beside}" if other in against and other in changes else beside

    numbers = ("parameters", "MFLOP/token", "tokens", "PFLOP", "time a run", "memory", "runs")
    lines = []
    for row in rows:
        finished = f" ({len(row['finished'])} finished)" if row["finished"] else ""
        trials = f"{len(row['bracket'])} rates, " if row["bracket"] else ""
        if row["search"]:
            judged = set() if row["search"]["left"] else set(row["runs"].values())
            extra = len(set(row["shared"].values()) - judged)
            trials = f"{row['search']['trials']} trials, " + (f"{extra} as written, " if extra else "")
        lines.append((
            str(row["arm"]), changed(row["arm"]), f"{row['parameters']:,}", f"{row['flops_per_token'] / 1e6:,.1f}",
            f"{row['tokens']:,}", f"{row['flops'] / 1e15:,.3g}", duration(row["seconds_per_run"]),
            memory(row["memory_bytes"]), f"{trials}{len(row['runs'])}{finished}",
        ))  # fmt: skip
    return table_of("arm", "what changes", *numbers, rows=lines, right=numbers, title=title)


def sweep(
    context: typer.Context,
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
    set_: Set = None,
    name: Name = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the search and its cost; train nothing.")] = False,
    profile: Profile = None,
    executor: ExecutorName = LOCAL,
    workers: Workers = 1,
    sbatch: Sbatch = "",
    machine: MachineFile = None,
    max_days: MaxDays = MAX_DAYS,
    no_tracking: NoTracking = False,
    runs: Runs = RUNS,
    out: Out = OUT,
    json_: Json = False,
) -> None:  # fmt: skip
    """Search for the best settings. Trains what is not finished and reports the optimum with its interval."""
    from gpt2lab import api
    from gpt2lab.basics.progress import Message, display
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.planning.ablation import scales_of

    place = place_of(context, executor, workers, sbatch, jobs, machine, dry_run)
    if executor == PRINT or (executor != LOCAL and nproc):
        what = f"trains every run in one process; for {nproc} ranks, submit this command itself, without --executor"
        what = "is for ablations" if executor == PRINT else what
        raise typer.BadParameter(what, param_hint=f"--executor {executor}")
    console, code = console_for(to_stderr=json_), 0
    for at_scale in scales(scale, scales_of(file)):
        with rich_progress() as progress:
            plan = api.open_sweep(
                file, name=name, scale=at_scale, trials=trials, overrides=tuple(set_ or ()),
                plugins=tuple(plugin or ()), budget=budget, jobs=place.local_jobs,
                runs=runs, progress=progress, machine=place.machine, machine_like=place.machine_like,
            )  # fmt: skip
        if dry_run and json_:
            print_json({"sweep": plan.loaded.name, "searches": plan.as_record()})
            continue
        say(console, f"{plan.record.name}: {plan.record.question}", *plan.lines())
        if dry_run:
            continue
        confirm_time(plan.seconds, max_days, plan.record.name)
        tracker = None if no_tracking else api.tracker_of(plan.store, plan.loaded.declared.sweep)
        with display(console) as listener:

            def tell(text: str, listener: Listener = listener) -> None:
                listener(Message(text))

            record = plan.train(
                on_event=listener, tracker=tracker, storage=storage, nproc=nproc or 1, stays=not worker,
                executor=place.executor_for(plan.record.name, tell),
            )  # fmt: skip
        if worker:
            page = api.command("report", record.name, runs=runs)
            say(console, f"{record.name}: nothing is left to start here; {page} writes the page")
        else:
            code = max(code, show_sweep(record, plan, out, console, apply=apply, as_json=json_))
    if code:
        raise SystemExit(code)


def show_sweep(record: SweepRecord, plan: SweepPlan, out: Path, console: Any, *, apply: bool, as_json: bool) -> int:
    """Write the page and print the result; -> the exit code. Raises NumericsFault when everything diverged."""
    from gpt2lab import api
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
        say(console, f"written: {path}; try: {api.command('train', path)}")
    outcomes = {trial.outcome for search in record.searches.values() for trial in search.trials}
    if outcomes <= {"diverged", "pruned"} and "diverged" in outcomes:
        problem = "no trial was finished: all of them diverged"
        raise NumericsFault(problem, where=str(page), hint="lower rates: see the page for which ones to try")
    return 0 if "finished" in outcomes or outcomes <= {"waiting", "running"} else NOTHING_FOUND


def noise(
    preset: Annotated[
        str | None,
        typer.Argument(help="Preset or file; without it, list the stored noise floors.", metavar="PRESET"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", "-n", help="Runs with different seeds.", min=3)] = 10,
    same_seed: Annotated[
        int, typer.Option("--same-seed", help="Runs of the first seed, that one included.", min=1)
    ] = 2,
    set_: Set = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option("--tokens-per-parameter", help="Length of training, as in a ladder of scales.")
    ] = None,
    jobs: Jobs = None,
    plugin: Plugin = None,
    dry_run: DryRun = False,
    max_days: MaxDays = MAX_DAYS,
    no_tracking: NoTracking = False,
    runs: Runs = RUNS,
    json_: Json = False,
) -> None:
    """Measure the noise between repeats of a recipe. Used for planning and for verdicts on few seeds."""
    from gpt2lab.planning.noise import floors
    from gpt2lab.store import Store

    console, store = console_for(to_stderr=json_), Store(runs)
    if preset is None:
        show_floors(list(floors(store)), console, as_json=json_)
        return
    from gpt2lab import api
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.experiments.noise import aa_study, keep_floor

    overrides, plugins = tuple(set_ or ()), tuple(plugin or ())
    ablation = aa_study(
        preset, seeds=seeds, same_seed=same_seed, overrides=overrides, tokens_per_parameter=tokens_per_parameter,
        plugins=plugins,
    )  # fmt: skip
    again = api.command(
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
    file: File,
    scale: Scale = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    arms: Arms = None,
    set_: Set = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs that could be kept.")] = False,
    runs: Runs = RUNS,
    json_: Json = False,
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
