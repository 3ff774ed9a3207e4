"""What a plan takes and can find, for people and as JSON; and the commands that only look ahead: check, machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.text import apart, duration, memory, plural
from gpt2lab.cli import options
from gpt2lab.cli.options import given, names_in, print_json, say, scales, table_of
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.experiments import command

if TYPE_CHECKING:
    from gpt2lab.experiments.ablation import Study
    from gpt2lab.planning.plan import ArmPlan, Plan
    from gpt2lab.store import Store

MOST_JUDGED = 1000
"""Runs of a study that a plan judges to say what is open; more take longer than the plan."""


def check(
    files: Annotated[list[str], typer.Argument(help="YAML files of ablations and sweeps.", metavar="FILE")],
    scale: options.Scale = None,
    seeds: options.Seeds = None,
    arms: options.Arms = None,
    set_: options.Set = None,
    plugin: options.Plugin = None,
    json_: options.Json = False,
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
    preset: Annotated[str, typer.Argument(help="Preset or file to plan for.", metavar="PRESET")] = "nano",
    jobs: options.Jobs = None,
    runs: options.Runs = options.RUNS,
) -> None:
    """Describe this machine as JSON, for planning on another one. See `gpt2lab run --dry-run --machine`."""
    from gpt2lab import api

    print(api.describe_machine(preset, jobs=jobs, runs=runs).to_json())


def finished_runs(plan: Plan, store: Store) -> set[str]:
    """Ids of the runs of a plan that need no training."""
    from gpt2lab.planning.runs import is_finished

    return {run.id for run in plan.runs() if is_finished(run, store)}


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


def total_line(plan: Plan, done: set[str], seconds: float) -> str:
    """How much there is to train, and how long it takes here."""
    machine = plan.machine
    runs = plural(len({run.id for run in plan.runs()}), "run")
    due = trials_due(plan) if plan.searches else f"{runs}, {len(done)} finished"
    return (
        f"{due}; about {duration(seconds)} on {machine.device_name} ({machine.device}), "
        f"{machine.at_a_time}; speed from {machine.speed_from}"
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


def next_steps(name: str, store: Store) -> list[str]:
    """What to do about each contrast that the runs of a recorded study left open."""
    from gpt2lab.analysis.results import cleaned, collect
    from gpt2lab.analysis.studies import judge_runs
    from gpt2lab.records import run_ids

    if name not in store.studies():
        return []
    study = cleaned(store.study(name))
    if (count := len(run_ids(study))) > MOST_JUDGED:
        page = command("report", name, runs=given(store.root))
        return [f"{count:,} runs of this study so far; for open contrasts see: {page}"]
    contrasts = judge_runs(study, collect(study, store), store, sensitivity=False, text={}).contrasts
    still_open = [contrast for contrast in contrasts if contrast.word.startswith("inconclusive")]
    return [f"open so far: {c.arm} against {c.against}; {c.next.text}" for c in still_open]


def print_plan(study: Study, console: Any, as_json: bool, price: float | None = None) -> None:
    """Print the plan: runs, costs per arm, time on this machine, and statistical power."""
    from gpt2lab.analysis.verdicts import FEWEST
    from gpt2lab.planning import forecast, prediction
    from gpt2lab.planning.runs import unmeasured_lines
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
        shown = {name: getattr(machine, name) for name in ("jobs", "ranks", "threads", "device")}
        print_json({**record, **shown})
        return
    say(console, total_line(plan, done, seconds))
    against = {pair.arm: pair.against for pair in reversed(plan.ablation.contrasts) if pair.is_pair}
    console.print(plan_table(f"{study.name}: {plan.ablation.question}", rows, against))
    lines: list[str] = []
    if plan.searches:
        lines.append(
            "first the trials, the same for every arm; then the seeds above at each arm's best settings and, if those "
            "differ, at its settings as written"
        )
    elif plan.tuning:
        lines.append("first the learning rates: each arm tries its own with one seed; then the seeds above at the best")
    if plan.ablation.looks:
        first, *_, last = plan.ablation.looks
        lines.append(
            f"seeds are added one by one from {first} to at most {last} per arm; decided arms stop"
            if plan.ablation.until_decided
            else f"looks at n = {', '.join(map(str, plan.ablation.looks))}; decided arms stop there"
        )
    if rule := plan.ablation.confirm:
        lines.append(f"then the best {rule.best} on {rule.seeds} fresh seeds: {plan.ablation.name}-confirm")
    lines += [f"{name}: {arm.adjustment}" for name, arm in plan.arms.items() if arm.adjustment]
    lines += [replacing(study.name, kept)] if kept else []
    lines += [counted] if counted else []
    lines += unmeasured_lines(plan.runs(), store)
    if len(plan.seeds) < FEWEST and plan.ablation.contrasts:
        lines.append(f"{plural(len(plan.seeds), 'seed')} per arm: verdicts are likely better or likely worse at "
                     f"most, exploratory without a noise floor of ten repeats; others need {FEWEST}")  # fmt: skip
    if price is not None or machine.gpus or not machine.local:
        lines += forecast.device_hours(plan, store, price).lines()
    say(console, *lines, *forecast.lines(plan), *prediction.lines(plan), *next_steps(study.name, store))
