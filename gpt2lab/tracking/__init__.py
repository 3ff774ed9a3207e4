"""Tracking: the journal on disk is the truth; a tracker mirrors it, may lag, may fail and then catches up.

journal.py writes and reads metrics.jsonl; follower.py sends the rows of a study or sweep to a tracker; mlflow.py is the
tracker that is used unless GPT2LAB_TRACKER names another, and reads any MLflow experiment; no other file imports
mlflow. Another tracker is one class in a plug-in:

    @tracker.register("table", source="my own")
    class Table:
        "Where the rows go, in one line."
        experiment_id = ""

        def __init__(self, address: str, experiment: str, artifacts: Path) -> None:
            self.shown_uri, self.notes = shown(address), []  # gpt2lab.basics.redaction
        ...  # the five methods of `Tracker`
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpt2lab.basics.redaction import shown
from gpt2lab.errors import ConfigError, unknown
from gpt2lab.registry import Slot, load_entry_points
from gpt2lab.store import RunFolder, Status, Store

tracker = Slot("tracker", "where results are mirrored (GPT2LAB_TRACKER)", default="mlflow", in_config=False)


class MetricPoint(NamedTuple):
    """Numbers of one step, at a time in milliseconds since 1970."""

    step: int
    time_ms: int
    values: Mapping[str, float]


class RunGone(Exception):
    """The tracker's copy of a run or study was deleted, usually in its user interface."""


@dataclass
class TrackedRun:
    """The tracker's copy of a run, or of a whole study. tokens: the greatest value of `tokens` that it holds, -1 for
    none; rows up to there are not sent again. tags: those that it has."""

    id: str
    tokens: float = -1.0
    tags: dict[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Where a study's or sweep's runs are mirrored. Made as `cls(address, experiment, artifacts)`, without connecting:
    the address behind the tracker's name, the ablation's name, and a folder for files.

    Used by one thread at a time. Any call may fail, and is then repeated later, or take long; none is made from a
    training step.
    """

    shown_uri: str
    """Where it is, without passwords."""
    experiment_id: str
    """For links into its user interface; empty where it has none."""
    notes: list[str]
    """Messages for the user; the follower empties the list."""

    def open_study(self, study: Mapping[str, Any]) -> TrackedRun:
        """Find or make the entry of a study or sweep (its record)."""

    def open_run(self, study: Mapping[str, Any], parent: TrackedRun, arm: str, seed: str, run: RunFolder) -> TrackedRun:
        """Find or make the copy of one run of a study."""

    def log(self, run: TrackedRun, points: Sequence[MetricPoint]) -> None:
        """Store points, at most 1,000 numbers in order of step: all or none. Equal points may come twice. Raises
        RunGone."""

    def update(self, run: TrackedRun, status: Status, tags: Mapping[str, str], ended: str | None) -> None:
        """Set the status of a run or study, and some tags. ended: when, in ISO format. Raises RunGone."""

    def log_report(self, study: Mapping[str, Any], folder: Path) -> None:
        """Keep a finished report with its study."""


def open_tracker(root: Path, experiment: str) -> Tracker:
    """The tracker of the run store at `root`: what GPT2LAB_TRACKER names as NAME or NAME:ADDRESS, else MLflow.

    Raises ConfigError for an unknown name, and what the tracker's class raises for an address that cannot work.
    """
    name, _, address = (os.environ.get("GPT2LAB_TRACKER") or "mlflow").partition(":")
    if name == "mlflow":
        import gpt2lab.tracking.mlflow  # noqa: F401  (registers it)
        from gpt2lab.tracking.addresses import default_uri

        address = address or default_uri(root)
    elif name not in tracker:
        load_entry_points()
    if name not in tracker:
        hint = "--plugin FILE, where its class is registered"
        raise ConfigError(unknown("tracker", name, tracker.names()), where="GPT2LAB_TRACKER", hint=hint)
    shown(address)  # messages hide its secrets, whatever the class makes of it
    made: Tracker = tracker[name].factory(address, experiment, Store(root).folder("artifacts"))
    return made


def milliseconds(moment: str | None) -> int:
    """Since 1970; of now where no moment is given."""
    at = datetime.fromisoformat(moment) if moment else datetime.now().astimezone()
    return round(at.timestamp() * 1000)


def started_ms(study: Mapping[str, Any], run: RunFolder) -> int:
    """When a run began, in milliseconds since 1970."""
    return milliseconds((run.identity() or {}).get("created") or study.get("created"))
