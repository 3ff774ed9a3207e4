"""What a person sees while runs train: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 15.0
LOG_WIDTH = 140
EVERY_ROW = 40  # runs up to which every one has a row; beyond it only those that are at work


@dataclass
class RunView:
    """How far one run is. `seconds` is training time, at `tokens`."""

    arm: str
    seed: str
    run_id: str
    steps: int
    status: str = "waiting"
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    val_loss: float = math.nan
    tokens_per_second: float = math.nan

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """Bring up to date with new rows of the run's journal."""
        for row in rows:
            # a resumed run starts behind where it was seen last; its speed is then unknown for a moment
            if row["tokens"] > self.tokens and row["seconds"] > self.seconds:
                now = (row["tokens"] - self.tokens) / (row["seconds"] - self.seconds)
                old = self.tokens_per_second
                self.tokens_per_second = now if math.isnan(old) else 0.9 * old + 0.1 * now
            self.step, self.tokens, self.seconds = row["step"], row["tokens"], row["seconds"]
            self.loss = row["metrics"].get("train/loss", self.loss)
            self.val_loss = row["metrics"].get("val/loss", self.val_loss)

    @property
    def seconds_left(self) -> float:
        """Of training, by its present speed."""
        if not self.step or math.isnan(self.tokens_per_second):
            return math.nan
        return (self.steps - self.step) * (self.tokens / self.step) / self.tokens_per_second


class Display(Protocol):
    """Shows runs while they change."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, runs: list[RunView]) -> None:
        """Called several times a second."""

    def say(self, text: str) -> None:
        """One message that stays."""


class LiveTable:
    """A table that redraws itself: every run with its bar, losses, speed and time left."""

    def __init__(self, console: Console, title: str, jobs: int) -> None:
        self.console, self.title, self.jobs = console, title, jobs
        self.live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveTable:
        self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.live.__exit__(*exception)

    def show(self, runs: list[RunView]) -> None:
        self.live.update(Group(table(runs, self.title), Text(summary(runs, self.jobs), style="dim")))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


class PlainLines:
    """A line when a run starts, is evaluated or ends, and a summary now and then."""

    def __init__(self, console: Console, jobs: int) -> None:
        self.console, self.jobs = console, jobs
        self.seen: dict[str, tuple[str, float]] = {}
        self.last = time.monotonic()

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, runs: list[RunView]) -> None:
        for run in runs:
            before, state = self.seen.get(run.run_id), (run.status, run.val_loss)
            if run.status == "waiting" or str(state) == str(before):  # as text, because nan is not itself
                continue
            self.seen[run.run_id] = state
            at = f"step {run.step:>5}/{run.steps}  train {number(run.loss)}  val {number(run.val_loss)}"
            speed = f"  {speed_text(run.tokens_per_second)}  {duration(run.seconds_left)} left"
            self.say(f"{run.arm:<14} seed {run.seed:<4} {run.status:<9} {at}{speed if run.status == 'running' else ''}")
        if time.monotonic() - self.last > LINE_SECONDS:
            self.last = time.monotonic()
            self.say(summary(runs, self.jobs))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def display(console: Console, title: str, jobs: int) -> Display:
    """A live table where the console is a terminal, plain lines where it is not."""
    return LiveTable(console, title, jobs) if console.is_terminal else PlainLines(console, jobs)


def console_for(*, to_stderr: bool = False) -> Console:
    """A console as wide as its terminal; where there is none, wide enough for tables to keep their lines."""
    found = Console(stderr=to_stderr)
    return found if found.is_terminal else Console(stderr=to_stderr, width=LOG_WIDTH)


STYLES = {"running": "bold", "finished": "green", "failed": "red", "diverged": "red", "waiting": "dim"}


def table(runs: list[RunView], title: str) -> Table:
    """All runs, or those at work when there are too many for one screen."""
    shown = runs if len(runs) <= EVERY_ROW else [run for run in runs if run.status == "running"]
    made = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1))
    for name in ("arm", "seed", "status", "progress"):
        made.add_column(name)
    for name in ("step", "train loss", "val loss", "tokens/s", "left"):
        made.add_column(name, justify="right")
    for run in shown:
        running = run.status == "running"
        made.add_row(
            Text(run.arm),
            run.seed,
            Text(run.status, style=STYLES.get(run.status, "")),
            ProgressBar(total=run.steps, completed=run.step, width=16),
            f"{run.step}/{run.steps}",
            number(run.loss),
            number(run.val_loss),
            speed_text(run.tokens_per_second) if running else "",
            duration(run.seconds_left) if running else "",
        )
    return made


def summary(runs: list[RunView], jobs: int) -> str:
    """How many runs are in which state, and when all will be done."""
    counts = {status: sum(run.status == status for run in runs) for status in dict.fromkeys(r.status for r in runs)}
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    left = time_left(runs, jobs)
    return text + ("" if math.isnan(left) else f"; about {duration(left)} left")


def time_left(runs: list[RunView], jobs: int) -> float:
    """Seconds until all runs are done, those that wait taken to be as fast as those seen; nan before any is seen."""
    speeds = [run.tokens_per_second for run in runs if not math.isnan(run.tokens_per_second)]
    open_runs = [run for run in runs if run.status in ("waiting", "running")]
    sizes = [run.tokens / run.step for run in runs if run.step]
    if not speeds or not sizes or not open_runs:
        return math.nan
    tokens = sum((run.steps - run.step) * sizes[0] for run in open_runs)
    return tokens / (sum(speeds) / len(speeds)) / min(jobs, len(open_runs))


def number(value: float) -> str:
    """A loss, or a dash."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def speed_text(tokens_per_second: float) -> str:
    """Tokens per second, short."""
    return "-" if math.isnan(tokens_per_second) else f"{tokens_per_second:,.0f} tok/s"


def duration(seconds: float) -> str:
    """1:05, 2:03:00, 12 days, or a dash."""
    if math.isnan(seconds):
        return "-"
    if seconds >= 4 * 86_400:
        return f"{seconds / 86_400:,.0f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
