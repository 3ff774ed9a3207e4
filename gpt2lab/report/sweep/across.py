"""The same sweep at several scales: how the best value of its setting moves with the size of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2lab.analysis.tuning import Chosen, Optimum, Transfer, chosen, transfer
from gpt2lab.report.sweep.scales import Size, Trend
from gpt2lab.report.tables import Cell, Column, Row, Table
from gpt2lab.results import LOSS, unit
from gpt2lab.text import DASH, quantity, setting

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AtScale:
    """One search at one scale."""

    scale: str
    parameters: float
    optimum: Optimum

    @property
    def at(self) -> float | None:
        """The best value, unless it lies at an edge: then it is only a bound."""
        return None if self.optimum.edge else self.optimum.vertex or self.optimum.best


@dataclass(frozen=True, kw_only=True)
class Across:
    """One search (a variant, or the sweep's only one) over all scales, the smallest model first."""

    label: str
    name: str
    """of the setting"""
    scales: Sequence[AtScale]
    transfer: Transfer

    def trend(self) -> Trend:
        """As the figure takes it."""
        found, law = [], self.transfer
        for one in self.scales:
            if one.at is not None:
                ends = one.optimum.interval or (float("nan"), float("nan"))
                found.append(Size(parameters=one.parameters, at=one.at, low=ends[0], high=ends[1]))
        predicted = None
        if law.target is not None and law.at_target is not None:
            ends = law.target_interval or (float("nan"), float("nan"))
            predicted = Size(parameters=law.target, at=law.at_target, low=ends[0], high=ends[1])
        line = ((), ()) if law.line is None else (law.line[0].tolist(), law.line[1].tolist())
        return Trend(sizes=found, line=line, predicted=predicted)


def read_chosen(search: Record, record: Record) -> Chosen:
    """What the analysis says of one search of a record."""
    noise = (record.get("noise") or {}).get("sd") if record["metric"] == LOSS else None
    return chosen(
        search, maximize=record.get("direction") == "maximize", slots=search.get("slots"),
        effect=record.get("smallest_effect"), noise_sd=noise, unit=unit(record),
    )  # fmt: skip


def across(records: Sequence[Record]) -> dict[str, Across]:
    """Label -> its search over the scales of `records`; only searches over one number that were made at two or more."""
    found: dict[str, list[AtScale]] = {}
    names: dict[str, str] = {}
    for record in sorted(records, key=lambda record: (record.get("scope") or {}).get("parameters") or 0):
        for label, search in record["searches"].items():
            optima = read_chosen(search, record).optima
            if len(search["space"]) == 1 and len(optima) == 1:
                name, optimum = next(iter(optima.items()))
                if names.setdefault(label, name) == name:
                    one = AtScale(scale=record["scale"], parameters=search["parameters"], optimum=optimum)
                    found.setdefault(label, []).append(one)
    return {label: _across(label, names[label], scales) for label, scales in found.items() if len(scales) > 1}


def _across(label: str, name: str, scales: Sequence[AtScale]) -> Across:
    law = transfer(
        [one.parameters for one in scales], [one.at for one in scales], [one.optimum.interval for one in scales],
        what=scales[0].optimum.what,
    )  # fmt: skip
    return Across(label=label, name=name, scales=scales, transfer=law)


def across_table(found: Mapping[str, Across]) -> Table:
    """One row per scale, the optimum of each search in a column."""
    columns = [Column("Scale"), Column("Parameters", "number")]
    columns += [Column(label if len(found) > 1 else f"Best {one.name}", "number") for label, one in found.items()]
    sizes = {scale.scale: scale.parameters for one in found.values() for scale in one.scales}
    rows = []
    for scale, parameters in sorted(sizes.items(), key=lambda item: item[1]):
        cells = [_cell(next((s for s in one.scales if s.scale == scale), None)) for one in found.values()]
        rows.append(Row((Cell(scale), Cell(quantity(parameters)), *cells)))
    laws = [one.transfer for one in found.values()]
    if any(law.at_target is not None for law in laws):
        target = next(law.target for law in laws if law.target is not None)
        rows.append(Row((Cell("predicted"), Cell(quantity(target)), *map(_predicted, laws))))
    return Table(columns, rows)


def _cell(one: AtScale | None) -> Cell:
    if one is None:
        return Cell()
    found = one.optimum
    if found.best is None:
        return Cell(DASH, "no trial finished")
    if found.edge:
        return Cell(setting(found.best, 3), f"at the {found.edge} edge: left out")
    inside = f"[{setting(found.interval[0], 3)}, {setting(found.interval[1], 3)}]" if found.interval else found.reason
    return Cell(setting(one.at, 3), inside)


def _predicted(law: Transfer) -> Cell:
    if law.at_target is None:
        return Cell(DASH)
    ends = law.target_interval
    return Cell(setting(law.at_target, 3), f"[{setting(ends[0], 3)}, {setting(ends[1], 3)}]" if ends else "")
