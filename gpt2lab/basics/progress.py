"""Progress of running trainings: events, and listeners that show them on a terminal, in a notebook or in a log.

    def listener(event: Event) -> None:
        if isinstance(event, Progress):
            print(event.runs[0].step)

A listener is called from the thread that drives the runs, several times a second, so it should return quickly.
"""

from __future__ import annotations

import io
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt2lab.basics.output import LOG_WIDTH, console_for
from gpt2lab.basics.text import duration, harmless, shorten

LINE_SECONDS, LONGEST_PAUSE = 15.0, 600.0
"""Between two summaries in a log, at first and at most."""
MOST_NAMED = 4
"""Runs of which a summary says how far they are."""
NOTEBOOK_SECONDS = 1.0
SHOWN_MESSAGES = 20
MOST_ROWS = 40
WIDE = 100
"""Columns of a terminal that shows every column of the table."""
SHOWN_FIRST = ("running", "failed", "diverged", "waiting")
LAST = len(SHOWN_FIRST)


@dataclass
class RunProgress:
    """How far one run is."""

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


@dataclass(frozen=True)
class Message:
    """A line for the user that is worth keeping."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Where all runs of a study or sweep are at this moment. `jobs`: how many train side by side."""

    title: str
    runs: tuple[RunProgress, ...]
    jobs: int

    @classmethod
    def of(cls, title: str, runs: Iterable[RunProgress], jobs: int) -> Progress:
        """A snapshot, which later rows do not change."""
        return cls(title, tuple(replace(run) for run in runs), jobs)


Event = Message | Progress
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listens to nothing."""


class Display(ABC):
    """A listener and context manager."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: Any) -> None:
        return

    @abstractmethod
    def __call__(self, event: Event) -> None: ...


class LiveTable(Display):
    """A table on a terminal that redraws itself: every run with its bar, losses, speed and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveTable:
        self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.live.__exit__(*exception)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message):
            self.console.print(harmless(event.text), markup=False, highlight=False)
        else:
            self.live.update(drawn(event, self.console.width, self.console.height))


class PlainLines(Display):
    """A line when a run starts or ends, and a summary at growing intervals; of a single run also every evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seen: dict[str, tuple[str, float]] = {}
        self.last, self.pause = time.monotonic(), LINE_SECONDS

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message):
            self.console.print(harmless(event.text), markup=False, highlight=False, soft_wrap=True)
            return
        for run in event.runs:
            loss = run.val_loss if len(event.runs) == 1 else math.nan
            before, state = self.seen.get(run.run_id), (run.status, loss)
            if run.status == "waiting" or str(state) == str(before):  # as text, because nan is not itself
                continue
            self.seen[run.run_id] = state
            at = f"step {run.step:>5}/{run.steps}"
            if run.step or run.status != "running":
                at += f"  train {number(run.loss)}  val {number(run.val_loss)}"
            if run.step and run.status == "running":
                at += f"  {speed_text(run.tokens_per_second)}  {duration(run.seconds_left)} left"
            self(Message(f"{run.arm:<14} seed {run.seed:<4} {run.status:<9} {at}"))
        if time.monotonic() - self.last > self.pause:
            self.last, self.pause = time.monotonic(), min(1.5 * self.pause, LONGEST_PAUSE)
            running = [run for run in event.runs if run.status == "running"]
            where = [f"{run.arm} seed {run.seed} {run.step}/{run.steps} val {number(run.val_loss)}" for run in running]
            more = f", {len(running) - MOST_NAMED} more" if len(running) > MOST_NAMED else ""
            places = f" ({', '.join(where[:MOST_NAMED])}{more})" if where else ""
            self(Message(f"{summary(event.runs, event.jobs)}{places}"))


class NotebookTable(Display):
    """The same table as the output of a notebook's cell, with messages below it."""

    def __init__(self) -> None:
        from IPython.display import HTML  # type: ignore[import-not-found]
        from IPython.display import display as show

        self.html, self.messages, self.last = HTML, list[str](), -math.inf
        self.handle = show(HTML(""), display_id=True)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message):
            self.messages.append(event.text)
        elif time.monotonic() - self.last > NOTEBOOK_SECONDS or not any(r.status == "running" for r in event.runs):
            self.last = time.monotonic()
            console = Console(record=True, file=io.StringIO(), width=LOG_WIDTH, force_jupyter=False)
            console.print(drawn(event), *map(Text, self.messages[-SHOWN_MESSAGES:]), sep="\n")
            self.handle.update(self.html(console.export_html(inline_styles=True)))


def drawn(progress: Progress, width: int = LOG_WIDTH, height: int | None = None) -> RenderableType:
    """The table with a line of summary, which a terminal of this size shows in full."""
    line = Text(summary(progress.runs, progress.jobs), style="dim", no_wrap=True, overflow="ellipsis")
    most = MOST_ROWS if height is None else max(1, height - 4)  # title, head, summary, and the line of the cursor
    return Group(table(progress.runs, progress.title, width, most), line)


def display(console: Console) -> Display:
    """A live table where the console is a terminal, plain lines where it is not."""
    return LiveTable(console) if console.is_terminal else PlainLines(console)


def show_progress() -> Display:
    """A listener for users: a live table in a notebook or on a terminal, plain lines elsewhere.

    with g.show_progress() as listener:
        g.run_ablation("ablations/posenc.yaml", scale="nano", on_event=listener)
    """
    shell = sys.modules.get("IPython")
    if shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell":
        return NotebookTable()
    return display(console_for())


STYLES = {"running": "bold", "finished": "green", "failed": "red", "diverged": "red", "waiting": "dim"}


def table(runs: Sequence[RunProgress], title: str, width: int = LOG_WIDTH, most: int = MOST_ROWS) -> Table:
    """All runs, or `most` of them, running ones before others. A narrow table has no bars and no train losses."""
    by_need = sorted(runs, key=lambda run: SHOWN_FIRST.index(run.status) if run.status in SHOWN_FIRST else LAST)
    chosen = {run.run_id for run in by_need[: min(most, MOST_ROWS)]}
    wide = width >= WIDE
    title = harmless(title) if wide else shorten(harmless(title), width - 1)
    result = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1))
    for name in ("arm", "seed", "status", *(["progress"] if wide else [])):
        result.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in ("step", *(["train loss"] if wide else []), "val loss", "tokens/s", "left"):
        result.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        if run.run_id not in chosen:
            continue
        running = run.status == "running"
        cells: list[RenderableType] = [
            Text(run.arm if wide else shorten(run.arm, 16)), run.seed,
            Text(run.status, style=STYLES.get(run.status, "")),
            ProgressBar(total=run.steps, completed=run.step, width=16), f"{run.step}/{run.steps}", number(run.loss),
            number(run.val_loss), speed_text(run.tokens_per_second) if running else "",
            duration(run.seconds_left) if running else "",
        ]  # fmt: skip
        result.add_row(*(cell for index, cell in enumerate(cells) if wide or index not in (3, 5)))
    return result


def summary(runs: Sequence[RunProgress], jobs: int) -> str:
    """Number of runs by status, and the remaining time."""
    counts = {status: sum(run.status == status for run in runs) for status in dict.fromkeys(r.status for r in runs)}
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    seconds_left = time_left(runs, jobs)
    return text + ("" if math.isnan(seconds_left) else f"; about {duration(seconds_left)} left")


def time_left(runs: Sequence[RunProgress], jobs: int) -> float:
    """Seconds until all runs are done, assuming that waiting ones are as fast; nan before any has a speed."""
    speeds = [run.tokens_per_second for run in runs if not math.isnan(run.tokens_per_second)]
    open_runs = [run for run in runs if run.status in ("waiting", "running")]
    sizes = [run.tokens / run.step for run in runs if run.step]
    if not speeds or not sizes or not open_runs:
        return math.nan
    tokens = sum((run.steps - run.step) * sizes[0] for run in open_runs)
    at_once = sum(run.status == "running" for run in open_runs) or len(open_runs)  # a cluster may give fewer than jobs
    return tokens / (sum(speeds) / len(speeds)) / min(jobs, at_once)


def number(value: float) -> str:
    """A loss, or a dash."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def speed_text(tokens_per_second: float) -> str:
    """Tokens per second, short."""
    return "-" if math.isnan(tokens_per_second) else f"{tokens_per_second:,.0f} tok/s"
