"""The trials of a sweep: the winning config, what pruning saved, what ended without a value, and the list of all."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from gpt2lab.analysis.tuning import audit, replay, savings
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import DIVERGED, FAILED, FINISHED, PRUNED, RUNNING, WAITING, Record, Search, SweepRead
from gpt2lab.reports.tables import Cell, Row, Table, columns
from gpt2lab.text import DASH, number, plural, quantity, setting

CHIPS = {FINISHED: "better", PRUNED: "grey", DIVERGED: "broken", FAILED: "worse", RUNNING: "open", WAITING: "open"}
PLACES = (FINISHED, PRUNED, DIVERGED, FAILED, RUNNING, WAITING)

SHOWN_SLOTS = 12
"""Trials named one by one up to here."""

MANY = 40
"""Trials from which their table is opened by a click."""

BEST = "best.yaml"
REASONS = "A trial that diverged is a result: its settings train nothing. One that failed says nothing of its settings."


@section(order=50, of="sweep")
def winner(read: SweepRead) -> list[Section]:
    made = []
    for file, search in best_files(read).items():
        if written := best_yaml(read, search):
            note = f"The file {file} beside this page; gpt2lab train {file} trains it, --dry-run says what that costs."
            title = read.titled(search, "The winning config")
            made.append(Section(title=title, code=written.rstrip("\n"), note=note))
    return made


@section(order=60, title="What pruning saved", of="sweep")
def pruning(read: SweepRead) -> Section | None:
    """In tokens, and what the audit found; nothing where no pruner was declared."""
    if (read.record.get("pruner") or {}).get("name") in (None, "none"):
        return None
    return Section(points=[one for search in read.searches.values() for one in _saved(read, search)])


@section(order=70, title="What ended without a value", of="sweep")
def without_value(read: SweepRead) -> Section | None:
    table = reasons_table(read)
    return Section(table=table, note=REASONS) if table else None


@section(order=90, of="sweep")
def every_trial(read: SweepRead) -> list[Section]:
    return [
        Section(title=read.titled(s, "Trials"), table=trial_table(s, read), folded=len(s.trials) > MANY)
        for s in read.searches.values()
    ]


def best_files(read: SweepRead) -> dict[str, Search]:
    """Name of the winning config's file -> its search."""
    if read.single:
        return {BEST: read.single}
    named = {f"best-{re.sub(r'[^A-Za-z0-9_.+-]', '_', label)}.yaml": one for label, one in read.searches.items()}
    if len(named) == len(read.searches):
        return named
    return {f"best-{place}.yaml": one for place, one in enumerate(read.searches.values())}


def best_yaml(read: SweepRead, search: Search) -> str | None:
    """The config of the best trial; None where no trial finished."""
    best, config = search.best, search.record.get("best_config")
    if best is None or not config:
        return None
    written: str = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return _head(read, search, best) + written


class _Dumper(yaml.SafeDumper):
    """Writes what gpt2lab's reader reads: no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _head(read: SweepRead, search: Search, best: Record) -> str:
    of = "" if read.single else f", search {search.label}"
    told = f"{read.metric} {number(best['value'])} in the search, on seed {next(iter(best['values']), '?')}"
    return f"# The best trial of {read.record['name']}{of} (trial {best['slot']}): {told}.\n"


def _saved(read: SweepRead, search: Search) -> list[str]:
    label, record = "" if read.single else f"{search.label}: ", read.record
    steps = int(search.record["steps"])
    if not record.get("audit_pruning"):
        told = [savings(search.trials, search.record["tokens"] * len(search.seeds))]
        if search.counts[PRUNED]:
            told.append(
                "What those trials would have reached is not known; with --audit-pruning all are trained to their end, "
                "and the page tells how often the eventual best would have been stopped."
            )
        return [label + " ".join(told)]
    found = audit(search.trials, steps, maximize=search.maximize)
    told = [found or "No trial finished, so the audit tells nothing of the pruner."]
    return [label + told[0], *(f"{label}{one}" for one in _replayed(read, search, steps))]


def _replayed(read: SweepRead, search: Search, steps: int) -> list[str]:
    """What the median rule does to the audited curves in other orders."""
    pruner = read.record["pruner"]
    if pruner["name"] != "median":
        return []
    done = [trial for trial in search.trials if trial["outcome"] in (FINISHED, DIVERGED)]
    curves = [[(step, value) for step, _, value in trial["curve"] or () if value is not None] for trial in done]
    finals = [math.nan if trial["value"] is None else trial["value"] for trial in done]
    found = replay(
        curves, finals, startup=int(pruner.get("startup_trials") or 0), warmup=steps * (pruner.get("warmup") or 0.0),
        maximize=search.maximize,
    )  # fmt: skip
    return [found.sentence(read.unit)] if found else []


def reasons_table(read: SweepRead) -> Table | None:
    """Trials that ended without a value, by outcome and reason."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for search, trial in read.trials:
        if trial["outcome"] in (DIVERGED, FAILED):
            groups.setdefault((search.label, trial["outcome"], _kind(trial)), []).append(trial)
    if not groups:
        return None
    many = len(read.searches) > 1
    titles = columns("Outcome", *(["Search"] if many else []), "Trials:number", "Reason:words", "Which:words",
                     "Settings:words")  # fmt: skip
    rows = []
    for (label, outcome, reason), trials in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        slots = [str(trial["slot"]) for trial in trials]
        more = f" and {len(slots) - SHOWN_SLOTS} more" if slots[SHOWN_SLOTS:] else ""
        which = Cell(", ".join(slots[:SHOWN_SLOTS]) + more)
        cells = (Cell(outcome, "", CHIPS[outcome]), *([Cell(label)] if many else []), Cell(str(len(trials))),
                 Cell(reason or DASH), which, Cell(_ranges(read.searches[label], trials)))  # fmt: skip
        rows.append(Row(cells))
    return Table(titles, rows)


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


def trial_table(search: Search, read: SweepRead) -> Table:
    """Every trial: the best first, then those without a final value."""
    names = list(search.axes)
    names_shown = [f"{name.rpartition('.')[2]}:number" for name in names]
    titles = columns("Trial", "Outcome", f"{read.metric}:number", *names_shown,
                     "Stopped at step:number", "Tokens:number", "Run:id", "Remarks:words")  # fmt: skip
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
    return Table(titles, rows)


def _order(trial: Record, *, maximize: bool) -> tuple[int, float, int]:
    place = PLACES.index(trial["outcome"]) if trial["outcome"] in PLACES else len(PLACES)
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
