"""What follows the figures of a sweep: choices, sizes, the winning config, pruning, failures, trials, method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpt2lab.report.pictures import Picture
from gpt2lab.report.sections import Section
from gpt2lab.report.sweep import method, tables
from gpt2lab.report.sweep.across import across_table
from gpt2lab.report.sweep.best import best_files, best_yaml
from gpt2lab.report.sweep.pictures import COORDINATES, SEARCHES, SIZES, of_section
from gpt2lab.report.sweep.read import ReadSweep, Search

MANY = 40
"""Trials from which their table is opened by a click."""


def sections(read: ReadSweep, figures: Sequence[Picture]) -> list[Section]:
    made: list[Section | None] = [
        *(_choices(read, search) for search in read.searches.values()),
        _across(read, figures),
        _coordinates(read, figures),
        *(_winner(read, search) for search in read.searches.values()),
        _pruning(read),
        _reasons(read),
        _figures("Each search by itself", SEARCHES, figures, folded=True),
        *(_trial_list(read, search) for search in read.searches.values()),
        Section(title="Method", points=method.declared(read)),
        Section(title="What this shows, and what it does not", points=method.limits(read)),
    ]
    return [section for section in made if section]


def _titled(read: ReadSweep, search: Search, title: str) -> str:
    return title if read.single else f"{title}: {search.label}"


def _choices(read: ReadSweep, search: Search) -> Section | None:
    table = tables.choices_table(search, read)
    note = (
        "The best finished trial with each choice, and what else it had. A choice that was tried less often had fewer "
        "chances; a sampler that learns tries what did well more often."
    )
    return Section(title=_titled(read, search, "The best per choice"), table=table, note=note) if table else None


def _across(read: ReadSweep, figures: Sequence[Picture]) -> Section | None:
    if not read.across:
        return None
    many = len(read.across) > 1
    return Section(
        title="Across size",
        table=across_table(read.across),
        points=[f"{label + ': ' if many else ''}{one.transfer}" for label, one in read.across.items()],
        figures=of_section(figures, SIZES),
    )


def _coordinates(read: ReadSweep, figures: Sequence[Picture]) -> Section | None:
    found = read.record.get("coordinates")
    if not found:
        return None
    return Section(
        title="Coordinate check",
        points=[told for label, one in found.items() if (told := _steepest(label, one.get("slopes") or {}))],
        figures=of_section(figures, COORDINATES),
    )


def _steepest(label: str, slopes: Mapping[str, float | None]) -> str:
    """Which part moves most with width."""
    known = {name: slope for name, slope in slopes.items() if slope is not None}
    if not known:
        return ""
    name = max(known, key=lambda one: abs(known[one]))
    return (
        f"{label}: what changes most with width is {name}, as width^{known[name]:+.2f}; a power of 0 means that it "
        "moves as far at every width."
    )


def _figures(title: str, part: str, figures: Sequence[Picture], *, folded: bool = False) -> Section | None:
    own = of_section(figures, part)
    return Section(title=title, figures=own, folded=folded) if own else None


def _winner(read: ReadSweep, search: Search) -> Section | None:
    written = best_yaml(read, search)
    if written is None:
        return None
    file = next(name for name, one in best_files(read).items() if one is search)
    note = f"The file {file} beside this page; gpt2lab train {file} trains it, --dry-run says what that costs."
    return Section(title=_titled(read, search, "The winning config"), code=written.rstrip("\n"), note=note)


def _pruning(read: ReadSweep) -> Section | None:
    points = method.pruning(read)
    return Section(title="What pruning saved", points=points) if points else None


def _reasons(read: ReadSweep) -> Section | None:
    table = tables.reasons_table(read)
    note = (
        "A trial that diverged is a result: its settings train nothing. One that failed says nothing of its settings."
    )
    return Section(title="What ended without a value", table=table, note=note) if table else None


def _trial_list(read: ReadSweep, search: Search) -> Section:
    many = len(search.trials) > MANY
    table = tables.trial_table(search, read)
    return Section(title=_titled(read, search, "Trials"), table=table, folded=many)
