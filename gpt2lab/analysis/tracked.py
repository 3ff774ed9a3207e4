"""Tables of runs as trackers make them: `mlflow.search_runs`, with columns run_id, status, metrics.*, params.* and
tags.*, and the export of Weights & Biases, with columns Name and State.

The status of a run counts, and runs that only hold others together, or that look for a rate, belong to no arm. Our own
mirror and anybody else's experiments are read alike; ours is known by its tags.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2lab.analysis.rows import PREFERRED, Asked, Columns, Row, blank, number, spelled
from gpt2lab.errors import ConfigError, unknown

ARM_COLUMNS = ("arm", "tags.gpt2lab.arm", "params.arm", "tags.arm")
SEED_COLUMNS = ("seed", "tags.gpt2lab.seed", "params.seed", "tags.seed", "run_id")
METRIC_COLUMNS = ("value", "metrics.val-final/loss", *(f"metrics.{name}" for name in PREFERRED))
"""Where an MLflow table has what, the best first, unless told."""
WITHOUT_VALUE = ("RUNNING", "SCHEDULED")
FAILED = ("FAILED", "KILLED")
PREFIXES = ("metrics.", "params.", "tags.")
WANDB = ("Name", "State")
WANDB_WITHOUT_VALUE = ("running", "pending", "queued", "preempting", "preempted")
WANDB_FAILED = ("crashed", "failed", "killed")
OWN_WITHOUT_VALUE = ("running", "failed", "partial", "absent")
"""What our own mirror tags a run with that the same command takes up again; a run that diverged is FAILED alone."""


def is_tracked(columns: Sequence[str]) -> bool:
    """Whether these are the columns of an MLflow table."""
    return {"run_id", "status"} <= set(columns) and any(name.startswith(PREFIXES) for name in columns)


def is_exported(columns: Sequence[str]) -> bool:
    """Whether these are the columns of a table of runs from Weights & Biases."""
    return set(WANDB) <= set(columns)


def ended(rows: Sequence[Row], value: str) -> list[Row]:
    """The rows of Weights & Biases, each with the value that the state of its run leaves it."""

    def left(cells: Mapping[Any, Any]) -> Any:
        state = str(cells.get("State")).strip().casefold()
        return None if state in WANDB_WITHOUT_VALUE else math.nan if state in WANDB_FAILED else cells.get(value)

    return [Row(row.where, {**row.cells, value: left(row.cells)}) for row in rows]


def begun_in_order(rows: Sequence[Row]) -> bool:
    """Whether the time at which every run was begun is known, so that `runs_of_arms` has put them in order."""
    times = [row.cells.get("start_time") for row in rows]
    return not any(map(blank, times)) and len(set(map(type, times))) == 1


def columns_of(columns: Sequence[str], asked: Asked, where: str) -> Columns:
    """The columns that are asked for, with or without their prefix, else the best of those that there are.

    Raises ConfigError with the columns there are.
    """

    def named(kind: str, name: str, prefixes: Sequence[str] = ("params.", "tags.")) -> str:
        found = [f"{prefix}{name}" for prefix in ("", *prefixes) if f"{prefix}{name}" in columns]
        if not found:
            raise ConfigError(unknown("column", name, columns), where=where, hint=f"{kind}=COLUMN")
        return found[0]

    if asked.metric is not None and asked.value is not None:
        raise ConfigError("metric and value both name what is compared: give one of them", where=where)
    arms = [named("arm", asked.arm)] if asked.arm else [name for name in ARM_COLUMNS if name in columns]
    if not arms:
        what = f"no column tells the arm of a run: none of {', '.join(ARM_COLUMNS)} is there (columns: "
        raise ConfigError(f"{what}{', '.join(sorted(columns))})", where=where, hint="arm=COLUMN")
    seeds = [named("seed", asked.seed)] if asked.seed else [name for name in SEED_COLUMNS if name in columns]
    held = named("value", asked.value, PREFIXES) if asked.value else _metric_column(columns, asked.metric, where)
    shown = None if held == "value" else held.removeprefix("metrics.")
    return Columns(arm=arms[0], seed=seeds[0], value=held, metric=shown)


def _metric_column(columns: Sequence[str], metric: str | None, where: str) -> str:
    """The column of a metric; the final evaluation goes by the name of either `load_results` or our mirror."""
    names = [name.removeprefix("metrics.") for name in columns if name.startswith("metrics.")]
    if metric is not None:
        asked = metric.removeprefix("metrics.")
        for name in (asked, asked.replace("final/val/", "val-final/", 1)):
            if name in names:
                return f"metrics.{name}"
        if metric in columns:
            return metric
        raise ConfigError(unknown("metric", asked, names), where=where, hint="metric=NAME")
    preferred = next((name for name in METRIC_COLUMNS if name in columns), None)
    if preferred is None and len(names) != 1:
        what = f"which metric? The table holds {', '.join(sorted(names))}" if names else "no run has any metric"
        hint = "metric=NAME" if names else None
        raise ConfigError(what, where=where, hint=hint)
    return preferred or f"metrics.{names[0]}"


def runs_of_arms(rows: Sequence[Row], chosen: Columns, where: str) -> list[Row]:
    """The rows that are runs of an arm, in the order in which they were begun, each with the value that its status
    leaves it: MLflow lists the newest first."""
    parents = {row.cells.get("tags.mlflow.parentRunId") for row in rows}
    kept, studies = [], set()
    for row in rows:
        if not blank(row.cells.get("tags.gpt2lab.sweep")):
            continue  # trials are no arms
        study = row.cells.get("tags.gpt2lab.study")
        if not blank(study):
            if blank(row.cells.get("tags.gpt2lab.arm")) or _own_seed(row) is None:
                continue  # the study itself; a trial of a rate, or a run of another budget: "0 lr x2", "0 0.5x"
            studies.add(str(study))
        elif row.cells["run_id"] in parents and blank(row.cells.get(chosen.arm)):
            continue  # it only holds others together
        kept.append(Row(f"run {row.cells['run_id']}", {**row.cells, chosen.value: _result(row.cells, chosen.value)}))
    if not kept:
        raise ConfigError("no run of an arm is among the runs", where=where)
    if len(studies) > 1:
        hint = f"keep one: frame[frame['tags.gpt2lab.study'] == '{min(studies)}']"
        raise ConfigError(f"runs of several studies: {', '.join(sorted(studies))}", where=where, hint=hint)
    try:
        return sorted(kept, key=lambda row: (_own_seed(row) or 0, row.cells.get("start_time") or 0))
    except TypeError:  # times of several kinds
        return kept


def _own_seed(row: Row) -> int | None:
    """The seed of a run of ours; None where there is none, or more than that."""
    cell = row.cells.get("tags.gpt2lab.seed")
    seed = "" if blank(cell) else spelled(cell)
    return int(seed) if seed.isdecimal() else None


def _result(cells: Mapping[Any, Any], value: str) -> Any:
    """What a run's status leaves of its value: None before the end, NaN for a failure, else the cell."""
    cell, status, own = cells.get(value), cells.get("status"), cells.get("tags.gpt2lab.status")
    if status in WITHOUT_VALUE or own in OWN_WITHOUT_VALUE:
        return None
    if status in FAILED:
        return math.nan
    try:
        found = number(cell)
    except ValueError:
        return cell  # refused with all other bad cells
    if found is None or (own == "finished" and math.isnan(found)):
        return None  # the mirror has its end, but not yet its final evaluation
    return math.inf if abs(found) >= sys.float_info.max else found  # MLflow's own spelling of infinity
