"""Read anyone's table of results: a DataFrame, a CSV file or a list of rows becomes seed -> value for each arm.

A blank value is a run without a result yet; NaN or infinity is a run that failed. The two are never confused, and no
row is dropped.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gpt2lab.errors import ConfigError, Problem, unknown

Source = pd.DataFrame | str | Path | Sequence[Mapping[str, Any]]
Value = float | None
PREFERRED = ("final/val/loss", "val/loss")
"""Metrics that stand for the result of a run, the best first, in a table that holds several."""


@dataclass(frozen=True)
class Row:
    where: str
    cells: Mapping[Any, Any]


@dataclass(frozen=True)
class Entry:
    """One cell that matters: the value of `metric` of one arm and seed, at a step."""

    where: str
    arm: str
    seed: str
    metric: str
    step: float
    value: Value


def read(source: Source, metric: str | None = None) -> tuple[dict[str, dict[str, Value]], str | None]:
    """(arm -> seed -> value, name of the metric); None for a run without a value.

    Columns: arm, seed (or run), and the value: the column `metric`, else `value`. A table with the columns metric and
    value (and step), as `load_results` makes it, counts at the last step of each run.
    Raises ConfigError with every bad cell: row, column, what stands there.
    """
    rows = _rows(source)
    columns = list(dict.fromkeys(key for row in rows for key in row.cells))
    if not rows:
        raise ConfigError("the table has no rows", where=_name(source))
    seed = "seed" if "seed" in columns else "run"
    value = metric if metric is not None and metric in columns else "value"
    several = value == "value" and "metric" in columns
    if metric is not None and metric not in columns and not several:
        raise ConfigError(unknown("column", metric, columns), where=_name(source))
    lacking = [name for name in ("arm", seed, value) if name not in columns]
    if lacking:
        hint = "the columns are arm, seed (or run) and value"
        raise ConfigError([Problem(_name(source), unknown("column", c, columns)) for c in lacking], hint=hint)
    entries = _entries(rows, seed, value, several=several)
    chosen = _metric(entries, metric, _name(source)) if several else metric
    runs = _last(entries, chosen) if several and chosen else entries
    _refuse_duplicates(runs)
    table: dict[str, dict[str, Value]] = {}
    for entry in runs:
        table.setdefault(entry.arm, {})[entry.seed] = entry.value
    return table, chosen


def _rows(source: Source) -> list[Row]:
    if isinstance(source, (str, Path)):
        return _csv(Path(source))
    if isinstance(source, pd.DataFrame):
        records = source.to_dict("records")
        return [
            Row(f"row {label}", {str(k): v for k, v in r.items()})
            for label, r in zip(source.index, records, strict=True)
        ]
    if isinstance(source, Sequence):
        rows = [Row(f"row {i}", row) for i, row in enumerate(source) if isinstance(row, Mapping)]
        if len(rows) == len(source):
            return rows
    raise ConfigError(f"a table is expected (DataFrame, CSV file or list of rows), not {type(source).__name__}")


def _csv(path: Path) -> list[Row]:
    """By the csv module, not pandas: it keeps `nan` apart from an empty cell, and knows the line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows = [Row(f"{path}:{reader.line_num}", row) for row in reader]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"not a CSV file in UTF-8: {error}", where=str(path)) from None
    longer = [Problem(row.where, f"more cells than columns: {row.cells[None]}") for row in rows if None in row.cells]
    if longer:  # a decimal comma, most likely
        raise ConfigError(longer, hint="write 2.15, not 2,15")
    return rows


def _entries(rows: Iterable[Row], seed: str, value: str, *, several: bool) -> list[Entry]:
    entries, problems = [], []
    for row in rows:
        bad = [name for name in ("arm", seed) if _blank(row.cells.get(name))]
        problems += [Problem(row.where, f"column '{name}' is empty") for name in bad]
        numbers: dict[str, Value] = {}
        for name in (value, "step") if several else (value,):
            try:
                numbers[name] = _number(row.cells.get(name))
            except ValueError as error:
                bad.append(name)
                problems.append(Problem(row.where, f"column '{name}': {error}"))
        if not bad:
            measured = str(row.cells.get("metric")) if several else value
            arm, step = str(row.cells["arm"]).strip(), numbers.get("step")
            at = -1.0 if step is None else step
            entries.append(Entry(row.where, arm, _seed(row.cells[seed]), measured, at, numbers[value]))
    if problems:
        raise ConfigError(problems)
    return entries


def _number(cell: Any) -> Value:
    """A cell as a number, None when it is blank; raises ValueError that shows it."""
    if isinstance(cell, (bool, np.bool_)):
        raise ValueError(f"a number is expected, not {cell}")
    if isinstance(cell, (float, np.floating)):
        return float(cell)  # NaN included: a run that failed
    if _blank(cell):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"a number is expected, not {cell!r:.60}") from None


def _blank(cell: Any) -> bool:
    return cell is None or cell is pd.NA or (isinstance(cell, str) and not cell.strip()) or cell != cell


def _seed(cell: Any) -> str:
    """One spelling for 0, 0.0 and "0": pandas turns a column of integers with a gap into floats."""
    whole = isinstance(cell, (float, np.floating)) and float(cell).is_integer()
    return str(int(cell)) if whole else str(cell).strip()


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


def _refuse_duplicates(entries: Sequence[Entry]) -> None:
    first: dict[tuple[str, str], str] = {}
    problems = []
    for entry in entries:
        seen = first.setdefault((entry.arm, entry.seed), entry.where)
        if seen != entry.where:
            what = f"arm '{entry.arm}' has seed {entry.seed} already, in {seen}: columns 'arm' and 'seed' name one run"
            problems.append(Problem(entry.where, what))
    if problems:
        raise ConfigError(problems)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else "table"
