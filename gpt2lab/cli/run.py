"""Commands that plan and train: run, check."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gpt2lab.plan import Plan

File = Annotated[str, typer.Argument(help="An ablation's YAML file, as ablations/posenc.yaml.", metavar="FILE")]
Scale = Annotated[str | None, typer.Option("--scale", "-s", help="Preset to run at, as nano or gpt2-124m.")]
Seeds = Annotated[int | None, typer.Option("--seeds", "-n", help="Seeds per arm.", min=1)]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", help="Runs side by side; jobs x threads <= cores.", min=1)]
Arms = Annotated[str | None, typer.Option("--arms", help="Only these arms, separated by commas.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value on top of the preset, for every arm.")]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="Python file that registers components.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the run store.", file_okay=False)]
Out = Annotated[Path, typer.Option("--out", help="Folder of the reports.", file_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Put this file's commands into the application."""
    app.command()(run)
    app.command()(check)


def run(
    file: File,
    scale: Scale = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    arms: Arms = None,
    set_: Set = None,
    plugin: Plugin = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it costs; train nothing.")
    ] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    runs: Runs = Path("runs"),
    out: Out = Path("reports"),
    json_: Json = False,
) -> None:
    """Run an ablation. Trains what is not finished, judges it and writes the report."""
    from gpt2lab.display import console_for
    from gpt2lab.store import Store

    console, store = console_for(to_stderr=json_), Store(runs)
    plan = plan_of(file, scale, seeds, arms, set_, plugin, store, jobs)
    if dry_run:
        print_plan(plan, store, console, json_)
        return
    from gpt2lab.display import display
    from gpt2lab.report import terminal_summary, write_report
    from gpt2lab.study import run_study
    from gpt2lab.tracking.addresses import default_uri
    from gpt2lab.tracking.mlflow import MlflowSink

    def sink() -> MlflowSink:
        return MlflowSink(default_uri(store.root), plan.ablation.name, store.root / "artifacts")

    title = f"{plan.ablation.name}@{plan.ablation.scale}: {plan.ablation.question}"
    console.print(title, markup=False, highlight=False)
    outcome = run_study(
        plan,
        store,
        display=display(console, title, plan.machine.jobs),
        reproduce=reproduce(file, scale, seeds, arms, set_, plugin),
        mirror=None if no_tracking else sink,
    )
    name = outcome.record["name"]
    trained = len(outcome.endings) - len(outcome.failed)
    counts = f"{outcome.found} runs found finished, {trained} trained now"
    failed = f", {len(outcome.failed)} failed (tried again by the same command)" if outcome.failed else ""
    console.print(counts + failed, markup=False, highlight=False)
    write_report(name, root=runs, out=out)
    if not no_tracking:
        keep_report(sink, outcome.record, out / name, console, store)
    if json_:
        print((out / name / "verdicts.json").read_text(encoding="utf-8"))
    else:
        console.print(terminal_summary(name, runs, out))
        if not no_tracking:
            console.print("MLflow: gpt2lab ui", markup=False, highlight=False)
    if outcome.failed:
        raise SystemExit(1)


def keep_report(sink: Any, record: dict[str, Any], folder: Path, console: Any, store: Any) -> None:
    """Log the report with the study's parent run; a tracker that does not work costs one line, not the study."""
    from gpt2lab.tracking.addresses import reason

    try:
        sink().log_report(record, folder)
    except Exception as error:
        console.print(
            f"the report is not in MLflow ({reason(error)}); `gpt2lab sync {record['name']}` sends it later",
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
    """Say all that is wrong with an ablation. Reads its file alone, neither prepares data nor trains."""
    ablation = ablation_of(file, scale, seeds, arms, set_, plugin)
    print(f"{file}: {len(ablation.arms)} arms ({', '.join(ablation.arms)}) x {len(ablation.seeds)} seeds at "
          f"{ablation.scale}: all well")  # fmt: skip


def ablation_of(
    file: str, scale: str | None, seeds: int | None, arms: str | None, set_: list[str] | None, plugin: list[str] | None
) -> Any:
    """The ablation as the command line asks for it."""
    from gpt2lab.ablation import load_ablation

    wanted = [name.strip() for name in arms.split(",") if name.strip()] if arms is not None else None
    return load_ablation(file, scale=scale, overrides=set_ or (), arms=wanted, seeds=seeds, plugins=plugin or ())


def plan_of(
    file: str,
    scale: str | None,
    seeds: int | None,
    arms: str | None,
    set_: list[str] | None,
    plugin: list[str] | None,
    store: Any,
    jobs: int | None,
) -> Plan:
    """The ablation's plan, with its data prepared."""
    ablation = ablation_of(file, scale, seeds, arms, set_, plugin)
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.data.shards import prepare
    from gpt2lab.plan import make_plan

    with rich_progress() as progress:
        data = prepare(ablation.arms[ablation.baseline].config.data, progress=progress)
    return make_plan(ablation, data, store, jobs=jobs)


def reproduce(
    file: str, scale: str | None, seeds: int | None, arms: str | None, set_: list[str] | None, plugin: list[str] | None
) -> str:
    """The command that repeats this study, without what only concerns this machine."""
    words = ["gpt2lab", "run", file]
    words += ["--scale", scale] if scale else []
    words += ["--seeds", str(seeds)] if seeds else []
    words += ["--arms", arms] if arms else []
    words += [word for item in set_ or () for word in ("--set", item)]
    words += [word for item in plugin or () for word in ("--plugin", item)]
    return shlex.join(words)


def print_plan(plan: Plan, store: Any, console: Any, as_json: bool) -> None:
    """What would be done: runs, costs per arm, time on this machine."""
    from gpt2lab.study import is_finished

    done = {run.id for run in plan.runs() if is_finished(run, store)}
    rows: list[dict[str, Any]] = [
        {
            "arm": name,
            "changes": dict(arm.arm.changes),
            "parameters": arm.costs.parameters,
            "flops_per_token": arm.costs.flops_per_token,
            "tokens": arm.tokens,
            "flops": arm.costs.flops_per_token * arm.tokens,
            "seconds_per_run": arm.seconds,
            "memory_bytes": arm.memory,
            "runs": {str(run.seed): run.id for run in arm.runs},
            "finished": [str(run.seed) for run in arm.runs if run.id in done],
        }
        for name, arm in plan.arms.items()
    ]
    unique = {run.id: plan.arms[run.arm].seconds for run in plan.runs()}
    left = sum(seconds for run_id, seconds in unique.items() if run_id not in done) / plan.machine.jobs
    machine = plan.machine
    if as_json:
        record = {"study": f"{plan.ablation.name}@{plan.ablation.scale}", "arms": rows, "seconds": left}
        json.dump({**record, "jobs": machine.jobs, "threads": machine.threads, "device": machine.device}, sys.stdout)
        print()
        return
    from rich.table import Table
    from rich.text import Text

    from gpt2lab.display import duration

    shown = Table(title=Text(f"{plan.ablation.name}@{plan.ablation.scale}: {plan.ablation.question}"), box=None,
                  title_justify="left", padding=(0, 2, 0, 0))  # fmt: skip
    for name in ("arm", "what changes"):
        shown.add_column(name, overflow="fold")
    for name in ("parameters", "MFLOP/token", "tokens", "PFLOP", "time a run", "memory", "runs"):
        shown.add_column(name, justify="right")
    for row in rows:
        finished = f" ({len(row['finished'])} finished)" if row["finished"] else ""
        shown.add_row(
            Text(str(row["arm"])),
            Text(", ".join(f"{key} = {in_short(value)}" for key, value in row["changes"].items()) or "baseline"),
            f"{row['parameters']:,}",
            f"{row['flops_per_token'] / 1e6:,.1f}",
            f"{row['tokens']:,}",
            f"{row['flops'] / 1e15:,.3g}",
            duration(row["seconds_per_run"]),
            f"{row['memory_bytes'] / 2**30:.1f} GiB",
            f"{len(row['runs'])}{finished}",
        )
    console.print(shown)
    console.print(
        f"{len(unique)} runs, {len(done)} finished; about {duration(left)} on {machine.device_name} "
        f"({machine.device}), {machine.jobs} at a time, threads each: {machine.threads}; speed from "
        f"{machine.speed_from}",
        markup=False,
        highlight=False,
    )


def in_short(value: Any) -> str:
    """A change as people say it: `rotary`, `sliding_window(window=64)`, `rotary, none`."""
    if isinstance(value, dict):
        options = ", ".join(f"{key}={in_short(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']}({options})" if "name" in value else options
    return ", ".join(map(in_short, value)) if isinstance(value, list) else str(value)
