"""Every declared run: what became of it, why where it has no value, and what else rests on it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpt2lab.analysis.results import failure_ceiling, first_runs
from gpt2lab.basics.text import DASH, number
from gpt2lab.errors import DataFault
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import StudyRead
from gpt2lab.reports.sections.tuned import tunings
from gpt2lab.reports.tables import Cell, Row, Table, columns, tabulate
from gpt2lab.tracking.follower import links

SAMPLES = (
    "One text per arm and prompt, by its run of the lowest seed, at temperature 0.8 and with the same random numbers. "
    "Such texts show what a model has learned to write; do not compare arms by them."
)


MOST_ROWS = 1000
"""From which on only runs with a remark are listed."""


def elsewhere(read: StudyRead) -> dict[str, list[str]]:
    """Run -> the other studies that declare it as well."""
    runs = {run for entry in read.study.arms.values() for run in entry.runs.values()}
    others: dict[str, list[str]] = {}
    for name in read.store.studies():
        if name == read.name:
            continue
        with contextlib.suppress(DataFault):
            other = read.store.study(name)
            for run in runs & {run for entry in other.arms.values() for run in entry.runs.values()}:
                others.setdefault(run, []).append(name)
    return others


@section(order=170, title="Runs")
def runs(read: StudyRead) -> Section:
    titles = columns("Arm", "Seed:number", "Run:id", "Status", f"Final {read.metric}:number", "Remarks:words")
    ceiling, shared = failure_ceiling(read.study), read.once(elsewhere)
    copies = links(read.store, read.name) or {}
    as_written = [replace(run, arm=f"{run.arm}, as written") for run in read.once(tunings).runs]
    rows = []
    for run in [*read.runs, *as_written]:
        status, reason = run.status, run.reason or ""
        if run.value is not None and math.isfinite(run.value) and run.value >= ceiling:
            status, reason = "learned nothing", f"not below {number(ceiling, 3)}, the unigram floor less the margin"
        remarks = [reason] if reason else []
        remarks += [f"taken over from {run.adopted_from}, bit for bit the same"] if run.adopted_from else []
        remarks += [f"shared with {', '.join(shared[run.id])}"] if run.id in shared else []
        value = number(run.value) if run.value is not None else DASH
        name = Cell(run.id, link=mlflow_link(copies, run.id))
        rows.append(
            Row((Cell(run.arm), Cell(str(run.seed)), name, Cell(status), Cell(value), Cell("; ".join(remarks))))
        )
    if len(rows) <= MOST_ROWS:
        return Section(table=Table(titles, rows))
    shown = [row for row in rows if row.cells[-1].text]
    note = f"{len(shown)} of {len(rows)} runs: those with a remark. All are in results.csv."
    return Section(table=Table(titles, shown) if shown else None, note=note)


def mlflow_link(links: Mapping[str, Any], run: str) -> str:
    """Where the run is in MLflow's pages: at the tracking server, or at what `gpt2lab ui` serves here."""
    copy, experiment = (links.get("runs") or {}).get(run), links.get("experiment_id")
    if not all(re.fullmatch(r"\w+", str(part or "")) for part in (copy, experiment)):
        return ""
    uri = str(links.get("uri") or "")
    server = uri.rstrip("/") if re.fullmatch(r"https?://[\w.:/-]+", uri) else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{experiment}/runs/{copy}?workflowType=machine_learning"


@section(order=165, title="Samples")
def samples(read: StudyRead) -> Section | None:
    """How the first run of every arm continues the same prompts; nothing before `gpt2lab report --samples`."""
    texts: dict[str, dict[str, str]] = {}
    for arm, run in first_runs(read.runs).items():
        with contextlib.suppress(DataFault):
            texts[arm] = read.store.run(run.id).samples()
    arms = [arm for arm in read.arms if texts.get(arm)]

    def cells(prompt: str) -> dict[str, str]:
        return {"Prompt": prompt} | {f"{arm}:words": texts[arm].get(prompt, "") for arm in arms}

    table = tabulate(dict.fromkeys(prompt for arm in arms for prompt in texts[arm]), cells)
    return Section(table=table, note=SAMPLES, folded=True) if table else None
