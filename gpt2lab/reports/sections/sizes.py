"""A sweep across sizes of the model: how the best setting moves with the number of parameters, and how activations grow
with width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpt2lab.analysis.results import cleaned
from gpt2lab.analysis.tuning import Optimum
from gpt2lab.basics.text import DASH, quantity, setting
from gpt2lab.errors import Gpt2labError
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import Record, SweepRead, read_chosen, record_errors
from gpt2lab.reports.sections.searches import ends_text
from gpt2lab.reports.tables import Cell, tabulate


@dataclass(frozen=True, kw_only=True)
class AtScale:
    """The best value of the one setting of a search at one scale."""

    scale: str
    parameters: float
    setting: str
    optimum: Optimum


@section(order=30, title="Across size", of="sweep")
def across_size(read: SweepRead) -> Section | None:
    """The optimum of each search (a variant, or the sweep's only one) in a column, a row for each size, the smallest
    first: of searches over one number that the store has at two scales or more."""
    records = [read.record]
    for name in read.store.sweeps():
        try:
            other = cleaned(read.store.sweep(name).plain())
            same = other["sweep"] == read.record["sweep"] and name != read.name
            if same and bool(other.get("part_of")) == bool(read.record.get("part_of")):
                at_scale(other)
                records.append(other)
        except (Gpt2labError, KeyError, TypeError, AttributeError):  # of another scale: left out
            continue
    with record_errors(read.name):
        by_record = [at_scale(record) for record in records]
    labels = [label for label in by_record[0] if sum(label in by_label for by_label in by_record) > 1]
    if not labels:
        return None
    rows = sorted(by_record, key=lambda by_label: min((scale.parameters for scale in by_label.values()), default=0.0))

    def cells(by_label: Mapping[str, AtScale]) -> dict[str, Cell | str]:
        first = next(iter(by_label.values()))
        titles = {label: label if len(labels) > 1 else f"Best {by_record[0][label].setting}" for label in labels}
        optima = {f"{title}:number": _optimum(by_label.get(label)) for label, title in titles.items()}
        return {"Scale": first.scale, "Parameters:number": quantity(first.parameters), **optima}

    return Section(table=tabulate([by_label for by_label in rows if by_label], cells))


def at_scale(record: Record) -> dict[str, AtScale]:
    """Label -> its search at the scale of a record, of searches over one number."""
    searches = {}
    for label, search in record["searches"].items():
        optima = read_chosen(search, record).optima
        if len(search["space"]) == 1 and len(optima) == 1:
            name, optimum = next(iter(optima.items()))
            parameters = float(search["parameters"])
            searches[label] = AtScale(scale=record["scale"], parameters=parameters, setting=name, optimum=optimum)
    return searches


def _optimum(scale: AtScale | None) -> Cell:
    if scale is None:
        return Cell()
    optimum = scale.optimum
    if optimum.best is None:
        return Cell(DASH, "no trial finished")
    if optimum.edge:
        return Cell(setting(optimum.best, 3), f"at the {optimum.edge} edge")
    return Cell(setting(optimum.vertex or optimum.best, 3), ends_text(optimum.interval) or optimum.reason)
