"""The trials of a sweep: the winning config and the list of all."""

from __future__ import annotations

import math
import re

import yaml

from gpt2lab.basics.text import DASH, number, plural, quantity, setting
from gpt2lab.records import TrialRecord
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import (
    DIVERGED,
    FAILED,
    FINISHED,
    OUTCOMES,
    PRUNED,
    RUNNING,
    WAITING,
    SearchRead,
    SweepRead,
    last_value,
)
from gpt2lab.reports.tables import Cell, Row, Table, columns
from gpt2lab.tracking.addresses import dashboard_command

CHIPS = {FINISHED: "better", PRUNED: "grey", DIVERGED: "broken", FAILED: "worse", RUNNING: "open", WAITING: "open"}

MANY = 40
"""Trials from which their table is opened by a click."""

BEST = "best.yaml"


@section(order=50, of="sweep")
def winner(read: SweepRead) -> list[Section]:
    files = best_files(read)
    return [
        Section(
            title=read.titled(files[file], "The winning config"),
            code=config.rstrip("\n"),
            note=f"The file {file} beside this page; gpt2lab train {file} trains it, --dry-run says what that costs.",
        )
        for file, config in best_configs(read).items()
    ]


@section(order=90, of="sweep")
def every_trial(read: SweepRead) -> list[Section]:
    return [
        Section(title=read.titled(s, "Trials"), table=trial_table(s, read), folded=len(s.trials) > MANY,
                note=_further_figures(read))
        for s in read.searches.values()
    ]  # fmt: skip


def _further_figures(read: SweepRead) -> str:
    """Where the same trials can be seen in other ways."""
    if not read.record.storage:
        return ""
    figures = "their history, training curves, the importance of settings and parallel coordinates"
    return f"`{dashboard_command(read.record.storage)}` draws {figures} (extra `dashboard`)."


def best_files(read: SweepRead) -> dict[str, SearchRead]:
    """Name of the winning config's file -> its search."""
    if read.single:
        return {BEST: read.single}
    named = {f"best-{re.sub(r'[^A-Za-z0-9_.+-]', '_', label)}.yaml": s for label, s in read.searches.items()}
    if len(named) == len(read.searches):
        return named
    return {f"best-{place}.yaml": search for place, search in enumerate(read.searches.values())}


def best_configs(read: SweepRead) -> dict[str, str]:
    """Name of its file -> the config of the best trial, of every search of which a trial finished."""
    configs = {}
    for file, search in best_files(read).items():
        best, config = search.best, search.record.best_config
        if best and config:
            of = "" if read.single else f", search {search.label}"
            value = f"{read.metric} {number(best.value)} in the search, on seed {next(iter(best.values), '?')}"
            head = f"# The best trial of {read.name}{of} (trial {best.index}): {value}.\n"
            configs[file] = head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
    return configs


def trial_table(search: SearchRead, read: SweepRead) -> Table:
    """Every trial: the best first, then those without a final value."""
    best, trials = search.best, sorted(search.trials, key=lambda trial: _order(trial, search.direction))

    def row(trial: TrialRecord) -> Row:
        cells = (
            Cell(str(trial.index)),
            Cell(trial.outcome, "", CHIPS[trial.outcome]),
            _value_cell(trial),
            *(Cell(DASH if (value := trial.settings.get(name)) is None else setting(value)) for name in search.axes),
            Cell(str(trial.stopped_at or DASH)),
            Cell(quantity(trial.tokens)),
            Cell(", ".join(trial.runs.values()) or DASH),
            Cell("; ".join(remarks(trial))),
        )
        return Row(cells, baseline=trial is best)

    settings = [f"{name.rpartition('.')[2]}:number" for name in search.axes]  # two may be called alike
    titles = columns("Trial", "Outcome", f"{read.metric}:number", *settings, "Stopped at step:number",
                     "Tokens:number", "Run:id", "Remarks:words")  # fmt: skip
    return Table(titles, list(map(row, trials)))


def _order(trial: TrialRecord, direction: str) -> tuple[int, float, int]:
    value = last_value(trial)
    worth = math.inf if math.isnan(value) else -value if direction == "maximize" else value
    return OUTCOMES.index(trial.outcome), worth, trial.index


def _value_cell(trial: TrialRecord) -> Cell:
    if trial.value is not None:
        return Cell(number(trial.value), f"over {plural(len(trial.values), 'seed')}" if len(trial.values) > 1 else "")
    return Cell(DASH) if math.isnan(last := last_value(trial)) else Cell("", f"{number(last)} when pruned")


def remarks(trial: TrialRecord) -> list[str]:
    """What is particular about a trial."""
    remarks = [
        trial.reason,
        "a known point, tried first" if trial.enqueued else None,
        "its runs were there already" if trial.found else None,
        f"tried again {plural(trial.retries, 'time')}" if trial.retries else None,
    ]
    return [remark for remark in remarks if remark]
