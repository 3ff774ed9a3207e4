"""Wide tables, with a row for each step and a column for each run, as Weights & Biases exports its charts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpt2lab.analysis.rows import Row, blank
from gpt2lab.errors import ConfigError

STEPS = ("step", "_step", "global_step", "trainer/global_step", "iteration", "iter")
PROGRESS = ("steps", "epoch", "tokens")
"""Columns that say how far training was. The latter may also be a property of a whole run."""
BETWEEN = " - "
"""Between the run and the metric in the head of a column."""
RUN = re.compile(r"(?P<arm>.+?)(?:[-_/., ]+(?:seed|run|s)?|seed)[-_= ]?(?P<seed>\d+)")
"""`base-seed0`, `base_s0`, `base-0`"""
NOT_MEASURED = re.compile(r"_.*|.*__(MIN|MAX)")
"""Metrics of the export itself: `_step`, and the range in which a smoothed curve moved."""


def counts_training(name: str) -> bool:
    """Whether a column of this name holds steps of training, which tell no runs apart."""
    return name.casefold().removeprefix("metrics.") in (*STEPS, *PROGRESS)


def is_wide(columns: Sequence[str]) -> bool:
    """Whether every run has a column of its own."""
    if "arm" in columns or not columns:
        return False
    first, *others = columns
    runs = counts_training(first) and all(RUN.fullmatch(name) for name in others)
    return bool(others) and (runs or any(BETWEEN in name for name in others))


def unfolded(rows: Sequence[Row], columns: Sequence[str], metric: str | None, where: str) -> list[Row]:
    """The same values with the columns arm, seed, step, value and, where it has a name, metric.

    metric: what the values are where columns are called after runs alone.
    Raises ConfigError for a run whose name does not end in its seed.
    """
    exported = any(BETWEEN in name for name in columns)
    beside = [name for name in columns if BETWEEN not in name] if exported else list(columns[:1])
    step = next(filter(counts_training, beside), beside[0] if beside else None)
    if step is None:
        raise ConfigError("no column holds the steps", where=where)
    found: list[Row] = []
    for name in columns:
        run, _, measured = name.rpartition(BETWEEN) if exported else (name, "", metric or "")
        if name in beside or NOT_MEASURED.fullmatch(measured):
            continue
        parts = RUN.fullmatch(run.strip())
        if parts is None:
            hint = "name runs as base-seed0, or give a table with the columns arm, seed, step and value"
            raise ConfigError(f"column '{name}': the name of the run does not end in its seed", where=where, hint=hint)
        own = {"arm": parts["arm"], "seed": parts["seed"]} | ({"metric": measured} if measured else {})
        there = [row for row in rows if not blank(row.cells.get(name))] or list(rows[-1:])
        for row in there:
            cells = own | {"step": row.cells.get(step), "value": row.cells.get(name)}
            found.append(Row(f"{row.where}, column '{name}'", cells))
    return found
