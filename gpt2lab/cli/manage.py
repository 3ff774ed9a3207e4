"""Commands that list and manage what is in the store: studies, runs, status, show, diff, curves, tag, note, clean."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import (
    damage_text,
    harmless,
    in_short,
    memory,
    plural,
    quantity,
    seconds_of,
    signed,
    time_taken,
)
from gpt2lab.cli import options
from gpt2lab.cli.options import checked_time, print_fault, print_json, say, store_at, table_of
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault, LockHeld

if TYPE_CHECKING:
    from rich.table import Table

Where = Annotated[
    str | None,
    typer.Option("--where", help='Conditions, as "arm=rotary and val<2.0". Keys: columns, slots, settings.'),
]
DIFF_POINTS = 8
"""Steps at which `diff` shows both curves."""


MOST_CHANGES = 3
"""Changes of a run in a table; `show` and --csv have all."""

MOST_ROWS = 500
"""In a table, unless --limit says otherwise."""


def studies(runs: options.Runs = options.RUNS, out: options.Out = options.OUT, json_: options.Json = False) -> None:
    """List studies and sweeps, with earlier declarations. `gpt2lab report NAME#1` opens the page of an earlier one."""
    store, damaged, rows = store_at(runs), list[DataFault](), list[dict[str, Any]]()
    for kind, names in (("study", store.studies()), ("sweep", store.sweeps())):
        for current in names:
            for name in (*store.earlier(current, kind), current):
                try:
                    rows.append(study_row(store, kind, name, out))
                except DataFault as fault:
                    damaged.append(fault)
    if json_:
        print_json({"studies": rows})
    else:
        console = console_for()
        numbers = ("arms", "seeds", "runs")
        lines = [
            (row["name"], row["declared"][:16].replace("T", " "), str(len(row["arms"])), str(row["seeds"]),
             f"{row['finished']} of {row['runs']}", row["page"] or "-")
            for row in rows
        ]  # fmt: skip
        console.print(table_of("name", "declared", *numbers, "page", rows=lines, right=numbers))
        counts = plural(len(store.studies()), "study"), plural(len(store.sweeps()), "sweep")
        say(console, f"{', '.join(counts)} in {runs}")
    for damage in damaged:
        print_fault(damage, as_json=json_)
    if damaged:
        raise SystemExit(DataFault.exit_code)


def study_row(store: Any, kind: str, name: str, out: Any) -> dict[str, Any]:
    """One study or sweep in short, as plain data. Raises DataFault."""
    from gpt2lab.records import run_ids
    from gpt2lab.reports.page import index_of

    record = store.study(name) if kind == "study" else store.sweep(name)
    ids, page = run_ids(record), index_of(store, kind, name, out)
    finished = sum(store.run(run).status() in ("finished", "diverged") for run in ids)
    arms = list(record.arms if kind == "study" else record.searches)
    return {
        "name": name, "kind": kind, "question": record.question, "declared": record.created, "arms": arms,
        "seeds": len(record.seeds), "runs": len(ids), "finished": finished, "reproduce": record.reproduce,
        "page": str(page) if page else None,
    }  # fmt: skip


def runs(
    where: Where = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort", help="Column to sort by, such as val; -val for descending order. By default newest first."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help=f"Show so many; a table has {MOST_ROWS} by default.", min=1)
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print all columns as CSV.")] = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """List the runs of the store. Shows each run's changes, result and the study that uses it."""
    from gpt2lab.basics.text import clean
    from gpt2lab.store.listing import COLUMNS, age, ordered, run_rows, selected

    store, damaged = store_at(runs), list[DataFault]()
    everything = run_rows(store, damaged.append)
    rows = ordered(selected(everything, where, store), sort)[:limit]
    if json_:
        print_json({"runs": rows})
    elif csv:
        from gpt2lab.reports.page import csv_text

        cells = [[_flat(row[name]) for name in COLUMNS] for row in rows]
        print(csv_text([COLUMNS, *cells]), end="")
    else:
        console = console_for()
        lines, shown_rows = list[list[str]](), rows[: limit or MOST_ROWS]
        for row in shown_rows:
            loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
            listed = [f"{key.rpartition('.')[2]}={in_short(value)}" for key, value in row["changes"].items()]
            more = len(listed) - MOST_CHANGES
            changes = ", ".join([*listed[:MOST_CHANGES], *([f"{more} more"] if more > 0 else [])])
            status = row["status"] if row["status"] in ("finished", "diverged") else f"{row['status']} {row['step']}"
            study = (row["study"] or "-") + "".join(f" #{tag}" for tag in row["tags"])
            shown = [row["id"], status, row["arm"] or "-", row["seed"] or "-", changes, loss, age(row["ended"]), study]
            lines.append(list(map(clean, shown)))
        if rows:
            columns, right = ("run", "status", "arm", "seed", "changes", "loss", "age", "study"), ("loss", "age")
            console.print(table_of(*columns, rows=lines, right=right))
        say(console, *(f"{row['id']}: {row['damage']}" for row in rows if row["damage"]), wrap=False)
        shown_of = f"{len(shown_rows):,} of " if len(shown_rows) < len(everything) else ""
        counts = [f"{shown_of}{plural(len(everything), 'run')}", plural(len(store.studies()), "study")]
        say(console, *(["more: --limit, --where, --csv"] if len(shown_rows) < len(rows) else []))
        counts += [plural(len(store.sweeps()), "sweep")] if store.sweeps() else []
        say(console, f"{', '.join(counts)} in {runs}")
    for damage in damaged:
        print_fault(damage, as_json=json_)
    if damaged or any(row["damage"] for row in rows):
        raise SystemExit(DataFault.exit_code)


def _flat(value: Any) -> Any:
    """A cell of a CSV file."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def status(runs: options.Runs = options.RUNS, json_: options.Json = False) -> None:
    """Show the runs in training. Includes other machines that share the folder of runs."""
    from gpt2lab.store.listing import age, facts_of, run_row, uses

    store = store_at(runs)
    working = [(folder, holder) for folder in store.runs() if (holder := folder.holder())]
    used = uses(store, lambda _: None) if working else {}
    rows = [run_row(used.get(folder.id, []), facts_of(folder)) | {"holder": holder} for folder, holder in working]
    if json_:
        print_json({"running": rows})
        return
    console = console_for()
    for row in rows:
        holder, loss = row["holder"], "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        what = "; ".join(row["studies"]) or "no study"
        say(console, f"{row['id']}  {what}  step {row['step']}  val {loss}  last row {age(row['ended'])} ago  "
                     f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}")  # fmt: skip
    say(console, *([] if rows else [f"no run is training in {runs}"]))


def show(
    run: options.Run,
    full: Annotated[bool, typer.Option("--full", help="Also show config, identity, result and evaluations.")] = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Summarise one run: study, arm, loss, curve, time, files. Damaged parts show their error."""
    from gpt2lab.store.listing import facts_of, run_row, uses

    damaged = False

    def read(part: Callable[[], Any]) -> Any:
        nonlocal damaged
        try:
            return part()
        except DataFault as fault:
            damaged = True
            return {"damaged": damage_text(fault)}

    store = store_at(runs)
    folder = store.find(run)
    row = run_row(uses(store, lambda _: None).get(folder.id, []), facts_of(folder))
    damaged = bool(row["damage"])
    if full or json_:
        about = {"id": folder.id, "status": folder.status(), "config": read(folder.config)}
        record = {"run": read(folder.identity), "result": read(folder.result), "failure": read(folder.failure)}
        evaluations = [read(partial(folder.evaluation, key)) for key in folder.evaluation_keys()]
    if json_:
        print_json({**about, **record, "evaluations": evaluations, "summary": row}, indent=1)
    else:
        say(console_for(), *summary_lines(folder, row), wrap=False)
        if full:
            config = about["config"]
            shown = config if isinstance(config, str) else json.dumps(config or "")
            print(harmless(f"\n# {folder.path}: {about['status']}\n{shown}"))
            print_json({**record, "evaluations": evaluations}, indent=1)
    if damaged:
        raise SystemExit(DataFault.exit_code)


def summary_lines(folder: Any, row: dict[str, Any]) -> list[str]:
    """A run in ten lines."""
    from gpt2lab.store.listing import age, curve_of, sparkline

    head = [f"{row['id']}: {row['status']}, {age(row['ended'])} ago"]
    head += [f"used by   {use}" for use in row["studies"][:3]] or ["used by   no study"]
    if row["damage"]:
        return [*head, f"damaged   {row['damage']}"]
    changes = ", ".join(f"{key}={value}" for key, value in row["changes"].items())
    result, curve = folder.result() or {}, curve_of(folder)
    tokens = result.get("tokens") or max((line.get("tokens", 0) for line in folder.rows()), default=0)
    speed = f" at {quantity(row['tokens_per_second'])} tokens/s" if row["tokens_per_second"] else ""
    loss = f"{row['val_loss']:.4f} nats at step {row['step']:,}" if row["val_loss"] is not None else "none yet"
    lines = [*head, f"changes   {changes or 'nothing'}", f"val/loss  {loss}"]
    if len(curve) > 1:
        lines.append(f"curve     {sparkline([value for _, value in curve])}  {curve[0][1]:.3g} to {curve[-1][1]:.4g}")
    train = [value for _, value in curve_of(folder, "train/loss")]
    lines += [f"training  {sparkline(train)}  {train[0]:.3g} to {train[-1]:.4g}"] if len(train) > 1 else []
    lines.append(f"tokens    {quantity(tokens)} in {time_taken(row['seconds'] or 0.0)}{speed}")
    lines += [f"failed    {result['reason']}"] if result.get("reason") else []
    failure = folder.failure() or {}
    lines += [f"failed    {failure.get('reason')}"] if failure else []
    lines += [f"tags      {' '.join(f'#{tag}' for tag in row['tags'])}"] if row["tags"] else []
    lines += [f"note      {row['note']}"] if row["note"] else []
    return [*lines, f"files     {folder.path}", f"more      gpt2lab show {row['id'][:8]} --full"]


def diff(
    run_a: options.Run, run_b: options.Run, runs: options.Runs = options.RUNS, json_: options.Json = False
) -> None:
    """Compare two runs. Shows settings that differ, and validation loss at the same steps."""
    from gpt2lab.store.listing import config_of, curve_of

    store = store_at(runs)
    a, b = store.find(run_a), store.find(run_b)
    ours, theirs = config_of(a), config_of(b)
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    settings = [{"key": key, "a": ours.get(key), "b": theirs.get(key)} for key in keys]
    left, right = dict(curve_of(a)), dict(curve_of(b))
    if json_:
        steps = sorted(left.keys() & right.keys())
        curve = [{"step": step, "a": left[step], "b": right[step]} for step in steps]
        print_json({"a": a.id, "b": b.id, "settings": settings, "curve": curve})
        return
    console = console_for()
    rows = [["-" if cell is None else str(cell) for cell in setting.values()] for setting in settings]
    if rows:
        console.print(table_of("", a.id, b.id, rows=rows))
    else:
        say(console, f"{a.id} and {b.id}: the same settings")
    if curve_table := side_by_side((a.id, b.id), left, right):
        console.print(curve_table)
    say(console, f"what else differs, code included: gpt2lab why {a.id[:8]} {b.id[:8]}")


def side_by_side(names: tuple[str, str], left: Mapping[int, float], right: Mapping[int, float]) -> Table | None:
    """Two curves at common steps, with the difference; None without common steps."""
    steps = sorted(left.keys() & right.keys())
    if not steps:
        return None
    shown = sorted({steps[round(i * (len(steps) - 1) / (DIFF_POINTS - 1))] for i in range(DIFF_POINTS)})
    rows = [(f"{step:,}", f"{left[step]:.4f}", f"{right[step]:.4f}", signed(right[step] - left[step]))
            for step in shown]  # fmt: skip
    columns = ("step", *names, "second - first")
    return table_of(*columns, rows=rows, right=columns)


def curves(
    name: Annotated[str, typer.Argument(help="A study, such as posenc@nano.", metavar="NAME")],
    file: Annotated[
        Path, typer.Argument(help="File to write: .csv or .parquet; a folder for TensorBoard.", metavar="FILE|FOLDER")
    ],
    runs: options.Runs = options.RUNS,
) -> None:
    """Write all curves of a study to a file. Columns: arm, seed, step, metric, value; or a folder for TensorBoard."""
    from gpt2lab.analysis.results import load_results

    if file.suffix not in (".csv", ".parquet", "") or (file.is_dir() != (not file.suffix) and file.exists()):
        problem = "a file .csv or .parquet is expected, or a folder without suffix"
        raise ConfigError(problem, where=str(file), hint="curves.csv, or curves for TensorBoard")
    store_at(runs)
    frame = load_results(name, runs)
    try:
        if not file.suffix:
            frame = write_events(frame, file)
        else:
            frame.to_csv(file, index=False) if file.suffix == ".csv" else frame.to_parquet(file, index=False)
    except OSError as error:
        raise EnvironmentFault(f"cannot write: {error.strerror or error}", where=str(file)) from None
    print(f"{file}: {plural(len(frame), 'value')} of {plural(frame['metric'].nunique(), 'metric')}")


def write_events(frame: Any, folder: Path) -> Any:
    """Write the curves of all runs in TensorBoard's format, in place of earlier ones: FOLDER/ARM/seed N has the events
    of one run. What was measured at the end alone is left out. -> the rows that are written. Raises
    EnvironmentFault."""
    from gpt2lab.analysis.results import FINAL

    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        hint = "pip install 'gpt2lab[tensorboard]', or a file curves.csv"
        raise EnvironmentFault("TensorBoard is not installed", where=str(folder), hint=hint) from None
    frame = frame[~frame["metric"].str.startswith(FINAL)]
    for (arm, seed), rows in frame.groupby(["arm", "seed"], sort=False):
        place = folder / arm / f"seed {seed}"
        for earlier in place.glob("events.out.tfevents.*"):
            earlier.unlink()
        writer = EventFileWriter(str(place))
        for step, metric, value in zip(rows["step"], rows["metric"], rows["value"], strict=True):
            summary = Summary(value=[Summary.Value(tag=metric, simple_value=value)])
            writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.close()
    return frame


def tag(
    run: options.Run,
    tags: Annotated[list[str], typer.Argument(help="Words to find it by; -WORD removes one.", metavar="TAG")],
    runs: options.Runs = options.RUNS,
) -> None:
    """Tag a run, for `gpt2lab runs --where tags=WORD`. A leading minus, after --, removes a tag."""
    folder = store_at(runs).find(run)
    chosen = folder.remarks()["tags"]
    for word in tags:
        chosen = [other for other in chosen if other != word.removeprefix("-")]
        chosen += [] if word.startswith("-") else [word]
    folder.remark(tags=chosen)
    print(f"{folder.id}: {' '.join(f'#{word}' for word in chosen) or 'no tags'}")


def note(
    name: Annotated[str, typer.Argument(help="A run id or its first digits, or a study.", metavar="NAME")],
    text: Annotated[
        str | None,
        typer.Argument(help="What to remember; '' to forget. Without it, show the note.", metavar="[TEXT]"),
    ] = None,
    runs: options.Runs = options.RUNS,
) -> None:
    """Write or show a note about a run, or a study's conclusion. `show` and `runs --json` have the notes of runs;
    a conclusion stands on the study's page."""
    store = store_at(runs)
    if name in (studies := store.studies()) or any(name == study.partition("@")[0] for study in studies):
        study = store.study(name)
        if text is None:
            print(f"{study.name}: {harmless(store.conclusion(study)) or 'no conclusion'}")
            return
        store.conclude(study, text)
        print(f"{study.name}: {text or 'no conclusion'}\nto update its page: gpt2lab report {study.name}")
        return
    folder = store.find(name)
    if text is not None:
        folder.remark(note=text)
    print(f"{folder.id}: {harmless(folder.remarks()['note']) or 'no note'}")


def clean(
    orphans: Annotated[bool, typer.Option("--orphans", help="Runs that no study or sweep names.")] = False,
    where: Where = None,
    older: Annotated[
        str | None,
        typer.Option("--older", callback=checked_time, help="Only those that ended before, as 30d or 12h."),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Delete only the checkpoints; results and curves stay.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted; delete nothing.")] = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:
    """Delete runs, or their checkpoints, after asking. Keeps runs in training and records of studies."""
    from gpt2lab.store.listing import age, run_rows, seconds_since, selected

    if not (orphans or where or older):
        raise ConfigError(
            "which runs? --orphans, --where or --older is expected", hint="gpt2lab clean --orphans --dry-run"
        )
    store, console = store_at(runs), console_for(to_stderr=json_)
    rows = selected(run_rows(store, _refuse_damaged), where, store)
    rows = [row for row in rows if row["status"] != "running" and not (orphans and row["studies"])]
    rows = [row for row in rows if older is None or (seconds_since(row["ended"]) or 0.0) > seconds_of(older)]
    folders = {row["id"]: [store.run(row["id"]).path] for row in rows}
    if checkpoints:
        folders = {run: [path / part for part in ("checkpoints", "replay")] for run, [path] in folders.items()}
    sizes = {run: sum(map(_size, paths)) for run, paths in folders.items()}
    rows = [row for row in rows if sizes[row["id"]]]
    say(console, *(f"{row['id']}  {memory(sizes[row['id']])}  {age(row['ended'])}  "
                   f"{'; '.join(row['studies']) or 'no study'}" for row in rows))  # fmt: skip
    what = f"{plural(len(rows), 'run')}, {memory(sum(sizes[row['id']] for row in rows))}"
    what = f"the checkpoints of {what}" if checkpoints else what
    deleted = list[str]()
    if dry_run or not rows:
        say(console, f"would delete {what}" if rows else "nothing to delete")
    elif not yes and not (sys.stdin.isatty() and typer.confirm(f"delete {what}?", err=True)):
        raise EnvironmentFault(f"nothing is deleted without confirmation: {what}", where=str(runs), hint="--yes")
    for row in rows if not dry_run else ():
        try:
            with store.run(row["id"]).lock():
                for path in folders[row["id"]]:
                    shutil.rmtree(path, ignore_errors=True)
            deleted.append(row["id"])
        except LockHeld as held:
            print_fault(held, as_json=json_)
    if deleted:
        say(console, f"deleted {what}")
    if json_:
        listed = [{"id": row["id"], "bytes": sizes[row["id"]], "deleted": row["id"] in deleted} for row in rows]
        print_json({"runs": listed, "checkpoints": checkpoints})


def _refuse_damaged(fault: Any) -> None:
    """What a damaged record names is not known, so that no run can be called an orphan."""
    raise fault


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
