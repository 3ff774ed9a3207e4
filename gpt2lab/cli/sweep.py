"""Search for settings: sweep."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Jobs, Json, Out, Plugin, Runs, Scale, Set, a_time, seconds_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpt2lab.planning.search import Search
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
    from gpt2lab.display import console_for
    from gpt2lab.store import Store
    from gpt2lab.sweep.declaration import scales_of

    console, store = console_for(to_stderr=json_), Store(runs)
    code = 0
    scales: tuple[str | None, ...] = (scale,) if scale else scales_of(file) or (None,)
    for one in scales:
        words = reproduce(file, scale, trials, tuple(set_ or ()), tuple(plugin or ()), audit_pruning)
        loaded = load(file, one, trials, tuple(set_ or ()), tuple(plugin or ()), audit_pruning)
        searches, head = planned(loaded, store, jobs, words, budget)
        if dry_run:
            print_plan(loaded, searches, store, console, json_)
            continue
        record = train(
            searches, head, loaded, store, console, storage=storage, nproc=nproc or 1, stays=not worker,
            tracking=not no_tracking,
        )  # fmt: skip
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


def planned(
    loaded: LoadedSweep, store: Any, jobs: int | None, command: str, budget: str | None
) -> tuple[dict[str, Search], dict[str, Any]]:
    """The searches on this machine, their data prepared, and the head of their record. Raises ConfigError."""
    from gpt2lab.data.progress import rich_progress
    from gpt2lab.data.shards import prepare
    from gpt2lab.evaluation.tasks.results import fetch
    from gpt2lab.planning.machine import probe
    from gpt2lab.planning.noise import find_floor
    from gpt2lab.planning.runs import known_costs
    from gpt2lab.sweep.record import head

    config = loaded.config_of_all
    with rich_progress() as progress:
        data = prepare(config.data, progress=progress)
    fetch({name for arm in loaded.arms.values() for name in arm.config.evaluation.tasks})
    costs = known_costs(config)
    machine = probe(store, config.training, costs.flops_per_token, jobs)
    searches = loaded.searches(data, machine)
    declared = loaded.declared
    limit = budget or declared.time_budget
    known = head(
        sweep=declared.sweep, scale=loaded.scale, question=declared.question, settings=declared, config=config,
        costs=costs, data=data, machine=machine,
        floor=find_floor(store, loaded.scale, config, data, machine, costs)[0],
        smallest_effect=loaded.smallest_effect, reproduce=command, time_budget=seconds_of(limit) if limit else None,
        audit_pruning=declared.audit_pruning,
    )  # fmt: skip
    return searches, known | (coordinates(loaded, store) if declared.coordinates else {})


def coordinates(loaded: LoadedSweep, store: Any) -> dict[str, Any]:
    """The coordinate check of every variant, as the record holds it; what an earlier start has found is kept."""
    from gpt2lab.coordinates import at_widths, coordinate_check
    from gpt2lab.identity import core_code, digest, settings

    key = digest({"code": core_code(), **{label: settings(arm.config) for label, arm in loaded.arms.items()}})
    before = store.sweep(loaded.name) if loaded.name in store.sweeps() else {}
    found = before.get("coordinates") if before.get("coordinates_of") == key else None
    if not found:
        model = loaded.config_of_all.model
        widths = [w for w in (model.n_embd // 2, model.n_embd, 2 * model.n_embd) if w % model.head_size == 0]
        found = {label: coordinate_check(at_widths(arm.config, widths)) for label, arm in loaded.arms.items()}
    return {"coordinates": found, "coordinates_of": key}


def train(
    searches: Mapping[str, Search], head: Mapping[str, Any], loaded: LoadedSweep, store: Any, console: Any, *,
    storage: str | None, nproc: int, stays: bool, tracking: bool,
) -> dict[str, Any]:  # fmt: skip
    """Work on the sweep, with its progress on the console; -> its record."""
    from gpt2lab.api import tracker_of
    from gpt2lab.display import display
    from gpt2lab.sweep.searching import run_searches

    title = f"{head['name']}: {head['question']}"
    console.print(title, markup=False, highlight=False)
    for line in lines(searches, store):
        console.print(line, markup=False, highlight=False)
    tracker = tracker_of(store, loaded.declared.sweep) if tracking else None
    with display(console) as listener:
        return run_searches(
            searches, head, store,
            on_event=listener, tracker=tracker, storage=storage, nproc=nproc, stays=stays, seconds=head["time_budget"],
        )  # fmt: skip


def lines(searches: Mapping[str, Search], store: Any) -> list[str]:
    """What is searched and what that takes here at most, in sentences."""
    from gpt2lab.text import duration, plural, quantity

    told = []
    seconds = 0.0
    for label, search in searches.items():
        runs = search.slots * search.settings.seeds
        cost = search.costs.flops_per_token * search.tokens * runs
        seconds += cost / search.machine.speed / search.machine.jobs
        named = f"{label}: " if len(searches) > 1 else ""
        each = f" of {search.settings.seeds} runs" if search.settings.seeds > 1 else ""
        told.append(
            f"{named}{plural(search.slots, 'trial')}{each}, {quantity(search.tokens * runs)} tokens, "
            f"{cost / 1e15:,.3g} PFLOP; " + ", ".join(told_dimension(one) for one in search.space.dimensions)
        )
    machine = next(iter(searches.values())).machine
    told.append(
        f"at most {duration(seconds)} on {machine.device_name} ({machine.device}), {machine.jobs} at a time; "
        f"speed from {machine.speed_from}"
    )
    return told


def told_dimension(one: Any) -> str:
    """A dimension in a few words."""
    name = f"{one.name} ({', '.join(f'{k} = {v}' for k, v in one.when.items())})" if one.when else one.name
    if one.kind == "categorical":
        return f"{name}: {' | '.join(one.choices)}"
    return f"{name} from {one.low:g} to {one.high:g}{' (log)' if one.log else ''}"


def print_plan(loaded: LoadedSweep, searches: Mapping[str, Search], store: Any, console: Any, as_json: bool) -> None:
    """What would be done."""
    if as_json:
        record = {
            label: {
                "trials": search.slots,
                "seeds": list(search.seeds),
                "tokens": search.tokens,
                "flops": search.costs.flops_per_token * search.tokens * search.slots * search.settings.seeds,
                "space": [one.as_record() for one in search.space.dimensions],
            }
            for label, search in searches.items()
        }
        print(json.dumps({"sweep": loaded.name, "searches": record}))
        return
    console.print(f"{loaded.name}: {loaded.declared.question}", markup=False, highlight=False)
    for line in lines(searches, store):
        console.print(line, markup=False, highlight=False)


def tell(
    record: Mapping[str, Any], loaded: LoadedSweep, store: Any, out: Path, console: Any, *, apply: bool, as_json: bool
) -> int:
    """Write the page and say what was found; -> the exit code. Raises NumericsFault when everything diverged."""
    from gpt2lab.errors import NumericsFault
    from gpt2lab.report.sweep.writing import terminal_sweep, write_sweep_report

    page = write_sweep_report(record["name"], root=store.root, out=out)
    if as_json:
        print((page.parent / "sweep.json").read_text(encoding="utf-8"))
    else:
        console.print(terminal_sweep(record, root=store.root, out=out))
    for best in sorted(page.parent.glob("best*.yaml")) if apply else ():
        path = Path(f"{loaded.scale}-{loaded.declared.sweep}{best.stem.removeprefix('best')}.yaml")
        path.write_text(best.read_text(encoding="utf-8"), encoding="utf-8")
        console.print(f"written: {path}; try: gpt2lab train {path}", markup=False, highlight=False)
    outcomes = {trial["outcome"] for search in record["searches"].values() for trial in search["trials"]}
    if "finished" in outcomes:
        return 0
    if outcomes <= {"diverged", "pruned"} and "diverged" in outcomes:
        what = "no trial was finished: all of them diverged"
        raise NumericsFault(what, where=str(page), hint="lower rates: see the page for which ones to try")
    return 0 if outcomes <= {"waiting", "running"} else NOTHING_FOUND
