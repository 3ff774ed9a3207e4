"""Progress for people: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from gpt2lab.data.files import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def rich_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A progress callback that writes to `stream` (standard error unless given) for as long as the context lasts."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _lines(stream)
        return
    # Imported here: only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        yield update


def _lines(stream: TextIO) -> Progress:
    """One line at the start of each phase, then one every SECONDS_BETWEEN_LINES."""
    last, phase = 0.0, ""

    def update(done: int, total: int, what: str) -> None:
        nonlocal last, phase
        now = time.monotonic()
        if what != phase or now - last >= SECONDS_BETWEEN_LINES:
            amount = f": {done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else ""
            print(f"{what}{amount}", file=stream, flush=True)
            last, phase = now, what

    return update
