"""Writes the page of a study or a sweep, whichever a name is of."""

from __future__ import annotations

from pathlib import Path

from gpt2lab.reports.read import read_study, read_sweep
from gpt2lab.reports.study import write_report
from gpt2lab.reports.sweep import write_sweep_report
from gpt2lab.store import Store


def write_page_of(
    name: str, store: Store, out: str | Path = "reports", *, force_exploratory: bool = False, images: bool = False
) -> Path:
    """See `api.report`."""
    if store.kind(name) == "sweep":
        return write_sweep_report(read_sweep(name, store.root), out, images=images)
    return write_report(read_study(name, store.root, force_exploratory=force_exploratory), out, images=images)
