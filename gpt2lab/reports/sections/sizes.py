"""A sweep across sizes of the model: how the best setting moves with the number of parameters, and how activations grow
with width."""

from __future__ import annotations

from collections.abc import Iterator

from gpt2lab.basics.text import DASH, quantity, setting
from gpt2lab.errors import Gpt2labError
from gpt2lab.reports.page import Section, section
from gpt2lab.reports.read import SearchRead, SweepRead, read_record
from gpt2lab.reports.sections.searches import ends_text
from gpt2lab.reports.tables import Cell, tabulate


@section(order=30, title="Across size", of="sweep")
def across_size(read: SweepRead) -> Section | None:
    """The optimum of each search (a variant, or the sweep's only one) in a column, a row for each size, the smallest
    first: of searches over one number that the store has at two scales or more."""
    scales = [scale for scale in (read, *_other_scales(read)) if _sized(scale)]
    labels = [label for label in _sized(read) if sum(label in _sized(scale) for scale in scales) > 1]
    if not labels:
        return None
    titles = {label: label if len(labels) > 1 else f"Best {read.searches[label].alone}" for label in labels}

    def cells(scale: SweepRead) -> dict[str, Cell | str]:
        optima = {f"{title}:number": _optimum(_sized(scale).get(label)) for label, title in titles.items()}
        parameters = next(iter(_sized(scale).values())).record.parameters
        return {"Scale": scale.record.scale, "Parameters:number": quantity(parameters), **optima}

    scales.sort(key=lambda scale: min(search.record.parameters or 0 for search in _sized(scale).values()))
    return Section(table=tabulate(scales, cells))


def _other_scales(read: SweepRead) -> Iterator[SweepRead]:
    """The same sweep at other scales; those whose record is damaged are left out."""
    for name in read.store.sweeps():
        try:
            other = read.store.sweep(name)
            same = other.sweep == read.record.sweep and name != read.name
            if same and bool(other.part_of) == bool(read.record.part_of):
                yield read_record(other, read.store)
        except Gpt2labError:
            continue


def _sized(read: SweepRead) -> dict[str, SearchRead]:
    """Label -> its search, of searches over one number whose models have a known size."""
    return {label: search for label, search in read.searches.items() if search.alone and search.record.parameters}


def _optimum(search: SearchRead | None) -> Cell:
    if search is None or search.alone is None:
        return Cell()
    optimum = search.optima[search.alone]
    if optimum.best is None:
        return Cell(DASH, "no trial finished")
    if optimum.edge:
        return Cell(setting(optimum.best, 3), f"at the {optimum.edge} edge")
    return Cell(setting(optimum.vertex or optimum.best, 3), ends_text(optimum.interval) or optimum.reason)
