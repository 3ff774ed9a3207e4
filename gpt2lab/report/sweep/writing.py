"""Write the page of a sweep: one self-contained HTML page, its Markdown twin, the figures, the numbers, and the winning
config. From the run store alone: no torch, no Optuna, no tracker."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from gpt2lab.analysis.verdicts import as_json
from gpt2lab.report.page import write_page
from gpt2lab.report.sweep import content
from gpt2lab.report.sweep.across import Record
from gpt2lab.report.sweep.best import best_files, best_yaml
from gpt2lab.report.sweep.pictures import draw
from gpt2lab.report.sweep.read import ReadSweep, read_record, read_sweep
from gpt2lab.store import Store
from gpt2lab.text import number, setting

TOP = 5
"""Trials that a terminal shows."""

Sweep = str | Record | ReadSweep


def write_sweep_report(sweep: Sweep, *, root: str | Path = "runs", out: str | Path = "reports") -> Path:
    """Write `out`/<sweep>/ with index.html, report.md, figures/, trials.csv, sweep.json and, once a trial has finished,
    best.yaml (best-<search>.yaml for each of several searches); returns index.html.

    sweep: its name in the store at `root`, its record, or what `read_sweep` read of it.
    Raises ConfigError for an unknown sweep, DataFault for a damaged record, EnvironmentFault when the folder cannot be
    written (the old report stays).
    """
    read = _read(sweep, root)
    page, files, folder = content.build(read, draw(read)), numbers(read), Path(out) / str(read.record["name"])
    index = write_page(folder, page, files)
    for stale in set(folder.glob("best*.yaml")) - {folder / file for file in files}:
        stale.unlink()
    return index


def _read(sweep: Sweep, root: str | Path) -> ReadSweep:
    if isinstance(sweep, ReadSweep):
        return sweep
    return read_sweep(sweep, root) if isinstance(sweep, str) else read_record(sweep, Store(root))


def numbers(read: ReadSweep) -> dict[str, str]:
    """The files for programs beside the page: name -> content."""
    configs = {file: text for file, search in best_files(read).items() if (text := best_yaml(read, search))}
    return {"trials.csv": _csv(read), "sweep.json": _json(read), **configs}


def _csv(read: ReadSweep) -> str:
    """One line per trial of every search, with a column for each setting."""
    names = list(dict.fromkeys(name for search in read.searches.values() for name in search.axes))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    kept = ("slot", "number", "outcome", "value")
    rest = ("stopped_at", "would_stop_at", "tokens", "retries", "enqueued", "found", "reason")
    writer.writerow(["search", *kept, *names, *rest, "runs"])
    for label, search in read.searches.items():
        for trial in search.trials:
            settings = [trial["settings"].get(name) for name in names]
            row = [label, *map(trial.get, kept), *settings, *map(trial.get, rest)]
            row.append(" ".join(map(str, (trial.get("runs") or {}).values())))
            writer.writerow(["" if value is None else value for value in row])
    return buffer.getvalue()


def _json(read: ReadSweep) -> str:
    """What the page concludes, and the record that it rests on; numbers that are not finite are null."""
    concluded: dict[str, Any] = {
        "answer": content.answer(read),
        "caveat": read.record.get("caveat"),
        "searches": {},
    }
    for label, search in read.searches.items():
        found = {name: _optimum_json(optimum) for name, optimum in search.optima.items()}
        best = search.best
        concluded["searches"][label] = {
            "best": {key: best[key] for key in ("slot", "value", "settings")} if best else None,
            "outcomes": dict(search.counts),
            "optima": found if search.alone else {name: {"edge": one["edge"]} for name, one in found.items()},
        }
    return json.dumps(as_json(concluded | {"record": dict(read.record)}), indent=1, allow_nan=False) + "\n"


def _optimum_json(found: Any) -> dict[str, Any]:
    kept = ("vertex", "interval", "flat", "effect", "edge", "widen", "reason")
    return {key: getattr(found, key) for key in kept}


def terminal_sweep(sweep: Sweep, *, root: str | Path = "runs", out: str | Path = "reports") -> Group:
    """What a terminal shows at the end of a sweep: the answer, the best five of every search, where the page lies."""
    read = _read(sweep, root)
    shown: list[Text | RichTable] = [Text(f"{one.head} {one.text}", style="yellow") for one in content.warnings(read)]
    shown += [Text(sentence, style="bold") for sentence in content.answer(read)]
    for label, search in read.searches.items():
        done = [point for point in search.points if point.finished]
        best = sorted(done, key=lambda point: (-point.value if search.maximize else point.value, point.slot))[:TOP]
        if best:
            shown.append(_top(read, label, best, list(search.axes)))
    folder = Path(out) / str(read.record["name"])
    where = folder / "index.html"
    shown.append(Text(f"report: {where}" if where.exists() else f"report: gpt2lab report {read.record['name']}"))
    files = [folder / file for file in best_files(read) if (folder / file).exists()]
    shown += [Text(f"winning config: {file}") for file in files]
    return Group(*shown)


def _top(read: ReadSweep, label: str, best: Any, names: list[str]) -> RichTable:
    title = None if read.single else Text(label)
    table = RichTable(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("trial", str(read.record["metric"]), *names):
        table.add_column(Text(column), justify="right")
    for point in best:
        values = [setting(point.settings[name]) if name in point.settings else "" for name in names]
        table.add_row(str(point.slot), number(point.value), *map(Text, values))
    return table
