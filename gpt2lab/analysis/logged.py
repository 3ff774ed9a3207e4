"""Reads what other programs log as rows of a table: TensorBoard's event files, and result files of
lm-evaluation-harness.

A row is one value: run, arm, seed, metric, step, value. Arm and seed are read off the name of the run or of its folder
(`base-seed0`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2lab.errors import ConfigError

RUN = re.compile(r"(?P<arm>.+?)(?:[-_/., ]+(?:seed|run|s)?|seed)[-_= ]?(?P<seed>\d+)")
"""`base-seed0`, `base_s0`, `base-0`"""
Values = list[tuple[str, float | None, Any]]
"""(metric, step, value) of one run"""


def logged_rows(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """(place, cells) of every value below a folder, or in a file; None for a file that none of these programs wrote.

    Raises ConfigError for a folder without such files, a damaged file, and runs whose arm and seed are unknown.
    """
    if not path.is_dir() and not any(path.match(pattern) for pattern in READERS):
        return None
    rows: list[tuple[str, dict[str, Any]]] = []
    for pattern, reader in READERS.items():
        for file in [path] if path.match(pattern) else sorted(path.rglob(pattern)):
            try:
                names, values = reader(file)
            except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
                raise ConfigError(f"cannot be read: {error}", where=str(file)) from None
            match = next(filter(None, map(RUN.fullmatch, names)), None)
            run = {"run": names[0]} | (match.groupdict() if match else {})
            rows += [(f"{file}, {m}", {**run, "metric": m, "step": step, "value": value}) for m, step, value in values]
    if not rows:
        raise ConfigError("nothing that TensorBoard or lm-evaluation-harness has written", where=str(path))
    return rows


def _tensorboard(file: Path) -> tuple[tuple[str, ...], Values]:
    """Scalars of both formats; the run is the folder."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise ConfigError(
            "event files need tensorboard", where=str(file), hint="pip install 'gpt2lab[tensorboard]'"
        ) from None
    values: Values = []
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("tensor") and not value.tensor.tensor_shape.dim and not value.tensor.string_val:
                values.append((value.tag, float(event.step), float(make_ndarray(value.tensor))))
    return (file.parent.name,), values


def _lm_eval(file: Path) -> tuple[tuple[str, ...], Values]:
    """One run; the folder of a model has its results. Seeds in such files are those of the evaluation, not training."""
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("results"), dict):
        return (file.parent.name,), []
    values: Values = []
    for task, measures in record["results"].items():
        for name, value in measures.items():
            measure, _, chosen = name.partition(",")
            if isinstance(value, (int, float)) and chosen and not measure.endswith("_stderr"):
                values.append((f"{task}/{measure}" + (f",{chosen}" if chosen != "none" else ""), None, value))
    name = str(record.get("model_name") or "").rstrip("/").rpartition("/")[2]
    return (name, file.parent.name.rpartition("__")[2], file.parent.name), values


READERS: Mapping[str, Callable[[Path], tuple[tuple[str, ...], Values]]] = {
    "*.tfevents.*": _tensorboard,
    "results*.json": _lm_eval,
}
"""Name of a file -> what reads it: the names that may tell arm and seed, the likeliest first, and the values."""
