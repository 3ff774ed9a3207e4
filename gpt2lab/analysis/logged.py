"""Reads what other programs log as rows of a table: TensorBoard's event files, offline runs of Weights & Biases,
projects of trackio, and result files of lm-evaluation-harness.

A row is one value: run, arm, seed, metric, step, value, and the settings of its run. Arm and seed are settings of these
names, else they are read off the name of the run or of its folder (`base-seed0`).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2lab.errors import ConfigError

RUN = re.compile(r"(?P<arm>.+?)(?:[-_/., ]+(?:seed|run|s)?|seed)[-_= ]?(?P<seed>\d+)")
"""`base-seed0`, `base_s0`, `base-0`"""
Value = tuple[str, float | None, Any]
"""(metric, step, value)"""


@dataclass(frozen=True)
class LoggedRun:
    """One run: the names that may tell its arm and seed, the likeliest first, its settings and values."""

    where: str
    names: tuple[str, ...]
    values: list[Value]
    settings: Mapping[str, Any] = field(default_factory=dict)
    failed: bool = False

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, cells) of every value; a run that failed has no number at its last step."""
        match = next(filter(None, (RUN.fullmatch(name) for name in self.names)), None)
        known = {"run": self.names[0]} | (match.groupdict() if match else {}) | dict(self.settings)
        last = max((step for _, step, _ in self.values if step is not None), default=None)
        for metric, step, value in self.values:
            shown = math.nan if self.failed and step == last else value
            yield f"{self.where}, {metric}", {**known, "metric": metric, "step": step, "value": shown}


def logged_rows(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """(place, cells) of every value below a folder, or in a file; None for a file that none of these programs wrote.

    Raises ConfigError for a folder without such files, a damaged file, and runs whose arm and seed are unknown.
    """
    if not path.is_dir() and not any(path.match(pattern) for pattern in READERS):
        return None
    runs: list[LoggedRun] = []
    for pattern, reader in READERS.items():
        for file in [path] if path.match(pattern) else sorted(path.rglob(pattern)):
            try:
                runs += reader(file)
            except (ValueError, KeyError, TypeError, IndexError, OSError, struct.error, sqlite3.Error) as error:
                raise ConfigError(f"cannot be read: {error}", where=str(file)) from None
    if not runs:
        if path.is_dir() or path.suffix == ".json":
            known = "TensorBoard, Weights & Biases (offline), trackio or lm-evaluation-harness"
            raise ConfigError(f"nothing that {known} has written", where=str(path))
        raise ConfigError("no run with values", where=str(path))
    return [row for run in runs for row in run.rows()]


def _tensorboard(file: Path) -> Iterator[LoggedRun]:
    """Scalars of both formats; the run is the folder."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise ConfigError(
            "event files need tensorboard", where=str(file), hint="pip install 'gpt2lab[tensorboard]'"
        ) from None
    values: list[Value] = []
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("tensor") and not value.tensor.tensor_shape.dim and not value.tensor.string_val:
                values.append((value.tag, float(event.step), float(make_ndarray(value.tensor))))
    if values:
        yield LoggedRun(str(file), (file.parent.name,), values)


def _lm_eval(file: Path) -> Iterator[LoggedRun]:
    """One run; the folder of a model has its results. Seeds in such files are those of the evaluation, not training."""
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("results"), dict):
        return
    values: list[Value] = []
    for task, measures in record["results"].items():
        for name, value in measures.items():
            measure, _, chosen = name.partition(",")
            if isinstance(value, (int, float)) and chosen and not measure.endswith("_stderr"):
                values.append((f"{task}/{measure}" + (f",{chosen}" if chosen != "none" else ""), None, value))
    name = str(record.get("model_name") or "").rstrip("/").rpartition("/")[2]
    yield LoggedRun(str(file), (name, file.parent.name.rpartition("__")[2], file.parent.name), values)


def _trackio(file: Path) -> Iterator[LoggedRun]:
    """Every run of a project."""
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as base:
        tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master")}
        if not {"metrics", "configs"} <= tables:
            return
        settings = {run: json.loads(text) for run, text in base.execute("SELECT run_id, config FROM configs")}
        runs: dict[str, LoggedRun] = {}
        for run, name, step, text in base.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id"):
            made = LoggedRun(f"{file}, run {name}", (name,), [], _plain(settings.get(run, {})))
            runs.setdefault(run, made).values.extend(_numbers(json.loads(text), float(step)))
    yield from runs.values()


BLOCK, HEADER = 32_768, 7
"""Bytes of a block of a .wandb file, and of the header of the file and of each piece of a record: LevelDB's format."""
HISTORY, RUN_RECORD, EXIT = 2, 17, 18
"""Numbers of Record's fields in wandb_internal.proto; those below are of its nested messages and their items."""
ITEM, STEP, CONFIG, DISPLAY_NAME, KEY, NESTED_KEY, JSON = 1, 2, 4, 8, 1, 2, 16


def _wandb(file: Path) -> Iterator[LoggedRun]:
    """An offline run. One without an end is still at work or was killed; a nonzero exit code is a failure."""
    values: list[Value] = []
    settings: dict[str, Any] = {}
    name, failed = file.parent.name, False
    for record in map(_fields, _records(file.read_bytes())):
        for history in record.get(HISTORY, []):
            parts = _fields(history)
            step = _fields(parts[STEP][0]).get(1, [0])[0] if STEP in parts else None
            values += _numbers(_items(parts.get(ITEM, [])), None if step is None else float(step))
        for run in map(_fields, record.get(RUN_RECORD, [])):
            name = run[DISPLAY_NAME][0].decode() if DISPLAY_NAME in run else name
            for config in map(_fields, run.get(CONFIG, [])):
                settings |= _plain(_items(config.get(ITEM, [])))
        for end in map(_fields, record.get(EXIT, [])):
            failed = bool(end.get(1, [0])[0])
    if values:
        yield LoggedRun(str(file), (name,), values, settings, failed)


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log: each in one piece (type 1), or in a first, middle and last one (2, 3, 4)."""
    if data[:4] != b":W&B":
        raise ValueError("not a file of Weights & Biases")
    at, pieces = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too short for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += HEADER
        if kind == 0 or at + length > len(data):  # the end of a run that is still being written
            return
        pieces = data[at : at + length] if kind in (1, 2) else pieces + data[at : at + length]
        at += length
        if kind in (1, 4):
            yield pieces


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Number -> values of a protocol buffer's fields: integers, or bytes of texts and nested messages."""
    from google.protobuf.empty_pb2 import Empty  # a message without fields of its own, so that all are unknown
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    fields: dict[int, list[Any]] = {}
    try:
        for field in UnknownFieldSet(Empty.FromString(message)):
            fields.setdefault(field.field_number, []).append(field.data)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    return fields


def _items(items: list[bytes]) -> dict[str, Any]:
    """Key -> value of items that hold JSON; the keys of nested values joined by dots."""
    values = {}
    for item in map(_fields, items):
        key = ".".join(part.decode() for part in item.get(KEY) or item.get(NESTED_KEY, []))
        values[key] = json.loads(item[JSON][0]) if JSON in item else None
    return values


def _numbers(metrics: Mapping[str, Any], step: float | None) -> Iterator[Value]:
    """The measured values; names that begin with an underscore belong to the program."""
    for name, value in metrics.items():
        number = isinstance(value, (int, float)) or value in ("NaN", "Infinity", "-Infinity")
        if number and not isinstance(value, bool) and not name.startswith("_"):
            yield name, step, float(value)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that can be cells, without those of the program."""
    reserved = ("metric", "step", "value")
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, (int, float, str)) and not name.startswith("_") and name not in reserved
    }


READERS: Mapping[str, Callable[[Path], Iterator[LoggedRun]]] = {
    "*.tfevents.*": _tensorboard,
    "results*.json": _lm_eval,
    "*.wandb": _wandb,
    "*.db": _trackio,
}
"""Name of a file -> what reads it."""
