"""Events while runs train, for listeners such as a terminal, a notebook or a log.

    def listener(event: Event) -> None:
        if isinstance(event, Progress):
            print(event.runs[0].step)

A listener is called from the thread that drives the runs, several times a second, so it should return quickly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class RunProgress:
    """Progress of one run."""

    arm: str
    seed: str
    run_id: str
    steps: int
    status: str = "waiting"
    """waiting, running, finished, diverged or failed; of a trial also pruned, stopped or lost"""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """of training, at `tokens`"""
    loss: float = math.nan
    val_loss: float = math.nan
    tokens_per_second: float = math.nan

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Update from new rows of the run's journal."""
        for row in rows:
            # a resumed run starts at an earlier step than last seen; keep its last speed until it passes that
            if row["tokens"] > self.tokens and row["seconds"] > self.seconds:
                now = (row["tokens"] - self.tokens) / (row["seconds"] - self.seconds)
                old = self.tokens_per_second
                self.tokens_per_second = now if math.isnan(old) else 0.9 * old + 0.1 * now
            self.step, self.tokens, self.seconds = row["step"], row["tokens"], row["seconds"]
            self.loss = row["metrics"].get("train/loss", self.loss)
            self.val_loss = row["metrics"].get("val/loss", self.val_loss)

    @property
    def seconds_left(self) -> float:
        """Remaining training time at the current speed."""
        if not self.step or math.isnan(self.tokens_per_second):
            return math.nan
        return (self.steps - self.step) * (self.tokens / self.step) / self.tokens_per_second


@dataclass(frozen=True)
class Message:
    """A line for the user, to be kept on the screen."""

    text: str


@dataclass(frozen=True)
class Progress:
    """The state of all runs of a study or sweep. `jobs`: number of parallel runs."""

    title: str
    runs: tuple[RunProgress, ...]
    jobs: int

    @classmethod
    def of(cls, title: str, runs: Iterable[RunProgress], jobs: int) -> Progress:
        """A snapshot: copies of `runs`."""
        return cls(title, tuple(replace(run) for run in runs), jobs)


Event = Message | Progress
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
