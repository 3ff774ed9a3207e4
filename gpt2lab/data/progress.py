"""Progress for users: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from gpt2lab.basics.text import duration
from gpt2lab.data.files import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def rich_progress(stream: TextIO | None = None, *, of_bytes: bool = True) -> Iterator[Progress]:
    """A progress callback that writes to `stream` (standard error unless given) for as long as the context lasts.
    of_bytes: whether bytes are counted, or something else."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _lines(stream, of_bytes)
        return
    # Imported here: only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    amounts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=None)

        phase = ""

        def update(done: int, total: int, what: str) -> None:
            nonlocal phase
            if what != phase:  # the rate is that of this phase only
                phase = what
                bar.reset(task, completed=done, total=total or None, description=what)
            bar.update(task, completed=done, total=total or None, description=what)

        yield update


def _lines(stream: TextIO, of_bytes: bool) -> Progress:
    """One line at the start of each phase, then one every SECONDS_BETWEEN_LINES, with the rate of this phase so far."""
    last, phase, began, first = 0.0, "", 0.0, 0

    def update(done: int, total: int, what: str) -> None:
        nonlocal last, phase, began, first
        now = time.monotonic()
        if what != phase:
            began, first = now, done
        if what != phase or now - last >= SECONDS_BETWEEN_LINES:
            counts = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB" if of_bytes else f"{done:,} of {total:,}"
            amount = f": {counts}" if total else ""
            if total and now > began and done > first:
                rate = (done - first) / (now - began)
                amount += f", {rate / 1e6:.1f} MB/s" if of_bytes else ""
                amount += f", {duration((total - done) / rate)} left"
            print(f"{what}{amount}", file=stream, flush=True)
            last, phase = now, what

    return update
