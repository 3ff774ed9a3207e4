"""Read anyone's table of results: a DataFrame, a CSV file or a list of rows becomes seed -> value for each arm.

A blank value is a run without a result yet; NaN or infinity is a run that failed. The two are never confused, and no
row is dropped. Tables as `mlflow.search_runs` makes them are known by their columns; see tracked.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpt2lab.analysis.rows import (
    PREFERRED,
    Asked,
    Columns,
    Row,
    Source,
    Value,
    blank,
    name_of,
    number,
    rows_of,
    spelled,
)
from gpt2lab.analysis.tracked import columns_of, is_tracked, runs_of_arms
from gpt2lab.errors import ConfigError, Problem, unknown

REASON_COLUMNS = ("not_comparable", "tags.not_comparable")
"""Where a table says why an arm cannot be compared."""


@dataclass(frozen=True)
class Entry:
    """One cell that matters: the value of `metric` of one arm and seed, at a step."""

    where: str
    arm: str
    seed: str
    metric: str
    step: float
    value: Value


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a table holds."""

    runs: dict[str, dict[str, Value]]
    """arm -> seed -> value; None for a run without a value"""
    metric: str | None
    not_comparable: dict[str, str]
    """arm -> why it cannot be compared, where the table has a column that says so"""


def read(
    source: Source,
    metric: str | None = None,
    *,
    arm: str | None = None,
    seed: str | None = None,
    value: str | None = None,
) -> Table:
    """The runs of every arm in a table.

    Columns, unless `arm`, `seed` and `value` name others: arm, seed (or run), and the value: the column `metric`, else
    `value`. A table with the columns metric and value (and step), as `load_results` makes it, counts at the last step
    of each run. In an MLflow table (columns run_id, status, metrics.*, params.*, tags.*) the prefixes may be left out;
    tracked.py says where arm, seed and metric are looked for.
    Raises ConfigError with every bad cell: row, column, what stands there.
    """
    rows, where = rows_of(source), name_of(source)
    asked = Asked(metric=metric, arm=arm, seed=seed, value=value)
    columns = list(dict.fromkeys(key for row in rows for key in row.cells))
    if not rows:
        raise ConfigError("the table has no rows", where=where)
    if is_tracked(columns):
        chosen = columns_of(columns, asked, where)
        rows = runs_of_arms(rows, chosen, where)
    else:
        chosen = _plain_columns(columns, asked, where)
    entries = _entries(rows, chosen)
    named = _metric(entries, metric, where) if chosen.several else chosen.metric
    entries = _last(entries, named) if chosen.several and named else entries
    _refuse_duplicates(entries, chosen)
    runs: dict[str, dict[str, Value]] = {}
    for entry in entries:
        runs.setdefault(entry.arm, {})[entry.seed] = entry.value
    return Table(runs=runs, metric=named, not_comparable=_reasons(rows, chosen.arm))


def _plain_columns(columns: Sequence[str], asked: Asked, where: str) -> Columns:
    metric, value = asked.metric, asked.value
    direct = metric is not None and metric in columns
    if value is not None and direct and metric != value:
        raise ConfigError(f"'{metric}' and '{value}' are both columns: which one holds the values?", where=where)
    chosen = Columns(
        arm=asked.arm or "arm",
        seed=asked.seed or ("seed" if "seed" in columns else "run"),
        value=value or (metric if metric is not None and direct else "value"),
        metric=metric or value,
        several="metric" in columns and not direct,
    )
    if metric is not None and not direct and not chosen.several:
        raise ConfigError(unknown("column", metric, columns), where=where)
    lacking = [name for name in (chosen.arm, chosen.seed, chosen.value) if name not in columns]
    if lacking:
        hint = "the columns are arm, seed (or run) and value"
        hint = f"{hint}, unless others are named" if asked.arm or asked.seed or value else hint
        raise ConfigError([Problem(where, unknown("column", c, columns)) for c in lacking], hint=hint)
    return chosen


def _reasons(rows: Sequence[Row], arm: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rows:
        for name in REASON_COLUMNS:
            if not blank(row.cells.get(name)):
                found.setdefault(str(row.cells[arm]).strip(), str(row.cells[name]).strip())
    return found


def _entries(rows: Iterable[Row], chosen: Columns) -> list[Entry]:
    entries, problems = [], []
    value, several = chosen.value, chosen.several
    for row in rows:
        bad = [name for name in (chosen.arm, chosen.seed) if blank(row.cells.get(name))]
        problems += [Problem(row.where, f"column '{name}' is empty") for name in bad]
        numbers: dict[str, Value] = {}
        for name in (value, "step") if several else (value,):
            try:
                numbers[name] = number(row.cells.get(name))
            except ValueError as error:
                bad.append(name)
                problems.append(Problem(row.where, f"column '{name}': {error}"))
        if not bad:
            measured = str(row.cells.get("metric")) if several else value
            arm, step = str(row.cells[chosen.arm]).strip(), numbers.get("step")
            at = -1.0 if step is None else step
            entries.append(Entry(row.where, arm, spelled(row.cells[chosen.seed]), measured, at, numbers[value]))
    if problems:
        raise ConfigError(problems)
    return entries


def _metric(entries: Sequence[Entry], wanted: str | None, where: str) -> str:
    names = list(dict.fromkeys(entry.metric for entry in entries))
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(unknown("metric", wanted, names), where=where)
        return wanted
    chosen = next((name for name in PREFERRED if name in names), names[0] if len(names) == 1 else None)
    if chosen is None:
        raise ConfigError(f"which metric? The table holds {', '.join(sorted(names))}", where=where, hint="metric=NAME")
    return chosen


def _last(entries: Sequence[Entry], metric: str) -> list[Entry]:
    """The value of `metric` at the last step of every run.

    A run that stopped before the other runs of its arm, or lacks the metric, has failed if its last loss is not
    finite, and else has no value yet.
    """
    ends: dict[str, float] = {}
    runs: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        runs.setdefault((entry.arm, entry.seed), []).append(entry)
        if entry.metric == metric:
            ends[entry.arm] = max(ends.get(entry.arm, -1.0), entry.step)
    found: list[Entry] = []
    for (arm, seed), own in runs.items():
        final = [e for e in own if e.metric == metric and e.step == ends.get(arm)]
        last = max(e.step for e in own)
        broken = [e for e in own if e.step == last and "loss" in e.metric and not _finite(e.value)]
        found += final or [Entry(own[-1].where, arm, seed, metric, last, math.nan if broken else None)]
    return found


def _finite(value: Value) -> bool:
    return value is None or math.isfinite(value)


def _refuse_duplicates(entries: Sequence[Entry], chosen: Columns) -> None:
    first: dict[tuple[str, str], Entry] = {}
    problems = []
    for entry in entries:
        seen = first.setdefault((entry.arm, entry.seed), entry)
        if seen is not entry:  # not by the place: joined frames have two rows 0
            what = f"arm '{entry.arm}' has seed {entry.seed} already, in {seen.where}: "
            what += f"columns '{chosen.arm}' and '{chosen.seed}' name one run"
            problems.append(Problem(entry.where, what))
    if problems:
        raise ConfigError(problems, hint="seed='run_id'" if chosen.seed in ("params.seed", "tags.seed") else None)
