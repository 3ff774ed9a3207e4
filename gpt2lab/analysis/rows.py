"""Rows and cells of a table of results: a DataFrame, a CSV file, a list of rows, or the export of a tracker.

A CSV file may be separated by commas, semicolons (then with decimal commas too) or tabs; blank lines and lines that
begin with # are skipped. Tables of MLflow (`mlflow.search_runs`, with columns run_id, status, metrics.*, params.* and
tags.*) and Weights & Biases (runs with columns Name and State, or charts with a column for each run) are known by their
columns. The status of a run counts, and runs that only group others, or belong to a sweep, belong to no arm.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gpt2lab.errors import ConfigError, Problem, unknown

if TYPE_CHECKING:
    import pandas as pd

Source: TypeAlias = "pd.DataFrame | str | Path | Sequence[Mapping[str, Any]]"
Value = float | None
NO_VALUE = ("na", "n/a", "#n/a", "<na>", "-", "--", "null", "none")
FAILED = ("crashed", "failed", "diverged")
"""Cells of a run without a value yet, and of a failed one, beside what Python reads as NaN or infinity."""
WHOLE = re.compile(r"([+-]?\d{1,18})(\.0*)?")
DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+([eE][+-]?\d+)?)")
PREFERRED = ("final/val/loss", "val/loss")
"""Metrics that are the result of a run, the best first, in a table of several."""

ARM_COLUMNS = ("arm", "tags.gpt2lab.arm", "params.arm", "tags.arm")
SEED_COLUMNS = ("seed", "tags.gpt2lab.seed", "params.seed", "tags.seed", "run_id")
METRIC_COLUMNS = ("value", "metrics.val-final/loss", *(f"metrics.{name}" for name in PREFERRED))
"""Columns of an MLflow table, the best first, where the caller names none."""
PREFIXES = ("metrics.", "params.", "tags.")
OPEN_STATUS, FAILED_STATUS = ("RUNNING", "SCHEDULED"), ("FAILED", "KILLED")
MIRROR_OPEN = ("running", "failed", "partial", "absent")
"""Status tags of our mirror for runs that the same command resumes; a run that diverged is FAILED alone."""
WANDB = ("Name", "State")
WANDB_OPEN, WANDB_FAILED = ("running", "pending", "queued", "preempting", "preempted"), ("crashed", "failed", "killed")

STEPS = ("step", "_step", "global_step", "trainer/global_step", "iteration", "iter")
PROGRESS = ("steps", "epoch", "tokens")
"""Columns of training progress; these may also be a property of a whole run."""
BETWEEN = " - "
"""Separates run and metric in the head of a W&B column."""
RUN = re.compile(r"(?P<arm>.+?)(?:[-_/., ]+(?:seed|run|s)?|seed)[-_= ]?(?P<seed>\d+)")
"""`base-seed0`, `base_s0`, `base-0`"""
NOT_MEASURED = re.compile(r"_.*|.*__(MIN|MAX)")
"""Metrics of the export itself: `_step`, and the range of a smoothed curve."""


@dataclass(frozen=True)
class Row:
    where: str
    cells: Mapping[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Named:
    """What the caller named: a metric, and the columns of arm, seed and value; None for the default names."""

    metric: str | None
    arm: str | None
    seed: str | None
    value: str | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column holds what."""

    arm: str
    seed: str
    value: str
    metric: str | None
    """the name of the value; None when the table does not say"""
    several: bool = False
    """whether a column `metric` says which of several metrics a row holds"""
    step: str | None = None
    """where the table holds several steps of a run"""


def rows_of(source: Source) -> list[Row]:
    """Every row with its place for error messages. Raises ConfigError for anything that is not a table."""
    if isinstance(source, (str, Path)):
        return _csv(Path(source))
    pandas = sys.modules.get("pandas")  # imported by the caller if the source is a frame; others need not wait
    if pandas is not None and isinstance(source, pandas.DataFrame):
        _refuse_repeated(map(str, source.columns), "table")
        records = source.to_dict("records")
        return [
            Row(f"row {label}", {str(k): v for k, v in r.items()})
            for label, r in zip(source.index, records, strict=True)
        ]
    if isinstance(source, Sequence):
        rows = [
            Row(f"row {i}", {str(k): v for k, v in row.items()})
            for i, row in enumerate(source)
            if isinstance(row, Mapping)
        ]
        if len(rows) == len(source):
            return rows
    raise ConfigError(f"a table is expected (DataFrame, CSV file or list of rows), not {type(source).__name__}")


def _csv(path: Path) -> list[Row]:
    """By the csv module, not pandas: it distinguishes `nan` from an empty cell, and knows the line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = ["\n" if line.lstrip().startswith("#") else line for line in file]  # keeps line numbers
        first = next(filter(str.strip, lines), "")
        mark = max(",;\t", key=first.count)
        reader = csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)
        lines_of_cells = [(f"{path}:{reader.line_num}", cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"not a CSV file in UTF-8: {error}", where=str(path)) from None
    names = [name.strip() for name in lines_of_cells[0][1]] if lines_of_cells else []
    _refuse_repeated(names, str(path))
    longer = [(where, cells[len(names) :]) for where, cells in lines_of_cells[1:] if len(cells) > len(names)]
    if longer:  # a decimal comma, most likely
        longer_rows = [Problem(where, f"more cells than columns: {more}") for where, more in longer]
        raise ConfigError(longer_rows, hint="write 2.15, not 2,15")
    rows = []
    for where, cells in lines_of_cells[1:]:
        texts = cells if mark == "," else [DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells]
        rows.append(Row(where, dict(zip(names, texts + [""] * (len(names) - len(texts)), strict=True))))
    return rows


def _refuse_repeated(names: Iterable[str], where: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        what = f"{len(repeated)} column names occur twice: {', '.join(repeated)}"
        what = f"two columns are called '{repeated[0]}'" if len(repeated) == 1 else what
        raise ConfigError(what, where=where, hint="rename or drop one of them")


def number(cell: Any) -> Value:
    """A cell as a number, None when it is blank. Raises ValueError that shows the cell."""
    if isinstance(cell, (bool, np.bool_)):
        raise ValueError(f"a number is expected, not {cell}")
    if isinstance(cell, (float, np.floating)):
        return float(cell)  # NaN included: a run that failed
    if blank(cell):
        return None
    word = cell.strip().casefold() if isinstance(cell, str) else ""
    if word in NO_VALUE:
        return None
    if word in FAILED:
        return math.nan
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a number is expected, not {cell!r:.60}") from None


def blank(cell: Any) -> bool:
    """Whether a cell is empty, which pandas writes as NaN in a column of text."""
    missing = getattr(sys.modules.get("pandas"), "NA", None)
    return cell is None or cell is missing or (isinstance(cell, str) and not cell.strip()) or cell != cell


def spelled(cell: Any) -> str:
    """One spelling for 0, 0.0, "0" and "0.0": pandas turns a column of integers with a gap into floats."""
    whole = WHOLE.fullmatch(
        f"{cell:.0f}" if isinstance(cell, (float, np.floating)) and cell % 1 == 0 else str(cell).strip()
    )
    return str(int(whole[1])) if whole else str(cell).strip()


def name_of(source: Source) -> str:
    """The name of a table in error messages."""
    return str(source) if isinstance(source, (str, Path)) else "table"


# Tables of trackers.


def is_tracked(columns: Sequence[str]) -> bool:
    """Whether these are the columns of an MLflow table."""
    return {"run_id", "status"} <= set(columns) and any(name.startswith(PREFIXES) for name in columns)


def is_exported(columns: Sequence[str]) -> bool:
    """Whether these are the columns of a table of runs from Weights & Biases."""
    return set(WANDB) <= set(columns)


def ended(rows: Sequence[Row], value: str) -> list[Row]:
    """The rows of Weights & Biases with the values of unfinished and failed runs replaced."""

    def result(cells: Mapping[Any, Any]) -> Any:
        state = str(cells.get("State")).strip().casefold()
        return None if state in WANDB_OPEN else math.nan if state in WANDB_FAILED else cells.get(value)

    return [Row(row.where, {**row.cells, value: result(row.cells)}) for row in rows]


def begun_in_order(rows: Sequence[Row]) -> bool:
    """Whether the start time of every run is known, so that `runs_of_arms` returns them in that order."""
    times = [row.cells.get("start_time") for row in rows]
    return not any(map(blank, times)) and len(set(map(type, times))) == 1


def columns_of(columns: Sequence[str], given: Named, where: str) -> Columns:
    """The columns that the caller named, with or without prefix, else the preferred ones of the table.

    Raises ConfigError with the columns of the table.
    """

    def named(kind: str, name: str, prefixes: Sequence[str] = ("params.", "tags.")) -> str:
        for column in (f"{prefix}{name}" for prefix in ("", *prefixes)):
            if column in columns:
                return column
        raise ConfigError(unknown("column", name, columns), where=where, hint=f"{kind}=COLUMN")

    if given.metric is not None and given.value is not None:
        raise ConfigError("metric and value both name what is compared: give one of them", where=where)
    arms = [named("arm", given.arm)] if given.arm else [name for name in ARM_COLUMNS if name in columns]
    if not arms:
        what = f"no column tells the arm of a run: none of {', '.join(ARM_COLUMNS)} is there (columns: "
        raise ConfigError(f"{what}{', '.join(sorted(columns))})", where=where, hint="arm=COLUMN")
    seeds = [named("seed", given.seed)] if given.seed else [name for name in SEED_COLUMNS if name in columns]
    held = named("value", given.value, PREFIXES) if given.value else _metric_column(columns, given.metric, where)
    shown = None if held == "value" else held.removeprefix("metrics.")
    return Columns(arm=arms[0], seed=seeds[0], value=held, metric=shown)


def _metric_column(columns: Sequence[str], metric: str | None, where: str) -> str:
    """The column of a metric; the final evaluation by its name in `load_results` or in our mirror."""
    names = [name.removeprefix("metrics.") for name in columns if name.startswith("metrics.")]
    if metric is not None:
        name_only = metric.removeprefix("metrics.")
        for name in (name_only, name_only.replace("final/val/", "val-final/", 1)):
            if name in names:
                return f"metrics.{name}"
        if metric in columns:
            return metric
        raise ConfigError(unknown("metric", name_only, names), where=where, hint="metric=NAME")
    preferred = next((name for name in METRIC_COLUMNS if name in columns), None)
    if preferred is None and len(names) != 1:
        what = f"which metric? The table holds {', '.join(sorted(names))}" if names else "no run has any metric"
        hint = "metric=NAME" if names else None
        raise ConfigError(what, where=where, hint=hint)
    return preferred or f"metrics.{names[0]}"


def runs_of_arms(rows: Sequence[Row], chosen: Columns, where: str) -> list[Row]:
    """The rows that are runs of an arm, in the order of their start (MLflow lists the newest first), with the values of
    unfinished and failed runs replaced."""
    parents = {row.cells.get("tags.mlflow.parentRunId") for row in rows}
    kept, studies = [], set()
    for row in rows:
        if not blank(row.cells.get("tags.gpt2lab.sweep")):
            continue  # trials are no arms
        study = row.cells.get("tags.gpt2lab.study")
        if not blank(study):
            if blank(row.cells.get("tags.gpt2lab.arm")) or _mirror_seed(row) is None:
                continue  # the study itself; a trial of a rate, or a run of another budget: "0 lr x2", "0 0.5x"
            studies.add(str(study))
        elif row.cells["run_id"] in parents and blank(row.cells.get(chosen.arm)):
            continue  # it only groups others
        kept.append(Row(f"run {row.cells['run_id']}", {**row.cells, chosen.value: _result(row.cells, chosen.value)}))
    if not kept:
        raise ConfigError("no run of an arm is among the runs", where=where)
    if len(studies) > 1:
        hint = f"keep one: frame[frame['tags.gpt2lab.study'] == '{min(studies)}']"
        raise ConfigError(f"runs of several studies: {', '.join(sorted(studies))}", where=where, hint=hint)
    try:
        return sorted(kept, key=lambda row: (_mirror_seed(row) or 0, row.cells.get("start_time") or 0))
    except TypeError:  # times of several kinds
        return kept


def _mirror_seed(row: Row) -> int | None:
    """The seed of a run of our mirror; None where the tag is absent or holds more than a seed."""
    cell = row.cells.get("tags.gpt2lab.seed")
    seed = "" if blank(cell) else spelled(cell)
    return int(seed) if seed.isdecimal() else None


def _result(cells: Mapping[Any, Any], value: str) -> Any:
    """A run's value given its status: None before the end, NaN for a failure, else the cell."""
    cell, status, mirror = cells.get(value), cells.get("status"), cells.get("tags.gpt2lab.status")
    if status in OPEN_STATUS or mirror in MIRROR_OPEN:
        return None
    if status in FAILED_STATUS:
        return math.nan
    try:
        result = number(cell)
    except ValueError:
        return cell  # refused with all other bad cells
    if result is None or (mirror == "finished" and math.isnan(result)):
        return None  # the mirror has its end, but not yet its final evaluation
    return math.inf if abs(result) >= sys.float_info.max else result  # MLflow's spelling of infinity


# Wide tables: a row for each step, a column for each run.


def counts_training(name: str) -> bool:
    """Whether a column of this name holds training progress, which does not identify runs."""
    return name.casefold().removeprefix("metrics.") in (*STEPS, *PROGRESS)


def is_wide(columns: Sequence[str]) -> bool:
    """Whether every run has a column."""
    if "arm" in columns or not columns:
        return False
    first, *others = columns
    runs = counts_training(first) and all(RUN.fullmatch(name) for name in others)
    return bool(others) and (runs or any(BETWEEN in name for name in others))


def unfolded(rows: Sequence[Row], columns: Sequence[str], metric: str | None, where: str) -> list[Row]:
    """The same values with the columns arm, seed, step, value and, where it has a name, metric.

    metric: of the values where columns are named after runs alone.
    Raises ConfigError for a run whose name does not end in its seed.
    """
    exported = any(BETWEEN in name for name in columns)
    beside = [name for name in columns if BETWEEN not in name] if exported else list(columns[:1])
    step = next(filter(counts_training, beside), beside[0] if beside else None)
    if step is None:
        raise ConfigError("no column holds the steps", where=where)
    long: list[Row] = []
    for name in columns:
        run, _, measured = name.rpartition(BETWEEN) if exported else (name, "", metric or "")
        if name in beside or NOT_MEASURED.fullmatch(measured):
            continue
        parts = RUN.fullmatch(run.strip())
        if parts is None:
            hint = "name runs as base-seed0, or give a table with the columns arm, seed, step and value"
            raise ConfigError(f"column '{name}': the name of the run does not end in its seed", where=where, hint=hint)
        base = {"arm": parts["arm"], "seed": parts["seed"]} | ({"metric": measured} if measured else {})
        filled = [row for row in rows if not blank(row.cells.get(name))] or list(rows[-1:])
        for row in filled:
            cells = base | {"step": row.cells.get(step), "value": row.cells.get(name)}
            long.append(Row(f"{row.where}, column '{name}'", cells))
    return long
