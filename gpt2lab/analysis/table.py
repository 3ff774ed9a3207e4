"""Read a table of results: rows of any source (see rows.py) become seed -> value for each arm.

A blank value is a run without a result yet; NaN or infinity is a run that failed. No row is dropped. Each run counts
once: copies of a run, and its training steps, are never taken for seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2lab.analysis.metrics import known
from gpt2lab.analysis.rows import (
    PREFERRED,
    PROGRESS,
    SEED_COLUMNS,
    STEPS,
    WHOLE,
    Columns,
    Named,
    Row,
    Source,
    Value,
    begun_in_order,
    blank,
    columns_of,
    counts_training,
    ended,
    is_exported,
    is_tracked,
    is_wide,
    name_of,
    number,
    rows_of,
    runs_of_arms,
    spelled,
    unfolded,
)
from gpt2lab.analysis.wording import listed
from gpt2lab.errors import ConfigError, Problem, unknown

REASON_COLUMNS = ("not_comparable", "tags.not_comparable")
"""Columns that say why an arm cannot be compared."""

RUN_COLUMNS = ("run", "run_id", "run_name", "name", "id", "tags.mlflow.runname")
"""Columns that identify runs, but not their seeds; case does not matter."""

FINAL = "final/"
"""Prefix of the metrics that `load_results` writes for the end of a run, whatever its step."""

FULL_PRECISION = 7
"""Significant digits to which two runs of different seeds do not agree by chance."""

ALONE = 3e38
"""Larger values do not fit single precision."""

LEAST, MOST = 1e-50, 1e50
"""Range of values that can be judged: the fourth power of a spread must be finite and not zero."""


@dataclass(frozen=True)
class Entry:
    """The value of `metric` of one arm and seed at a step."""

    where: str
    arm: str
    seed: str
    metric: str
    step: float
    value: Value


@dataclass(frozen=True, kw_only=True)
class Table:
    """The content of a table."""

    runs: dict[str, dict[str, Value]]
    """arm -> seed -> value; None for a run without a value"""
    metric: str | None
    not_comparable: dict[str, str]
    """arm -> why it cannot be compared, where the table has a column that says so"""
    ends: dict[str, float]
    """arm -> the step at which its runs end, where the table holds steps"""
    copies: tuple[Problem, ...]
    """runs of one arm whose values agree digit for digit"""
    begun: bool
    """whether the runs of an arm are in the order of their start"""


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
    `value`, else the one column that has the name of a known metric. A table with a column of steps counts at the last
    step of each run, also one with columns metric and value, as `load_results` makes it. In an MLflow table (columns
    run_id, status, metrics.*, params.*, tags.*) the prefixes may be left out; rows.py lists the default columns.
    Raises ConfigError with every bad cell: row, column, content.
    """
    rows, where = rows_of(source), name_of(source)
    names = Named(metric=metric, arm=arm, seed=seed, value=value)
    if not rows:
        raise ConfigError("the table has no rows", where=where)
    if seed is not None and counts_training(seed):
        what = f"the steps of a run are no seeds: '{seed}' tells no runs apart"
        raise ConfigError(what, where=where, hint="seed=COLUMN")
    begun = False
    if is_tracked(_columns(rows)):
        chosen = columns_of(_columns(rows), names, where)
        rows = runs_of_arms(rows, chosen, where)
        begun = begun_in_order(rows)
    else:
        if arm is None and is_wide(_columns(rows)):
            rows = unfolded(rows, _columns(rows), metric, where)
        chosen = _plain_columns(rows, names, where)
        rows = ended(rows, chosen.value) if is_exported(_columns(rows)) else rows
    _refuse_repeated_seeds(rows, chosen)
    ends: dict[str, float] = {}
    entries = _entries(rows, chosen)
    named = _metric(entries, metric, where) if chosen.several else chosen.metric
    if chosen.several or chosen.step:
        entries, ends = _last(entries, named if chosen.several and named else chosen.value)
    _refuse_duplicates(entries, chosen)
    _refuse_sizes(entries)
    runs: dict[str, dict[str, Value]] = {}
    for entry in entries:
        runs.setdefault(entry.arm, {})[entry.seed] = entry.value
    reasons = _reasons(rows, chosen.arm)
    return Table(runs=runs, metric=named, not_comparable=reasons, ends=ends, copies=_copies(entries), begun=begun)


def refuse_copies(table: Table) -> None:
    """Raises ConfigError for runs that are copies of one; not for metrics that count."""
    _refuse(table.copies, "keep one of the two")


def in_order(table: Table) -> dict[str, dict[str, Value]]:
    """The runs in the order in which looks count them: by their start, else by the number of the seed.

    Raises ConfigError for seeds without an order.
    """
    if table.begun:
        return table.runs
    for arm, runs in table.runs.items():
        for seed in runs:
            if not WHOLE.fullmatch(seed):
                what = f"which seeds came first is not known: seed '{seed}' of arm '{arm}' is no whole number"
                hint = "number the seeds of each arm 0, 1, 2, ... as they were run, or leave out the looks"
                raise ConfigError(what, where="looks", hint=hint)
    return {arm: dict(sorted(runs.items(), key=lambda run: int(run[0]))) for arm, runs in table.runs.items()}


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.cells))


def _plain_columns(rows: Sequence[Row], given: Named, where: str) -> Columns:
    columns = _columns(rows)
    metric, value = given.metric, given.value
    direct = metric is not None and metric in columns
    if value is not None and direct and metric != value:
        raise ConfigError(f"'{metric}' and '{value}' are both columns: which one holds the values?", where=where)
    arm, seed = given.arm or "arm", given.seed or ("seed" if "seed" in columns else "run")
    several = "metric" in columns and not direct
    if metric is not None and not direct and not several:
        raise ConfigError(unknown("column", metric, columns), where=where)
    held = value or (metric if metric is not None and direct else _value_column(columns, where))
    lacking = [name for name in (arm, seed, held) if name not in columns]
    training = next(filter(counts_training, columns), None)
    if lacking == ["run"] and training:
        what = f"no column tells the runs of an arm apart; the steps of a run ('{training}') are no seeds"
        raise ConfigError(what, where=where, hint="seed=COLUMN")
    if lacking:
        hint = "the columns are arm, seed (or run) and value"
        hint = f"{hint}, unless others are named" if given.arm or given.seed or value else hint
        several_lack = f"no columns {listed(map(repr, lacking))} (known: {', '.join(columns)})"
        what = unknown("column", lacking[0], columns) if len(lacking) == 1 else several_lack
        raise ConfigError(what, where=where, hint=hint)
    named = metric or (held if held != "value" or value else None)
    step = _step_column(rows, (arm, seed, "metric") if several else (arm, seed))
    return Columns(arm=arm, seed=seed, value=held, metric=named, several=several, step=step)


def _value_column(columns: Sequence[str], where: str) -> str:
    """`value`, else the one column that has the name of a known metric."""
    preferred = next((name for name in ("value", *PREFERRED) if name in columns), None)
    metrics = [name for name in columns if known(name)]
    if preferred is None and len(metrics) > 1:
        raise ConfigError(f"which metric? The table holds {', '.join(metrics)}", where=where, hint="metric=NAME")
    return preferred or (metrics[0] if metrics else "value")


def _step_column(rows: Sequence[Row], run: Sequence[str]) -> str | None:
    """The column of steps; PROGRESS columns only where a run has several rows."""
    columns = _columns(rows)
    if is_exported(columns):
        return None  # one row for each run
    names = {name.casefold(): name for name in columns}
    if any(name in names for name in STEPS):
        return next(names[name] for name in STEPS if name in names)
    several = len({tuple(str(row.cells.get(name)) for name in run) for row in rows}) < len(rows)
    return next((names[name] for name in PROGRESS if name in names and several), None)


def _reasons(rows: Sequence[Row], arm: str) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for row in rows:
        for name in REASON_COLUMNS:
            if not blank(row.cells.get(name)):
                reasons.setdefault(str(row.cells[arm]).strip(), str(row.cells[name]).strip())
    return reasons


def _entries(rows: Iterable[Row], chosen: Columns) -> list[Entry]:
    entries, problems = [], []
    value, step = chosen.value, chosen.step
    for row in rows:
        bad = [name for name in (chosen.arm, chosen.seed) if blank(row.cells.get(name))]
        problems += [Problem(row.where, f"column '{name}' is empty") for name in bad]
        numbers: dict[str, Value] = {}
        for name in (value, step) if step else (value,):
            try:
                numbers[name] = number(row.cells.get(name))
            except ValueError as error:
                bad.append(name)
                problems.append(Problem(row.where, f"column '{name}': {error}"))
        if not bad:
            measured = str(row.cells.get("metric")) if chosen.several else value
            arm, at = str(row.cells[chosen.arm]).strip(), numbers.get(step) if step else None
            at = -1.0 if at is None else at
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


def _last(entries: Sequence[Entry], metric: str) -> tuple[list[Entry], dict[str, float]]:
    """The value of `metric` at the last step of every run, and at which step the runs of each arm end.

    A run that stopped before the other runs of its arm, or lacks the metric, has failed if its last loss is not
    finite, and else has no value yet. Where a metric is final by its name, each run has an end of its own.
    """
    ends: dict[str, float] = {}
    runs: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        runs.setdefault((entry.arm, entry.seed), []).append(entry)
        if entry.metric == metric and entry.value is not None:
            ends[entry.arm] = max(ends.get(entry.arm, -1.0), entry.step)
    final_entries: list[Entry] = []
    for (arm, seed), run_entries in runs.items():
        taken = [e for e in run_entries if e.value is not None]
        values = [e for e in taken if e.metric == metric]
        end = max((e.step for e in values), default=None) if metric.startswith(FINAL) else ends.get(arm)
        last = max((e.step for e in taken), default=-1.0)
        losses = [e for e in taken if e.step == last and (e.metric == metric or "loss" in e.metric)]
        broken = any(not _finite(e.value) for e in losses)
        final = [e for e in values if e.step == end]
        final_entries += final or [Entry(run_entries[-1].where, arm, seed, metric, last, math.nan if broken else None)]
    compared = {} if metric.startswith(FINAL) else ends
    judged = {entry.arm for entry in final_entries if entry.value is not None and _finite(entry.value)}
    return final_entries, {arm: end for arm, end in compared.items() if arm in judged and end >= 0}


def _finite(value: Value) -> bool:
    return value is None or math.isfinite(value)


def _refuse_repeated_seeds(rows: Sequence[Row], chosen: Columns) -> None:
    """Runs of one arm and seed that differ in their names alone."""
    columns = _columns(rows)
    if chosen.seed.casefold() not in RUN_COLUMNS:
        return
    seed = next((name for name in SEED_COLUMNS if name in columns and name.casefold() not in RUN_COLUMNS), None)
    first: dict[tuple[str, str], Row] = {}
    problems = []
    for row in rows:
        if seed is None or any(blank(row.cells.get(name)) for name in (chosen.arm, chosen.seed, seed)):
            continue
        arm, label = str(row.cells[chosen.arm]).strip(), spelled(row.cells[seed])
        seen = first.setdefault((arm, label), row)
        if spelled(seen.cells[chosen.seed]) != spelled(row.cells[chosen.seed]):
            what = f"arm '{arm}' has seed {label} already, in {seen.where}: by '{seed}' they are one seed"
            problems.append(Problem(row.where, what))
    _refuse(problems, "keep one run of each arm and seed")


def _refuse_duplicates(entries: Sequence[Entry], chosen: Columns) -> None:
    first: dict[tuple[str, str], Entry] = {}
    problems = []
    for entry in entries:
        seen = first.setdefault((entry.arm, entry.seed), entry)
        if seen is not entry:  # not by the place: joined frames have two rows 0
            what = f"arm '{entry.arm}' has seed {entry.seed} already, in {seen.where}: "
            what += f"columns '{chosen.arm}' and '{chosen.seed}' name one run"
            problems.append(Problem(entry.where, what))
    _refuse(problems, "keep one run of each arm and seed")


def _refuse_sizes(entries: Sequence[Entry]) -> None:
    odd = [e for e in entries if e.value and math.isfinite(e.value) and not LEAST < abs(e.value) < MOST]
    what = f"is no size that can be judged (from {LEAST:g} to {MOST:g})"
    problems = [Problem(e.where, f"seed {e.seed} of arm '{e.arm}': {e.value:g} {what}") for e in odd]
    _refuse(problems, "write inf for a run that failed, or give all values in another unit")


def _copies(entries: Sequence[Entry]) -> tuple[Problem, ...]:
    first: dict[tuple[str, float], Entry] = {}
    problems = []
    for entry in entries:
        if entry.value is None or not math.isfinite(entry.value) or _digits(entry.value) < FULL_PRECISION:
            continue
        seen = first.setdefault((entry.arm, entry.value), entry)
        if seen is not entry:
            what = (
                f"seed {entry.seed} of arm '{entry.arm}' has the value of seed {seen.seed} in {seen.where}, digit for "
            )
            problems.append(Problem(entry.where, f"{what}digit ({entry.value:.15g}): they are one run"))
    return tuple(problems)


def _digits(value: float) -> int:
    """Significant digits that it takes to write it, in single precision where that holds it."""
    single = abs(value) < ALONE and float(np.float32(value)) == value
    mantissa = str(np.float32(value)) if single else f"{value:.12g}"  # 2.1431999999999998 has five
    return len(mantissa.partition("e")[0].replace(".", "").strip("-0"))


def _refuse(problems: Sequence[Problem], hint: str) -> None:
    """Raises ConfigError with the first of many like it."""
    if problems:
        more = f" (and {len(problems) - 1} more such rows)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0].what}{more}", where=problems[0].where, hint=hint)
