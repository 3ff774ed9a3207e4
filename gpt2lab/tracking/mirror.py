"""What the follower asks of a mirror. MLflow is one; a test's recorder is another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gpt2lab.store import Row, RunFolder, Status


class CopyGone(Exception):
    """The mirrored run was deleted, usually in the UI."""


@dataclass
class Copy:
    """One run's copy in the mirror. `tokens` is how far it got, as the mirror itself says: rows up to there are not
    sent. `sent` holds the tags and final numbers that need no second sending; `marks`, the tags that may change; `beat`
    is when it last showed life."""

    id: str
    started_ms: int
    tokens: float
    status: str
    sent: set[str] = field(default_factory=set)
    marks: dict[str, str] = field(default_factory=dict)
    beat: float = -math.inf


class Mirror(Protocol):
    """Used by one thread at a time. Any call may fail or take long; none may be made from a training step."""

    shown_uri: str
    """Where it is, without passwords."""
    experiment_id: str
    notes: list[str]
    """Things to tell the user, in plain words; the follower takes them out."""

    def open_study(self, record: Mapping[str, Any]) -> str:
        """Find or make the study's parent; returns its id."""

    def open_run(self, record: Mapping[str, Any], parent: str, arm: str, seed: str, run: RunFolder) -> Copy:
        """Find or make the copy of one run below its parent."""

    def send(self, copy: Copy, rows: Sequence[Row]) -> None:
        """Store rows, all or none, and move `copy.tokens` on. Raises CopyGone."""

    def settle(self, copy: Copy, status: Status, run: RunFolder, evaluation_key: str | None) -> None:
        """Bring status and final numbers in line with the run folder. Raises CopyGone."""

    def mark(self, copy: Copy, tags: Mapping[str, str]) -> None:
        """Let the copy have these tags. Raises CopyGone."""

    def settle_study(self, parent: str, statuses: Sequence[Status], over: bool) -> None:
        """Bring the parent's status in line with its runs; `over`: nobody works on the study now. Raises CopyGone."""
