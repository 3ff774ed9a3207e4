"""Reads a table of results (DataFrame, CSV file, list of rows or tracker export) as seed -> value per arm.

A CSV file may be separated by commas, semicolons (then with decimal commas too) or tabs; blank lines and lines that
begin with # are skipped. Tables of MLflow (`mlflow.search_runs`, with columns run_id, status, metrics.*, params.* and
tags.*) and Weights & Biases (runs with columns Name and State, or charts with a column for each run) are recognised by
their columns. The status of a run counts, and runs that only group others, or belong to a sweep, belong to no arm.

A blank value is a run without a result yet; NaN or infinity is a run that failed. No row is dropped. Each run counts
once: copies of a run, and its training steps, are never taken for seeds. The name of a metric determines direction and
unit.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from gpt2lab.analysis.logged import RUN, logged_rows
from gpt2lab.analysis.metric_names import metric_spec
from gpt2lab.analysis.wording import listed
from gpt2lab.errors import ConfigError, Problem, unknown

if TYPE_CHECKING:
    import pandas as pd

Source: TypeAlias = "pd.DataFrame | str | Path | Sequence[Mapping[str, Any]]"
Value = float | None
T = TypeVar("T")

NO_VALUE = ("na", "n/a", "#n/a", "<na>", "-", "--", "null", "none")
FAILED = ("crashed", "failed", "diverged")
"""Cells of a run without a value yet, and of a failed one, in addition to NaN and infinity."""
WHOLE = re.compile(r"([+-]?\d{1,18})(\.0*)?")
DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+([eE][+-]?\d+)?)")

FINAL = "final/"
"""Prefix of the metrics that `load_results` writes for the end of a run, whatever its step."""
PREFERRED = ("final/val/loss", "val/loss")
"""Metrics that are the result of a run, the best first, in a table of several."""
REASON_COLUMNS = ("not_comparable", "tags.not_comparable")
"""Columns that say why an arm cannot be compared."""
RUN_COLUMNS = ("run", "run_id", "run_name", "name", "id", "tags.mlflow.runname")
"""Columns that identify runs, but not their seeds; case does not matter."""
STEPS = ("step", "_step", "global_step", "trainer/global_step", "iteration", "iter")
PROGRESS = ("steps", "epoch", "tokens")
"""Columns of training progress; these may also be a property of a whole run."""

ARM_COLUMNS = ("arm", "tags.gpt2lab.arm", "params.arm", "tags.arm")
SEED_COLUMNS = ("seed", "tags.gpt2lab.seed", "params.seed", "tags.seed", "run_id")
METRIC_COLUMNS = ("value", "metrics.val-final/loss", *(f"metrics.{name}" for name in PREFERRED))
"""Columns of an MLflow table, the best first, where the caller names none."""
PREFIXES = ("metrics.", "params.", "tags.")

MLFLOW, WANDB = ("run_id", "status"), ("Name", "State")
"""Columns by which tables of runs are recognised."""
UNFINISHED = ("running", "scheduled", "pending", "queued", "preempting", "preempted")
BROKEN = ("failed", "killed", "crashed")
"""Status of a run that is not over, and of one that failed, in either tracker."""
MIRROR_OPEN = ("running", "failed", "partial", "absent")
"""Status tags of our mirror for runs that the same command resumes; a run that diverged is FAILED alone."""

BETWEEN = " - "
"""Separates run and metric in the head of a W&B column."""
NOT_MEASURED = re.compile(r"_.*|.*__(MIN|MAX)")
"""Metrics of the export itself: `_step`, and the range of a smoothed curve."""

FULL_PRECISION = 7
"""Significant digits at which runs with different seeds do not agree by chance."""
SINGLE = 3e38
"""Larger values do not fit single precision."""
LEAST, MOST = 1e-50, 1e50
"""Range of values that can be judged: the fourth power of a spread must be finite and not zero."""


class TableRow(NamedTuple):
    """Cells by column; `where` is their place for error messages."""

    where: str
    cells: Mapping[Any, Any]


class Columns(NamedTuple):
    """Which column holds what. `metric` names the value, where the table says so; with `several`, a column `metric`
    does. `step` where the table holds several steps of a run."""

    arm: str
    seed: str
    value: str
    metric: str | None
    several: bool = False
    step: str | None = None


class TableValue(NamedTuple):
    """The value of `metric` of one arm and seed at a step."""

    where: str
    arm: str
    seed: str
    metric: str
    step: float
    value: Value


@dataclass(frozen=True, kw_only=True)
class ResultsTable:
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
) -> ResultsTable:
    """The runs of every arm in a table.

    Columns, unless `arm`, `seed` and `value` name others: arm, seed (or run), and the value: the column `metric`, else
    `value`, else the one column that has the name of a known metric. A table with a column of steps counts at the last
    step of each run, also one with columns metric and value, as `load_results` makes it. In an MLflow table the
    prefixes may be left out; its default columns are ARM_COLUMNS, SEED_COLUMNS and METRIC_COLUMNS.
    Raises ConfigError with every bad cell: row, column, content.
    """
    rows, where = _rows(source), str(source) if isinstance(source, (str, Path)) else "table"
    if not rows:
        raise ConfigError("the table has no rows", where=where)
    if seed is not None and _counts_training(seed):
        problem = f"the steps of a run are not seeds: '{seed}' does not distinguish runs"
        raise ConfigError(problem, where=where, hint="seed=COLUMN")
    begun, columns = False, _names(rows)
    if {*MLFLOW} <= {*columns} and any(name.startswith(PREFIXES) for name in columns):
        chosen = _mlflow_columns(columns, where, metric, arm, seed, value)
        rows = _runs_of_arms(rows, chosen, where)
        times = [row.cells.get("start_time") for row in rows]
        begun = not any(map(_blank, times)) and len(set(map(type, times))) == 1
    else:
        if arm is None and _is_wide(columns):
            rows = _unfolded(rows, columns, metric, where)
        chosen = _plain_columns(rows, where, metric, arm, seed, value)
        if {*WANDB} <= {*_names(rows)}:
            value_column = chosen.value
            rows = [
                TableRow(w, {**c, value_column: _value_by_status(c.get("State"), c.get(value_column))}) for w, c in rows
            ]
    _refuse_repeated_seeds(rows, chosen)
    ends: dict[str, float] = {}
    entries, named = _entries(rows, chosen), chosen.metric
    if chosen.several:
        names = list(dict.fromkeys(entry.metric for entry in entries))
        if metric is not None and metric not in names:
            raise ConfigError(unknown("metric", metric, names), where=where)
        named = metric or _choose_metric(names, PREFERRED, where)
    if chosen.several or chosen.step:
        entries, ends = _last(entries, named if chosen.several and named else chosen.value)
    _refuse_duplicates(entries, chosen)
    _refuse_sizes(entries)
    runs: dict[str, dict[str, Value]] = defaultdict(dict)
    for entry in entries:
        runs[entry.arm][entry.seed] = entry.value
    reasons: dict[str, str] = {}
    for row, column in ((row, column) for row in rows for column in REASON_COLUMNS):
        if not _blank(row.cells.get(column)):
            reasons.setdefault(str(row.cells[chosen.arm]).strip(), str(row.cells[column]).strip())
    copies = tuple(_copies(entries))
    return ResultsTable(runs={**runs}, metric=named, not_comparable=reasons, ends=ends, copies=copies, begun=begun)


def refuse_copies(table: ResultsTable) -> None:
    """Raises ConfigError for runs that are copies of one; not for metrics that count."""
    _refuse(table.copies, "keep one of the two")


def in_order(table: ResultsTable) -> dict[str, dict[str, Value]]:
    """The runs in the order in which looks count them: by their start, else by the number of the seed.

    Raises ConfigError for seeds without an order.
    """
    if table.begun:
        return table.runs
    for arm, seed in ((arm, seed) for arm, runs in table.runs.items() for seed in runs):
        if not WHOLE.fullmatch(seed):
            problem = f"which seeds came first is not known: seed '{seed}' of arm '{arm}' is no whole number"
            hint = "number the seeds of each arm 0, 1, 2, ... as they were run, or leave out the looks"
            raise ConfigError(problem, where="looks", hint=hint)
    return {arm: dict(sorted(runs.items(), key=lambda run: int(run[0]))) for arm, runs in table.runs.items()}


# Rows and cells.


def _rows(source: Source) -> list[TableRow]:
    """Every row of any source. Raises ConfigError for anything that is not a table."""
    if isinstance(source, (str, Path)):
        logged = logged_rows(Path(source))
        return _csv(Path(source)) if logged is None else [TableRow(*row) for row in logged]
    pandas = sys.modules.get("pandas")  # imported by the caller if the source is a frame; others need not wait
    records: Sequence[Any] | None = source if isinstance(source, Sequence) else None
    labels: Iterable[Any] = range(len(records or ()))
    if pandas is not None and isinstance(source, pandas.DataFrame):
        _refuse_repeated_columns(map(str, source.columns), "table")
        records, labels = source.to_dict("records"), source.index
    if records is None or not all(isinstance(row, Mapping) for row in records):
        raise ConfigError(f"a table is expected (DataFrame, CSV file or list of rows), not {type(source).__name__}")
    return [
        TableRow(f"row {label}", {str(k): v for k, v in row.items()})
        for label, row in zip(labels, records, strict=True)
    ]


def _csv(path: Path) -> list[TableRow]:
    """By the csv module, not pandas: it distinguishes `nan` from an empty cell, and gives the number of the line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = ["\n" if line.lstrip().startswith("#") else line for line in file]  # keeps line numbers
        mark = max(",;\t", key=next(filter(str.strip, lines), "").count)
        reader = csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)
        filled = [(f"{path}:{reader.line_num}", cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"not a CSV file in UTF-8: {error}", where=str(path)) from None
    names = [name.strip() for name in filled[0][1]] if filled else []
    _refuse_repeated_columns(names, str(path))
    longer = [(where, cells[len(names) :]) for where, cells in filled[1:] if len(cells) > len(names)]
    if longer:  # a decimal comma, most likely
        problems = [Problem(where, f"more cells than columns: {more}") for where, more in longer]
        raise ConfigError(problems, hint="write 2.15, not 2,15")
    rows = []
    for where, cells in filled[1:]:
        texts = cells if mark == "," else [DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells]
        rows.append(TableRow(where, dict.fromkeys(names, "") | dict(zip(names, texts, strict=False))))
    return rows


def _refuse_repeated_columns(names: Iterable[str], where: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        problem = f"{len(repeated)} column names occur twice: {', '.join(repeated)}"
        problem = f"two columns are called '{repeated[0]}'" if len(repeated) == 1 else problem
        raise ConfigError(problem, where=where, hint="rename or drop one of them")


def _names(rows: Sequence[TableRow]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.cells))


def _number(cell: Any) -> Value:
    """A cell as a number, None when it is blank. Raises ValueError that shows the cell."""
    if isinstance(cell, (bool, np.bool_)):
        raise ValueError(f"a number is expected, not {cell}")
    if isinstance(cell, (float, np.floating)):
        return float(cell)  # NaN included: a run that failed
    text = cell.strip().casefold() if isinstance(cell, str) else ""
    if _blank(cell) or text in NO_VALUE:
        return None
    if text in FAILED:
        return math.nan
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a number is expected, not {cell!r:.60}") from None


def _blank(cell: Any) -> bool:
    """Whether a cell is empty, which pandas writes as NaN in a column of text."""
    missing = getattr(sys.modules.get("pandas"), "NA", None)
    return cell is None or cell is missing or (isinstance(cell, str) and not cell.strip()) or cell != cell


def _spelled(cell: Any) -> str:
    """One spelling for 0, 0.0, "0" and "0.0": pandas turns a column of integers with a gap into floats."""
    text = f"{cell:.0f}" if isinstance(cell, (float, np.floating)) and cell % 1 == 0 else str(cell).strip()
    whole = WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else str(cell).strip()


def _counts_training(name: str) -> bool:
    """Whether a column of this name holds training progress, which does not identify runs."""
    return name.casefold().removeprefix("metrics.") in (*STEPS, *PROGRESS)


def _choose_metric(names: Iterable[str], preferred: Iterable[str], where: str) -> str | None:
    """The first of `preferred` among the names of metrics, else the only name; None where there is none."""
    names = list(names)
    best = next((name for name in preferred if name in names), None)
    if best is None and len(names) > 1:
        raise ConfigError(f"which metric? The table holds {', '.join(sorted(names))}", where=where, hint="metric=NAME")
    return best or (names[0] if names else None)


# Plain tables, and wide ones.


def _plain_columns(
    rows: Sequence[TableRow], where: str, metric: str | None, arm: str | None, seed: str | None, value: str | None
) -> Columns:
    columns = _names(rows)
    direct = metric is not None and metric in columns
    if value is not None and direct and metric != value:
        raise ConfigError(f"'{metric}' and '{value}' are both columns: which one holds the values?", where=where)
    hint = "the columns are arm, seed (or run) and value"
    hint += ", unless others are named" if arm or seed or value else ""
    arm, seed = arm or "arm", seed or ("seed" if "seed" in columns else "run")
    several = "metric" in columns and not direct
    if metric is not None and not direct and not several:
        raise ConfigError(unknown("column", metric, columns), where=where)
    default = next((name for name in ("value", *PREFERRED) if name in columns), None)
    value_column = value or (
        metric if direct and metric else default or _choose_metric(filter(metric_spec, columns), (), where) or "value"
    )
    missing = [name for name in (arm, seed, value_column) if name not in columns]
    training = next(filter(_counts_training, columns), None)
    if missing == ["run"] and training:
        problem = f"no column distinguishes the runs of an arm; the steps of a run ('{training}') are not seeds"
        raise ConfigError(problem, where=where, hint="seed=COLUMN")
    if missing:
        problem = f"no columns {listed(map(repr, missing))} (known: {', '.join(columns)})"
        problem = unknown("column", missing[0], columns) if len(missing) == 1 else problem
        raise ConfigError(problem, where=where, hint=hint)
    named = metric or (value_column if value_column != "value" or value else None)
    step = _step_column(rows, columns, (arm, seed, "metric") if several else (arm, seed))
    return Columns(arm, seed, value_column, named, several, step)


def _step_column(rows: Sequence[TableRow], columns: Sequence[str], run: Sequence[str]) -> str | None:
    """The column of steps; PROGRESS columns only where a run has several rows."""
    if {*WANDB} <= {*columns}:
        return None  # one row for each run
    several = len({tuple(str(row.cells.get(name)) for name in run) for row in rows}) < len(rows)
    names = {name.casefold(): name for name in columns}
    return next((names[name] for name in (*STEPS, *(PROGRESS if several else ())) if name in names), None)


def _is_wide(columns: Sequence[str]) -> bool:
    """Whether every run has a column, and every step a row."""
    if "arm" in columns or not columns:
        return False
    first, *rest = columns
    runs = _counts_training(first) and all(RUN.fullmatch(name) for name in rest)
    return bool(rest) and (runs or any(BETWEEN in name for name in rest))


def _unfolded(rows: Sequence[TableRow], columns: Sequence[str], metric: str | None, where: str) -> list[TableRow]:
    """The same values with the columns arm, seed, step, value and, where it has a name, metric.

    metric: of the values where columns are named after runs alone.
    Raises ConfigError for a run whose name does not end in its seed.
    """
    exported = any(BETWEEN in name for name in columns)
    shared = [name for name in columns if BETWEEN not in name] if exported else list(columns[:1])
    step = next(filter(_counts_training, shared), shared[0] if shared else None)
    if step is None:
        raise ConfigError("no column holds the steps", where=where)
    long: list[TableRow] = []
    for name in columns:
        run, _, measured = name.rpartition(BETWEEN) if exported else (name, "", metric or "")
        if name in shared or NOT_MEASURED.fullmatch(measured):
            continue
        parts = RUN.fullmatch(run.strip())
        if parts is None:
            hint = "name runs as base-seed0, or give a table with the columns arm, seed, step and value"
            raise ConfigError(f"column '{name}': the name of the run does not end in its seed", where=where, hint=hint)
        base = parts.groupdict() | ({"metric": measured} if measured else {})
        for row in [row for row in rows if not _blank(row.cells.get(name))] or rows[-1:]:
            cells = base | {"step": row.cells.get(step), "value": row.cells.get(name)}
            long.append(TableRow(f"{row.where}, column '{name}'", cells))
    return long


# Tables of MLflow, and the status of runs.


def _mlflow_columns(
    columns: Sequence[str], where: str, metric: str | None, arm: str | None, seed: str | None, value: str | None
) -> Columns:
    """The columns that the caller named, with or without prefix, else the preferred ones of the table."""

    def column(kind: str, name: str | None, prefixes: Sequence[str], preferred: Sequence[str]) -> str | None:
        candidates = [f"{prefix}{name}" for prefix in ("", *prefixes)] if name else preferred
        first = next((name for name in candidates if name in columns), None)
        if name and first is None:
            raise ConfigError(unknown("column", name, columns), where=where, hint=f"{kind}=COLUMN")
        return first

    if metric is not None and value is not None:
        raise ConfigError("metric and value both name what is compared: give one of them", where=where)
    arms = column("arm", arm, PREFIXES[1:], ARM_COLUMNS)
    if arms is None:
        problem = f"no column has the arm of a run: none of {', '.join(ARM_COLUMNS)} is there (columns: "
        raise ConfigError(f"{problem}{', '.join(sorted(columns))})", where=where, hint="arm=COLUMN")
    seeds = column("seed", seed, PREFIXES[1:], SEED_COLUMNS) or MLFLOW[0]
    value_column = column("value", value, PREFIXES, METRIC_COLUMNS if metric is None else ())
    value_column = value_column or _metric_column(columns, metric, where)
    return Columns(
        arms, seeds, value_column, None if value_column == "value" else value_column.removeprefix("metrics.")
    )


def _metric_column(columns: Sequence[str], metric: str | None, where: str) -> str:
    """The column of a metric; the final evaluation by its name in `load_results` or in our mirror."""
    names = [name.removeprefix("metrics.") for name in columns if name.startswith("metrics.")]
    if metric is None:
        only = _choose_metric(names, (), where)
        if only is None:
            raise ConfigError("no run has any metric", where=where)
        return f"metrics.{only}"
    bare = metric.removeprefix("metrics.")
    logged = next((name for name in (bare, bare.replace("final/val/", "val-final/", 1)) if name in names), None)
    if logged is None and metric not in columns:
        raise ConfigError(unknown("metric", bare, names), where=where, hint="metric=NAME")
    return f"metrics.{logged}" if logged else metric


def _runs_of_arms(rows: Sequence[TableRow], chosen: Columns, where: str) -> list[TableRow]:
    """The rows that are runs of an arm, in the order of their start (MLflow lists the newest first), with the values of
    unfinished and failed runs replaced."""
    parents = {row.cells.get("tags.mlflow.parentRunId") for row in rows}
    runs, studies = [], set()
    for _, cells in rows:
        if not _blank(cells.get("tags.gpt2lab.sweep")):
            continue  # trials are no arms
        study = cells.get("tags.gpt2lab.study")
        if not _blank(study):
            if _blank(cells.get("tags.gpt2lab.arm")) or _mirror_seed(cells) is None:
                continue  # the study itself; a trial of a rate, or a run of another budget: "0 lr x2", "0 0.5x"
            studies.add(str(study))
        elif cells["run_id"] in parents and _blank(cells.get(chosen.arm)):
            continue  # it only groups others
        mirror = cells.get("tags.gpt2lab.status")
        value = _value_by_status(cells.get("status"), _mlflow_value(cells.get(chosen.value), mirror))
        value = None if mirror in MIRROR_OPEN else value
        runs.append(TableRow(f"run {cells['run_id']}", {**cells, chosen.value: value}))
    if not runs:
        raise ConfigError("no run of an arm is among the runs", where=where)
    if len(studies) > 1:
        hint = f"keep one: frame[frame['tags.gpt2lab.study'] == '{min(studies)}']"
        raise ConfigError(f"runs of several studies: {', '.join(sorted(studies))}", where=where, hint=hint)
    try:
        return sorted(runs, key=lambda row: (_mirror_seed(row.cells) or 0, row.cells.get("start_time") or 0))
    except TypeError:  # times of several kinds
        return runs


def _mirror_seed(cells: Mapping[Any, Any]) -> int | None:
    """The seed of a run of our mirror; None where the tag is absent or holds more than a seed."""
    cell = cells.get("tags.gpt2lab.seed")
    seed = "" if _blank(cell) else _spelled(cell)
    return int(seed) if seed.isdecimal() else None


def _mlflow_value(cell: Any, mirror: Any) -> Any:
    """The value of a finished run; a run of our mirror has its end before its final evaluation."""
    try:
        number = _number(cell)
    except ValueError:
        return cell  # refused with all other bad cells
    if number is None or (mirror == "finished" and math.isnan(number)):
        return None
    return math.inf if abs(number) >= sys.float_info.max else number  # MLflow's spelling of infinity


def _value_by_status(status: Any, value: Any) -> Any:
    """None before the end of a run, NaN for a failure, else its value."""
    state = str(status).strip().casefold()
    return None if state in UNFINISHED else math.nan if state in BROKEN else value


# Entries.


def _entries(rows: Iterable[TableRow], chosen: Columns) -> list[TableValue]:
    entries, problems = [], []
    for where, cells in rows:
        bad = [Problem(where, f"column '{n}' is empty") for n in (chosen.arm, chosen.seed) if _blank(cells.get(n))]
        numbers: dict[str | None, Value] = {None: None}
        for name in filter(None, (chosen.value, chosen.step)):
            try:
                numbers[name] = _number(cells.get(name))
            except ValueError as error:
                bad.append(Problem(where, f"column '{name}': {error}"))
        problems += bad
        if not bad:
            metric = str(cells.get("metric")) if chosen.several else chosen.value
            step = numbers[chosen.step]
            arm, seed = str(cells[chosen.arm]).strip(), _spelled(cells[chosen.seed])
            entries.append(TableValue(where, arm, seed, metric, -1.0 if step is None else step, numbers[chosen.value]))
    if problems:
        raise ConfigError(problems)
    return entries


def _last(entries: Sequence[TableValue], metric: str) -> tuple[list[TableValue], dict[str, float]]:
    """The value of `metric` at the last step of every run, and at which step the runs of each arm end.

    A run that stopped before the other runs of its arm, or lacks the metric, has failed if its last loss is not
    finite, and else has no value yet. Where a metric is final by its name, each run has an end of its own.
    """
    ends: dict[str, float] = {}
    runs: dict[tuple[str, str], list[TableValue]] = defaultdict(list)
    for entry in entries:
        runs[entry.arm, entry.seed].append(entry)
        if entry.metric == metric and entry.value is not None:
            ends[entry.arm] = max(ends.get(entry.arm, -1.0), entry.step)
    final_entries: list[TableValue] = []
    for (arm, seed), run in runs.items():
        valued = [e for e in run if e.value is not None]
        values = [e for e in valued if e.metric == metric]
        end = max((e.step for e in values), default=None) if metric.startswith(FINAL) else ends.get(arm)
        last = max((e.step for e in valued), default=-1.0)
        losses = [e for e in valued if e.step == last and (e.metric == metric or "loss" in e.metric)]
        missing = None if all(map(_finite, losses)) else math.nan
        final = [e for e in values if e.step == end]
        final_entries += final or [TableValue(run[-1].where, arm, seed, metric, last, missing)]
    judged = {entry.arm for entry in final_entries if entry.value is not None and _finite(entry)}
    compared = {} if metric.startswith(FINAL) else ends
    return final_entries, {arm: end for arm, end in compared.items() if arm in judged and end >= 0}


def _finite(entry: TableValue) -> bool:
    return entry.value is None or math.isfinite(entry.value)


# What is refused.


def _repeats(items: Iterable[T], key: Callable[[T], Hashable]) -> Iterator[tuple[T, T]]:
    """Every item whose key, unless None, an earlier one had, with that one. Joined frames have two rows of one name."""
    first: dict[Hashable, T] = {None: None}  # type: ignore[dict-item]
    for item in items:
        earlier = first.setdefault(key(item), item)
        if earlier is not None and earlier is not item:
            yield item, earlier


def _refuse_repeated_seeds(rows: Sequence[TableRow], chosen: Columns) -> None:
    """Runs of one arm and seed that differ in their names alone."""
    seed_columns = [name for name in SEED_COLUMNS if name in _names(rows) and name not in RUN_COLUMNS]
    if chosen.seed.casefold() not in RUN_COLUMNS or not seed_columns:
        return
    seed = seed_columns[0]

    def arm_and_seed(row: TableRow) -> Hashable:
        cells = [row.cells.get(name) for name in (chosen.arm, seed, chosen.seed)]
        return None if any(map(_blank, cells)) else (str(cells[0]).strip(), _spelled(cells[1]))

    problems = []
    for row, earlier in _repeats(rows, arm_and_seed):
        if _spelled(earlier.cells[chosen.seed]) != _spelled(row.cells[chosen.seed]):
            problem = f"arm '{str(row.cells[chosen.arm]).strip()}' has seed {_spelled(row.cells[seed])} already"
            problems.append(Problem(row.where, f"{problem}, in {earlier.where}: by '{seed}' they are one seed"))
    _refuse(problems, "keep one run of each arm and seed")


def _refuse_duplicates(entries: Sequence[TableValue], chosen: Columns) -> None:
    names = f"columns '{chosen.arm}' and '{chosen.seed}' name one run"
    problems = [
        Problem(entry.where, f"arm '{entry.arm}' has seed {entry.seed} already, in {earlier.where}: {names}")
        for entry, earlier in _repeats(entries, lambda entry: (entry.arm, entry.seed))
    ]
    _refuse(problems, "keep one run of each arm and seed")


def _refuse_sizes(entries: Sequence[TableValue]) -> None:
    odd = [e for e in entries if e.value and math.isfinite(e.value) and not LEAST < abs(e.value) < MOST]
    problem = f"is no size that can be judged (from {LEAST:g} to {MOST:g})"
    problems = [Problem(e.where, f"seed {e.seed} of arm '{e.arm}': {e.value:g} {problem}") for e in odd]
    _refuse(problems, "write inf for a run that failed, or give all values in another unit")


def _copies(entries: Sequence[TableValue]) -> Iterator[Problem]:
    precise = [e for e in entries if e.value is not None and _finite(e) and _digits(e.value) >= FULL_PRECISION]
    for entry, earlier in _repeats(precise, lambda entry: (entry.arm, entry.value)):
        source = f"the value of seed {earlier.seed} in {earlier.where}, digit for digit ({entry.value:.15g})"
        yield Problem(entry.where, f"seed {entry.seed} of arm '{entry.arm}' has {source}: they are one run")


def _digits(value: float) -> int:
    """Significant digits that it takes to write it, in single precision where that holds it."""
    single = abs(value) < SINGLE and float(np.float32(value)) == value
    mantissa = str(np.float32(value)) if single else f"{value:.12g}"  # 2.1431999999999998 has five
    return len(mantissa.partition("e")[0].replace(".", "").strip("-0"))


def _refuse(problems: Sequence[Problem], hint: str) -> None:
    """Raises ConfigError with the first of many like it."""
    if problems:
        more = f" (and {len(problems) - 1} more such rows)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0].what}{more}", where=problems[0].where, hint=hint)
