"""Rows and cells of any table: a DataFrame, a CSV file or a list of rows, and what a cell says.

A CSV file may be separated by commas, semicolons (then with decimal commas too) or tabs; blank lines and lines that
begin with # do not count.
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

from gpt2lab.errors import ConfigError, Problem

if TYPE_CHECKING:
    import pandas as pd

Source: TypeAlias = "pd.DataFrame | str | Path | Sequence[Mapping[str, Any]]"
Value = float | None
NO_VALUE = ("na", "n/a", "#n/a", "<na>", "-", "--", "null", "none")
FAILED = ("crashed", "failed", "diverged")
"""Words for a run without a value yet, and for one that failed, beside what Python reads as NaN or infinity."""
WHOLE = re.compile(r"([+-]?\d{1,18})(\.0*)?")
DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+([eE][+-]?\d+)?)")
PREFERRED = ("final/val/loss", "val/loss")
"""Metrics that stand for the result of a run, the best first, in a table that holds several."""


@dataclass(frozen=True)
class Row:
    where: str
    cells: Mapping[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the caller named: a metric, and the columns of arm, seed and value; None where a table's own names count."""

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
    """what the value is called; None when the table does not say"""
    several: bool = False
    """whether a column `metric` tells which of several metrics a row holds"""
    step: str | None = None
    """where the table holds several steps of a run"""


def rows_of(source: Source) -> list[Row]:
    """Every row with the place that errors name. Raises ConfigError for what is no table."""
    if isinstance(source, (str, Path)):
        return _csv(Path(source))
    pandas = sys.modules.get("pandas")  # whoever hands over a frame has imported it; a plan need not wait for it
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
    """By the csv module, not pandas: it keeps `nan` apart from an empty cell, and knows the line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = ["\n" if line.lstrip().startswith("#") else line for line in file]  # numbers of lines stay
        first = next(filter(str.strip, lines), "")
        mark = max(",;\t", key=first.count)
        reader = csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True)
        found = [(f"{path}:{reader.line_num}", cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"not a CSV file in UTF-8: {error}", where=str(path)) from None
    names = [name.strip() for name in found[0][1]] if found else []
    _refuse_repeated(names, str(path))
    longer = [Problem(where, f"more cells than columns: {more}") for where, c in found[1:] if (more := c[len(names) :])]
    if longer:  # a decimal comma, most likely
        raise ConfigError(longer, hint="write 2.15, not 2,15")
    rows = []
    for where, cells in found[1:]:
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
    """A cell as a number, None when it is blank; raises ValueError that shows it."""
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
    """Whether nothing stands in a cell; pandas writes that as NaN in a column of text."""
    missing = getattr(sys.modules.get("pandas"), "NA", None)
    return cell is None or cell is missing or (isinstance(cell, str) and not cell.strip()) or cell != cell


def spelled(cell: Any) -> str:
    """One spelling for 0, 0.0, "0" and "0.0": pandas turns a column of integers with a gap into floats."""
    whole = WHOLE.fullmatch(
        f"{cell:.0f}" if isinstance(cell, (float, np.floating)) and cell % 1 == 0 else str(cell).strip()
    )
    return str(int(whole[1])) if whole else str(cell).strip()


def name_of(source: Source) -> str:
    """What errors call a table."""
    return str(source) if isinstance(source, (str, Path)) else "table"
