"""The tables of a sweep's page: best settings, best per choice, what ended without a value, every trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpt2lab.analysis.tuning import Optimum
from gpt2lab.report.svg import ARMS
from gpt2lab.report.sweep.across import Record
from gpt2lab.report.sweep.axes import DIVERGED, FAILED, FINISHED, PRUNED
from gpt2lab.report.sweep.read import RUNNING, WAITING, ReadSweep, Search
from gpt2lab.report.tables import Cell, Column, Row, Table
from gpt2lab.text import DASH, number, plural, quantity, setting

CHIPS = {FINISHED: "better", PRUNED: "grey", DIVERGED: "broken", FAILED: "worse", RUNNING: "open", WAITING: "open"}

SHOWN_SLOTS = 12
"""Trials named one by one up to here."""


def best_table(read: ReadSweep) -> Table:
    """One row per setting of every search: its best value, how sure that is, how flat, whether it lies at an edge."""
    weighed = any(search.record.get("importance") for search in read.searches.values())
    columns = [
        Column("Setting"), Column("Best trial", "number"), Column("Optimum", "number"), Column("Flat", "number"),
        Column("Searched", "number"), Column("Edge", "words"), Column("The config's own", "number"),
    ]  # fmt: skip
    columns += [Column("Importance", "number")] if weighed else []
    rows = []
    for place, (label, search) in enumerate(read.searches.items()):
        best = search.best
        shares = (search.record.get("importance") or {}).get("values") or {}
        for name, axis in search.axes.items():
            own = (search.record.get("base") or {}).get(name)
            chosen = (best or {}).get("settings", {}).get(name)
            found = search.optima.get(name)
            cells = [
                Cell(label, name) if len(read.searches) > 1 else Cell(name),
                Cell(setting(chosen) if chosen is not None else DASH, _reached(best, read)),
                optimum_cell(found, search) if found else Cell(),
                flat_cell(found, search, read.unit) if found else Cell(),
                Cell(", ".join(axis.choices)) if axis.choices else Cell(f"{setting(axis.low)} to {setting(axis.high)}",
                                                                        "on a log scale" if axis.log else ""),
                edge_cell(found) if found and best else Cell(),
                Cell(setting(own) if own is not None else DASH),
            ]  # fmt: skip
            if weighed:
                cells.append(Cell(f"{100 * shares[name]:.0f} %" if shares.get(name) is not None else DASH))
            rows.append(Row(cells, look_of(place) if len(read.searches) > 1 else None))
    return Table(columns, rows)


def look_of(place: int) -> int:
    """The colour of a search in the figures, by its place."""
    return (place - 1) % len(ARMS) + 1 if place else 0


def _reached(best: Record | None, read: ReadSweep) -> str:
    return f"{read.record['metric']} {number(best['value'])}" if best else ""


def optimum_cell(found: Optimum, search: Search) -> Cell:
    """The vertex of the fitted curve over its interval; why there is none."""
    if found.what and search.alone is None:
        return Cell(DASH, "other settings vary")
    if found.vertex is None:
        return Cell(DASH, found.reason)
    inside = f"[{setting(found.interval[0], 3)}, {setting(found.interval[1], 3)}]" if found.interval else found.reason
    return Cell(setting(found.vertex, 3), inside)


def flat_cell(found: Optimum, search: Search, unit: str) -> Cell:
    """The range in which little is lost; an end that is only where the trials end says so."""
    if found.flat is None or search.alone is None:
        return Cell(DASH)
    low, high = (setting(end, 3) for end in found.flat)
    ends = f"{'at most ' if found.flat_open[0] else ''}{low} to {'at least ' if found.flat_open[1] else ''}{high}"
    return Cell(ends, f"loses less than {number(found.effect, 3)} {unit}" if found.effect else "")


def edge_cell(found: Optimum) -> Cell:
    """Whether the best value lies at the edge of what was searched, and what to widen to."""
    if found.edge is None:
        return Cell("inside", "", "same")
    wider = f"try {setting(found.widen[0], 2)} to {setting(found.widen[1], 2)}" if found.widen else ""
    return Cell(f"at the {found.edge} edge", wider, "worse")


def choices_table(search: Search, read: ReadSweep) -> Table | None:
    """The best finished trial of every choice of every dimension that has choices."""
    named = [axis for axis in search.axes.values() if axis.choices]
    if not named:
        return None
    columns = (Column("Choice"), Column("Best", "number"), Column("Behind the best", "number"),
               Column("Finished", "number"), Column("Trials", "number"), Column("With", "words"))  # fmt: skip
    best = search.best
    rows = []
    for axis in named:
        for choice in axis.choices:
            own = [trial for trial in search.trials if str(trial["settings"].get(axis.name)) == choice]
            done = [trial for trial in own if trial["outcome"] == FINISHED and trial["value"] is not None]
            top = min(done, key=lambda t: -t["value"] if search.maximize else t["value"], default=None)
            behind = abs(top["value"] - best["value"]) if top and best else None
            others = {key: value for key, value in (top or {}).get("settings", {}).items() if key != axis.name}
            cells = (Cell(choice, axis.name), Cell(number(top["value"]) if top else DASH),
                     Cell("best" if behind == 0 else number(behind)), Cell(str(len(done))), Cell(str(len(own))),
                     Cell(settings_text(others)))  # fmt: skip
            rows.append(Row(cells, None, behind == 0))
    return Table(columns, rows)


def settings_text(settings: Record) -> str:
    """`optim.lr 0.00213, model.norm rmsnorm`"""
    return ", ".join(f"{name} {setting(value)}" for name, value in settings.items())


def reasons_table(read: ReadSweep) -> Table | None:
    """Trials that ended without a value, by outcome and reason."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for label, search in read.searches.items():
        for trial in search.trials:
            if trial["outcome"] in (DIVERGED, FAILED):
                key = (label, trial["outcome"], _kind(trial))
                groups.setdefault(key, []).append(trial)
    if not groups:
        return None
    many = len(read.searches) > 1
    columns = (Column("Outcome"), *([Column("Search")] if many else []), Column("Trials", "number"),
               Column("Reason", "words"), Column("Which", "words"), Column("Settings", "words"))  # fmt: skip
    rows = []
    for (label, outcome, reason), trials in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        slots = [str(trial["slot"]) for trial in trials]
        named = ", ".join(slots[:SHOWN_SLOTS]) + (
            f" and {len(slots) - SHOWN_SLOTS} more" if slots[SHOWN_SLOTS:] else ""
        )
        search = read.searches[label]
        rows.append(
            Row(
                (
                    Cell(outcome, "", CHIPS[outcome]),
                    *([Cell(label)] if many else []),
                    Cell(str(len(trials))),
                    Cell(reason or DASH),
                    Cell(named),
                    Cell(_ranges(search, trials)),
                )
            )
        )
    return Table(columns, rows)


def _kind(trial: Record) -> str:
    """A reason without the step at which it struck, so that equal ones are counted together."""
    return str(trial.get("reason") or "").partition(" at step ")[0]


def _ranges(search: Search, trials: Sequence[Record]) -> str:
    """Where in the space these trials lie: `optim.lr 0.07 to 0.2`."""
    parts = []
    for name, axis in search.axes.items():
        values = [trial["settings"][name] for trial in trials if name in trial["settings"]]
        if axis.choices:
            parts += [", ".join(sorted(set(map(str, values))))] if values else []
        elif values:
            low, high = min(values), max(values)
            parts.append(f"{name} {setting(low, 3)}" + (f" to {setting(high, 3)}" if high > low else ""))
    return "; ".join(parts)


def trial_table(search: Search, read: ReadSweep) -> Table:
    """Every trial: the best first, then those without a final value."""
    names = list(search.axes)
    columns = (
        Column("Trial"), Column("Outcome"), Column(read.record["metric"], "number"),
        *(Column(name.rpartition(".")[2], "number") for name in names), Column("Stopped at step", "number"),
        Column("Tokens", "number"), Column("Run", "id"), Column("Remarks", "words"),
    )  # fmt: skip
    best = search.best
    rows = []
    for trial in sorted(search.trials, key=lambda trial: _order(trial, maximize=search.maximize)):
        value, runs = trial.get("value"), trial.get("runs") or {}
        seeds = trial.get("values") or {}
        spread = f"over {plural(len(seeds), 'seed')}" if len(seeds) > 1 else ""
        cells = (
            Cell(str(trial["slot"])),
            Cell(trial["outcome"], "", CHIPS.get(trial["outcome"], "grey")),
            Cell(number(value), spread) if value is not None else _last_seen(trial),
            *(Cell(_value(trial["settings"].get(name))) for name in names),
            Cell(str(trial.get("stopped_at") or DASH)),
            Cell(quantity(trial.get("tokens"))),
            Cell(", ".join(map(str, runs.values())) or DASH),
            Cell("; ".join(remarks(trial))),
        )
        rows.append(Row(cells, None, best is not None and trial["slot"] == best["slot"]))
    return Table(columns, rows)


def _order(trial: Record, *, maximize: bool) -> tuple[int, float, int]:
    places = (FINISHED, PRUNED, DIVERGED, FAILED, RUNNING, WAITING)
    place = places.index(trial["outcome"]) if trial["outcome"] in places else len(places)
    value = trial.get("value")
    if value is None and trial.get("curve") and trial["outcome"] == PRUNED:
        value = trial["curve"][-1][2]
    worth = math.inf if value is None else -value if maximize else value
    return place, worth, trial["slot"]


def _last_seen(trial: Record) -> Cell:
    """The last value of a trial that has no final one."""
    seen = trial.get("curve") or ()
    if trial["outcome"] == PRUNED and seen and seen[-1][2] is not None:
        return Cell("", f"{number(seen[-1][2])} when pruned")
    return Cell(DASH)


def _value(value: Any) -> str:
    return DASH if value is None else setting(value)


def remarks(trial: Record) -> list[str]:
    """What is particular about a trial."""
    found = [str(trial["reason"])] if trial.get("reason") else []
    found += ["a known point, tried first"] if trial.get("enqueued") else []
    found += ["its runs were there already"] if trial.get("found") else []
    found += [f"tried again {plural(trial['retries'], 'time')}"] if trial.get("retries") else []
    found += [f"pruning would have stopped it at step {trial['would_stop_at']}"] if trial.get("would_stop_at") else []
    return found
